"""Hybrid inference: the regenerator writes patterns for sequences, one in each of its K ways (DR4SR, section 4.3).

At each step a coin decides: with probability gamma the next item is chosen among the sequence's own (restrictive),
otherwise among all (generative); never one that the pattern has already. The public code always tosses restrictive.

All sequences of a batch and all K conditions are decoded together, a step at a time, on kept keys and values, in
float64: in float32 the last bits of a product depend on the size of the batch, and with them, now and then, an item.
Coins and draws are functions of (seed, sequence, condition, step). So the patterns do not depend on the batch size.
"""

from __future__ import annotations

import copy
from typing import Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.regeneration.layers import KeyValue
from recbole_raserec.regeneration.regenerator import Regenerator, Source
from recbole_raserec.regeneration.sources import Sequences

#: Items a pattern has at least; a single one has no prefix.
LEAST = 2

_COIN, _DRAW = 0, 1


class Decoder:
    """Writes patterns with a trained regenerator.

    Args:
        model: trained; it is copied. gamma: share of restrictive steps, in [0, 1].
        temperature: 0: the best item (greedy); above: items are drawn, their logits divided by it. seed: of both.
    """

    def __init__(self, model: Regenerator, gamma: float, temperature: float = 0.0, seed: int = 0):
        self.model = copy.deepcopy(model).double().eval()
        self.gamma, self.temperature, self.seed = float(gamma), float(temperature), int(seed)

    @torch.no_grad()
    def decode(self, items: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """Patterns of sequences.

        Args:
            items: int64 [B, S], padded with 0. numbers: int [B], of the sequences; they enter coins and draws.

        Returns:
            int64 [B, K, pattern_length], padded with 0; at least two items each, unless the sequence has too few for
            restrictive steps.
        """
        model, count, length = self.model, len(items), self.model.pattern_length
        source = model.encode(items)
        ways = model.conditions
        owner = torch.arange(count, device=items.device).repeat_interleave(ways)
        keys_values = model.keys_values(source.spaces.flatten(0, 1))
        mask = (items > 0)[owner][:, None, None]
        coins, draws = (
            torch.from_numpy(uniform(self.seed, numbers, ways, length, stream)).reshape(-1, length).to(items.device)
            for stream in (_COIN, _DRAW)
        )
        written = torch.zeros(count * ways, length, dtype=torch.int64, device=items.device)
        token = torch.full((count * ways,), model.start, device=items.device)
        past: list[Optional[KeyValue]] = [None] * len(keys_values)
        open_ = torch.ones(count * ways, dtype=torch.bool, device=items.device)
        for step in range(length):
            x = model.pattern_norm(model.items(token) + model.pattern_positions.weight[step])[:, None]
            for number, layer in enumerate(model.decoder_layers()):
                x, past[number] = layer.step(x, past[number], keys_values[number], mask)
            restrictive = coins[:, step] < self.gamma
            token = torch.full_like(token, model.end)
            for rows, choose in ((restrictive, self._among_own), (~restrictive, self._among_all)):
                rows = (rows & open_).nonzero().squeeze(1)
                if len(rows):
                    token[rows] = choose(x[rows, 0], source, owner[rows], written[rows], draws[rows, step], step)
            open_ &= token != model.end
            if not bool(open_.any()):
                break
            written[:, step] = torch.where(open_, token, 0)
        return written.view(count, ways, length)

    def _among_own(
        self, h: torch.Tensor, source: Source, owner: torch.Tensor, written: torch.Tensor, draw: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The next item of rows [R], or the end, among the items of their sequences."""
        items = source.items[owner]  # [R, S]
        logits = (self.model.items(items) @ h[:, :, None]).squeeze(2)
        used = (items[:, :, None] == written[:, None]).any(2)
        logits = logits.masked_fill(used | ~source.candidates[owner], -torch.inf)
        place = self._choose(logits, h, draw, step)
        own = items.gather(1, place.clamp(max=items.shape[1] - 1)[:, None]).squeeze(1)
        return torch.where(place < items.shape[1], own, self.model.end)

    def _among_all(
        self, h: torch.Tensor, source: Source, owner: torch.Tensor, written: torch.Tensor, draw: torch.Tensor, step: int
    ) -> torch.Tensor:
        """The next item of rows [R], or the end, among all items."""
        table = self.model.items.weight[: self.model.n_items]
        logits = h @ table.t()  # [R, V]
        logits[:, 0] = -torch.inf
        logits.scatter_(1, written, -torch.inf)  # unwritten places are 0, the padding
        place = self._choose(logits, h, draw, step)
        return torch.where(place < self.model.n_items, place, self.model.end)

    def _choose(self, logits: torch.Tensor, h: torch.Tensor, draw: torch.Tensor, step: int) -> torch.Tensor:
        """Column of `logits` [R, C] that is taken; C: the end."""
        end = h @ self.model.items.weight[self.model.end]
        best = logits.amax(dim=1)
        if step < LEAST:  # no end yet, if there is any item at all
            end = torch.where(torch.isneginf(best), end, -torch.inf)
        if not self.temperature:
            return torch.where(end > best, logits.shape[1], logits.argmax(dim=1))
        weights = torch.softmax(torch.cat([logits, end[:, None]], dim=1) / self.temperature, dim=1).cumsum(dim=1)
        # the last column that has any weight ends at the total
        return torch.searchsorted(weights, (draw * weights[:, -1])[:, None], right=True).squeeze(1)


def generate(
    model: Regenerator, sequences: Sequences, gamma: float, temperature: float = 0.0, seed: int = 0,
    batch_size: int = 256, desc: Optional[str] = None,
) -> np.ndarray:  # fmt: skip
    """Patterns of all sequences: int64 [S, K, pattern_length], padded with 0.

    Args:
        model, gamma, temperature, seed: see :class:`Decoder`. sequences: of at most `model.longest` items each.
        batch_size: sequences decoded at a time; it changes nothing but speed and memory (K rows of V float64 each).
        desc: show a progress bar with this label.
    """
    decoder, device = Decoder(model, gamma, temperature, seed), model.projections.device
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
    places = np.arange(ways * steps, dtype=np.uint64).reshape(ways, steps)
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed % (1 << 64)], np.uint64) + np.uint64(stream) * np.uint64(0xD1342543DE82EF95))
        state = _mix(state + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + (places + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
