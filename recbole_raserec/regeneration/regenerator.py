"""The regenerator (DR4SR, arXiv 2405.17795): reads a sequence, writes a pattern of it, in one of K ways.

A transformer encoder-decoder over item ids. One sequence has many patterns; the diversity promoter makes that
one-to-many map one-to-one: the encoder's output is projected into K spaces, a condition encoder reads the pattern and
chooses among them by Gumbel-softmax, and the decoder attends to the chosen mixture. When patterns are generated there
is nothing to read: each of the K spaces is tried in turn.

Shapes: B sequences of S items, P pairs of a sequence and a pattern, T steps of the decoder (pattern and end), K
conditions, H hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import nn

from recbole_raserec.kernels.dropout import use_fast_dropout
from recbole_raserec.regeneration.layers import DecoderLayer, EncoderLayer, KeyValue
from recbole_raserec.regeneration.shared import PairsOfSources


@dataclasses.dataclass
class Source:
    """An encoded batch of sequences.

    Attributes:
        items: int64 [B, S], left-aligned, padded with 0.
        hidden: [B, S, H], the encoder's output. projections: [K, H, H], the latent spaces.
        candidates: bool [B, S], first occurrences of items: what restrictive decoding chooses from.
    """

    items: torch.Tensor
    hidden: torch.Tensor
    projections: torch.Tensor
    candidates: torch.Tensor

    @cached_property
    def spaces(self) -> torch.Tensor:
        """The encoder's output in each latent space, [B, K, S, H]."""
        return torch.einsum("bsh,khg->bksg", self.hidden, self.projections)


