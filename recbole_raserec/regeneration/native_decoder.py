"""Greedy decoding by the compiled kernels: all steps of a few sequences at a time, the best of all items in one sweep.

``kernels/src/decode.h`` holds the loop; what it reads of the model is laid out here. Same choices as the form in torch
(:mod:`recbole_raserec.regeneration.inference`), which is used where the kernels are not there or the sizes do not fit.
"""

from __future__ import annotations

import ctypes
from typing import Optional

import torch

from recbole_raserec.kernels import Library, loaded, pointer
from recbole_raserec.regeneration.regenerator import Attention, DecoderLayer, Regenerator, first_occurrences

_PANEL = 64  # items in a panel, decode.h
_MOST_WAYS = 60  # rows of a block there


def compiled(model: Regenerator, least: int, unsure: float) -> Optional[CompiledSteps]:
    """The compiled form of a model in evaluation mode, or None where it cannot be had.

    Args:
        model: float32, on the CPU. least: items a pattern has at least. unsure: difference of two logits, per length of
            the decoder's output, below which a choice is reported as close.
    """
    found = loaded()
    if found is None or model.projections.device.type != "cpu" or model.projections.dtype != torch.float32:
        return None
    layers = model.decoder_layers()
    widths = [model.size // layer.own.heads for layer in layers] + [_inner(layer) for layer in layers]
    fits = layers and model.conditions <= _MOST_WAYS and not any(width % found.width for width in widths)
    return CompiledSteps(model, least, unsure, found) if fits else None


class CompiledSteps:
    """See :func:`compiled`."""

    def __init__(self, model: Regenerator, least: int, unsure: float, library: Library):
        self._model, self._library = model, library
        layers = model.decoder_layers()
        size, ways, n_items = model.size, model.conditions, model.n_items
        with torch.no_grad():
            # [H, K * layers * 2H]: the source's projection into each space, and each layer's keys and values of it.
            maps = torch.stack([torch.cat([_w(layer.source.key), _w(layer.source.value)], 1) for layer in layers])
            self._into = torch.einsum("khg,lgj->hklj", model.projections, maps).reshape(size, -1).contiguous()
            bias = torch.cat([_bias(layer.source.key, layer.source.value) for layer in layers])
            self._into_bias = bias.repeat(ways)
            self._weights = torch.cat([part.reshape(-1) for layer in layers for part in _parts(layer)])
            self._positions = model.pattern_positions.weight.detach().contiguous()
            self._norm = [model.pattern_norm.weight.detach(), model.pattern_norm.bias.detach()]
            self._table = model.items.weight.detach().contiguous()
            table = torch.zeros(-(-n_items // _PANEL), _PANEL, size)
            table.view(-1, size)[:n_items] = self._table[:n_items]
            if library.bfloat16:
                rounded = table.bfloat16()
                pairs = rounded.view(len(table), _PANEL, size // 2, 2).transpose(1, 2)
                self._columns, rounded = pairs.contiguous(), rounded.float()
            else:
                self._columns, rounded = table.transpose(1, 2).contiguous(), table
            # A whisker up: these are bounds, and float32 rounds them.
            self._errors = (table - rounded).norm(dim=2).amax(1) * 1.0001
            self._norms = rounded.norm(dim=2).amax(1) * 1.0001
        numbers = [model.pattern_length, size, _inner(layers[0]), layers[0].own.heads, len(layers), n_items, least]
        self._numbers, self._settings = numbers, torch.tensor([model.pattern_norm.eps, unsure])

    def run(self, items: torch.Tensor, restrictive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patterns int64 [B, K, length] of sequences [B, S], and bool [B, K] where a choice was too close to tell.

        Args:
            items: padded with 0, none empty. restrictive: bool [B, K, length].

        Raises:
            IndexError: an item is not one of the model's.
        """
        model = self._model
        shape = len(items), model.conditions, model.pattern_length
        if restrictive.shape != shape or items.shape[1] > model.longest:
            raise ValueError("sequences and coins must fit the regenerator.")
        if items.numel() and not 0 <= int(items.min()) <= int(items.max()) < model.n_items:
            raise IndexError(f"items must lie in [0, {model.n_items}).")
        source = model.read(items).contiguous()
        items, unused, own = items.contiguous(), first_occurrences(items), restrictive.contiguous()
        written, close = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape[:2], dtype=torch.bool)
        steps, size, inner, heads, layers, n_items, least = self._numbers
        numbers = torch.tensor(
            [len(items), model.conditions, steps, items.shape[1], size, inner, heads, layers, n_items, least]
        )
        failed = self._library.call.raserec_decode(
            *map(pointer, (numbers, source, items, unused, own, self._into, self._into_bias, self._weights)),
            *map(pointer, (self._positions, *self._norm, self._table, self._columns, self._errors, self._norms)),
            pointer(self._settings), ctypes.c_int(torch.get_num_threads()), pointer(written), pointer(close),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory to decode in; lower the batch size.")
        return written, close


def _w(linear: torch.nn.Linear) -> torch.Tensor:
    """[in, out]."""
    return linear.weight.detach().t()


def _bias(*linears: torch.nn.Linear) -> torch.Tensor:
    return torch.cat([linear.bias.detach() for linear in linears])


def _inner(layer: DecoderLayer) -> int:
    first = layer.feed_forward[0]
    assert isinstance(first, torch.nn.Linear)
    return first.out_features


def _parts(layer: DecoderLayer) -> list[torch.Tensor]:
    """A layer's weights in the order of decode.h."""

    def out(attention: Attention) -> list[torch.Tensor]:
        return [_w(attention.out), attention.out.bias]

    def norm(number: int) -> list[torch.Tensor]:
        return list(layer.norms[number].parameters())  # gain, shift

    own, source = layer.own, layer.source
    wide, back = layer.feed_forward[0], layer.feed_forward[3]
    assert isinstance(wide, torch.nn.Linear)
    assert isinstance(back, torch.nn.Linear)
    parts = [torch.cat([_w(own.query), _w(own.key), _w(own.value)], 1), _bias(own.query, own.key, own.value)]
    parts += [*out(own), *norm(0), _w(source.query), source.query.bias, *out(source), *norm(1)]
    parts += [_w(wide), wide.bias, _w(back), back.bias, *norm(2)]
    return [part.detach() for part in parts]
