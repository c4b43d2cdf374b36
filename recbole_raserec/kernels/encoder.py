"""SASRec's encoder over sequences laid end to end: no padding, no intermediate tensors, one pass per thread and group.

The kernels are in ``src/encoder.h`` and ``src/layers.h``. Same function as the layer-by-layer form in torch; only the
draws of dropout differ (they are hashes of a seed from torch's generator, drawn again in the backward pass).
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable

from recbole_raserec.kernels import native
from recbole_raserec.kernels.native import pointer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of the encoder: vectors, feed-forward layers, attention heads, layers; epsilon of the layer norms."""

    size: int
    inner: int
    heads: int
    layers: int
    epsilon: float

    def fits(self) -> bool:
        """Whether the compiled kernels take it: sizes, that of a head included, are multiples of their vectors."""
        found = native.library()
        if found is None or self.size % self.heads:
            return False
        return not (self.size // self.heads % found.width or self.inner % found.width)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences laid end to end.

    Attributes:
        items: int64 [T]. offsets: int64 [S + 1]; sequence s is ``items[offsets[s]:offsets[s + 1]]``, not empty.
        chosen: int64 [N], ascending places in `items` whose outputs are wanted.
        chosen_offsets: int64 [S + 1]; sequence s has ``chosen[chosen_offsets[s]:chosen_offsets[s + 1]]``.
        longest: length of the longest sequence.
    """

    items: torch.Tensor
    offsets: torch.Tensor
    chosen: torch.Tensor
    chosen_offsets: torch.Tensor
    longest: int

    @staticmethod
    def of_rows(item_seq: torch.Tensor, lengths: torch.Tensor, wanted: Optional[torch.Tensor] = None) -> Ragged:
        """From padded rows.

        Args:
            item_seq: int64 [B, L], left-aligned. lengths: int64 [B], in [1, L].
            wanted: bool [B, L], positions whose outputs are wanted, none of them padding; None for each row's last.
        """
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        longest = int(lengths.max()) if len(lengths) else 0
        columns = torch.arange(item_seq.size(1))
        items = item_seq[columns < lengths[:, None]]
        if wanted is None:
            return Ragged(items, offsets, offsets[1:] - 1, torch.arange(len(lengths) + 1), longest)
        row, column = wanted.nonzero(as_tuple=True)
        chosen_offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(wanted.sum(dim=1), 0, out=chosen_offsets[1:])
        return Ragged(items, offsets, offsets[row] + column, chosen_offsets, longest)


def encode(
    ragged: Ragged, architecture: Architecture, table: torch.Tensor, positions: torch.Tensor,
    weights: list[torch.Tensor], hidden_dropout: float = 0.0, attention_dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Outputs of the last layer at the chosen places, [N, H].

    Args:
        ragged: the sequences. architecture: sizes; :meth:`Architecture.fits` must hold.
        table: float32 [V, H], item vectors. positions: float32 [L, H], L at least the longest sequence.
        weights: of each layer query, key, value, output (weight [H, H] and bias [H] each), gain and shift of the layer
            norm, feed-forward in (weight [I, H], bias [I]) and out ([H, I], [H]), gain and shift; after the layers'
            gain and shift of the embedding's layer norm.
        hidden_dropout, attention_dropout: probabilities in [0, 1); 0 when the model is not being trained.

    Raises:
        IndexError: a sequence is empty or longer than `positions`, or an item is not in `table`.
    """
    lengths = ragged.offsets.diff()
    if len(lengths) and not 1 <= int(lengths.min()) <= ragged.longest <= len(positions):
        raise IndexError(f"sequences must have 1 to {len(positions)} items.")
    if len(ragged.items) and not 0 <= int(ragged.items.min()) <= int(ragged.items.max()) < len(table):
        raise IndexError(f"items must lie in [0, {len(table)}).")
    return _Encode.apply(ragged, architecture, (hidden_dropout, attention_dropout), table, positions, *weights)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ragged: Ragged, a: Architecture, dropout: tuple[float, float], table: torch.Tensor,
        positions: torch.Tensor, *weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        found = native.library()
        assert found is not None
        flat = torch.cat([w.reshape(-1) for w in weights])
        keep = any(ctx.needs_input_grad)
        sequences, outputs = len(ragged.offsets) - 1, len(ragged.chosen)
        sizes = (len(ragged.items), sequences, outputs, len(table), ragged.longest, a.size, a.inner, a.heads, a.layers)
        numbers = torch.tensor([*sizes, int(keep)])
        room = torch.zeros(2, dtype=torch.int64)
        found.call.raserec_encoder_floats(pointer(numbers), pointer(room))
        columns, tape = (torch.empty(size) for size in room.tolist())
        settings = torch.tensor([a.epsilon, *dropout], dtype=torch.float32)
        seeds = torch.zeros(4, dtype=torch.int32)
        if any(dropout):
            seeds.random_(-(1 << 31), 1 << 31)
        index = tuple(x.contiguous() for x in (ragged.items, ragged.offsets, ragged.chosen, ragged.chosen_offsets))
        tensors = (numbers, *index, table.contiguous(), positions.contiguous(), flat, columns, tape, settings, seeds)
        out = torch.empty(outputs, a.size)
        if sequences:
            threads = ctypes.c_int(torch.get_num_threads())
            if found.call.raserec_encode(*map(pointer, tensors), threads, pointer(out)):
                raise MemoryError("no memory for the encoder's rooms.")
        if keep:
            ctx.save_for_backward(*tensors)
            ctx.shapes = [w.shape for w in weights]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        found = native.library()
        assert found is not None
        tensors = ctx.saved_tensors
        table, positions, flat = tensors[5:8]
        results = [torch.zeros_like(x) for x in (flat, positions, table)]
        if len(tensors[2]) > 1:
            threads = ctypes.c_int(torch.get_num_threads())
            above = pointer(grads[0].contiguous())
            if found.call.raserec_encode_backward(*map(pointer, tensors), threads, above, *map(pointer, results)):
                raise MemoryError("no memory for the encoder's rooms.")
        grad_flat, grad_positions, grad_table = results
        parts = grad_flat.split([shape.numel() for shape in ctx.shapes])
        grad_weights = (part.view(shape) for part, shape in zip(parts, ctx.shapes))
        return None, None, None, grad_table, grad_positions, *grad_weights
