"""SASRec's encoder over sequences laid end to end: no padding, no intermediate tensors, one pass per thread and group.

The kernels are in `src/encoder.h` and `src/layers.h`. Same function as the layer-by-layer form in torch; only the
draws of dropout differ (they are hashes of a seed from torch's generator, drawn again in the backward pass).
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch.autograd.function import once_differentiable

from recbole_raserec.kernels import native
from recbole_raserec.kernels.native import pointer

#: Items encoded in one call when no gradient is wanted: what a call keeps is some 6 KiB an item and layer.
TOKENS = 1 << 13


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
        found = native.loaded()
        if found is None or self.size % self.heads:
            return False
        return not (self.size // self.heads % found.width or self.inner % found.width)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Sequences laid end to end.

    Attributes:
        items: of all sequences, int64 [T].
        offsets: sequence s is `items[offsets[s]:offsets[s + 1]]`, not empty; int64 [S + 1].
        chosen: positions in `items` whose outputs are wanted, ascending, int64 [N].
        chosen_offsets: sequence s has `chosen[chosen_offsets[s]:chosen_offsets[s + 1]]`; int64 [S + 1].
        longest: length of the longest sequence.
    """

    items: torch.Tensor
    offsets: torch.Tensor
    chosen: torch.Tensor
    chosen_offsets: torch.Tensor
    longest: int

    def arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """items, offsets, chosen, chosen_offsets."""
        return self.items, self.offsets, self.chosen, self.chosen_offsets

    def parts(self, tokens: int) -> Iterator[Ragged]:
        """The sequences in order, in parts of about `tokens` items; one part when there are none."""
        last = torch.searchsorted(self.offsets, torch.arange(tokens, int(self.offsets[-1]) + tokens, tokens))
        ends = torch.unique(last.clamp(max=len(self.offsets) - 1)).tolist() or [0]
        start = 0
        for stop in ends:
            first, wanted = int(self.offsets[start]), int(self.chosen_offsets[start])
            yield Ragged(
                self.items[first : int(self.offsets[stop])],
                self.offsets[start : stop + 1] - first,
                self.chosen[wanted : int(self.chosen_offsets[stop])] - first,
                self.chosen_offsets[start : stop + 1] - wanted,
                self.longest,
            )
            start = stop

    @staticmethod
    def of_rows(item_seq: torch.Tensor, lengths: torch.Tensor, wanted: Optional[torch.Tensor] = None) -> Ragged:
        """From padded rows.

        Args:
            item_seq: left-aligned, int64 [B, L].
            lengths: in [1, L], int64 [B].
            wanted: positions whose outputs are wanted, none of them padding, bool [B, L]; None: each row's last.
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
    """Outputs of the last layer at the chosen positions, [N, H].

    Args:
        ragged: the sequences.
        architecture: sizes; its `fits` must hold.
        table: item vectors, float32 [V, H].
        positions: position vectors, float32 [L, H], L at least the longest sequence.
        weights: of each layer query, key, value, output (weight [H, H] and bias [H] each), gain and shift of the layer
            norm, feed-forward in (weight [I, H], bias [I]) and out ([H, I], [H]), gain and shift; after the layers'
            gain and shift of the embedding's layer norm.
        hidden_dropout: probability in [0, 1); 0 when the model is not being trained.
        attention_dropout: the same of the attention.

    Raises:
        IndexError: a sequence is empty or longer than `positions`, or an item is not in `table`.
    """
    lengths = ragged.offsets.diff()
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= ragged.longest <= len(positions):
        raise IndexError(f"sequences must have 1 to {len(positions)} items.")
    if int(ragged.offsets[-1]) != len(ragged.items) or int(ragged.chosen_offsets[-1]) != len(ragged.chosen):
        raise IndexError("offsets must end where the sequences and their chosen positions do.")
    owner = torch.repeat_interleave(ragged.chosen_offsets.diff())
    if not ((ragged.chosen >= ragged.offsets[owner]) & (ragged.chosen < ragged.offsets[owner + 1])).all():
        raise IndexError("chosen positions must lie in their sequences.")
    if len(ragged.items) and not 0 <= int(ragged.items.min()) <= int(ragged.items.max()) < len(table):
        raise IndexError(f"items must lie in [0, {len(table)}).")
    dropout = hidden_dropout, attention_dropout
    if torch.is_grad_enabled():
        return _Encode.apply(ragged, architecture, dropout, True, table, positions, *weights)
    parts = [
        _Encode.apply(part, architecture, dropout, False, table, positions, *weights) for part in ragged.parts(TOKENS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ragged: Ragged, a: Architecture, dropout: tuple[float, float], keep: bool, table: torch.Tensor,
        positions: torch.Tensor, *weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        found = native.loaded()
        assert found is not None
        flat = torch.cat([w.reshape(-1) for w in weights]).float()
        keep = keep and any(ctx.needs_input_grad)
        sequences, outputs = len(ragged.offsets) - 1, len(ragged.chosen)
        sizes = (len(ragged.items), sequences, outputs, len(table), ragged.longest, a.size, a.inner, a.heads, a.layers)
        numbers = torch.tensor([*sizes, int(keep)])
        room = torch.zeros(2, dtype=torch.int64)
        found.call.raserec_encoder_floats(pointer(numbers), pointer(room))
        columns, tape = (torch.empty(size, dtype=torch.float32) for size in room.tolist())
        settings = torch.tensor([a.epsilon, *dropout], dtype=torch.float32)
        seeds = torch.zeros(4, dtype=torch.int32)
        if any(dropout):
            seeds.random_(-(1 << 31), 1 << 31)
        index = tuple(x.to(torch.int64).contiguous() for x in ragged.arrays())
        tensors = (numbers, *index, table.contiguous(), positions.contiguous(), flat, columns, tape, settings, seeds)
        out = torch.empty(outputs, a.size, dtype=torch.float32)
        if sequences:
            threads = ctypes.c_int(torch.get_num_threads())
            if found.call.raserec_encode(*map(pointer, tensors), threads, pointer(out)):
                raise MemoryError("no memory for the encoder's buffers.")
        if keep:
            ctx.save_for_backward(*tensors)
            ctx.shapes = [w.shape for w in weights]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        found = native.loaded()
        assert found is not None
        tensors = ctx.saved_tensors
        table, positions, flat = tensors[5:8]
        results = [torch.zeros_like(x) for x in (flat, positions, table)]
        if len(tensors[2]) > 1:
            threads = ctypes.c_int(torch.get_num_threads())
            above = grads[0].contiguous()  # a name of its own: it must live until the call returns
            given = *map(pointer, tensors), threads, pointer(above), *map(pointer, results)
            if found.call.raserec_encode_backward(*given):
                raise MemoryError("no memory for the encoder's buffers.")
        grad_flat, grad_positions, grad_table = results
        parts = grad_flat.split([shape.numel() for shape in ctx.shapes])
        grad_weights = (part.view(shape) for part, shape in zip(parts, ctx.shapes))
        return None, None, None, None, grad_table, grad_positions, *grad_weights
