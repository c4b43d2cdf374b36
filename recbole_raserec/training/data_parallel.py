"""Training steps that several processes make together: each takes some rows of the batch, all make the same step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from recbole_raserec.data import PACKED_TARGETS
from recbole_raserec.distributed import Group
from recbole_raserec.errors import ConfigError

Losses = Union[torch.Tensor, tuple[torch.Tensor, ...]]

#: Gradients with fewer numbers travel together.
SMALL = 1 << 16

#: Rows on which a loss is tested for being a mean over rows, and the share of it by which it may be off: means are off
#: by about 1e-7; norms over the batch, with RecBole's weights and at the first step, by 3e-6 and more.
SAMPLE, TOLERANCE = 256, 1e-6


class SplitSteps:
    """Makes the steps of a trainer those of a group.

    All processes have the same batch of B rows. Process r computes the loss l_r of its rows and weighs it by its share
    w_r / w of what the mean is over (rows; targets of a packed batch; masked items). The sums of the weighed losses and
    of their gradients over the group, before the optimizer's step, are those of the batch: every process makes the step
    that one process would make, up to rounding and to the dropout masks, which each draws for its own rows.

    That takes a loss that is a mean over rows. It is tested on the first batch, with dropout off.

    Args:
        group: of more than one process.
        model: to be trained.
        name: of the model, for messages.
        optimizer: its steps are preceded by the sum of the gradients.
        clip: options of torch's `clip_grad_norm_`, which has to come after the sum; None: no clipping.
    """

    def __init__(
        self, group: Group, model: Any, name: str, optimizer: torch.optim.Optimizer, clip: Optional[dict[str, Any]]
    ):
        self._group, self._model, self._name, self._clip = group, model, name, clip
        self._parameters = [p for part in optimizer.param_groups for p in part["params"]]
        self._parts = 0  # terms of the loss; 0: not tested yet
        optimizer.register_step_pre_hook(lambda *_: self.sum_gradients())

    def loss_of(self, loss: Callable[[Any], Losses]) -> Callable[[Any], Losses]:
        """`loss` of a batch, computed together: its value is the whole batch's, its gradient that of the own rows."""

        def together(batch: Any) -> Losses:
            if not self._parts:
                self._parts = self._test(loss, batch)
            own = batch[self._group.every(len(batch))]
            share = mean_over(own) / max(mean_over(batch), 1)
            terms = [torch.zeros((), device=self._parameters[0].device, requires_grad=True)] * self._parts
            if share:
                terms = [term * share for term in _terms(loss(own))]
            values = self._group.add_up(torch.stack([term.detach().double().reshape(()) for term in terms]))
            whole = tuple(_Valued.apply(term, value) for term, value in zip(terms, values))
            return whole if len(whole) > 1 else whole[0]

        return together

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Replace each gradient by its sum over the group; a parameter without one in every process keeps none."""
        device = self._parameters[0].device
        present = torch.tensor([float(p.grad is not None) for p in self._parameters], device=device)
        packs: dict[torch.dtype, list[torch.Tensor]] = {present.dtype: [present]}
        waiting = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = parameter.grad.contiguous()
            if parameter.numel() < SMALL:
                packs.setdefault(parameter.grad.dtype, []).append(parameter.grad)
            else:
                waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for pack in packs.values():
            flat = self._group.add_up(torch.cat([values.reshape(-1) for values in pack]))
            for values, summed in zip(pack, flat.split([values.numel() for values in pack])):
                values.copy_(summed.view_as(values))
        for work in waiting:
            work.wait()
        for parameter, held in zip(self._parameters, present.tolist()):
            if not held:
                parameter.grad = None
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), **self._clip)

    def _test(self, loss: Callable[[Any], Losses], batch: Any) -> int:
        """Compare the loss of some rows with those of its halves, and count its terms; raises `_refusal`."""
        if any(isinstance(module, _BatchNorm) for module in self._model.modules()):
            raise self._refusal("normalises over the rows of a batch (BatchNorm)")
        rows = batch[:SAMPLE]
        with _undisturbed(self._model), torch.no_grad():
            whole = [float(term) for term in _terms(loss(rows))]
            halves = [part for part in (rows[0::2], rows[1::2]) if len(part) > 1 and mean_over(part)]
            if len(halves) < 2 or not np.isfinite(whole).all():  # a loss that is no number is the trainer's to report
                return len(whole)
            shares = [mean_over(part) / mean_over(rows) for part in halves]
            parts = [[float(term) * share for term in _terms(loss(part))] for part, share in zip(halves, shares)]
        total, summed = sum(whole), sum(map(sum, parts))
        if abs(total - summed) > TOLERANCE * abs(total):
            found = f"has a loss that is no mean over rows ({total:.6g} for {len(rows)}, {summed:.6g} from two halves)"
            raise self._refusal(found)
        return len(whole)

    def _refusal(self, why: str) -> ConfigError:
        share = f"nproc: {self._group.size} processes share the rows of a batch, but {self._name} {why}"
        return ConfigError([f"{share}; train it in one process: leave nproc and world_size out (threads: N)"])


class _Valued(torch.autograd.Function):
    """Another value for a term, whose gradient stays its own."""

    @staticmethod
    def forward(ctx: Any, term: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.to(term.dtype).reshape(term.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def mean_over(batch: Any) -> int:
    """How many things the loss of a batch is the mean over: packed targets, masked items, or rows."""
    for field in (PACKED_TARGETS, "MASK_INDEX"):
        if field in batch.columns:
            return int((batch[field] > 0).sum())
    return len(batch)


def _terms(losses: Losses) -> tuple[torch.Tensor, ...]:
    return losses if isinstance(losses, tuple) else (losses,)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode within; afterwards mode, counters of the model and random numbers are what they were."""
    training, numpy_state, python_state = model.training, np.random.get_state(), random.getstate()
    attributes = dict(vars(model))
    with torch.random.fork_rng():
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            vars(model).update(attributes)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
