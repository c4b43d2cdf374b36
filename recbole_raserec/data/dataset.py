"""RecBole's SequentialDataset on top of the CSR store: same windows, same order of targets, nothing materialised."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.loading import FastLoading, rows_of
from recbole_raserec.data.sequences import SequenceStore

#: Column of every batch: index of the target in its user's full history, so the untruncated prefix length.
POSITION = "sequence_position"

#: Column of splits with regenerated rows: the row of the store that holds the window; elsewhere that is the user.
SEQUENCE = "sequence_row"


#: Column of a training batch: the row's weight in the loss.
WEIGHT = "row_weight"


class SequenceDataset(FastLoading):
    """Drop-in for RecBole's ``SequentialDataset`` whose prefix windows are indices into one sorted copy of the log.

    RecBole builds a dense ``[windows, max_length]`` tensor per field in a Python loop over the interactions; here the
    list fields of a batch are gathered when the batch is asked for. Every other behaviour (fields, splits, order of the
    rows) is RecBole's. Memory: O(interactions).

    Attributes:
        store: the users' sequences (full log: the split happens on the windows, see :meth:`windows`).
        trim: cut a batch to its longest window instead of ``MAX_ITEM_LIST_LENGTH`` (set by the loader for models
            that give the same result on the trimmed batch).
        original: of a training split with regenerated rows, the split without them; None elsewhere.
    """

    store: SequenceStore
    inter_feat: Any
    trim: bool = False
    original: Any = None

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
        rows.update(
            Interaction({self.item_list_length_field: position.clamp(max=self.max_item_list_len), POSITION: position})
        )
        self.inter_feat = _Rows(rows, self)

    def copy(self, new_inter_feat: Any) -> Any:
        part = super().copy(new_inter_feat)
        if self.is_lazy:
            part.inter_feat = _Rows(new_inter_feat, part)
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
        """Add the list fields of `rows`: [B, L] each, L the longest window (`trim`) or ``MAX_ITEM_LIST_LENGTH``."""
        users, positions = rows[self._owner(rows)].numpy(), rows[POSITION].numpy()
        if users.ndim == 0:
            users, positions = users[None], positions[None]
        width = None if self.trim else self.max_item_list_len
        index, _ = self.store.window_rows(users, positions, self.max_item_list_len, width)
        padding = torch.from_numpy(index < 0)
        gather = torch.from_numpy(np.maximum(index, 0))
        columns = dict(rows.interaction)
        for field in self._log:
            if field != self.uid_field and self._window_field(field):
                values = self._log[field][gather]  # [B, L, ...]
                values[padding] = 0
                columns[self._window_field(field)] = values
        return Interaction(columns)

    def _window_field(self, field: str) -> str:
        return getattr(self, f"{field}_list_field", "")

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


class _Rows(Interaction):
    """The rows of a split; a list field that is asked for as a whole (FEARec does) is built then, and kept."""

    def __init__(self, rows: Interaction, dataset: SequenceDataset):
        super().__init__(rows.interaction)
        self._dataset = dataset
        self._built: Any = None

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str) and index not in self.interaction and index.endswith(self._suffix):
            if self._built is None:
                rows, trim = Interaction(self.interaction), self._dataset.trim
                self._dataset.trim = False
                self._built = self._dataset._with_windows(rows)
                self._dataset.trim = trim
            return self._built[index]
        if isinstance(index, (np.ndarray, torch.Tensor)) and index.ndim:
            return rows_of(self, index)
        return super().__getitem__(index)

    @property
    def _suffix(self) -> str:
        return self._dataset.config["LIST_SUFFIX"]
