"""RecBole's SequentialDataset on top of the CSR store: same tables, same windows, same order, nothing materialised."""

from __future__ import annotations

from typing import Any, Optional

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType

from recbole_raserec.data.sequences import SequenceStore

#: Column of every batch: index of the target in its user's full history, so the untruncated prefix length.
POSITION = "sequence_position"
#: Column of splits with regenerated rows: the row of the store that holds the window; elsewhere that is the user.
SEQUENCE = "sequence_row"
#: Column of a training batch: the row's weight in the loss.
WEIGHT = "row_weight"
#: Rows of a table that are read at a time.
CHUNK = 1 << 19
#: Rows of a group that a `leave_one_out` mode puts into (validation, test).
LEFT_OUT = {"valid_and_test": (1, 1), "valid_only": (1, 0), "test_only": (0, 1)}


class SequenceDataset(SequentialDataset):
    """Drop-in for RecBole's `SequentialDataset` whose prefix windows are indices into one sorted copy of the log.

    RecBole builds a dense `[windows, max_length]` tensor per field in a Python loop over the interactions; here the
    list fields of a batch are gathered when the batch is asked for. Every other behaviour (fields, splits, order of the
    rows) is RecBole's. Memory: O(interactions).

    Attributes:
        store: the users' sequences (full log: the split happens on the windows, see `windows`).
        trim: cut a batch to its longest window instead of `MAX_ITEM_LIST_LENGTH` (set by the loader for models
            that give the same result on the trimmed batch).
        original: of a training split with regenerated rows, the split without them; None elsewhere.
    """

    store: SequenceStore
    inter_feat: Any
    trim: bool = False
    original: Any = None

    def _load_feat(self, filepath: Any, source: Any) -> Optional[pd.DataFrame]:
        """Read an interaction table in parts, in which a token is one string however often it occurs.

        Files of any other kind go RecBole's way.
        """
        separator = self.config["field_separator"]
        load, unload = self._get_load_and_unload_col(source)
        if source != FeatureSource.INTERACTION or load == set() or len(separator) != 1:
            return super()._load_feat(filepath, source)
        encoding = self.config["encoding"] or "utf-8"  # pandas's default; that of `open` differs between systems
        with open(filepath, encoding=encoding) as file:
            header = file.readline().rstrip("\n").split(separator)
        types = dict(column.partition(":")[::2] for column in header)
        wanted = {f: t for f, t in types.items() if (load is None or f in load) and (unload is None or f not in unload)}
        if not wanted or len(types) < len(header) or not set(wanted.values()) <= {"token", "float"}:
            return super()._load_feat(filepath, source)
        dtypes: dict[str, Any] = {f"{f}:{t}": (np.float64 if t == "float" else str) for f, t in wanted.items()}
        columns: dict[str, list[np.ndarray]] = {name: [] for name in dtypes}
        known: dict[str, str] = {}
        options = {"sep": separator, "usecols": list(dtypes), "dtype": dtypes, "encoding": encoding}
        with pd.read_csv(filepath, engine="c", chunksize=CHUNK, **options) as chunks:
            for chunk in chunks:
                for name, column in columns.items():
                    values = chunk[name].to_numpy()
                    if dtypes[name] is str:
                        codes, names = pd.factorize(values)
                        tokens = [*(known.setdefault(token, token) for token in names), np.nan]  # code -1: missing
                        values = np.array(tokens, dtype=object)[codes]
                    column.append(values)
        table = {}
        for column, (field, kind) in zip(columns.values(), wanted.items()):
            self.field2source[field], self.field2type[field] = source, FeatureType(kind)
            self.field2seqlen[field] = 1
            if kind == "float":
                self.field2bucketnum[field] = 2
            table[field] = np.concatenate(column)
        return pd.DataFrame(table, copy=False)

    def _filter_by_inter_num(self) -> None:
        """RecBole's k-core filter: in each round all users and items whose count is out of bounds go together."""
        bounds = [self._parse_intervals_str(self.config[f"{side}_inter_num_interval"]) for side in ("user", "item")]
        plain = self.user_feat is None and self.item_feat is None and self.uid_field and self.iid_field
        if not plain or any(interval is not None and len(interval) != 1 for interval in bounds):
            super()._filter_by_inter_num()
            return
        log: pd.DataFrame = self.inter_feat
        fields = zip((self.uid_field, self.iid_field), bounds)
        sides = [(pd.factorize(log[field])[0], interval) for field, interval in fields if interval is not None]
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
        """
        if group_by is None or leave_one_mode not in LEFT_OUT:
            return super().leave_one_out(group_by, leave_one_mode)  # raises
        parts = leave_out(self.inter_feat[group_by].numpy(), leave_one_mode)
        self._drop_unused_col()
        return [self.copy(rows_of(self.inter_feat, index)) for index in parts]

    def data_augmentation(self) -> None:
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        log = self.inter_feat
        users = log[self.uid_field].numpy()
        times = log[self.time_field].numpy()
        self.store = SequenceStore(users, log[self.iid_field].numpy(), self.user_num, self.item_num, times)
        self._log = log
        positions = np.arange(len(users)) - self.store.offsets[users]
        targets = torch.from_numpy(np.flatnonzero(positions))
        rows = rows_of(log, targets)
        position = torch.from_numpy(positions)[targets]
        length = position.clamp(max=self.max_item_list_len)
        rows.update(Interaction({self.item_list_length_field: length, POSITION: position}))
        self.inter_feat = Rows(rows, self)

    def copy(self, new_inter_feat: Any) -> Any:
        part = super().copy(new_inter_feat)
        if self.is_lazy:
            part.inter_feat = Rows(new_inter_feat, part)
        return part

    @property
    def is_lazy(self) -> bool:
        """False for benchmark files, whose windows RecBole reads ready-made."""
        return hasattr(self, "store")

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        rows = self.inter_feat[index]
        if self.is_lazy:
            rows = self._with_windows(rows)
        return self.join(rows) if join else rows

    def _with_windows(self, rows: Interaction) -> Interaction:
        """Add the list fields of `rows`: [B, L] each, L the longest window (`trim`) or `MAX_ITEM_LIST_LENGTH`."""
        users, positions = (np.atleast_1d(rows[field].numpy()) for field in (self._owner(rows), POSITION))
        width = None if self.trim else self.max_item_list_len
        index, _ = self.store.window_rows(users, positions, self.max_item_list_len, width)
        padding = torch.from_numpy(index < 0)
        gather = torch.from_numpy(np.maximum(index, 0))
        columns = dict(rows.interaction)
        for field in self._log:
            if field != self.uid_field and (window := getattr(self, f"{field}_list_field", "")):
                columns[window] = self._log[field][gather]  # [B, L, ...]
                columns[window][padding] = 0
        return Interaction(columns)

    def windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The windows of this split: users [N], positions [N], targets [N] (int64), in row order.

        Of regenerated rows, which no user has, the row of the store stands in the user's place.
        """
        feat = self.inter_feat
        return feat[self._owner(feat)].numpy(), feat[POSITION].numpy(), feat[self.iid_field].numpy()

    def _owner(self, rows: Interaction) -> str:
        return SEQUENCE if SEQUENCE in rows.interaction else self.uid_field

    def inter_matrix(self, form: str = "coo", value_field: Any = None) -> Any:
        """Sparse user-item matrix of the split's targets and of the first item of each user's first window."""
        if not self.is_lazy:
            return super().inter_matrix(form, value_field)
        if self.original is not None:
            return self.original.inter_matrix(form, value_field)
        feat = self.inter_feat
        first = feat[feat[POSITION] == 1]
        heads = self._log[torch.from_numpy(self.store.offsets[first[self.uid_field].numpy()])]
        plain = [field for field in self._log if field in feat]
        both = Interaction({field: torch.cat([feat[field], heads[field]]) for field in plain})
        return self._create_sparse_matrix(both, self.uid_field, self.iid_field, form, value_field)


