"""Hybrid inference: the regenerator writes patterns for sequences, one in each of its K ways (DR4SR, section 4.3).

At each step a coin decides: with probability gamma the next item is chosen among the sequence's own (restrictive),
otherwise among all (generative); never one that the pattern has already. The public code always tosses restrictive.

All sequences of a batch and all K conditions are decoded together; greedily on a CPU by the compiled kernels. The last
bits of a product depend on the size of the batch and on the kernel, and with them, in float32, now and then an item. So
a pattern with any choice closer than float32 can tell is decoded again in float64 (draws always are), and coins and
draws are functions of (seed, sequence, condition, step): the patterns do not depend on the batch size.
"""

from __future__ import annotations

import copy
import ctypes
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.data import ORIGINS, Patterns, Regenerated
from recbole_raserec.kernels import Library, loaded, pointer
from recbole_raserec.regeneration.pairs import Sequences
from recbole_raserec.regeneration.regenerator import KeyValue, Regenerator, first_occurrences

#: Items a pattern has at least; a single one has no prefix.
LEAST = 2

_ROWS = 256  # rows whose logits over all items are held at a time
_BLOCK = 128  # columns of a block of logits, see best_two
_UNSURE = 2e-5  # rounding of a logit in float32, as a share of |h| |item|: four times what is measured
_PANEL, _MOST_WAYS = 64, 60  # items in a panel and rows of a block, decode.h


