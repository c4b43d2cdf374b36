"""Exponential moving average of the weights a training passes through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from recbole_raserec.errors import CheckpointError

#: The first averages reach back over a tenth of the steps so far, so that the initial weights soon count for nothing.
WARM_UP = 10


class WeightAverage:
    """Follows a model's weights: after each step ``average <- decay average + (1 - decay) weights``.

    With a constant learning rate the weights of the last step scatter around the path they follow; the average is that
    path (Polyak and Juditsky 1992). The training itself is untouched: gradients are those at the last weights.

    Args:
        model: its parameters that require gradients are followed.
        decay: in (0, 1); the average reaches back over some ``1 / (1 - decay)`` steps. While fewer steps have been
            made, ``(1 + steps) / (10 + steps)`` takes its place where that is less.
    """

    def __init__(self, model: Any, decay: float):
        self.decay, self.steps = decay, 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (WARM_UP + self.steps))
        for name, weight in self._weights.items():
            self._average[name].lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._average[name] = self._average[name], weight.data

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return self._average

    def restore(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Go on from what :meth:`tensors` gave after `steps` steps.

        Raises:
            CheckpointError: a parameter is missing or of another shape.
        """
        for name, average in self._average.items():
            if name not in tensors or tensors[name].shape != average.shape:
                raise CheckpointError(f"the average of {name} is missing or misshapen.")
            average.copy_(tensors[name])
        self.steps = steps
