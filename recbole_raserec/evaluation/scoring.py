"""Scores of all items for the queries of any RecBole model, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from tqdm import tqdm

from recbole_raserec.evaluation.ranking import SeenPairs, chunk_rows, rank_in_chunks, target_ranks

DEFAULT_MEMORY_MB = 512

#: Queries of like length that are encoded together.
GROUP = 128


class Scorer:
    """Scores all items for a block of queries, whichever of the three ways the model offers."""

    def __init__(self, model: Any, dataset: Any, config: Any):
        self.model, self.dataset, self.config = model, dataset, config
        self.n_items = dataset.item_num
        self.device = torch.device(config["device"])
        self.memory_mb = option(config, "eval_memory_mb") or DEFAULT_MEMORY_MB
        # float32 scores, the mask they are counted with, and a copy such as many models make on their way.
        self.rows = chunk_rows(self.n_items, 3 * 4, self.memory_mb, self.device)
        self.batch_size = max(1, option(config, "eval_batch_size") or 4096)
        self.gives_vectors = hasattr(model, "full_sort_vectors")
        if self.gives_vectors:  # the scores are cut up later; encoding is better done in large batches
            self.rows = max(self.rows, self.batch_size)
        self.predicts_pairs_only = False

    def rank(
        self,
        interaction: Interaction,
        start: int,
        stop: int,
        rows: torch.Tensor,
        targets: torch.Tensor,
        pairs: SeenPairs | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranks of `targets` [P] in the rows `rows` [P] of the block of queries start..stop."""
        block = interaction[start:stop].to(self.device)
        if self.gives_vectors:
            h, item_vectors, item_bias = self._vectors(block)
            if pairs is not None:  # pairs come sorted by owner: as a CSR over the targets
                pairs = (np.searchsorted(pairs[0], np.arange(len(targets) + 1)), pairs[1])
            h = h[rows.to(h.device)]
            return rank_in_chunks(h, item_vectors, targets, pairs, item_bias=item_bias, memory_mb=self.memory_mb)
        scores = self._scores(block).reshape(-1, self.n_items)
        if len(scores) != stop - start:
            name = type(self.model).__name__
            raise ValueError(f"{name} gives {len(scores)} rows of scores for {stop - start} queries.")
        return target_ranks(scores, targets, pairs, rows)

    def _vectors(self, block: Interaction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The model's `full_sort_vectors`; where windows may be trimmed, encoded in groups of like length."""
        lengths = self.dataset.item_list_length_field if getattr(self.dataset, "trim", False) else None
        if lengths not in block or len(block) <= GROUP:
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


def batches_of(eval_data: Any, rows: int, progress: bool) -> Iterator[tuple[Interaction, torch.Tensor, torch.Tensor]]:
    """(interaction, positive_u, positive_i) of every batch."""
    if isinstance(eval_data, FullSortEvalDataLoader) and not eval_data.is_sequential:
        # RecBole sizes these batches as eval_batch_size // n_items queries: one user a batch for most catalogues.
        spans = [list(range(start, stop)) for start, stop in even_blocks(eval_data.sample_size, rows)]
        batches: Any = map(
            eval_data.collate_fn, tqdm(spans, desc="evaluate", ncols=80, leave=False, disable=not progress)
        )
    else:
        batches = iter(tqdm(eval_data, desc="evaluate", ncols=80, leave=False, disable=not progress))
    for interaction, _, positive_u, positive_i in batches:
        yield interaction, positive_u.cpu(), positive_i.cpu()


def even_blocks(n: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..n into blocks of at most `size`, equally long: some RecBole models squeeze a batch of one query away."""
    cuts = np.linspace(0, n, -(-n // size) + 1).astype(int) if n else np.zeros(1, dtype=int)
    return [(int(start), int(stop)) for start, stop in zip(cuts[:-1], cuts[1:])]


def option(config: Any, name: str) -> Any:
    """An option that may be absent: RecBole's Config answers None, a plain mapping has no such key."""
    try:
        return config[name]
    except KeyError:
        return None
