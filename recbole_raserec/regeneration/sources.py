"""What the regenerator reads and learns from: training sequences in pieces it can take whole, and pairs with patterns.

Everything here comes from the training split: a user's history up to the last training target. Validation and test
items never enter a sequence, and so no pattern and no pair.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.data.patterns import Patterns, mine_patterns
from recbole_raserec.regeneration.pairs import build_pairs


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences one after the other, each of a user.

    Attributes:
        items: int64 [N]. offsets: int64 [S + 1]. users: int64 [S].
    """

    items: np.ndarray
    offsets: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def lengths(self) -> np.ndarray:
        """Items of each sequence, [S]."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray) -> torch.Tensor:
        """Some sequences as int64 [B, longest of them], padded with 0."""
        return torch.from_numpy(_padded(self.items, self.offsets, rows))


def training_sequences(train: Any) -> Sequences:
    """Every user's history up to the last training target.

    Args:
        train: training split, a :class:`~recbole_raserec.data.dataset.SequenceDataset` or RecBole's, whose windows of a
            user stand in the order of their targets.
    """
    if not hasattr(train, "windows"):
        return _from_windows(train)
    users, positions, _ = train.windows()
    items, offsets = train.store.until(users, positions)
    kept = np.flatnonzero(np.diff(offsets))
    return Sequences(items, np.concatenate([[0], offsets[1:][kept]]), kept)


def _from_windows(train: Any) -> Sequences:
    """A user's first window and then the target of each: RecBole's windows are cut to the longest the model takes."""
    rows, config = train.inter_feat.numpy(), train.config
    users, targets = rows[train.uid_field], rows[train.iid_field]
    order = np.argsort(users, kind="stable")
    users, targets = users[order], targets[order]
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    windows = rows[train.iid_field + config["LIST_SUFFIX"]][order[first]]
    lengths = rows[config["ITEM_LIST_LENGTH_FIELD"]][order[first]]
    counts = np.diff(np.concatenate([first, [len(users)]])) + lengths
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = np.empty(offsets[-1], np.int64)
    ahead = np.arange(windows.shape[1]) < lengths[:, None]  # of the first window
    places = offsets[:-1, None] + np.arange(windows.shape[1])
    items[places[ahead]] = windows[ahead]
    behind = np.ones(len(items), dtype=bool)
    behind[places[ahead]] = False
    items[behind] = targets
    return Sequences(items, offsets, users[first])


def pieces(sequences: Sequences, longest: int) -> Sequences:
    """Cut sequences of more than `longest` items into pieces of at most so many, from their ends backwards.

    (The papers drop what is before the last 50 items; here all of a long history takes part.)
    """
    lengths = sequences.lengths()
    count = np.maximum(-(-lengths // longest), 1)
    owner = np.repeat(np.arange(len(sequences)), count)
    last = np.repeat(np.cumsum(count), count)  # pieces of a sequence are numbered forwards
    behind = last - 1 - np.arange(len(owner))  # whole pieces after this one
    ends = sequences.offsets[1:][owner] - behind * longest
    starts = np.maximum(ends - longest, sequences.offsets[:-1][owner])
    return Sequences(sequences.items, np.concatenate([starts, ends[-1:]]), sequences.users[owner])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """(sequence, pattern) pairs of one set of sequences.

    Attributes:
        sequences: what is read. patterns: all mined ones.
        sequence, pattern: int64 [M], sorted by sequence. offsets: int64 [S + 1], pairs of each sequence.
    """

    sequences: Sequences
    patterns: Patterns
    sequence: np.ndarray
    pattern: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence)

    def batch(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences `rows` [B, S], and of all their pairs the row in it [P] and the pattern [P, longest of them]."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        place = np.repeat(self.offsets[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        owner = np.repeat(np.arange(len(rows)), counts)
        patterns = _padded(self.patterns.items, self.patterns.offsets, self.pattern[place])
        return self.sequences.padded(rows), torch.from_numpy(owner), torch.from_numpy(patterns)


def mine(whole: Sequences, span: int, min_support: int, pattern_length: int, desc: Optional[str] = None) -> Patterns:
    """The patterns of `whole` sequences; arguments as of :func:`make_pairs`."""
    return mine_patterns(
        whole.items, whole.offsets, span, min_support, 2, min(span, pattern_length),
        desc=f"Mine patterns{desc}" if desc is not None else None,
    )  # fmt: skip


def make_pairs(
    sequences: Sequences, whole: Sequences, span: int, min_support: int, pattern_length: int, per_sequence: int,
    seed: int, desc: Optional[str] = None,
) -> Pairs:  # fmt: skip
    """Mine the patterns of `whole` sequences, and draw up to `per_sequence` of those that each of `sequences` contains.

    Patterns with an item twice are left out of the pairs: decoding never repeats one.

    Args:
        span, min_support: alpha and beta, see :func:`~recbole_raserec.data.patterns.mine_patterns`.
        pattern_length: items of a pattern at most. seed: of the draw. desc: label of the progress bars.
    """
    patterns = mine(whole, span, min_support, pattern_length, desc)
    usable = _without_repeats(patterns)
    label = f"Pair sequences with patterns{desc}" if desc is not None else None
    sequence, pattern = build_pairs(sequences.items, sequences.offsets, usable[0], per_sequence, seed, label)
    offsets = np.searchsorted(sequence, np.arange(len(sequences) + 1))
    return Pairs(sequences, patterns, sequence, usable[1][pattern], offsets)


def _without_repeats(patterns: Patterns) -> tuple[Patterns, np.ndarray]:
    """Patterns whose items all differ, and their numbers among all."""
    owner = np.repeat(np.arange(len(patterns)), patterns.lengths())
    order = np.lexsort((patterns.items, owner))
    twice = (np.diff(patterns.items[order]) == 0) & (np.diff(owner[order]) == 0)
    fine = np.ones(len(patterns), dtype=bool)
    fine[owner[order][1:][twice]] = False
    kept = np.flatnonzero(fine)
    items = patterns.items[fine[owner]]
    offsets = np.concatenate([[0], np.cumsum(patterns.lengths()[kept])])
    return Patterns(items, offsets, patterns.support[kept]), kept


def _padded(items: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    lengths = offsets[rows + 1] - offsets[rows]
    columns = np.arange(int(lengths.max()) if len(lengths) else 0)
    inside = columns < lengths[:, None]
    return np.where(inside, items[np.where(inside, offsets[rows][:, None] + columns, 0)], 0)
