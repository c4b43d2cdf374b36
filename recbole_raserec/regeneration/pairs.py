"""Pre-training pairs of the regenerator: a training sequence and a frequent pattern it contains (DR4SR, section 4.1).

Sequences are histories up to the last training target: no item of validation or test enters one, and so no pattern and
no pair. A sequence contains a pattern if the pattern's items occur in it in that order, at any distance (the span
bounds the mining, not this). All sequences are matched at once against a prefix tree of the patterns: what a sequence
has matched so far is one row (sequence, node, earliest position where the match can end), grown by those of its later
items that lead to a child of the node. The work depends on what the sequences contain, not on the number of patterns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.data import Patterns, mine_patterns, pad_rows

#: Rows grown at a time.
_ROWS = 1 << 21


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequence s, of the user `users[s]`, is `items[offsets[s]:offsets[s + 1]]`; int64 [S], [N], [S + 1]."""

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
        return torch.from_numpy(pad_rows(self.items, self.offsets[rows], self.lengths()[rows]))


def training_sequences(train: Any) -> Sequences:
    """Every user's history up to the last training target, of a split of ours or of RecBole's, whose windows of a user
    are in the order of their targets."""
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
    first = np.unique(users, return_index=True)[1]
    windows = rows[train.iid_field + config["LIST_SUFFIX"]][order[first]]
    lengths = rows[config["ITEM_LIST_LENGTH_FIELD"]][order[first]]
    counts = np.diff(np.concatenate([first, [len(users)]])) + lengths
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = np.empty(offsets[-1], np.int64)
    ahead = np.arange(windows.shape[1]) < lengths[:, None]  # of the first window
    spots = (offsets[:-1, None] + np.arange(windows.shape[1]))[ahead]
    items[spots] = windows[ahead]
    items[np.setdiff1d(np.arange(len(items)), spots)] = targets
    return Sequences(items, offsets, users[first])


