"""All-positions training: one causal pass over a user's sequence predicts every item of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.dataset import WEIGHT
from recbole_raserec.data.loader import BLOCK, BucketLoader
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


@dataclasses.dataclass
class PackedPlan:
    """Which targets the rows of one epoch's batches predict.

    Attributes:
        window, length: int64 [R]; row r reads the first ``length`` inputs of window ``window``.
        offsets: int64 [R + 1]; row r predicts ``slots[offsets[r]:offsets[r + 1]]``, places in `PackedWindows.row`.
        slots: int64 [N].
    """

    window: np.ndarray
    length: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray

    def sizes(self) -> np.ndarray:
        """Targets of each row, [R]."""
        return np.diff(self.offsets)


def plan_epoch(windows: PackedWindows, copies: int, generator: Optional[torch.Generator] = None) -> PackedPlan:
    """Deal the targets of each window out to `copies` rows at random; rows that got none are left out.

    A row ends at the last target it got, so that more copies do not cost as many times the work.
    """
    sizes = np.diff(windows.offsets)
    owner = np.repeat(np.arange(len(windows)), sizes)  # window of each slot
    if copies == 1:
        return PackedPlan(np.arange(len(windows)), windows.length, windows.offsets, np.arange(len(owner)))
    row = owner * copies + torch.randint(copies, (len(owner),), generator=generator).numpy()
    slots = np.argsort(row, kind="stable")
    row = row[slots]
    offsets = np.concatenate([np.flatnonzero(np.diff(row, prepend=-1)), [len(row)]])
    last = slots[offsets[1:] - 1]  # columns increase within a row
    return PackedPlan(owner[last], windows.column[last] + 1, offsets, slots)


class PackedLoader(BucketLoader):
    """Batches of packed windows with about `train_batch_size` targets each, whatever the length of the histories.

    (With a fixed number of windows a batch and a mean loss, targets of long histories would weigh many times less.)
    Each epoch deals the targets of a window out to `packed_copies` rows anew, see :func:`plan_epoch`: the targets of
    one sequence then fall into different batches, as they do with one window per target.
    A batch holds ``item_id_list`` [U, L], ``item_length`` [U] and :data:`PACKED_TARGETS` [U, L]; with `same_target`
    also a window per target, in row-major order of the targets; where rows have weights, those of the targets [U, L].

    Args:
        costs: tokens of each item [V], for a model that reads items as text: a batch holds `token_budget` of them at
            most (but one row at least). None: only targets are counted.
    """

    def __init__(
        self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False, bucket: bool = True,
        same_target: bool = False, costs: Optional[np.ndarray] = None,
    ):  # fmt: skip
        super().__init__(config, dataset, sampler, shuffle, bucket, same_target)
        users, positions, self._row_targets = dataset.windows()
        self._windows = PackedWindows(dataset.store, users, positions, dataset.max_item_list_len)
        feat = dataset.inter_feat
        self._weights = feat[WEIGHT].numpy() if WEIGHT in feat.interaction else None
        self._copies = (config["packed_copies"] or 1) if shuffle else 1
        self._plan = plan_epoch(self._windows, 1)
        self._budget = config["token_budget"] if costs is not None else None
        # tokens before each item of the store
        self._tokens = None if costs is None else np.concatenate([[0], np.cumsum(costs[dataset.store.items])])

    def __len__(self) -> int:
        if self._tokens is None:
            return super().__len__()
        plan = plan_epoch(self._windows, 1)
        order = np.argsort(plan.length, kind="stable")
        return len(np.unique(self._numbers(plan, order)))

    def _numbers(self, plan: PackedPlan, order: np.ndarray) -> np.ndarray:
        """Number of the batch that each row of `order` goes to."""
        sizes = plan.sizes()[order]
        if self._tokens is None:
            return (np.cumsum(sizes) - 1) // self.step
        windows, store = self._windows, self._dataset.store
        window = plan.window[order]
        start = store.offsets[windows.user[window]] + windows.start[window]
        tokens = self._tokens[start + plan.length[order]] - self._tokens[start]
        numbers, number, targets, total = [], 0, 0, 0
        for size, cost in zip(sizes.tolist(), tokens.tolist()):
            if total and (targets + size > self.step or total + cost > self._budget):
                number, targets, total = number + 1, 0, 0
            numbers.append(number)
            targets, total = targets + size, total + cost
        return np.array(numbers, dtype=np.int64)

    def batches(self) -> Iterator[np.ndarray]:
        """Row numbers, in the epoch's plan, of its batches."""
        self._plan = plan = plan_epoch(self._windows, self._copies, self.generator)
        sizes = plan.sizes()
        order = np.arange(len(sizes))
        if self.shuffle:
            order = torch.randperm(len(order), generator=self.generator).numpy()
        if self.bucket and self.shuffle:
            block = np.cumsum(sizes[order]) // (BLOCK * self.step)
            order = order[np.lexsort((plan.length[order], block))]
        parts = np.split(order, np.flatnonzero(np.diff(self._numbers(plan, order))) + 1)
        turn = torch.randperm(len(parts), generator=self.generator).tolist() if self.shuffle else range(len(parts))
        for number in turn:
            if sizes[parts[number]].any():
                yield parts[number]

    def collate_fn(self, index: Any) -> Interaction:
        windows, plan, dataset = self._windows, self._plan, self._dataset
        index = np.asarray(index)
        window, length = plan.window[index], plan.length[index]
        store = dataset.store
        # a row may stop short of its window's end: it begins where the window does
        rows = store.offsets[windows.user[window]][:, None] + windows.start[window][:, None] + np.arange(length.max())
        beyond = np.arange(length.max()) >= length[:, None]
        rows[beyond] = 0
        item_seq = store.items[rows]
        item_seq[beyond] = 0
        sizes = plan.offsets[index + 1] - plan.offsets[index]
        line = np.repeat(np.arange(len(index)), sizes)
        slot = plan.slots[np.repeat(plan.offsets[index] - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())]
        targets = np.zeros_like(item_seq)
        targets[line, windows.column[slot]] = self._row_targets[windows.row[slot]]
        fields = {
            dataset.item_id_list_field: torch.from_numpy(item_seq),
            dataset.item_list_length_field: torch.from_numpy(length),
            PACKED_TARGETS: torch.from_numpy(targets),
        }
        if self._weights is not None:
            weights = np.zeros(item_seq.shape, dtype=np.float32)
            weights[line, windows.column[slot]] = self._weights[windows.row[slot]]
            fields[WEIGHT] = torch.from_numpy(weights)
        if self._partners is not None:
            fields.update(self._partner_fields(self._partners, windows.row[slot]))
        return Interaction(fields)
