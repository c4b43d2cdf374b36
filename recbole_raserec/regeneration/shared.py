"""Attention of many pairs to few sequences: what pairs of one sequence share is computed once for all of them.

Each pair p of a sequence b attends to a mixture of b's K latent spaces, X_b R_p with R_p = sum_k s_pk P_k. Keys and
values are linear in it, so neither the spaces nor the mixture ([P, S, H] numbers, in each layer twice) need be built: a
query q of p meets X_b as R_p W_key' q, and what the weights w take from X_b becomes a value as W_value R_p' (X_b' w).

Shapes: B sequences of S positions, P pairs, T steps of each, K spaces, N pairs of a sequence at most, H hidden size,
D = H / heads.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from recbole_raserec.regeneration.layers import Attention


@dataclasses.dataclass(frozen=True)
class PairsOfSources:
    """Which sequence each pair belongs to, how it mixes that sequence's spaces, and where it stands beside the others.

    Attributes:
        hidden: [B, S, H], the sequences. filled: bool [B, S], where an item stands.
        mixtures: [P, H, H], R_p. slots: int64 [P], place of each pair among B x `width` ones, those of a sequence side
            by side. width: N.
    """

    hidden: torch.Tensor
    filled: torch.Tensor
    mixtures: torch.Tensor
    slots: torch.Tensor
    width: int

    @classmethod
    def of(
        cls, hidden: torch.Tensor, filled: torch.Tensor, owner: torch.Tensor, shares: torch.Tensor,
        projections: torch.Tensor,
    ) -> PairsOfSources:  # fmt: skip
        """`owner`: int64 [P], the sequence of each pair, in any order; `shares` [P, K] of `projections` [K, H, H]."""
        counts = torch.bincount(owner, minlength=len(hidden))
        order = torch.argsort(owner, stable=True)
        column = torch.empty_like(owner)
        starts = counts.cumsum(0) - counts
        column[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
        width = int(counts.max()) if len(counts) else 0
        mixtures = (shares @ projections.flatten(1)).view(len(owner), *projections.shape[1:])
        return cls(hidden, filled, mixtures, owner * width + column, width)

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the pairs [P, Q, H] beside those of the same sequence: [B, N Q, H], zeros where there is none."""
        grid = x.new_zeros(len(self.hidden) * self.width, *x.shape[1:])
        return grid.index_copy(0, self.slots, x).view(len(self.hidden), self.width * x.shape[1], -1)

    def take_up(self, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`lay_out`."""
        return grid.reshape(len(self.hidden) * self.width, -1, grid.shape[2]).index_select(0, self.slots)

    def attend(self, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        """What ``attention(x, keys and values of each pair's mixture)`` gives: [P, T, H] -> [P, T, H]."""
        (pairs, steps, size), heads = x.shape, attention.heads
        key, value = (
            linear.weight.view(heads, -1, size) for linear in (attention.key, attention.value)
        )  # [heads, D, H]
        query = attention.query(x).view(pairs * steps, heads, -1) / math.sqrt(size // heads)
        # the keys' bias adds the same to all logits of a query
        query = (query.transpose(0, 1) @ key).view(heads, pairs, steps, size).transpose(0, 1)  # [P, heads, T, H]
        query = query.reshape(pairs, heads * steps, size) @ self.mixtures.transpose(1, 2)
        logits = self.lay_out(query) @ self.hidden.transpose(1, 2)  # [B, N heads T, S]
        weights = attention.weights(logits[:, None], self.filled[:, None, None]).squeeze(1)
        taken = self.take_up(weights @ self.hidden) @ self.mixtures  # [P, heads T, H]
        taken = taken.view(pairs, heads, steps, size).transpose(0, 1).reshape(heads, pairs * steps, size)
        found = (taken @ value.transpose(1, 2)).view(heads, pairs, steps, -1)
        sums = self.take_up(weights.sum(2, keepdim=True)).view(pairs, heads, steps, 1)  # with dropout, not 1
        found = found.permute(1, 2, 0, 3) + sums.transpose(1, 2) * attention.value.bias.view(heads, -1)
        return attention.out(found.reshape(pairs, steps, size))

    def logits(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """x [P, T, H] times the vectors [B, S, H] of each pair's sequence: [P, T, S]."""
        return self.take_up(self.lay_out(x) @ vectors.transpose(1, 2))
