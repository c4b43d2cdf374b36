"""The regenerator (DR4SR, arXiv 2405.17795): reads a sequence, writes a pattern of it, in one of K ways.

A transformer encoder-decoder over item ids. One sequence has many patterns; the diversity promoter makes that
one-to-many map one-to-one: the encoder's output is projected into K spaces, a condition encoder reads the pattern and
chooses among them by Gumbel-softmax, and the decoder attends to the chosen mixture. When patterns are generated there
is nothing to read: each of the K spaces is tried. It learns with early stopping on held-out sequences.

Shapes: B sequences of S items, P pairs of a sequence and a pattern, T steps of the decoder (pattern and end), K
conditions, H hidden size, D = H / heads; in a layer N rows, Q queries, S source positions.
"""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cached_property, partial
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from recbole_raserec.config import Config
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.kernels import use_fast_dropout
from recbole_raserec.regeneration.pairs import Pairs
from recbole_raserec.storage import load_named, named_tensors, part_of, read_tensors, write_tensors

STATE, BEST = "regenerator-state.safetensors", "regenerator.safetensors"

#: Batches that are sorted by length together.
_BLOCK = 32

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

    def together(self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """All steps at once [N, Q, H]; `attend` [N, Q, H] -> [N, Q, H] is the attention to the source."""
        return self._rest(x, self.own(x, self.own.keys_values(x), causal=True), attend)

    def step(
        self, x: torch.Tensor, past: Optional[KeyValue], source: KeyValue, mask: torch.Tensor
    ) -> tuple[torch.Tensor, KeyValue]:
        """One step [N, 1, H] after those of `past`: its output, and `past` with its keys and values; `mask` bool
        [N, 1, 1, S] of the source."""
        new = self.own.keys_values(x)
        grown = new if past is None else (torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2))
        return self._rest(x, self.own(x, grown), lambda h: self.source(h, source, mask)), grown

    def _rest(self, x: torch.Tensor, own: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.norms[0](x + self.dropout(own))
        x = self.norms[1](x + self.dropout(attend(x)))
        return self.norms[2](x + self.dropout(self.feed_forward(x)))


@dataclasses.dataclass(frozen=True)
class PairsOfSources:
    """Attention of many pairs to few sequences: what pairs of one sequence share is computed once for all of them.

    Pair p of sequence b attends to a mixture of b's K latent spaces, X_b R_p with R_p = sum_k s_pk P_k. Keys and values
    are linear in it, so neither spaces nor mixture ([P, S, H] numbers, twice in each layer) need be built: a query q of
    p meets X_b as R_p W_key' q, and what the weights w take from X_b becomes a value as W_value R_p' (X_b' w).

    `slots` are the pairs' rows in a grid of B x N, those of a sequence side by side; N = `width`, most of a sequence.
    """

    hidden: torch.Tensor  # [B, S, H], the sequences
    filled: torch.Tensor  # bool [B, S], where an item stands
    mixtures: torch.Tensor  # [P, H, H], R_p
    slots: torch.Tensor  # int64 [P]
    width: int

    @classmethod
    def of(
        cls, hidden: torch.Tensor, filled: torch.Tensor, owner: torch.Tensor, shares: torch.Tensor,
        projections: torch.Tensor,
    ) -> PairsOfSources:  # fmt: skip
        """Lay out pairs of the sequences `owner` int64 [P], in any order, that mix `projections` [K, H, H] by `shares`
        [P, K]."""
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
        """The inverse of `lay_out`."""
        return grid.reshape(len(self.hidden) * self.width, -1, grid.shape[2]).index_select(0, self.slots)

    def attend(self, attention: Attention, x: torch.Tensor) -> torch.Tensor:
        """`attention(x, keys and values of each pair's mixture)`: [P, T, H] -> [P, T, H]."""
        (pairs, steps, size), heads = x.shape, attention.heads
        key, value = (part.weight.view(heads, -1, size) for part in (attention.key, attention.value))  # [heads, D, H]
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


@dataclasses.dataclass
class Source:
    """An encoded batch of sequences."""

    items: torch.Tensor  # int64 [B, S], left-aligned, padded with 0
    hidden: torch.Tensor  # [B, S, H], the encoder's output
    projections: torch.Tensor  # [K, H, H], the latent spaces
    candidates: torch.Tensor  # bool [B, S], first occurrences of items: what restrictive decoding chooses from

    @cached_property
    def spaces(self) -> torch.Tensor:
        """The encoder's output in each latent space, [B, K, S, H]."""
        return torch.einsum("bsh,khg->bksg", self.hidden, self.projections)


class Regenerator(nn.Module):
    """Encoder-decoder with diversity promoter.

    Args:
        n_items: V, item ids are 1..V-1 (0: padding); two more rows are start and end.
        size: H.
        heads: divides H.
        layers: of the encoder and of the decoder each.
        inner_size: of the feed-forward layers.
        dropout: everywhere.
        conditions: K.
        longest: items of a sequence at most.
        pattern_length: the same of a pattern.
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

    def read(self, items: torch.Tensor) -> torch.Tensor:
        """The encoder's output [B, S, H] for sequences [B, S], S at most `longest`."""
        x = self.dropout(self.source_norm(self.items(items) + self.source_positions.weight[: items.shape[1]]))
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

    def condition(self, patterns: torch.Tensor) -> torch.Tensor:
        """Logits of the conditions [P, K] from the patterns [P, T - 1], padded with 0."""
        filled = patterns > 0
        x = self.reader(self._steps(patterns), filled[:, None, None])
        pooled = (x * filled[..., None]).sum(1) / filled.sum(1, keepdim=True).clamp(min=1)
        return self.chooser(pooled)

    def _steps(self, patterns: torch.Tensor) -> torch.Tensor:
        """Vectors [P, T, H] of the decoder's steps, or of a pattern's items, [P, T]."""
        x = self.items(patterns) + self.pattern_positions.weight[: patterns.shape[1]]
        return self.dropout(self.pattern_norm(x))

    def log_likelihood(
        self, source: Source, owner: torch.Tensor, patterns: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """Log-probability of each pattern and its end among the items of its sequence that it has not used yet.

        Args:
            source: encoded sequences.
            owner: int64 [P], row of `source` of each pair.
            patterns: int64 [P, T - 1], padded with 0; no item twice, all of them in the sequence.
            shares: [P, K], of the conditions, each row of sum 1.

        Returns:
            [P].
        """
        items, candidates = source.items[owner], source.candidates[owner]  # [P, S]
        pairs = PairsOfSources.of(source.hidden, source.items > 0, owner, shares, source.projections)
        x = self._steps(F.pad(patterns, (1, 0), value=self.start))
        for layer in self.decoder_layers():
            x = layer.together(x, partial(pairs.attend, layer.source))
        logits = pairs.take_up(pairs.lay_out(x) @ self.items(source.items).transpose(1, 2))
        logits = torch.cat([logits, (x @ self.items.weight[self.end])[..., None]], 2)
        same = patterns[:, :, None] == items[:, None]  # [P, T - 1, S]
        used = F.pad(same.cumsum(1) > 0, (0, 0, 1, 0))  # before each step, [P, T, S]
        barred = F.pad(used | ~candidates[:, None], (0, 1))  # [P, T, S + 1]
        log_p = torch.log_softmax(logits.masked_fill(barred, -torch.inf), dim=2)
        step, lengths = torch.arange(x.shape[1], device=x.device), (patterns > 0).sum(1, keepdim=True)
        column = F.pad((same & candidates[:, None]).int().argmax(2), (0, 1))
        column = torch.where(step == lengths, items.shape[1], column)  # at the last step the end
        chosen = log_p.gather(2, column[..., None]).squeeze(2)
        return torch.where(step <= lengths, chosen, 0.0).sum(1)

    def forward(
        self, items: torch.Tensor, owner: torch.Tensor, patterns: torch.Tensor, tau: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log-likelihood of the pairs [P] with sampled conditions, and the regulariser.

        The regulariser is the entropy of the chooser's mean over the batch, to be raised: without it one condition
        soon takes all patterns. (The paper names an entropy regulariser and not its form.)

        Args:
            items: sequences int64 [B, S].
            owner: int64 [P], row of `items` of each pair.
            patterns: int64 [P, T - 1].
            tau: temperature of the Gumbel-softmax.
        """
        logits = self.condition(patterns)
        shares, mean = F.gumbel_softmax(logits, tau=tau), torch.softmax(logits, dim=1).mean(0)
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
    """bool [B, S]: an item is here, and not earlier in the row."""
    same = items[:, :, None] == items[:, None]  # [B, S, S]
    return (items > 0) & ~torch.tril(same, diagonal=-1).any(2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


def check_heads(config: Config) -> None:
    """Raise ConfigError unless `regen_heads` divides the vectors' length."""
    size = config.for_embeddings()["hidden_size"] if config["regen_pretrained"] else config["regen_hidden_size"]
    heads = config["regen_heads"]
    if size % heads:
        raise ConfigError([f"regen_heads: {heads} does not divide vectors of length {size}; choose for example 1."])


def build(config: Config, n_items: int, vectors: Optional[torch.Tensor]) -> Regenerator:
    """A new regenerator for V = `n_items` items, which starts from item vectors [V, H], or from random ones of length
    `regen_hidden_size`."""
    size = config["regen_hidden_size"] if vectors is None else vectors.shape[1]
    names = ("heads", "layers", "inner_size", "dropout", "conditions", "pattern_length")
    sizes = {name: config[f"regen_{name}"] for name in names}
    model = Regenerator(n_items, size, longest=config["MAX_ITEM_LIST_LENGTH"], **sizes)
    if vectors is not None:
        model.use_item_vectors(vectors.to("cpu", torch.float32))
    return model


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the regenerator learns, as the options `regen_*` say; with the paper's values where it names them."""

    epochs: int = 40  # at most
    patience: int = 3  # epochs without a better held-out loss before it stops
    learning_rate: float = 1e-3  # of Adam with the paper's betas (.9, .98)
    batch_pairs: int = 1024  # about so many pairs in a batch
    held_out: float = 0.05  # share of the sequences whose pairs are not learned from
    entropy_weight: float = 0.1  # of the regulariser
    tau: float = 1.0  # temperature of the Gumbel-softmax at the first step
    tau_decay: float = 0.995  # its factor at each step
    tau_least: float = 0.1  # its lower bound
    seed: int = 0  # of shuffling, dropout and noise


def schedule_of(config: Config) -> Schedule:
    """How the regenerator learns, as the options `regen_*` say."""
    return Schedule(
        config["regen_epochs"], config["regen_stopping_step"], config["regen_learning_rate"],
        config["regen_batch_pairs"], config["regen_held_out"], config["regen_entropy"],
        tau_decay=config["regen_tau_decay"], tau_least=config["regen_tau_least"], seed=config["seed"],
    )  # fmt: skip


def split(pairs: Pairs, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences with pairs: those to learn from and the held-out ones, int64 each."""
    usable = np.flatnonzero(np.diff(pairs.offsets))
    order = np.random.default_rng(seed).permutation(usable)
    held = min(max(round(share * len(usable)), 1 if share and len(usable) > 1 else 0), max(len(usable) - 1, 0))
    return np.sort(order[held:]), np.sort(order[:held])


def epoch_batches(pairs: Pairs, rows: np.ndarray, batch_pairs: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`rows` in batches of about `batch_pairs` pairs and sequences of like length, in random order."""
    counts, lengths = np.diff(pairs.offsets), pairs.sequences.lengths()
    order = rng.permutation(rows)
    block = np.cumsum(counts[order]) // (_BLOCK * batch_pairs)
    order = order[np.lexsort((lengths[order], block))]
    batch = (np.cumsum(counts[order]) - 1) // batch_pairs
    parts = np.split(order, np.flatnonzero(np.diff(batch)) + 1)
    return [parts[number] for number in rng.permutation(len(parts))]


@torch.no_grad()
def held_out_loss(model: Regenerator, pairs: Pairs, rows: np.ndarray, batch_pairs: int = 2048) -> float:
    """Mean negative log-likelihood of a pair of `rows`, conditions equally likely (nats)."""
    was_training, device = model.training, model.projections.device
    model.eval()
    total = count = 0.0
    order = rows[np.argsort(pairs.sequences.lengths()[rows], kind="stable")]
    batch = np.cumsum(np.diff(pairs.offsets)[order]) // batch_pairs
    for part in np.split(order, np.flatnonzero(np.diff(batch)) + 1):
        items, owner, patterns = (x.to(device) for x in pairs.batch(part))
        total -= float(model.mixture_log_likelihood(items, owner, patterns).double().sum())
        count += len(owner)
    model.train(was_training)
    return total / max(count, 1.0)


def fit(
    model: Regenerator, pairs: Pairs, schedule: Schedule, directory: Path, progress: bool,
    log: Callable[[str, dict[str, float], int], None] = lambda *_: None,
) -> dict[str, Any]:  # fmt: skip
    """Train until the held-out loss stops falling; the model ends with the weights of the lowest.

    Args:
        model: of random weights.
        pairs: to learn from.
        schedule: how.
        directory: holds the state after each epoch, from which a later call with the same arguments continues.
        progress: show progress bars.
        log: takes the stage, the figures and the number of each epoch.

    Returns:
        {"epochs": [{"loss", "held_out", "entropy", "seconds"}], "best": epoch, "held_out": loss of the best}.

    Raises:
        CheckpointError: `directory` holds a damaged state, or another run's.
        ConfigError: the loss is not finite.
        ValueError: there are no pairs.
    """
    learn, held = split(pairs, schedule.held_out, schedule.seed)
    if not len(learn):
        raise ValueError("no sequence contains a frequent pattern")
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.learning_rate, betas=(0.9, 0.98))
    history: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    steps = 0
    if (directory / STATE).exists():
        history, steps, best = _resume(model, optimizer, directory)
        getLogger().info(f"Regenerator: resuming after epoch {len(history) - 1} from {directory}")
    while len(history) < schedule.epochs and not (history and len(history) > _best(history) + schedule.patience):
        epoch, started = len(history), time.perf_counter()
        torch.manual_seed(schedule.seed * 1_000_003 + epoch)  # an epoch's noise depends on its number alone
        batches = epoch_batches(pairs, learn, schedule.batch_pairs, np.random.default_rng([schedule.seed, epoch]))
        desc = f"Regenerator {epoch:>3}" if progress else None
        loss, entropy, steps = _epoch(model, optimizer, pairs, batches, schedule, steps, desc)
        value = held_out_loss(model, pairs, held) if len(held) else loss
        if not math.isfinite(loss + value):
            rate = schedule.learning_rate
            raise ConfigError([f"regen_learning_rate: {rate:g}: the regenerator's loss is not finite; lower it"])
        seconds = time.perf_counter() - started
        history.append({"loss": loss, "held_out": value, "entropy": entropy, "seconds": seconds})
        getLogger().info(f"regenerator epoch {epoch} [{seconds:.1f}s, loss: {loss:.4f}, held-out: {value:.4f}]")
        log("regeneration", {"train/loss": loss, "valid/loss": value, "train/entropy": entropy}, epoch)
        if _best(history) == epoch:
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        # one file, so that the best weights are those of the history whenever the run is killed
        tensors = named_tensors(model=model, best=best, optimizer=optimizer)
        write_tensors(directory / STATE, tensors, {"history": history, "steps": steps})
    model.load_state_dict(best)
    model.eval()
    number = _best(history)
    write_tensors(directory / BEST, best, {"epoch": number})
    return {"epochs": history, "best": number, "held_out": history[number]["held_out"]}


def _epoch(
    model: Regenerator, optimizer: Any, pairs: Pairs, batches: list[np.ndarray], schedule: Schedule, steps: int,
    desc: Optional[str],
) -> tuple[float, float, int]:  # fmt: skip
    """One pass: mean loss of a pair, mean entropy of the conditions' use, steps so far."""
    device = model.projections.device
    model.train()
    total = entropies = count = 0.0
    for rows in tqdm(batches, desc=desc, disable=desc is None, dynamic_ncols=True):
        items, owner, patterns = (x.to(device) for x in pairs.batch(rows))
        tau = max(schedule.tau * schedule.tau_decay**steps, schedule.tau_least)
        losses, entropy = model(items, owner, patterns, tau)
        loss = losses.mean() - schedule.entropy_weight * entropy
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        steps += 1
        total += float(losses.detach().sum())
        entropies += float(entropy.detach()) * len(owner)
        count += len(owner)
    return total / count, entropies / count, steps


def _best(history: list[dict[str, float]]) -> int:
    return int(np.argmin([epoch["held_out"] for epoch in history]))


def _resume(
    model: Regenerator, optimizer: Any, directory: Path
) -> tuple[list[dict[str, float]], int, dict[str, torch.Tensor]]:
    """History, steps and the best weights; the last ones are in `model`."""
    path = directory / STATE
    try:
        tensors, meta = read_tensors(path)
        best = {name: value.to(model.projections.device) for name, value in part_of(tensors, "best").items()}
        model.load_state_dict(best)
        load_named(tensors, model=model, optimizer=optimizer)
        return list(meta["history"]), int(meta["steps"]), best
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path} does not fit this run ({reason}); delete {directory} to start again.") from None