def item_counts(dataset: Any) -> np.ndarray:
    """How often each item is in the histories of a split, without regenerated rows: int64 [V].

    Of RecBole's own data sets, and of benchmark files, rows' targets are counted.
    """
    split = getattr(dataset, "original", None) or dataset
    items = np.asarray(split.inter_feat[split.iid_field])
    if getattr(split, "is_lazy", False):
        users, positions, _ = split.windows()
        items = split.store.until(users, positions)[0]
    return np.bincount(items, minlength=split.item_num)


class Rows(Interaction):
    """The rows of a split; a list field that is asked for as a whole (FEARec does) is built then, and kept."""

    def __init__(self, rows: Interaction, dataset: SequenceDataset):
        super().__init__(rows.interaction)
        self._dataset = dataset
        self._built: Any = None

    def __getitem__(self, index: Any) -> Any:
        suffix = self._dataset.config["LIST_SUFFIX"]
        if isinstance(index, str) and index not in self.interaction and index.endswith(suffix):
            if self._built is None:
                trim, self._dataset.trim = self._dataset.trim, False
                self._built = self._dataset._with_windows(Interaction(self.interaction))
                self._dataset.trim = trim
            return self._built[index]
        if isinstance(index, (np.ndarray, torch.Tensor)) and index.ndim:
            return rows_of(self, index)
        return super().__getitem__(index)


def rows_of(feat: Interaction, index: Any) -> Interaction:
    """`feat[index]` for an index array, taken by tensor. (RecBole turns the index into a Python list first.)"""
    index = torch.as_tensor(index)
    return Interaction({field: values[index] for field, values in feat.interaction.items()})


def leave_out(groups: np.ndarray, mode: str) -> list[np.ndarray]:
    """Row numbers of the training, validation and test part, [N0], [N1], [N2], in a `mode` of `LEFT_OUT`.

    The groups (int [N]) follow each other in the order of their first rows; within one the rows keep their order.
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
