"""Training batches: windows of like length together (`BucketLoader`), or all positions of a sequence in one causal pass
that predicts every item of it (`PackedLoader`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction

from recbole_raserec.data.dataset import WEIGHT
from recbole_raserec.data.sequences import SequenceStore, pad_rows

#: Batches that are sorted by length together. Each such block is a uniform random sample of the epoch.
BLOCK = 64
#: Windows up to this length are not told apart where a batch needs items to mask.
SHORT = 5
#: Prefix of the fields of same-target windows.
SAME_TARGET = "same_target_"
#: The rows of the batch (packed: of its targets) that have a same-target window, where not all do.
SAME_TARGET_ROWS = SAME_TARGET + "rows"
#: Field of a packed batch: target item of each position, 0 where none is predicted, [U, L].
PACKED_TARGETS = "packed_targets"


class BucketLoader(TrainDataLoader):
    """RecBole's TrainDataLoader with length-bucketed batches.

    An epoch is a uniform permutation of the rows, cut into blocks of `BLOCK` batches; within a block rows are
    sorted by window length, cut into batches, and the batches are put into random order. Every row is seen once an
    epoch. With RecBole's `transform: mask_itemseq` (BERT4Rec), whose loss is a mean over the masked items of a batch, a
    batch holds a constant number of items that can be masked instead of a constant number of rows: otherwise those of
    short windows would weigh many times more, and a batch of the shortest has none. What cannot count there is left
    out, see `counted_masks`. Needs a `SequenceDataset`, whose `trim` it switches on.

    Args:
        same_target: add to each batch, under the prefix `SAME_TARGET`, the window of another row with the same
            target item, drawn uniformly (the row itself where it is the only one). DuoRec's supervised view.
    """

    def __init__(
        self, config: Config, dataset: Any, sampler: Any, shuffle: bool = False, bucket: bool = True,
        same_target: bool = False,
    ):  # fmt: skip
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self.bucket = bucket
        self._lengths = dataset.inter_feat[dataset.item_list_length_field].numpy()
        # RecBole never counts a masked first item.
        self._maskable = np.maximum(self._lengths - 1, 0) if config["transform"] == "mask_itemseq" else None
        self._partners = SameTarget(dataset.inter_feat[dataset.iid_field].numpy()) if same_target else None
        self._share = config["contrast_share"]
        dataset.trim = True

    def __len__(self) -> int:
        return -(-self.sample_size // self.step)

    def __iter__(self) -> Iterator[Interaction]:
        return map(self.collate_fn, self.batches())

    def batches(self) -> Iterator[np.ndarray]:
        """Row numbers of one epoch's batches."""
        order = np.arange(self.sample_size)
        if self.shuffle:
            order = torch.randperm(self.sample_size, generator=self.generator).numpy()
        if not (self.bucket and self.shuffle):
            yield from (order[start : start + self.step] for start in range(0, len(order), self.step))
            return
        for start in range(0, len(order), BLOCK * self.step):
            block = order[start : start + BLOCK * self.step]
            if self._maskable is None:
                block = block[np.argsort(self._lengths[block], kind="stable")]
                parts = np.split(block, np.arange(self.step, len(block), self.step))
            else:
                parts = self._by_maskable(block)
            for batch in torch.randperm(len(parts), generator=self.generator).tolist():
                yield parts[batch]

    def _by_maskable(self, block: np.ndarray) -> list[np.ndarray]:
        """`block` in batches of as many maskable items as `step` rows have on average, short windows mixed."""
        assert self._maskable is not None
        block = block[np.argsort(np.maximum(self._lengths[block], SHORT), kind="stable")]
        budget = max(self._maskable.mean() * self.step, 1.0)
        batch = (np.cumsum(self._maskable[block]) // budget).astype(np.int64)
        last = max(round(self._maskable[block].sum() / budget), 1) - 1  # what is left over joins the last
        return np.split(block, np.flatnonzero(np.diff(np.minimum(batch, last))) + 1)

    def collate_fn(self, index: Any) -> Interaction:
        index = np.asarray(index)
        batch = super().collate_fn(index)
        if self._maskable is not None:
            batch = counted_masks(batch, self.config)
        if self._partners is not None:
            batch.update(Interaction(self._partner_fields(self._partners, index)))
        return batch

    def _partner_fields(self, partners: SameTarget, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """Windows with the targets of the split's `rows`, for all of them or for a share."""
        made = {}
        if self._share is not None and self._share < 1:
            count = max(round(self._share * len(rows)), 1)
            chosen = torch.randperm(len(rows), generator=self.generator)[:count].sort().values
            rows, made[SAME_TARGET_ROWS] = rows[chosen.numpy()], chosen
        other = self._dataset[partners.sample(rows, self.generator)]
        for field in (self._dataset.item_id_list_field, self._dataset.item_list_length_field):
            made[SAME_TARGET + field] = other[field]
        return made


def counted_masks(batch: Interaction, config: Config) -> Interaction:
    """A masked batch without what RecBole's BERT4Rec multiplies by 0: windows in which no item but the first is masked,
    and the positions of `MASK_INDEX` [B, M] (and the items at them) that no window uses.

    RecBole fills M up to `mask_ratio` times the longest window, and scores all items at each of the B x M positions.
    Without the dropout of the encoder the loss is the same.
    """
    counted = batch[config["MASK_INDEX"]] > 0  # [B, M]
    rows = counted.any(dim=1)
    if not rows.any():
        return batch
    batch = batch[rows]
    first = int(counted.any(dim=0).to(torch.uint8).argmax())  # they stand at the end
    fields = (config[name] for name in ("MASK_INDEX", "POS_ITEMS", "NEG_ITEMS"))
    batch.update(Interaction({field: batch[field][:, first:].contiguous() for field in fields}))
    return batch


class SameTarget:
    """Rows by target item (`targets`, int [N]): a CSR index, so that a partner is one random offset."""

    def __init__(self, targets: np.ndarray):
        self._order = np.argsort(targets, kind="stable")
        self._start = np.searchsorted(targets[self._order], targets, side="left")
        self._count = np.searchsorted(targets[self._order], targets, side="right") - self._start
        self._rank = np.empty(len(targets), dtype=np.int64)
        self._rank[self._order] = np.arange(len(targets))

    def sample(self, rows: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """For each of `rows` [B] another row with its target, uniformly; the row itself where there is no other."""
        others = self._count[rows] - 1
        draw = torch.rand(len(rows), generator=generator, dtype=torch.float64).numpy()
        offset = np.minimum((draw * others).astype(np.int64), np.maximum(others - 1, 0))
        own = self._rank[rows] - self._start[rows]
        offset = offset + (offset >= own) * (others > 0)
        return self._order[self._start[rows] + offset]


class RowLoader(BucketLoader):
    """Batches of the split's rows without their windows: user, target, position. For models that look vectors up."""

    def __init__(self, config: Config, dataset: Any, sampler: Any, shuffle: bool = False):
        super().__init__(config, dataset, sampler, shuffle, bucket=False)

    def collate_fn(self, index: Any) -> Interaction:
        return self._dataset.inter_feat[np.asarray(index)]


class PackedWindows:
    """Windows over users' training sequences in which every training target is predicted exactly once.

    A sequence of at most `max_length` inputs is one window. A longer one is cut into windows of `max_length` inputs
    that overlap by half; a later window predicts only what the ones before did not, so that every target but those of
    the first window sees at least `max_length // 2` earlier items. (RecBole's windows slide by one: there each
    target sees `max_length` items, at that many times the cost.)

    Args:
        store: the sequences.
        users: of the training rows, [N].
        positions: index of each row's target in its user's history, [N].
        max_length: longest window.

    Attributes:
        user: whose items window w reads, int64 [W].
        start: index of its first item, int64 [W].
        length: how many items it reads, int64 [W].
        row: training rows ordered by window and position, int64 [N].
        offsets: the rows of window w are `row[offsets[w]:offsets[w + 1]]`; int64 [W + 1].
        column: column of its window at which row `row[k]` is predicted, int64 [N].
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
        self.row = order = np.lexsort((positions, window))
        self.column = positions[order] - 1 - self.start[window[order]]
        self.offsets = np.searchsorted(window[order], np.arange(len(self.user) + 1))

    def __len__(self) -> int:
        return len(self.user)


@dataclasses.dataclass
class PackedPlan:
    """Which targets the rows of one epoch's batches predict."""

    window: np.ndarray  # that row r reads, int64 [R]
    length: np.ndarray  # how many inputs of it, from the first on; int64 [R]
    offsets: np.ndarray  # row r predicts `slots[offsets[r]:offsets[r + 1]]`; int64 [R + 1]
    slots: np.ndarray  # positions in `PackedWindows.row`, int64 [N]

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
    Each epoch deals the targets of a window out to `packed_copies` rows again, see `plan_epoch`: the targets of
    one sequence then fall into different batches, as they do with one window per target.
    A batch holds `item_id_list` [U, L], `item_length` [U] and `PACKED_TARGETS` [U, L]; with `same_target`
    also a window per target, in row-major order of the targets; where rows have weights, those of the targets [U, L].

    Args:
        costs: tokens of each item [V], for a model that reads items as text: a batch holds `token_budget` of them at
            most (but one row at least). None: only targets are counted.
    """

    def __init__(
        self, config: Config, dataset: Any, sampler: Any, shuffle: bool = False, bucket: bool = True,
        same_target: bool = False, costs: Optional[np.ndarray] = None,
    ):  # fmt: skip
        super().__init__(config, dataset, sampler, shuffle, bucket, same_target)
        users, positions, self._row_targets = dataset.windows()
        self._windows = windows = PackedWindows(dataset.store, users, positions, dataset.max_item_list_len)
        self._begin = dataset.store.offsets[windows.user] + windows.start  # of each window in the store, [W]
        feat = dataset.inter_feat
        self._weights = feat[WEIGHT].numpy() if WEIGHT in feat.interaction else None
        self._copies = (config["packed_copies"] or 1) if shuffle else 1
        self._plan = plan_epoch(windows, 1)
        self._budget = config["token_budget"]
        # tokens before each item of the store
        self._tokens = None if costs is None else np.concatenate([[0], np.cumsum(costs[dataset.store.items])])

    def __len__(self) -> int:
        if self._tokens is None:
            return super().__len__()
        plan = plan_epoch(self._windows, 1)
        return len(np.unique(self._numbers(plan, np.argsort(plan.length, kind="stable"))))

    def _numbers(self, plan: PackedPlan, order: np.ndarray) -> np.ndarray:
        """Number of the batch that each row of `order` goes to."""
        sizes = plan.sizes()[order]
        if self._tokens is None:
            return (np.cumsum(sizes) - 1) // self.step
        start = self._begin[plan.window[order]]
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
        length = plan.length[index]
        # a row may stop short of its window's end: it begins where the window does
        item_seq = pad_rows(dataset.store.items, self._begin[plan.window[index]], length)
        sizes = plan.sizes()[index]
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
