"""What the tests of stage i share; their fixtures are in conftest.py."""

from __future__ import annotations

QUICK = {
    "regeneration": True, "regen_epochs": 2, "regen_layers": 1, "regen_inner_size": 16, "regen_conditions": 2,
    "hidden_size": 16, "inner_size": 16, "n_layers": 1, "epochs": 1, "regen_batch_pairs": 64,
}  # fmt: skip


def as_rows(data) -> list[tuple[int, ...]]:
    return [tuple(data.items[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]
