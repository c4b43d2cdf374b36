"""Pre-training pairs of the regenerator: a training sequence and a frequent pattern it contains (DR4SR, section 4.1).

Sequences are histories up to the last training target: no item of validation or test enters one, and so no pattern and
no pair. The regenerator reads them in pieces of a length it can take.

A sequence contains a pattern if the pattern's items occur in it in that order, at any distance (the span bounds the
mining, not this). All sequences are matched at once against a prefix tree of the patterns: what a sequence has matched
so far is one row (sequence, node, earliest position where the match can end), grown by those of its later items that
lead to a child of the node. The work depends on what the sequences contain, not on how many patterns there are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.data import Patterns, mine_patterns, pad_rows

#: Rows grown at a time.
_ROWS = 1 << 21


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences one after the other, each of a user.

    Attributes:
        items: int64 [N].
        offsets: int64 [S + 1].
        users: int64 [S].
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
    first = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    windows = rows[train.iid_field + config["LIST_SUFFIX"]][order[first]]
    lengths = rows[config["ITEM_LIST_LENGTH_FIELD"]][order[first]]
    counts = np.diff(np.concatenate([first, [len(users)]])) + lengths
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    items = np.empty(offsets[-1], np.int64)
    ahead = np.arange(windows.shape[1]) < lengths[:, None]  # of the first window
    spots = offsets[:-1, None] + np.arange(windows.shape[1])
    items[spots[ahead]] = windows[ahead]
    behind = np.ones(len(items), dtype=bool)
    behind[spots[ahead]] = False
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


class PatternTree:
    """Prefix tree of patterns; node 0 is the empty prefix.

    Attributes:
        pattern: int64 [nodes], the pattern that ends at each node, -1 where none does.
    """

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
        self._keys = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
        self.pattern = np.full(nodes, -1, dtype=np.int64)
        self.pattern[at] = np.arange(len(patterns))

    def children(self, nodes: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The node behind `nodes` [N] by `items` [N], -1 where there is none."""
        known = items < self._width
        keys = nodes * self._width + np.where(known, items, 0)
        slot = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        found = known & (self._keys[slot] == keys) if len(self._keys) else np.zeros(len(keys), dtype=bool)
        return np.where(found, slot + 1, -1)


def contained_patterns(
    items: np.ndarray, offsets: np.ndarray, patterns: Patterns, desc: Optional[str] = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every (sequence, pattern) in which the pattern is a subsequence, sorted by both: int64 [M], [M].

    Args:
        items: int [N], the sequences one after the other.
        offsets: int [S + 1].
        patterns: mined ones.
        desc: show a progress bar with this label.
    """
    items, offsets = np.asarray(items, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    tree = PatternTree(patterns)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    starts = offsets[:-1][np.diff(offsets) > 0]
    owners = np.flatnonzero(np.diff(offsets) > 0)
    with tqdm(total=len(owners), desc=desc, disable=desc is None, unit="sequences", dynamic_ncols=True) as bar:
        # each row grows into as many as there are items behind it: parts of about _ROWS of them
        weight = np.cumsum(np.diff(offsets)[owners] ** 2)
        cuts = np.searchsorted(weight, np.arange(_ROWS, int(weight[-1]) if len(weight) else 0, _ROWS))
        for part in np.split(np.arange(len(owners)), np.unique(cuts)):
            _match(tree, items, offsets, owners[part], starts[part], found)
            bar.update(len(part))
    sequence, pattern = map(np.concatenate, zip(*found)) if found else np.zeros((2, 0), dtype=np.int64)
    order = np.lexsort((pattern, sequence))
    return sequence[order], pattern[order]


def _match(
    tree: PatternTree, items: np.ndarray, offsets: np.ndarray, sequence: np.ndarray, start: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]],
) -> None:  # fmt: skip
    """Grow matches from the empty prefix; `start` [B] is the first position of the next item."""
    node = np.zeros(len(sequence), dtype=np.int64)
    while len(sequence):
        reach = offsets[sequence + 1] - start
        grown = np.repeat(np.arange(len(sequence)), reach)
        step = np.arange(len(grown)) - np.repeat(np.cumsum(reach) - reach, reach)
        at = start[grown] + step
        child = tree.children(node[grown], items[at])
        keep = child >= 0
        grown, at, child = grown[keep], at[keep], child[keep]
        owner = sequence[grown]
        order = np.lexsort((at, child, owner))
        owner, at, child = owner[order], at[order], child[order]
        first = np.ones(len(owner), dtype=bool)  # the earliest end of each (sequence, node)
        first[1:] = (owner[1:] != owner[:-1]) | (child[1:] != child[:-1])
        sequence, node, start = owner[first], child[first], at[first] + 1
        ends = tree.pattern[node]
        found.append((sequence[ends >= 0], ends[ends >= 0]))


def build_pairs(
    items: np.ndarray, offsets: np.ndarray, patterns: Patterns, per_sequence: int = 10, seed: int = 0,
    desc: Optional[str] = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Up to `per_sequence` of the patterns each sequence contains, drawn uniformly without replacement.

    Args:
        items: int [N], the sequences one after the other.
        offsets: int [S + 1].
        patterns: mined ones.
        per_sequence: pairs of a sequence at most (the paper: 10).
        seed: of the draw.
        desc: show a progress bar with this label.

    Returns:
        sequence and pattern of each pair, int64 [M], [M], sorted by sequence.
    """
    if per_sequence < 1:
        raise ValueError(f"per_sequence: {per_sequence!r} must be at least 1")
    sequence, pattern = contained_patterns(items, offsets, patterns, desc)
    return draw(sequence, pattern, per_sequence, seed)


def draw(sequence: np.ndarray, pattern: np.ndarray, per_sequence: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep `per_sequence` random pairs of each sequence; `sequence` is sorted."""
    lot = np.random.default_rng(seed).random(len(sequence))
    order = np.lexsort((lot, sequence))
    begin = np.searchsorted(sequence, sequence, side="left")
    kept = np.sort(order[np.arange(len(sequence)) - begin < per_sequence])
    return sequence[kept], pattern[kept]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """(sequence, pattern) pairs of one set of sequences.

    Attributes:
        sequences: what is read.
        patterns: all mined ones.
        sequence: int64 [M], ascending.
        pattern: int64 [M].
        offsets: int64 [S + 1], pairs of each sequence.
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
        sequences: what the regenerator reads.
        whole: what is mined.
        span: alpha of `mine_patterns`.
        min_support: beta of `mine_patterns`.
        pattern_length: items of a pattern at most.
        per_sequence: pairs of a sequence at most.
        seed: of the draw.
        desc: label of the progress bars.
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
