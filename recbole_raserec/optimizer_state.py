"""The state of torch optimizers as named tensors, for files without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def optimizer_tensors(optimizer: Any, prefix: str = "optimizer") -> dict[str, torch.Tensor]:
    """The state of each parameter under ``<prefix>.<number>.<name>``; options such as learning rates are not in it."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{number}.{name}": torch.as_tensor(value)
        for number, slots in state.items()
        for name, value in slots.items()
        if value is not None  # a momentum that was never there
    }


def load_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor], prefix: str = "optimizer") -> None:
    """Put into `optimizer` what :func:`optimizer_tensors` gave, out of `tensors`, which may hold more.

    Raises:
        KeyError, ValueError, RuntimeError: it does not fit.
    """
    state: dict[int, dict[str, Any]] = {}
    for key, value in part_of(tensors, prefix).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those under ``<prefix>.``, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
