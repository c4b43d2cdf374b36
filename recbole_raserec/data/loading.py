"""RecBole's reading and leave-one-out split of a log, without its Python loops: same tables, same rows, same order."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

#: Rows of a table that are read at a time.
CHUNK = 1 << 19

#: Rows of a group that a ``leave_one_out`` mode puts into (validation, test).
LEFT_OUT = {"valid_and_test": (1, 1), "valid_only": (1, 0), "test_only": (0, 1)}


def rows_of(feat: Interaction, index: Any) -> Interaction:
    """``feat[index]`` for an index array, taken by tensor. (RecBole turns the index into a Python list first.)"""
    index = torch.as_tensor(index)
    return Interaction({field: values[index] for field, values in feat.interaction.items()})


class FastLoading(SequentialDataset):
    """What of RecBole's data set takes Python time per interaction, vectorised. Results are RecBole's."""

    inter_feat: Any

    def _load_feat(self, filepath: Any, source: Any) -> Optional[pd.DataFrame]:
        """Read an interaction table with the C parser, in parts, so that a token which occurs a thousand times is one
        string. Files of any other kind go RecBole's way."""
        separator = self.config["field_separator"]
        load, unload = self._get_load_and_unload_col(source)
        if source != FeatureSource.INTERACTION or load == set() or len(separator) != 1:
            return super()._load_feat(filepath, source)
        with open(filepath, encoding=self.config["encoding"]) as file:
            header = file.readline().rstrip("\n").split(separator)
        types = dict(column.partition(":")[::2] for column in header)
        wanted = {f: t for f, t in types.items() if (load is None or f in load) and (unload is None or f not in unload)}
        if not wanted or len(types) < len(header) or not set(wanted.values()) <= {"token", "float"}:
            return super()._load_feat(filepath, source)
        dtypes: dict[str, Any] = {f"{f}:{t}": (np.float64 if t == "float" else str) for f, t in wanted.items()}
        columns: dict[str, Any] = {name: [] if kind is np.float64 else _Tokens() for name, kind in dtypes.items()}
        options = {"sep": separator, "usecols": list(dtypes), "dtype": dtypes, "encoding": self.config["encoding"]}
        with pd.read_csv(filepath, engine="c", chunksize=CHUNK, **options) as chunks:
            for chunk in chunks:
                for name, column in columns.items():
                    column.append(chunk[name].to_numpy())
        table = {}
        for column, (field, kind) in zip(columns.values(), wanted.items()):
            self.field2source[field], self.field2type[field] = source, FeatureType(kind)
            self.field2seqlen[field] = 1
            if kind == "float":
                self.field2bucketnum[field] = 2
            table[field] = column.joined() if isinstance(column, _Tokens) else np.concatenate(column or [np.zeros(0)])
        return pd.DataFrame(table, copy=False)

    def _filter_by_inter_num(self) -> None:
        """RecBole's k-core filter: in each round all users and items whose count is out of bounds go together."""
        names = ("user_inter_num_interval", "item_inter_num_interval")
        bounds = [self._parse_intervals_str(self.config[name]) for name in names]
        plain = self.user_feat is None and self.item_feat is None and self.uid_field and self.iid_field
        if not plain or any(interval is not None and len(interval) != 1 for interval in bounds):
            super()._filter_by_inter_num()
            return
        log: pd.DataFrame = self.inter_feat
        sides = [
            (pd.factorize(log[field])[0], interval)
            for field, interval in zip((self.uid_field, self.iid_field), bounds)
            if interval is not None
        ]
        kept = np.arange(len(log))
        while True:
            fine = np.ones(len(kept), dtype=bool)
            for codes, interval in sides:
                counts = np.bincount(codes[kept])
                fine &= self._within_intervals(counts, interval)[codes[kept]]
            if fine.all():
                break
            kept = kept[fine]
        if len(kept) < len(log):
            self.inter_feat = log.iloc[kept].reset_index(drop=True)

    def leave_one_out(self, group_by: str, leave_one_mode: str) -> list[Any]:
        """RecBole's split: the last rows of each group, in the present order, become validation and test.

        A group with too few rows keeps one for training, and the later part comes first.

        Raises:
            ValueError: no group field.
            NotImplementedError: unknown mode.
        """
        if group_by is None or leave_one_mode not in LEFT_OUT:
            return super().leave_one_out(group_by, leave_one_mode)
        groups = self.inter_feat[group_by].numpy()
        parts = leave_out(groups, leave_one_mode)
        self._drop_unused_col()
        return [self.copy(rows_of(self.inter_feat, index)) for index in parts]


def leave_out(groups: np.ndarray, mode: str) -> list[np.ndarray]:
    """Row numbers of the training, validation and test part, [N0], [N1], [N2].

    Groups follow each other in the order of their first rows; within a group the rows keep their order.

    Args:
        groups: int [N], group of each row.
        mode: one of :data:`LEFT_OUT`.
    """
    rows, begin = _rows_by_group(groups)
    count = np.diff(begin)
    begin, count = begin[:-1][count > 0], count[count > 0]
    turn = np.argsort(rows[begin], kind="stable")  # groups by their first rows
    begin, count = begin[turn], count[turn]
    order = rows[np.repeat(begin - np.cumsum(count) + count, count) + np.arange(len(groups))]  # rows, group by group
    behind = np.repeat(np.cumsum(count), count) - 1 - np.arange(len(groups))  # rows of the group that follow
    left = np.repeat(np.minimum(sum(LEFT_OUT[mode]), count - 1), count)
    parts = [order[behind >= left]]
    for phase, wanted in enumerate(LEFT_OUT[mode]):
        later = sum(LEFT_OUT[mode][phase + 1 :])  # rows that go to later parts
        parts.append(order[(behind == later) & (behind < left)] if wanted else order[:0])
    return parts


def _rows_by_group(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by group and, within one, as they were [N]; where each group's rows begin [G + 1].

    For small non-negative numbers (ids) by counting, which is many times faster than a sort.
    """
    if len(groups) and groups.min() >= 0 and groups.max() < 4 * len(groups):
        index = np.arange(len(groups))
        size = int(groups.max()) + 1
        table = sp.coo_matrix((np.empty(len(groups), dtype=bool), (groups, index)), shape=(size, len(groups))).tocsr()
        return table.indices.astype(np.int64), table.indptr.astype(np.int64)
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    return order, np.concatenate([[0], ends, [len(groups)]]).astype(np.int64)


class _Tokens:
    """A column of tokens that arrives in parts; each distinct token is kept once."""

    def __init__(self) -> None:
        self._codes: list[np.ndarray] = []
        self._known: dict[str, int] = {}

    def append(self, tokens: np.ndarray) -> None:
        codes, names = pd.factorize(tokens)
        known = self._known
        here = np.fromiter((known.setdefault(name, len(known)) for name in names), dtype=np.int32, count=len(names))
        self._codes.append(np.append(here, np.int32(-1))[codes])  # -1: missing

    def joined(self) -> np.ndarray:
        """The strings, object [N]; equal ones are one object, missing ones NaN."""
        names = np.array([*self._known, np.nan], dtype=object)
        return names[np.concatenate(self._codes or [np.zeros(0, dtype=np.int32)])]