class Decoder:
    """Writes patterns with a trained regenerator.

    Args:
        model: trained; it is copied.
        gamma: share of restrictive steps, in [0, 1].
        temperature: 0: the best item (greedy); above: items are drawn, their logits divided by it.
        seed: of coins and draws.
        native_kernels: use the compiled kernels where they are built and fit.
    """

    def __init__(
        self, model: Regenerator, gamma: float, temperature: float = 0.0, seed: int = 0, native_kernels: bool = True
    ):
        self.exact = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.gamma, self.temperature, self.seed = float(gamma), float(temperature), int(seed)
        self._fine = TorchSteps(self.exact, self.temperature)
        rough = copy.deepcopy(model).float().eval().requires_grad_(False)
        unsure = _UNSURE * float(rough.items.weight[1:].norm(dim=1).max())
        self._compiled = compiled(rough, unsure) if native_kernels and not temperature else None
        self._rough = TorchSteps(rough, 0.0, unsure) if not temperature else None

    @torch.no_grad()
    def decode(self, items: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """Patterns of sequences.

        Args:
            items: int64 [B, S], padded with 0.
            numbers: int [B], of the sequences; coins and draws depend on them.

        Returns:
            int64 [B, K, pattern_length], padded with 0; at least two items each, unless the sequence has too few for
            restrictive steps.
        """
        shape = len(items), self.exact.conditions, self.exact.pattern_length
        streams = (uniform(self.seed, numbers, *shape[1:], stream) for stream in (0, 1))
        coins, draws = (torch.from_numpy(stream).to(items.device) for stream in streams)
        restrictive = coins < self.gamma
        if self._rough is None:
            return self._fine.run(items, restrictive, draws)[0].view(shape)
        if self._compiled is not None:
            found, close = self._compiled.run(items, restrictive)
        else:
            found, close = (x.view(shape[: x.dim() + 1]) for x in self._rough.run(items, restrictive, draws))
        again = close.any(1).nonzero().squeeze(1)
        if len(again):
            found[close] = self._fine.run(items[again], restrictive[again], draws[again], close[again])[0]
        return found


class TorchSteps:
    """The decoding by torch, in the precision of `model`, which is in evaluation mode.

    A choice is close where two logits differ by less than `unsure` times |h|: the rounding of products and of h.
    """

    def __init__(self, model: Regenerator, temperature: float, unsure: float = 0.0):
        self.model, self.temperature, self._unsure = model, temperature, unsure
        table = model.items.weight[: model.n_items]
        width = -(-model.n_items // _BLOCK) * _BLOCK
        self._table = torch.zeros(model.size, width, dtype=table.dtype, device=table.device)
        self._table[:, : model.n_items] = table.t()
        self._logits = torch.empty(_ROWS, width, dtype=table.dtype, device=table.device)

    def run(
        self, items: torch.Tensor, restrictive: torch.Tensor, draws: torch.Tensor, wanted: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patterns [N, length] of sequences `items` int64 [B, S], and bool [N] where a choice was too close to tell.

        `wanted` bool [B, K] says which N are decoded, all by default; `restrictive` bool and `draws` [B, K, length].
        """
        model, length, source = self.model, self.model.pattern_length, self.model.encode(items)
        if wanted is None:
            wanted = torch.ones(restrictive.shape[:2], dtype=torch.bool, device=items.device)
        owner = wanted.nonzero()[:, 0]
        keys_values = model.keys_values(source.spaces[wanted])
        mask = (items > 0)[owner][:, None, None]
        restrictive, draws = restrictive[wanted], draws[wanted]
        written = torch.zeros(len(owner), length, dtype=torch.int64, device=items.device)
        close = torch.zeros(len(owner), dtype=torch.bool, device=items.device)
        token = torch.full((len(owner),), model.start, device=items.device)
        past: list[Optional[KeyValue]] = [None] * len(keys_values)
        going = torch.ones(len(owner), dtype=torch.bool, device=items.device)
        for step in range(length):
            x = model.pattern_norm(model.items(token) + model.pattern_positions.weight[step])[:, None]
            for number, layer in enumerate(model.decoder_layers()):
                x, past[number] = layer.step(x, past[number], keys_values[number], mask)
            h = x[:, 0]
            end = h @ model.items.weight[model.end]
            token = torch.full_like(token, model.end)
            own = (restrictive[:, step] & going).nonzero().squeeze(1)
            for rows in own.split(_ROWS):
                own_items = source.items[owner[rows]]  # [R, S]
                logits = (model.items(own_items) @ h[rows][:, :, None]).squeeze(2)
                used = (own_items[:, :, None] == written[rows, None]).any(2)
                logits = logits.masked_fill(used | ~source.candidates[owner[rows]], -torch.inf)
                column, unsure = self._choose(logits, h[rows], end[rows], draws[rows, step], step)
                last = own_items.shape[1]
                picked = own_items.gather(1, column.clamp(max=last - 1)[:, None]).squeeze(1)
                token[rows] = torch.where(column < last, picked, model.end)
                close[rows] |= unsure
            free = (~restrictive[:, step] & going).nonzero().squeeze(1)
            for rows in free.split(_ROWS):
                logits = self._logits[: len(rows)]
                torch.mm(h[rows], self._table, out=logits)
                logits[:, model.n_items :] = -torch.inf
                logits.scatter_(1, written[rows], -torch.inf)  # unwritten steps are 0, the padding
                logits[:, 0] = -torch.inf
                column, unsure = self._choose(logits, h[rows], end[rows], draws[rows, step], step)
                token[rows] = torch.where(column < model.n_items, column, model.end)
                close[rows] |= unsure
            going &= token != model.end
            if not bool(going.any()):
                break
            written[:, step] = torch.where(going, token, 0)
        return written, close

    def _choose(
        self, logits: torch.Tensor, h: torch.Tensor, end: torch.Tensor, draw: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Column of `logits` [R, C] that is taken, C or more: the end; and whether that was too close to tell."""
        column, best, second = best_two(logits)
        if step < LEAST:  # no end yet, if there is any item at all
            end = torch.where(torch.isneginf(best), end, -torch.inf)
        if self.temperature:
            every = torch.cat([logits, end[:, None]], dim=1)
            weights = torch.softmax(every / self.temperature, dim=1).cumsum(dim=1)
            drawn = torch.searchsorted(weights, (draw * weights[:, -1])[:, None], right=True).squeeze(1)
            return drawn, torch.zeros_like(drawn, dtype=torch.bool)
        gap = torch.where(end > best, end - best, best - torch.maximum(second, end))
        return torch.where(end > best, logits.shape[1], column), gap <= self._unsure * h.norm(dim=1)


def best_two(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Column of the best of each row [R, C] (the first of equal ones), its value, and the value of the next: [R] each.

    One pass of maxima over blocks of columns, then a look into the best block: several times faster than an argmax.
    """
    rows, columns = logits.shape
    block = _BLOCK if columns % _BLOCK == 0 else columns
    blocks = logits.view(rows, columns // block, block)
    peaks = blocks.amax(dim=2)
    best = peaks.amax(dim=1)
    number = (peaks == best[:, None]).int().argmax(dim=1)
    inside = blocks[torch.arange(rows, device=logits.device), number]  # [R, block]
    column = (inside == best[:, None]).int().argmax(dim=1)
    inside = inside.scatter(1, column[:, None], -torch.inf)
    peaks = peaks.scatter(1, number[:, None], -torch.inf)
    return number * block + column, best, torch.maximum(inside.amax(dim=1), peaks.amax(dim=1))


def compiled(model: Regenerator, unsure: float) -> Optional[CompiledSteps]:
    """The compiled kernels' form of `TorchSteps` without temperature; None where they are not built or do not fit."""
    found = loaded()
    if found is None or model.projections.device.type != "cpu" or model.projections.dtype != torch.float32:
        return None
    layers = model.decoder_layers()
    widths = [model.size // layer.own.heads for layer in layers] + [_inner(layer) for layer in layers]
    fits = layers and model.conditions <= _MOST_WAYS and not any(width % found.width for width in widths)
    return CompiledSteps(model, unsure, found) if fits else None


class CompiledSteps:
    """Greedy decoding by the compiled kernels: all steps of a few sequences at a time, all items in one sweep.

    `kernels/src/decode.h` holds the loop; what it reads of `model` (float32, on the CPU) is laid out here.
    """

    def __init__(self, model: Regenerator, unsure: float, library: Library):
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
            # Slightly more: these are bounds, and float32 rounds them.
            self._errors = (table - rounded).norm(dim=2).amax(1) * 1.0001
            self._norms = rounded.norm(dim=2).amax(1) * 1.0001
        self._numbers = [_inner(layers[0]), layers[0].own.heads, len(layers), n_items, LEAST]
        self._settings = torch.tensor([model.pattern_norm.eps, unsure])

    def run(self, items: torch.Tensor, restrictive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Patterns int64 [B, K, length] of sequences [B, S], and bool [B, K] where a choice was too close to tell.

        Arguments as of `TorchSteps.run`; no row of `items` is empty.
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
        numbers = torch.tensor([*shape, items.shape[1], model.size, *self._numbers])
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


def _inner(layer: Any) -> int:
    return layer.feed_forward[0].out_features


def _parts(layer: Any) -> list[torch.Tensor]:
    """The weights of a `DecoderLayer` in the order of decode.h."""
    own, source, wide, back = layer.own, layer.source, layer.feed_forward[0], layer.feed_forward[3]
    parts = [torch.cat([_w(own.query), _w(own.key), _w(own.value)], 1), _bias(own.query, own.key, own.value)]
    for linear, norm in ((own.out, 0), (source.query, None), (source.out, 1), (wide, None), (back, 2)):
        parts += [_w(linear), linear.bias]
        parts += [] if norm is None else [layer.norms[norm].weight, layer.norms[norm].bias]
    return [part.detach() for part in parts]


def generate(
    model: Regenerator, sequences: Sequences, gamma: float, temperature: float = 0.0, seed: int = 0,
    batch_size: int = 256, desc: Optional[str] = None, native_kernels: bool = True,
) -> np.ndarray:  # fmt: skip
    """Patterns of all sequences: int64 [S, K, pattern_length], padded with 0. Arguments not named here: see `Decoder`.

    Args:
        sequences: of at most `model.longest` items each.
        batch_size: sequences decoded at a time; it changes only speed and memory (K rows of V float64 each).
        desc: label of the progress bar.
    """
    decoder, device = Decoder(model, gamma, temperature, seed, native_kernels), model.projections.device
    found = np.zeros((len(sequences), model.conditions, model.pattern_length), dtype=np.int64)
    order = np.argsort(sequences.lengths(), kind="stable")
    with tqdm(total=len(order), desc=desc, disable=desc is None, unit="sequences", dynamic_ncols=True) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            found[rows] = decoder.decode(sequences.padded(rows).to(device), rows).cpu().numpy()
            bar.update(len(rows))
    return found


def uniform(seed: int, numbers: np.ndarray, ways: int, steps: int, stream: int) -> np.ndarray:
    """Doubles in [0, 1) as a function of seed, number, way, step and stream: [N, ways, steps].

    The finaliser of splitmix64 (Steele, Lea and Flood, 2014) over a counter.
    """
    numbers = np.asarray(numbers, dtype=np.uint64)[:, None, None]
    counters = np.arange(ways * steps, dtype=np.uint64).reshape(ways, steps)
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed % (1 << 64)], np.uint64) + np.uint64(stream) * np.uint64(0xD1342543DE82EF95))
        state = _mix(state + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def combine(original: Sequences, read: Sequences, patterns: Patterns, generated: np.ndarray) -> Regenerated:
    """What joins the `original` sequences: every mined pattern, then every one `generated` int64 [len(read), K, L] for
    those `read`, in their order; of equal ones the first, and none that is an original sequence."""
    rows = generated.reshape(-1, generated.shape[2])
    lengths = (rows > 0).sum(axis=1)
    kept = np.flatnonzero(lengths >= LEAST)
    items = np.concatenate([patterns.items, rows[kept][rows[kept] > 0]])
    sizes = np.concatenate([patterns.lengths(), lengths[kept]])
    offsets = np.concatenate([original.offsets, original.offsets[-1] + np.cumsum(sizes)])
    users = np.concatenate([np.zeros(len(patterns), np.int64), np.repeat(read.users, generated.shape[1])[kept]])
    numbers = [ORIGINS.index("pattern"), ORIGINS.index("generated")]
    origin = np.repeat(np.array(numbers, np.uint8), [len(patterns), len(kept)])
    fresh = first_of_each(np.concatenate([original.items, items]), offsets)[len(original) :]
    items, offsets = items[np.repeat(fresh, sizes)].astype(np.int64), np.concatenate([[0], np.cumsum(sizes[fresh])])
    return Regenerated(items, offsets, users[fresh], origin[fresh])


def first_of_each(items: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """bool [S]: no earlier sequence has the same items. Compared by their bytes, not by a hash."""
    data = np.ascontiguousarray(items, dtype=np.int64).tobytes()
    first: dict[bytes, int] = {}
    for row, (start, stop) in enumerate(zip((8 * offsets[:-1]).tolist(), (8 * offsets[1:]).tolist())):
        first.setdefault(data[start:stop], row)
    return np.isin(np.arange(len(offsets) - 1), list(first.values()))
