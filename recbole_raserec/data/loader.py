"""Training batches whose rows are of like length, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction

#: Batches that are sorted by length together. Each such block is a uniform random sample of the epoch.
BLOCK = 64

#: Windows up to this length are not told apart where a batch needs items to mask.
SHORT = 5

SAME_TARGET = "same_target_"

#: The rows of the batch (packed: of its targets) that have a same-target window, where not all do.
SAME_TARGET_ROWS = SAME_TARGET + "rows"


class BucketLoader(TrainDataLoader):
    """RecBole's TrainDataLoader with length-bucketed batches.

    An epoch is a uniform permutation of the rows, cut into blocks of :data:`BLOCK` batches; within a block rows are
    sorted by window length, cut into batches, and the batches are put into random order. Every row is seen once an
    epoch. With RecBole's `transform: mask_itemseq` (BERT4Rec), whose loss is a mean over the masked items of a batch, a
    batch holds a constant number of items that can be masked instead of a constant number of rows: otherwise those of
    short windows would weigh many times more, and a batch of the shortest has none. What cannot count there is left
    out, see :func:`counted_masks`. Needs a :class:`~recbole_raserec.data.dataset.SequenceDataset`, whose `trim` it
    switches on.

    Args:
        same_target: add to each batch, under the prefix :data:`SAME_TARGET`, the window of another row with the same
            target item, drawn uniformly (the row itself where it is the only one). DuoRec's supervised view.
    """

    def __init__(
        self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False, bucket: bool = True,
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
        for rows in self.batches():
            yield self.collate_fn(rows)

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
        """`block` in batches of as many maskable items as :attr:`step` rows have on average, short windows mixed."""
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


def counted_masks(batch: Interaction, config: Any) -> Interaction:
    """A masked batch without what RecBole's BERT4Rec multiplies by 0: windows in which no item but the first is masked,
    and the places of ``MASK_INDEX`` [B, M] (and the items at them) that no window uses.

    RecBole fills M up to ``mask_ratio`` times the longest window, and scores all items at each of the B x M places.
    Without the dropout of the encoder the loss is the same.
    """
    counted = batch[config["MASK_INDEX"]] > 0  # [B, M]
    rows = counted.any(dim=1)
    if not rows.any():
        return batch
    batch = batch[rows]
    first = int(counted.any(dim=0).to(torch.uint8).argmax())  # they stand at the end
    cut = {
        config[name]: batch[config[name]][:, first:].contiguous() for name in ("MASK_INDEX", "POS_ITEMS", "NEG_ITEMS")
    }
    batch.update(Interaction(cut))
    return batch


class SameTarget:
    """Rows grouped by target item: a CSR index, so that a partner is one random offset.

    Args:
        targets: int array [N], target item of each row.
    """

    def __init__(self, targets: np.ndarray):
        self._order = np.argsort(targets, kind="stable")
        sorted_targets = targets[self._order]
        starts = np.searchsorted(sorted_targets, targets, side="left")
        ends = np.searchsorted(sorted_targets, targets, side="right")
        self._start, self._count = starts, ends - starts
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

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False):
        super().__init__(config, dataset, sampler, shuffle, bucket=False)

    def collate_fn(self, index: Any) -> Interaction:
        return self._dataset.inter_feat[np.asarray(index)]
