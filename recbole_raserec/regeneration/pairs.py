"""Pre-training pairs of the regenerator: a training sequence and a frequent pattern it contains (DR4SR, section 4.1).

A pattern is contained where its items occur in the sequence in that order, at any distance (the span bounds the
mining, not this). All sequences are matched at once against a prefix tree of the patterns: what a sequence has matched
so far is one row (sequence, node, earliest place where the match can end), grown by whichever of its later items leads
to a child of the node. The work depends on what the sequences contain, not on how many patterns there are.
"""

from __future__ import annotations

from typing import Optional

import numpy as np
from tqdm import tqdm

from recbole_raserec.data.patterns import Patterns

#: Rows grown at a time.
_ROWS = 1 << 21


class PatternTree:
    """Prefix tree of patterns; node 0 is the empty prefix.

    Args:
        patterns: mined patterns.

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
        items: int [N], the sequences one after the other. offsets: int [S + 1].
        patterns: mined patterns, see :func:`~recbole_raserec.data.patterns.mine_patterns`.
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
    sequence = np.concatenate([s for s, _ in found]) if found else np.zeros(0, dtype=np.int64)
    pattern = np.concatenate([p for _, p in found]) if found else np.zeros(0, dtype=np.int64)
    order = np.lexsort((pattern, sequence))
    return sequence[order], pattern[order]


def _match(
    tree: PatternTree, items: np.ndarray, offsets: np.ndarray, sequence: np.ndarray, place: np.ndarray,
    found: list[tuple[np.ndarray, np.ndarray]],
) -> None:  # fmt: skip
    """Grow matches from the empty prefix; `place` is where the next item may stand."""
    node = np.zeros(len(sequence), dtype=np.int64)
    while len(sequence):
        reach = offsets[sequence + 1] - place
        grown = np.repeat(np.arange(len(sequence)), reach)
        step = np.arange(len(grown)) - np.repeat(np.cumsum(reach) - reach, reach)
        at = place[grown] + step
        child = tree.children(node[grown], items[at])
        keep = child >= 0
        grown, at, child = grown[keep], at[keep], child[keep]
        owner = sequence[grown]
        order = np.lexsort((at, child, owner))
        owner, at, child = owner[order], at[order], child[order]
        first = np.ones(len(owner), dtype=bool)  # the earliest end of each (sequence, node)
        first[1:] = (owner[1:] != owner[:-1]) | (child[1:] != child[:-1])
        sequence, node, place = owner[first], child[first], at[first] + 1
        ends = tree.pattern[node]
        found.append((sequence[ends >= 0], ends[ends >= 0]))


def build_pairs(
    items: np.ndarray, offsets: np.ndarray, patterns: Patterns, per_sequence: int = 10, seed: int = 0,
    desc: Optional[str] = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Up to `per_sequence` of the patterns each sequence contains, drawn uniformly without replacement.

    Args:
        items, offsets, patterns, desc: as :func:`contained_patterns`.
        per_sequence: at most so many pairs of a sequence (the paper: 10).
        seed: of the draw; the same seed gives the same pairs.

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