class Regenerator(nn.Module):
    """Encoder-decoder with diversity promoter.

    Args:
        n_items: V, item ids are 1..V-1 (0: padding); two rows more are kept for start and end.
        size: H. heads: divides H. layers: of the encoder and of the decoder each. inner_size: of the feed-forwards.
        dropout: everywhere. conditions: K. longest: items of a source sequence at most. pattern_length: items of a
            pattern at most.
    """

    def __init__(
        self, n_items: int, size: int = 64, heads: int = 2, layers: int = 2, inner_size: int = 256,
        dropout: float = 0.5, conditions: int = 5, longest: int = 50, pattern_length: int = 5,
    ):  # fmt: skip
        super().__init__()
        self.n_items, self.size, self.conditions = n_items, size, conditions
        self.longest, self.pattern_length = longest, pattern_length
        self.start, self.end = n_items, n_items + 1
        self.items = nn.Embedding(n_items + 2, size, padding_idx=0)
        self.source_positions = nn.Embedding(longest, size)
        self.pattern_positions = nn.Embedding(pattern_length + 1, size)
        self.source_norm, self.pattern_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.encoder = nn.ModuleList(EncoderLayer(size, heads, inner_size, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(size, heads, inner_size, dropout) for _ in range(layers))
        self.projections = nn.Parameter(torch.empty(conditions, size, size))
        self.reader = EncoderLayer(size, heads, inner_size, dropout)
        self.chooser = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, conditions))
        self.dropout = nn.Dropout(dropout)
        use_fast_dropout(self)
        self.apply(_initialise)
        nn.init.normal_(self.projections, std=1 / math.sqrt(size))

    @torch.no_grad()
    def use_item_vectors(self, vectors: torch.Tensor) -> None:
        """Start from these item vectors [V, H]; start and end symbols get their mean length.

        Raises:
            ValueError: they have another shape.
        """
        if tuple(vectors.shape) != (self.n_items, self.size):
            raise ValueError(f"item vectors: expected [{self.n_items}, {self.size}], got {list(vectors.shape)}")
        self.items.weight[: self.n_items] = vectors
        length = vectors[1:].norm(dim=1).mean()
        symbols = self.items.weight[self.n_items :]
        symbols.mul_(length / symbols.norm(dim=1, keepdim=True))

    # -- source -----------------------------------------------------------------------------------------------------

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """The encoder's output [B, S, H] for sequences [B, S], S at most `longest`."""
        x = self.items(items) + self.source_positions.weight[: items.shape[1]]
        x = self.dropout(self.source_norm(x))
        mask = (items > 0)[:, None, None]
        for layer in self.encoder:
            x = layer(x, mask)
        return x

    def encode(self, items: torch.Tensor) -> Source:
        """Encode sequences [B, S], S at most `longest`."""
        return Source(items, self.read(items), self.projections, first_occurrences(items))

    def keys_values(self, memory: torch.Tensor) -> list[KeyValue]:
        """What the decoder's layers need of a source [N, S, H], a layer each."""
        return [layer.source.keys_values(memory) for layer in self.decoder_layers()]

    def decoder_layers(self) -> list[DecoderLayer]:
        """The decoder's layers, first to last."""
        return [layer for layer in self.decoder if isinstance(layer, DecoderLayer)]

    # -- training ---------------------------------------------------------------------------------------------------

    def condition(self, patterns: torch.Tensor) -> torch.Tensor:
        """Logits of the conditions [P, K] from the patterns [P, T - 1], padded with 0."""
        filled = patterns > 0
        x = self.items(patterns) + self.pattern_positions.weight[: patterns.shape[1]]
        x = self.reader(self.dropout(self.pattern_norm(x)), filled[:, None, None])
        pooled = (x * filled[..., None]).sum(1) / filled.sum(1, keepdim=True).clamp(min=1)
        return self.chooser(pooled)

    def log_likelihood(
        self, source: Source, owner: torch.Tensor, patterns: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each pattern and its end among the items of its sequence that it has not used yet.

        Args:
            source: encoded sequences. owner: int64 [P], row of `source` of each pair.
            patterns: int64 [P, T - 1], padded with 0; no item twice, all of them in the sequence.
            shares: [P, K], of the conditions, each row of sum 1.

        Returns:
            [P].
        """
        lengths = (patterns > 0).sum(1)
        items, candidates = source.items[owner], source.candidates[owner]  # [P, S]
        pairs = PairsOfSources.of(source.hidden, source.items > 0, owner, shares, source.projections)
        steps = F.pad(patterns, (1, 0), value=self.start)  # [P, T]
        x = self.items(steps) + self.pattern_positions.weight[: steps.shape[1]]
        x = self.dropout(self.pattern_norm(x))
        for layer in self.decoder_layers():
            x = layer.together(x, partial(pairs.attend, layer.source))
        logits = torch.cat([pairs.logits(x, self.items(source.items)), (x @ self.items.weight[self.end])[..., None]], 2)
        same = patterns[:, :, None] == items[:, None]  # [P, T - 1, S]
        used = F.pad(same.cumsum(1) > 0, (0, 0, 1, 0))  # before each step, [P, T, S]
        barred = F.pad(used | ~candidates[:, None], (0, 1))  # [P, T, S + 1]
        log_p = torch.log_softmax(logits.masked_fill(barred, -torch.inf), dim=2)
        last = torch.arange(steps.shape[1], device=steps.device) == lengths[:, None]  # the end's step, [P, T]
        place = F.pad((same & candidates[:, None]).int().argmax(2), (0, 1))
        place = torch.where(last, items.shape[1], place)
        counted = torch.arange(steps.shape[1], device=steps.device) <= lengths[:, None]
        chosen = log_p.gather(2, place[..., None]).squeeze(2)
        return torch.where(counted, chosen, 0.0).sum(1)

    def forward(
        self, items: torch.Tensor, owner: torch.Tensor, patterns: torch.Tensor, tau: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of the pairs [P] with sampled conditions, and the regulariser.

        The regulariser is the entropy of the chooser's mean over the batch, to be raised: without it one condition
        soon takes all patterns. (The paper names an entropy regulariser and not its form.)

        Args:
            items: sequences [B, S]. owner: [P]. patterns: [P, T - 1]. tau: temperature of the Gumbel-softmax.
        """
        logits = self.condition(patterns)
        shares = F.gumbel_softmax(logits, tau=tau)
        mean = torch.softmax(logits, dim=1).mean(0)
        entropy = -(mean * mean.clamp(min=1e-9).log()).sum()
        return -self.log_likelihood(self.encode(items), owner, patterns, shares), entropy

    @torch.no_grad()
    def mixture_log_likelihood(self, items: torch.Tensor, owner: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        """Log-probability of pairs with every condition equally likely and none chosen by looking at the pattern, [P].

        What a pattern costs under generation; the training's loss is lower by what the condition tells of it.
        """
        source = self.encode(items)
        each = torch.eye(self.conditions, device=items.device)
        found = [self.log_likelihood(source, owner, patterns, row.expand(len(owner), -1)) for row in each]
        return torch.logsumexp(torch.stack(found), dim=0) - math.log(self.conditions)


def first_occurrences(items: torch.Tensor) -> torch.Tensor:
    """bool [B, S]: an item stands here, and not earlier in the row."""
    same = items[:, :, None] == items[:, None]  # [B, S, S]
    earlier = torch.tril(same, diagonal=-1).any(2)
    return (items > 0) & ~earlier


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
