"""Ranks of target items, counted instead of sorted, for both protocols at once.

The rank of a target among the items 1..V-1 (item 0 is the padding and is never ranked) is one plus the number of
items in front of it: those with a higher score, and those with an equal score and a lower item id. Counting needs two
comparisons a score; sorting or a top-k needs far more, and would have to be repeated for the second protocol, which
here costs one look-up per seen item.

Shapes: B or N queries, V items with the padding, H dimensions, S pairs of a query and an item it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from tqdm import tqdm

from recbole_raserec.errors import ConfigError

MIB = 2**20
DEFAULT_MEMORY_MB = 512
#: Queries of like length that are encoded together.
GROUP = 128
# Scores and their comparison mask are reused while they still lie in the processor's last-level cache; a larger chunk
# is slower on a CPU. A GPU wants few, large kernels.
_CPU_CHUNK_BYTES = 12 * MIB
_GPU_CHUNK_BYTES = 512 * MIB
_MASK_BYTES = 4
# The counts are summed in float32 (the comparison and the sum are several times faster than through bool); whole
# numbers are exact in it up to here.
_EXACT_ITEMS = 2**24

SeenPairs = tuple[np.ndarray, np.ndarray]
Lists = dict[str, dict[str, torch.Tensor]]  # protocol -> name -> rows


def scores(h: torch.Tensor, item_vectors: torch.Tensor, item_bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The score of each item for each user vector, [B, V]: `h @ item_vectors.T (+ item_bias)`.

    The user vectors `h` are [B, H], the item vectors [V, H], the bias [V].
    """
    found = h @ item_vectors.T
    return found if item_bias is None else found + item_bias


