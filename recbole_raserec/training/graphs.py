"""Training steps on a GPU without their launches: recorded once for each shape of batch as a CUDA graph, then replayed.

A step of a small model is some two hundred kernels of a few microseconds each; launching them from Python takes several
times as long as they run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Callable, Optional

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_raserec.data import fixed_shape

logger = logging.getLogger(__name__)

#: Times a shape has to occur before its step is recorded.
OCCURRENCES = 2

#: The fields of a batch by name.
Fields = dict[str, Tensor]


class FixedShapes:
    """A loader whose batches have few shapes, see `fixed_shape`; what cannot be brought to one stays as it is."""

    def __init__(self, loader: Any, config: Any, longest: int):
        self._loader, self._config, self._longest = loader, config, longest

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Interaction]:
        for batch in self._loader:
            fixed = fixed_shape(batch, self._config, self._longest)
            yield batch if fixed is None else fixed


class GraphedLoss:
    """The loss of a batch with its gradients, recorded and replayed; in place of a model's `calculate_loss`.

    The gradients are computed with the loss. They become those of the parameters when `backward` is called on it, as
    they are: a factor in front of the loss is not seen. Where recording fails the steps are made as usual.

    Args:
        model: its parameters get the gradients.
        loss: of a batch, a scalar; without anything that waits for the device.
        record: (step) -> a function that replays it.
    """

    def __init__(
        self, model: torch.nn.Module, loss: Callable[[Any], Tensor],
        record: Optional[Callable[[Callable[[], Tensor]], Callable[[], Tensor]]] = None,
    ):  # fmt: skip
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._loss, self._record = loss, record or CudaGraphs().record
        self._gradients: dict[int, Tensor] = {}  # by the number of the parameter; the same for all shapes
        self._seen: dict[Any, int] = {}
        self._steps: dict[Any, tuple[Fields, Callable[[], Tensor]]] = {}
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, batch: Any) -> Tensor:
        key = tuple((name, tuple(values.shape)) for name, values in sorted(batch.interaction.items()))
        self._seen[key] = self._seen.get(key, 0) + 1
        if key not in self._steps:
            if self._seen[key] < OCCURRENCES or not self._parameters:
                return self._loss(batch)
            try:
                self._steps[key] = self._recorded(batch)
            except RuntimeError as error:
                logger.warning("cuda_graphs: a step could not be recorded (%s); training goes on without.", error)
                self._parameters = []
                return self._loss(batch)
        held, replay = self._steps[key]
        fields = sorted(held)
        torch._foreach_copy_([held[name] for name in fields], [batch[name] for name in fields])
        return _WithGradients.apply(self._anchor, replay().detach().clone(), self)

    def _recorded(self, batch: Any) -> tuple[Fields, Callable[[], Tensor]]:
        held = {name: values.clone() for name, values in batch.interaction.items()}
        static = Interaction(held)
        parameters = self._parameters
        for parameter in parameters:
            parameter.grad = None

        def step() -> Tensor:
            with _same_autocast(parameters[0].device):
                loss = self._loss(static)
            with torch.autocast(parameters[0].device.type, enabled=False):
                loss.backward()
            return loss.detach()

        with kept_random(parameters[0].device):
            replay = self._record(self._into_buffers(step))
        for parameter in parameters:
            parameter.grad = None
        return held, replay

    def _into_buffers(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`step` with the gradients in buffers of ours; a first call finds out which parameters get one."""

        def into() -> Tensor:
            first = not self._gradients
            if not first:
                torch._foreach_zero_(list(self._gradients.values()))
            for number, gradient in self._gradients.items():
                self._parameters[number].grad = gradient
            loss = step()
            if first:
                found = {n: p.grad for n, p in enumerate(self._parameters) if p.grad is not None}
                self._gradients = {n: torch.zeros_like(grad).copy_(grad) for n, grad in found.items()}
            return loss

        return into

    def give_gradients(self) -> None:
        """Make those of the last replay the parameters' own."""
        for number, gradient in self._gradients.items():
            self._parameters[number].grad = gradient


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, owner: GraphedLoss) -> Tensor:
        ctx.owner = owner
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.owner.give_gradients()
        return None, None, None


class CudaGraphs:
    """Records what the current GPU does as CUDA graphs, which share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A function that repeats `step` and returns the same tensor each time, overwritten."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # what libraries allocate at their first call must not be recorded
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@contextlib.contextmanager
def _same_autocast(device: torch.device) -> Iterator[None]:
    """Autocast as it is outside, without its cache of cast weights: a replay must cast the weights again."""
    kind = device.type
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        yield


@contextlib.contextmanager
def kept_random(device: torch.device) -> Iterator[None]:
    """Afterwards the random numbers go on as if nothing had been drawn within."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
