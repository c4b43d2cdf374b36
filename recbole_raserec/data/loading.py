"""RecBole's reading and leave-one-out split of a log, without its Python loops: same tables, same rows, same order."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

#: Rows of a group that a ``leave_one_out`` mode puts into (validation, test).
LEFT_OUT = {"valid_and_test": (1, 1), "valid_only": (1, 0), "test_only": (0, 1)}


def rows_of(feat: Interaction, index: Any) -> Interaction:
    """``feat[index]`` for an index array, taken by tensor. (RecBole turns the index into a Python list first.)"""
    index = torch.as_tensor(index)
    return Interaction({field: values[index] for field, values in feat.interaction.items()})


class FastLoading(SequentialDataset):
    """What of RecBole's data set takes Python time per interaction, vectorised. Results are RecBole's."""

    def _load_feat(self, filepath: Any, source: Any) -> Optional[pd.DataFrame]:
        """Read an interaction table with the C parser. Tokens are parsed as categories, so that a token which occurs a
        thousand times is one string. Files of any other kind go RecBole's way."""
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
        dtypes = {f"{f}:{t}": (np.float64 if t == "float" else "category") for f, t in wanted.items()}
        frame = pd.read_csv(
            filepath, sep=separator, usecols=list(dtypes), dtype=dtypes, encoding=self.config["encoding"], engine="c"
        )
        table = {}
        for name, (field, kind) in zip(dtypes, wanted.items()):
            self.field2source[field], self.field2type[field] = source, FeatureType(kind)
            self.field2seqlen[field] = 1
            if kind == "float":
                self.field2bucketnum[field] = 2
            table[field] = frame.pop(name) if kind == "float" else _shared_strings(frame.pop(name))
        return pd.DataFrame(table, copy=False)

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
    _, first, member, count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    by_first = np.argsort(first, kind="stable")
    turn = np.empty(len(first), dtype=np.int64)
    turn[by_first] = np.arange(len(first))
    order = np.argsort(turn[member.reshape(-1)], kind="stable")  # rows, group by group
    count = count[by_first]
    behind = np.repeat(np.cumsum(count), count) - 1 - np.arange(len(groups))  # rows of the group that follow
    left = np.repeat(np.minimum(sum(LEFT_OUT[mode]), count - 1), count)
    parts = [order[behind >= left]]
    for phase, wanted in enumerate(LEFT_OUT[mode]):
        later = sum(LEFT_OUT[mode][phase + 1 :])  # rows that go to later parts
        parts.append(order[(behind == later) & (behind < left)] if wanted else order[:0])
    return parts


def _shared_strings(column: pd.Series) -> np.ndarray:
    """A categorical column as strings, object [N]; equal ones are one object. Missing values are NaN."""
    names = np.append(np.asarray(column.cat.categories, dtype=object), np.nan)
    return names[column.cat.codes.to_numpy()]
