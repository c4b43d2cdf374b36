"""What the tests of stage i share; their fixtures are in conftest.py."""

from __future__ import annotations

import numpy as np
import torch

from recbole_raserec.regeneration.pairs import Pairs, Sequences, make_pairs
from recbole_raserec.regeneration.regenerator import Regenerator

QUICK = {
    "regeneration": True, "regen_epochs": 2, "regen_layers": 1, "regen_inner_size": 16, "regen_conditions": 2,
    "hidden_size": 16, "inner_size": 16, "n_layers": 1, "epochs": 1, "regen_batch_pairs": 64,
}  # fmt: skip


def as_rows(data) -> list[tuple[int, ...]]:
    return [tuple(data.items[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


ITEMS = 12


def model_of(seed: int = 0, **options) -> Regenerator:
    torch.manual_seed(seed)
    given_ = {"size": 8, "inner_size": 16, "longest": 10, "conditions": 3, "pattern_length": 4, **options}
    model = Regenerator(ITEMS, **given_)
    torch.nn.init.normal_(model.items.weight[1:].data, std=1.0)
    return model.eval()


def sequences_of(rows) -> Sequences:
    lengths = [len(row) for row in rows]
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    return Sequences(items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.arange(1, len(rows) + 1))


def random_rows(seed: int, count: int, longest: int = 10) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, ITEMS, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def pairs_of(seed: int = 0, count: int = 60) -> Pairs:
    sequences = sequences_of([row for row in random_rows(seed, count) if len(row) > 1])
    return make_pairs(sequences, sequences, 4, 2, 4, 5, seed)
