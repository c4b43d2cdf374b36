"""All-positions training: one causal pass over a user's sequence predicts every item of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.loader import BLOCK, SAME_TARGET, BucketLoader
from recbole_raserec.data.sequences import SequenceStore

#: Field of a packed batch: target item of each position, 0 where none is predicted, [U, L].
PACKED_TARGETS = "packed_targets"


class PackedWindows:
    """Windows over users' training sequences in which every training target is predicted exactly once.

    A sequence of at most `max_length` inputs is one window. A longer one is cut into windows of `max_length` inputs
    that overlap by half; a later window predicts only what the ones before did not, so that every target but those of
    the first window sees at least ``max_length // 2`` earlier items. (RecBole's windows slide by one: there each
    target sees `max_length` items, at that many times the cost.)

    Args:
        store: sequences. users, positions: training rows [N]; a target's index in its user's history.

    Attributes:
        user, start, length: int64 [W]; window w reads ``length`` items of ``user`` from index ``start``.
        row: int64 [N], training rows ordered by window and position; offsets: int64 [W + 1] into it.
        column: int64 [N], column of its window at which row ``row[k]`` is predicted.
    """

    def __init__(self, store: SequenceStore, users: np.ndarray, positions: np.ndarray, max_length: int):
        inputs = np.zeros(store.n_users, dtype=np.int64)
        np.maximum.at(inputs, users, positions)  # items before the last training target
        stride = max(max_length // 2, 1)
        later = -(-np.maximum(inputs - max_length, 0) // stride)  # windows after the first, per user
        count = np.where(inputs > 0, later + 1, 0)
        first = np.concatenate([[0], np.cumsum(count)])  # first window of each user
        self.user = np.repeat(np.arange(store.n_users), count)
        number = np.arange(len(self.user)) - first[self.user]
        self.start = np.clip(np.minimum(number * stride, inputs[self.user] - max_length), 0, None)
        self.length = np.minimum(inputs[self.user], max_length)
        # a target at position p is predicted by the first window whose inputs reach p - 1
        at = -(-np.maximum(positions - max_length, 0) // stride)
        window = first[users] + at
        order = np.lexsort((positions, window))
        self.row = order
        self.column = positions[order] - 1 - self.start[window[order]]
        self.offsets = np.searchsorted(window[order], np.arange(len(self.user) + 1))

    def __len__(self) -> int:
        return len(self.user)


class PackedLoader(BucketLoader):
    """Batches of packed windows with about `train_batch_size` targets each, whatever the length of the histories.

    (With a fixed number of windows a batch and a mean loss, targets of long histories would weigh many times less.)
    A batch holds ``item_id_list`` [U, L], ``item_length`` [U] and :data:`PACKED_TARGETS` [U, L]; with `same_target`
    also a window per target, in row-major order of the targets.
    """

    def __init__(
        self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False, bucket: bool = True,
        same_target: bool = False,
    ):  # fmt: skip
        super().__init__(config, dataset, sampler, shuffle, bucket, same_target)
        users, positions, self._row_targets = dataset.windows()
        self._windows = PackedWindows(dataset.store, users, positions, dataset.max_item_list_len)

    def __len__(self) -> int:
        return -(-self.sample_size // self.step)

    def batches(self) -> Iterator[np.ndarray]:
        """Window numbers of one epoch's batches."""
        windows = self._windows
        order = np.arange(len(windows))
        if self.shuffle:
            order = torch.randperm(len(order), generator=self.generator).numpy()
        sizes = np.diff(windows.offsets)
        if self.bucket and self.shuffle:
            block = np.cumsum(sizes[order]) // (BLOCK * self.step)
            order = order[np.lexsort((windows.length[order], block))]
        batch = (np.cumsum(sizes[order]) - 1) // self.step
        parts = np.split(order, np.flatnonzero(np.diff(batch)) + 1)
        turn = torch.randperm(len(parts), generator=self.generator).tolist() if self.shuffle else range(len(parts))
        for number in turn:
            if sizes[parts[number]].any():
                yield parts[number]

    def collate_fn(self, index: Any) -> Interaction:
        windows, dataset = self._windows, self._dataset
        index = np.asarray(index)
        length = windows.length[index]
        store = dataset.store
        ends = windows.start[index] + length
        rows, _ = store.window_rows(windows.user[index], ends, dataset.max_item_list_len)
        item_seq = store.items[np.maximum(rows, 0)]
        item_seq[rows < 0] = 0
        sizes = windows.offsets[index + 1] - windows.offsets[index]
        line = np.repeat(np.arange(len(index)), sizes)
        slot = np.repeat(windows.offsets[index] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        targets = np.zeros_like(item_seq)
        targets[line, windows.column[slot]] = self._row_targets[windows.row[slot]]
        fields = {
            dataset.item_id_list_field: torch.from_numpy(item_seq),
            dataset.item_list_length_field: torch.from_numpy(length),
            PACKED_TARGETS: torch.from_numpy(targets),
        }
        if self._partners is not None:
            other = dataset[self._partners.sample(windows.row[slot], self.generator)]
            for field in (dataset.item_id_list_field, dataset.item_list_length_field):
                fields[SAME_TARGET + field] = other[field]
        return Interaction(fields)