def pieces(sequences: Sequences, longest: int) -> Sequences:
    """Cut sequences of more than `longest` items into pieces of at most so many, from their ends backwards.

    (The papers drop what is before the last 50 items; here all of a long history takes part.)
    """
    count = np.maximum(-(-sequences.lengths() // longest), 1)
    owner = np.repeat(np.arange(len(sequences)), count)
    behind = np.repeat(np.cumsum(count), count) - 1 - np.arange(len(owner))  # pieces of the sequence after this one
    ends = sequences.offsets[1:][owner] - behind * longest
    starts = np.maximum(ends - longest, sequences.offsets[:-1][owner])
    return Sequences(sequences.items, np.concatenate([starts, ends[-1:]]), sequences.users[owner])


class PatternTree:
    """Prefix tree of patterns; node 0 is the empty prefix. `pattern` int64 [nodes]: what ends at each node, or -1."""

    def __init__(self, patterns: Patterns):
        lengths = patterns.lengths()
        self._width = int(patterns.items.max(initial=0)) + 1
        at = np.zeros(len(patterns), dtype=np.int64)  # node that each pattern has reached
        nodes, keys = 1, []
        for depth in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > depth)
            step = at[rows] * self._width + patterns.items[patterns.offsets[rows] + depth]
            fresh, slot = np.unique(step, return_inverse=True)
            at[rows] = nodes + slot.reshape(-1)
            keys.append(fresh)
            nodes += len(fresh)
        # nodes are numbered level by level, and by key within a level, so the keys ascend as a whole
        self._keys = np.concatenate(keys) if keys else np.array([-1])
        self.pattern = np.full(nodes, -1, dtype=np.int64)
        self.pattern[at] = np.arange(len(patterns))

    def children(self, nodes: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The node behind `nodes` [N] by `items` [N], -1 where there is none."""
        known = items < self._width
        keys = nodes * self._width + np.where(known, items, 0)
        slot = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(known & (self._keys[slot] == keys), slot + 1, -1)


def contained_patterns(
    items: np.ndarray, offsets: np.ndarray, patterns: Patterns, desc: Optional[str] = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every (sequence, pattern) in which the pattern is a subsequence, sorted by both: int64 [M], [M].

    Args:
        items: int [N], the sequences one after the other.
        offsets: int [S + 1].
        patterns: mined ones.
        desc: label of the progress bar.
    """
    items, offsets = np.asarray(items, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    tree = PatternTree(patterns)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    owners = np.flatnonzero(np.diff(offsets) > 0)
    with tqdm(total=len(owners), desc=desc, disable=desc is None, unit="sequences", dynamic_ncols=True) as bar:
        # each row grows into as many as there are items behind it: parts of about _ROWS of them
        weight = np.cumsum(np.diff(offsets)[owners] ** 2)
        cuts = np.searchsorted(weight, np.arange(_ROWS, int(weight[-1]) if len(weight) else 0, _ROWS))
        for part in np.split(np.arange(len(owners)), np.unique(cuts)):
            found.extend(_match(tree, items, offsets, owners[part]))
            bar.update(len(part))
    sequence, pattern = map(np.concatenate, zip(*found)) if found else np.zeros((2, 0), dtype=np.int64)
    order = np.lexsort((pattern, sequence))
    return sequence[order], pattern[order]


def _match(
    tree: PatternTree, items: np.ndarray, offsets: np.ndarray, sequence: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grow matches of `sequence` [B] from the empty prefix, and yield (sequence, pattern) where patterns end."""
    start, node = offsets[sequence], np.zeros(len(sequence), dtype=np.int64)  # start: the next item's first position
    while len(sequence):
        reach = offsets[sequence + 1] - start
        grown = np.repeat(np.arange(len(sequence)), reach)
        at = np.arange(len(grown)) + np.repeat(start - np.cumsum(reach) + reach, reach)
        child = tree.children(node[grown], items[at])
        keep = child >= 0
        owner, at, child = sequence[grown[keep]], at[keep], child[keep]
        order = np.lexsort((at, child, owner))
        owner, at, child = owner[order], at[order], child[order]
        first = np.ones(len(owner), dtype=bool)  # the earliest end of each (sequence, node)
        first[1:] = (owner[1:] != owner[:-1]) | (child[1:] != child[:-1])
        sequence, node, start = owner[first], child[first], at[first] + 1
        ends = tree.pattern[node]
        yield sequence[ends >= 0], ends[ends >= 0]


def build_pairs(
    items: np.ndarray, offsets: np.ndarray, patterns: Patterns, per_sequence: int = 10, seed: int = 0,
    desc: Optional[str] = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Up to `per_sequence` (the paper: 10) of the patterns each sequence contains, drawn without replacement.

    The other arguments are those of `contained_patterns`.

    Returns:
        sequence and pattern of each pair, int64 [M], [M], sorted by sequence.
    """
    if per_sequence < 1:
        raise ValueError(f"per_sequence: {per_sequence!r} must be at least 1")
    return draw(*contained_patterns(items, offsets, patterns, desc), per_sequence, seed)


def draw(sequence: np.ndarray, pattern: np.ndarray, per_sequence: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep `per_sequence` random pairs of each sequence; `sequence` is sorted."""
    order = np.lexsort((np.random.default_rng(seed).random(len(sequence)), sequence))
    begin = np.searchsorted(sequence, sequence, side="left")
    kept = np.sort(order[np.arange(len(sequence)) - begin < per_sequence])
    return sequence[kept], pattern[kept]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of `sequence` int64 [M], ascending, and `pattern` int64 [M], numbers among `sequences` and `patterns`.

    Those of sequence s are the pairs `offsets[s]` to `offsets[s + 1]`, int64 [S + 1].
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
        chosen = np.repeat(self.offsets[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        owner = np.repeat(np.arange(len(rows)), counts)
        taken = self.pattern[chosen]
        patterns = pad_rows(self.patterns.items, self.patterns.offsets[taken], self.patterns.lengths()[taken])
        return self.sequences.padded(rows), torch.from_numpy(owner), torch.from_numpy(patterns)


def mine(whole: Sequences, span: int, min_support: int, pattern_length: int, desc: Optional[str] = None) -> Patterns:
    """The patterns of `whole` sequences; arguments as of `make_pairs`."""
    label = f"Mine patterns{desc}" if desc is not None else None
    return mine_patterns(whole.items, whole.offsets, span, min_support, 2, min(span, pattern_length), desc=label)


def make_pairs(
    sequences: Sequences, whole: Sequences, span: int, min_support: int, pattern_length: int, per_sequence: int,
    seed: int, desc: Optional[str] = None,
) -> Pairs:  # fmt: skip
    """Mine the patterns of `whole` sequences, and draw up to `per_sequence` of those that each of `sequences` contains.

    Patterns with an item twice are left out of the pairs: decoding never repeats one.

    Args:
        sequences: what the regenerator reads.
        whole: what is mined.
        span: alpha of `mine_patterns`.
        min_support: beta of `mine_patterns`.
        pattern_length: items of a pattern at most.
        per_sequence: pairs of a sequence at most.
        seed: of the draw.
        desc: appended to the labels of the progress bars; None: there are none.
    """
    patterns = mine(whole, span, min_support, pattern_length, desc)
    usable, numbers = _without_repeats(patterns)
    label = f"Pair sequences with patterns{desc}" if desc is not None else None
    sequence, pattern = build_pairs(sequences.items, sequences.offsets, usable, per_sequence, seed, label)
    offsets = np.searchsorted(sequence, np.arange(len(sequences) + 1))
    return Pairs(sequences, patterns, sequence, numbers[pattern], offsets)


def _without_repeats(patterns: Patterns) -> tuple[Patterns, np.ndarray]:
    """Patterns whose items all differ, and their numbers among all."""
    lengths, width = patterns.lengths(), int(patterns.items.max(initial=0)) + 1
    owner = np.repeat(np.arange(len(patterns)), lengths)
    distinct = np.bincount(np.unique(owner * width + patterns.items) // width, minlength=len(patterns))
    fine = distinct == lengths
    offsets = np.concatenate([[0], np.cumsum(lengths[fine])])
    return Patterns(patterns.items[fine[owner]], offsets, patterns.support[fine]), np.flatnonzero(fine)