def target_ranks(
    scores: torch.Tensor, targets: torch.Tensor, seen: Optional[SeenPairs] = None, rows: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank each target in its row of a score matrix, with the seen items kept in the ranking and without them.

    Args:
        scores: [R, V], any real dtype; left unchanged. Minus infinity is allowed, NaN is not (except for item 0).
        targets: [B] item ids in 1..V-1.
        seen: (index of the target in `targets` [S], item id [S]); the items to take out of the ranking of that target.
            The target itself stays even if it is listed, an item listed twice counts once, item 0 is ignored.
        rows: [B] row of `scores` each target is ranked in; without it, target b belongs to row b.

    Returns:
        (kept, removed): 1-based ranks, int64 [B] on the CPU. Without `seen` both are the same.

    Raises:
        ValueError: a score is NaN, a target is no item, or the shapes do not fit.
    """
    n_targets, n_items = len(targets), scores.shape[1]
    rows = torch.arange(n_targets) if rows is None else rows.cpu()
    if len(rows) != n_targets or (n_targets and int(rows.max()) >= len(scores)):
        raise ValueError(f"{n_targets} targets do not fit a score matrix of shape {tuple(scores.shape)}.")
    _check_items(targets, n_items, "target")
    rows, targets = rows.to(scores.device), targets.to(scores.device)
    aligned = torch.equal(rows, torch.arange(n_targets, device=rows.device))

    kept = torch.empty(n_targets, dtype=torch.int64)
    step = max(1, min(n_targets, _chunk_bytes(scores.device) // (n_items * _MASK_BYTES)))
    mask = scores.new_empty((step, n_items - 1), dtype=torch.float32)
    for start in range(0, n_targets, step):
        stop = min(start + step, n_targets)
        block = scores[start:stop] if aligned else scores[rows[start:stop]]  # [b, V]
        kept[start:stop] = _count(_comparable(block), targets[start:stop], mask).cpu()
    return kept, kept - _seen_in_front(scores, rows, targets, seen)


def rank_in_chunks(
    h: torch.Tensor, item_vectors: torch.Tensor, targets: torch.Tensor, seen: Optional[SeenPairs] = None,
    *, item_bias: Optional[torch.Tensor] = None, memory_mb: float = DEFAULT_MEMORY_MB,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Rank each target by the scores `h @ item_vectors.T (+ item_bias)` without ever holding the whole [N, V] matrix.

    Rows are scored in chunks into one buffer that is allocated once; scores and mask stay under `memory_mb`.

    Args:
        h: [N, H] one vector per query.
        item_vectors: [V, H], row 0 the padding item.
        targets: [N] item ids in 1..V-1.
        seen: (offsets int [N + 1], items int [S]); query n has seen items[offsets[n]:offsets[n + 1]].
        item_bias: [V], added to the scores of each query.
        memory_mb: upper bound in MiB for the buffers (option `eval_memory_mb`).

    Returns:
        (kept, removed): 1-based ranks, int64 [N] on the CPU, as `target_ranks` counts them.

    Raises:
        ConfigError: `memory_mb` does not hold the scores of a single query.
        ValueError: a score is NaN, a target is no item, or the shapes do not fit.
    """
    n_queries, n_items = len(h), len(item_vectors)
    if len(targets) != n_queries:
        raise ValueError(f"{len(targets)} targets do not fit {n_queries} query vectors.")
    _check_items(targets, n_items, "target")
    if h.dtype not in (torch.float32, torch.float64):  # half precision would put many items on one score
        h, item_vectors = h.float(), item_vectors.float()
    targets = targets.to(h.device)

    fit = chunk_rows(n_items, h.element_size() + _MASK_BYTES, memory_mb, h.device)
    step = max(1, min(fit, n_queries))
    scores = h.new_empty((step, n_items))
    mask = h.new_empty((step, n_items - 1), dtype=torch.float32)
    kept, removed = torch.empty((2, n_queries), dtype=torch.int64)
    with torch.no_grad():
        for start in range(0, n_queries, step):
            stop = min(start + step, n_queries)
            block = torch.mm(h[start:stop], item_vectors.t(), out=scores[: stop - start])  # [b, V]
            if item_bias is not None:
                block += item_bias
            kept[start:stop] = _count(block, targets[start:stop], mask).cpu()
            pairs = None if seen is None else csr_pairs(*seen, np.arange(start, stop))
            own_rows = torch.arange(stop - start, device=h.device)
            removed[start:stop] = kept[start:stop] - _seen_in_front(block, own_rows, targets[start:stop], pairs)
    return kept, removed


def chunk_rows(n_items: int, bytes_per_score: int, memory_mb: float, device: torch.device) -> int:
    """How many rows of scores to hold at once: as many as are fast on `device`, never more than `memory_mb` MiB.

    Raises:
        ConfigError: not even one row fits.
    """
    row_bytes = n_items * bytes_per_score
    if (limit := int(memory_mb * MIB) // row_bytes) < 1:
        problem = f"eval_memory_mb: {memory_mb} MiB do not hold the scores of one user over {n_items} items"
        raise ConfigError([f"{problem}; set it to {math.ceil(row_bytes / MIB)} or more."])
    return max(1, min(limit, _chunk_bytes(device) // row_bytes))


def csr_pairs(offsets: np.ndarray, items: np.ndarray, rows: np.ndarray) -> SeenPairs:
    """Spread the CSR lists of the given rows into pairs: (index into `rows` [S], item [S])."""
    starts = np.asarray(offsets[rows], dtype=np.int64)
    lengths = np.asarray(offsets[rows + 1], dtype=np.int64) - starts
    owner = np.repeat(np.arange(len(rows)), lengths)
    first = np.cumsum(lengths) - lengths  # where each row's pairs begin in the result
    return owner, items[np.arange(len(owner)) + np.repeat(starts - first, lengths)]


def _count(block: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Ranks [b] of `targets` [b] in the score rows `block` [b, V]; `mask` [>= b, V - 1] is scratch."""
    items, mask = block[:, 1:], mask[: len(block)]
    own = block.gather(1, targets.unsqueeze(1))  # [b, 1]
    ahead = _row_sums(torch.gt(items, own, out=mask))
    behind = _row_sums(torch.lt(items, own, out=mask))
    # Every item but the target is strictly ahead or behind, unless it ties with the target or a score is NaN.
    odd = (ahead + behind != items.shape[1] - 1).nonzero().squeeze(1)
    if len(odd):
        unclear = items[odd]
        if bool(unclear.isnan().any()):
            cause = "its training has diverged (lower the learning rate) or its weights are damaged"
            raise ValueError(f"the model gives NaN scores, which have no rank; {cause}.")
        ids = torch.arange(1, block.shape[1], device=block.device)
        ahead[odd] += ((unclear == own[odd]) & (ids < targets[odd].unsqueeze(1))).sum(1)
    return ahead + 1


def _row_sums(mask: torch.Tensor) -> torch.Tensor:
    exact = torch.float32 if mask.shape[1] < _EXACT_ITEMS else torch.float64
    return mask.sum(1, dtype=exact).to(torch.int64)


def _seen_in_front(
    scores: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, seen: Optional[SeenPairs]
) -> torch.Tensor:
    """How many distinct seen items stand in front of each target: int64 [B] on the CPU."""
    n_targets, n_items = len(targets), scores.shape[1]
    if seen is None or not len(seen[0]):
        return torch.zeros(n_targets, dtype=torch.int64)
    owner, item = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in seen)
    if int(owner.min()) < 0 or int(owner.max()) >= n_targets:
        raise ValueError(f"seen items are given for row {int(owner.max())}, but there are only {n_targets} targets.")
    real = item != 0
    owner, item = owner[real].to(scores.device), item[real].to(scores.device)
    _check_items(item, n_items, "seen item")
    row, target = rows[owner], targets[owner]
    score, own = scores[row, item], scores[row, target]
    in_front = ((score > own) | ((score == own) & (item < target))) & (item != target)
    once = torch.unique(owner[in_front] * n_items + item[in_front])
    return torch.bincount(torch.div(once, n_items, rounding_mode="floor"), minlength=n_targets).cpu()


def _comparable(block: torch.Tensor) -> torch.Tensor:
    """Scores in a dtype that holds them exactly and compares fast."""
    if block.dtype in (torch.float32, torch.float64):
        return block
    return block.float() if block.is_floating_point() else block.double()


def _check_items(items: torch.Tensor, n_items: int, what: str) -> None:
    if len(items) and (int(items.min()) < 1 or int(items.max()) >= n_items):
        wrong = int(items.min()) if int(items.min()) < 1 else int(items.max())
        raise ValueError(f"{what} {wrong} is not an item: ids run from 1 to {n_items - 1} (0 is the padding).")


def _chunk_bytes(device: torch.device) -> int:
    return _CPU_CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES


def fill_lists(
    lists: dict[str, torch.Tensor], scores: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, step: int
) -> None:
    """What metrics read beside the ranks, of scores [b, V] and the targets [P] in their rows [P].

    Args:
        lists: to be filled, by the names of RecBole's Collector: "rec.items" [b, k], the items with the highest scores;
            "rec.meanrank" [b, 3], the sum of the targets' ranks (equal scores share the mean of theirs), the number of
            ranked items and that of targets.
        scores: minus infinity for what is not ranked; the padding item is made so.
        rows: the row of each target.
        targets: item ids.
        step: rows to be copied at once.
    """
    scores[:, 0] = -math.inf
    if (items := lists.get("rec.items")) is not None:
        items.copy_(scores.topk(items.shape[1]).indices)
    if (mean_ranks := lists.get("rec.meanrank")) is not None:
        rows, targets = rows.to(scores.device), targets.to(scores.device)
        parts = []
        for row, target in zip(rows.split(step), targets.split(step)):
            block, own = scores[row], scores[row, target].unsqueeze(1)
            parts.append((block > own).sum(1) + ((block == own).sum(1) + 1) / 2)
        sums = scores.new_zeros(len(scores), dtype=torch.float32).index_add_(0, rows, torch.cat(parts).float())
        ranked, count = (scores > -math.inf).sum(1), torch.bincount(rows, minlength=len(scores))
        mean_ranks.copy_(torch.stack([sums, ranked, count], 1))


class Scorer:
    """Scores all items for a block of queries, whichever of the three ways the model offers."""

    def __init__(self, model: Any, dataset: Any, config: Any):
        self.model, self.dataset, self.config = model, dataset, config
        self.n_items = dataset.item_num
        self.device = torch.device(config["device"])
        self.memory_mb = option_of(config, "eval_memory_mb") or DEFAULT_MEMORY_MB
        # float32 scores, the mask they are counted with, and a copy such as many models make on their way.
        self.rows = chunk_rows(self.n_items, 3 * 4, self.memory_mb, self.device)
        self.batch_size = max(1, option_of(config, "eval_batch_size") or 4096)
        self.gives_vectors = hasattr(model, "full_sort_vectors")
        if self.gives_vectors:  # the scores are cut up later; encoding is better done in large batches
            self.rows = max(self.rows, self.batch_size)
        # The same for `fill_lists`, which copies the rows of the targets and sorts in float32 and int64.
        self.listed = chunk_rows(self.n_items, 6 * 4, self.memory_mb, self.device)
        self.predicts_pairs_only = False

    def rank(
        self, interaction: Interaction, start: int, stop: int, rows: torch.Tensor, targets: torch.Tensor,
        pairs: Optional[SeenPairs], lists: Optional[Lists] = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Ranks of `targets` [P] in the rows `rows` [P] of the block of queries start..stop.

        Where `lists` are given, by protocol, the rows start..stop of each are filled, see `fill_lists`.
        """
        block = interaction[start:stop].to(self.device)
        if lists:
            return self._rank_and_list(block, start, rows, targets, pairs, lists)
        if self.gives_vectors:
            h, item_vectors, item_bias = self._vectors(block)
            if pairs is not None:  # pairs come sorted by owner: as a CSR over the targets
                pairs = (np.searchsorted(pairs[0], np.arange(len(targets) + 1)), pairs[1])
            h = h[rows.to(h.device)]
            return rank_in_chunks(h, item_vectors, targets, pairs, item_bias=item_bias, memory_mb=self.memory_mb)
        return target_ranks(self._matrix(block), targets, pairs, rows)

    def _matrix(self, block: Interaction) -> torch.Tensor:
        scores = self._scores(block).reshape(-1, self.n_items)
        if len(scores) != len(block):
            name = type(self.model).__name__
            raise ValueError(f"{name} gives {len(scores)} rows of scores for {len(block)} queries.")
        return scores

    def _rank_and_list(
        self, block: Interaction, start: int, rows: torch.Tensor, targets: torch.Tensor, pairs: Optional[SeenPairs],
        lists: Lists,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ranks = torch.zeros((2, len(targets)), dtype=torch.int64)
        vectors = self._vectors(block) if self.gives_vectors else None
        for first, last in even_blocks(len(block), self.listed):
            if vectors is None:
                matrix = self._matrix(block[first:last])
            else:
                matrix = scores(vectors[0][first:last], *vectors[1:])
            here = ((rows >= first) & (rows < last)).nonzero().squeeze(1)
            own, wanted, near = rows[here] - first, targets[here], None
            if pairs is not None:
                place = np.full(len(targets), -1)
                place[here.numpy()] = np.arange(len(here))
                near = (place[pairs[0]], pairs[1])
                near = (near[0][near[0] >= 0], near[1][near[0] >= 0])
            ranks[0, here], ranks[1, here] = target_ranks(matrix, wanted, near, own)
            for protocol, found in lists.items():
                if protocol != next(iter(lists)) and near is not None:  # the seen items go, in place
                    owner, item = (torch.from_numpy(part.astype(np.int64)) for part in near)
                    gone = item != wanted[owner]
                    matrix[own[owner[gone]].to(matrix.device), item[gone].to(matrix.device)] = -math.inf
                part = {name: values[start + first : start + last] for name, values in found.items()}
                fill_lists(part, matrix, own, wanted, self.listed)
        return ranks[0], ranks[1]

    def score_pairs(self, interaction: Interaction, positives: torch.Tensor) -> torch.Tensor:
        """Scores [N] of the rows of sampled items: for each user its P positives, then N / P - 1 draws for each.

        Args:
            interaction: RecBole's batch, users one after the other.
            positives: the positives of each user, int64 [users].
        """
        items = interaction[self.dataset.iid_field].to(self.device)
        if not self.gives_vectors:
            parts = [interaction[a : a + self.batch_size] for a in range(0, len(interaction), self.batch_size)]
            return torch.cat([self.model.predict(part.to(self.device)).reshape(-1) for part in parts])
        times = len(items) // int(positives.sum())
        ends = positives.cumsum(0)
        history = torch.cat([
            torch.arange(end - count, end).repeat(times) for end, count in zip(ends.tolist(), positives.tolist())
        ])  # [N], the positive whose history a row repeats: it is encoded once  # fmt: skip
        offsets = (ends - positives) * times
        rows = torch.cat([torch.arange(a, a + n) for a, n in zip(offsets.tolist(), positives.tolist())])
        h, table, bias = self._vectors(
            Interaction({k: v[rows] for k, v in interaction.interaction.items()}).to(self.device)
        )
        found = (h[history.to(h.device)] * table[items]).sum(1)
        return found if bias is None else found + bias[items]

    def _vectors(self, block: Interaction) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """The model's `full_sort_vectors`; where windows may be trimmed, encoded in groups of like length."""
        lengths = self.dataset.item_list_length_field if getattr(self.dataset, "trim", False) else None
        if lengths not in block or len(block) <= GROUP or self.device.type != "cpu":
            return self.model.full_sort_vectors(block)
        order = torch.argsort(block[lengths], stable=True)
        width = block[self.dataset.item_id_list_field].shape[1]
        parts = []
        for rows in order.split(GROUP):
            longest = int(block[lengths][rows[-1]])
            fields = {name: values[rows] for name, values in block.interaction.items()}
            for name, values in fields.items():
                if values.dim() > 1 and values.shape[1] == width:
                    fields[name] = values[:, :longest]
            parts.append(self.model.full_sort_vectors(Interaction(fields)))
        sorted_h = torch.cat([part[0] for part in parts])
        h = torch.empty_like(sorted_h)
        h[order] = sorted_h
        return h, parts[0][1], parts[0][2]

    def _scores(self, block: Interaction) -> torch.Tensor:
        if not self.predicts_pairs_only:
            try:
                return self.model.full_sort_predict(block)
            except NotImplementedError:
                self.predicts_pairs_only = True
        queries_at_once = max(1, self.batch_size // self.n_items)
        item_features = self.dataset.get_item_feature().to(self.device)
        scores = []
        for first in range(0, len(block), queries_at_once):
            queries = block[first : first + queries_at_once]
            pairs = queries.repeat_interleave(self.n_items)
            pairs.update(item_features.repeat(len(queries)))
            for pair in range(0, len(pairs), self.batch_size):
                scores.append(self.model.predict(pairs[pair : pair + self.batch_size]).reshape(-1))
        return torch.cat(scores)


def batches_of(eval_data: Any, rows: int, progress: bool) -> Iterator[tuple[Any, Any, torch.Tensor, torch.Tensor]]:
    """(interaction, query of each row where items are sampled, positive_u, positive_i) of every batch."""
    batches, collate = eval_data, None
    if isinstance(eval_data, FullSortEvalDataLoader) and not eval_data.is_sequential:
        # RecBole sizes these batches as eval_batch_size // n_items queries: one user a batch for most catalogues.
        batches = [list(range(start, stop)) for start, stop in even_blocks(eval_data.sample_size, rows)]
        collate = eval_data.collate_fn
    for batch in tqdm(batches, desc="evaluate", ncols=80, leave=False, disable=not progress):
        interaction, row, positive_u, positive_i = collate(batch) if collate else batch
        yield interaction, row, positive_u.cpu(), positive_i.cpu()


def even_blocks(n: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..n into blocks of at most `size`, equally long: some RecBole models squeeze a batch of one query away."""
    cuts = np.linspace(0, n, -(-n // size) + 1).astype(int) if n else np.zeros(1, dtype=int)
    return [(int(start), int(stop)) for start, stop in zip(cuts[:-1], cuts[1:])]


def option_of(config: Any, name: str) -> Any:
    """An option that may be absent: RecBole's Config answers None, a plain mapping has no such key."""
    return config.get(name) if isinstance(config, Mapping) else config[name]
