"""Transformer layers of the regenerator. A decoder layer can go step by step, on keys and values it has kept.

As in the original transformer: each part is followed by a residual sum and a layer norm. Shapes: N rows, Q queries,
S source positions, H hidden size, D = H / heads.
"""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import nn

#: Keys and values of the source or of the steps so far, [N, heads, S, D] each.
KeyValue = tuple[torch.Tensor, torch.Tensor]


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be computed apart from the queries."""

    def __init__(self, size: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)

    def keys_values(self, x: torch.Tensor) -> KeyValue:
        """[N, S, H] -> keys and values [N, heads, S, D]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def forward(
        self, x: torch.Tensor, source: KeyValue, mask: Optional[torch.Tensor] = None, causal: bool = False
    ) -> torch.Tensor:
        """[N, Q, H] attends to `source`; `mask` bool, broadcast to [N, heads, Q, S], True where it may -> [N, Q, H]."""
        query = self._split(self.query(x))
        if self.training:  # torch's own draws its dropout one by one
            weights = self.weights(query @ source[0].transpose(2, 3) / math.sqrt(query.shape[3]), mask, causal)
            mixed = weights @ source[1]
        else:
            mixed = F.scaled_dot_product_attention(query, *source, attn_mask=mask, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def weights(self, logits: torch.Tensor, mask: Optional[torch.Tensor] = None, causal: bool = False) -> torch.Tensor:
        """Softmax of `logits` [N, heads, Q, S] where `mask` is True, and dropout."""
        if causal:
            steps = torch.arange(logits.shape[2], device=logits.device)
            mask = steps[:, None] >= steps
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return self.dropout(torch.softmax(logits, dim=3))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FeedForward(nn.Sequential):
    """H -> inner -> H."""

    def __init__(self, size: int, inner_size: int, dropout: float):
        super().__init__(nn.Linear(size, inner_size), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner_size, size))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, size: int, heads: int, inner_size: int, dropout: float):
        super().__init__()
        self.attention = Attention(size, heads, dropout)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[N, S, H]; `mask` bool [N, 1, 1, S], True where an item stands."""
        x = self.norms[0](x + self.dropout(self.attention(x, self.attention.keys_values(x), mask)))
        return self.norms[1](x + self.dropout(self.feed_forward(x)))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, feed-forward."""

    def __init__(self, size: int, heads: int, inner_size: int, dropout: float):
        super().__init__()
        self.own, self.source = Attention(size, heads, dropout), Attention(size, heads, dropout)
        self.feed_forward = FeedForward(size, inner_size, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, source: KeyValue, mask: torch.Tensor) -> torch.Tensor:
        """All steps at once: [N, Q, H]; `mask` bool [N, 1, 1, S] of the source."""
        return self.together(x, lambda h: self.source(h, source, mask))

    def together(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All steps at once [N, Q, H], with `attend` [N, Q, H] -> [N, Q, H] as attention to the source."""
        x = self.norms[0](x + self.dropout(self.own(x, self.own.keys_values(x), causal=True)))
        return self._rest(x, attend)

    def step(
        self, x: torch.Tensor, past: Optional[KeyValue], source: KeyValue, mask: torch.Tensor
    ) -> tuple[torch.Tensor, KeyValue]:
        """One step [N, 1, H] after those whose keys and values are `past`: its output, and `past` with it."""
        new = self.own.keys_values(x)
        grown = new if past is None else (torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2))
        x = self.norms[0](x + self.dropout(self.own(x, grown)))
        return self._rest(x, lambda h: self.source(h, source, mask)), grown

    def _rest(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.norms[1](x + self.dropout(attend(x)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))
