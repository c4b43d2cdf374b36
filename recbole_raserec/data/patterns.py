"""Frequent sequential patterns within a span, counted exactly, for regeneration and for a pattern memory.

A pattern is a tuple of items; it occurs in a sequence where its items stand in that order, other items between them or
not, the last at most `alpha - 1` positions behind the first. Its support is the number of sequences in which it occurs
(DR4SR, arXiv 2405.17795: sliding window alpha = 5, threshold beta = 2).

Patterns are grown by their last item. All occurrences of one length are arrays; a pattern one item longer is a pair
(shorter pattern, item), so its key is one integer whatever its length, and counting is a sort. A pattern can only be
frequent where its beginning is, which leaves few occurrences to grow. Patterns with different first items have nothing
to do with each other: a log too large for the memory is mined by ranges of first items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

#: Bytes a candidate takes while it is counted: its key, start, end, order, and copies on the way.
_CANDIDATE_BYTES = 96


@dataclass(frozen=True)
class Patterns:
    """Mined patterns, by length, then by their items.

    Attributes:
        items: of all patterns one after the other, int64.
        offsets: pattern p is `items[offsets[p]:offsets[p + 1]]`; int64 [P + 1].
        support: sequences it occurs in, int64 [P].
        occurrences: of each pattern and each sequence it occurs in, ascending: pattern, sequence, and the position in
            the sequence at which it is first complete, int64 arrays of `support.sum()` rows; None unless asked for.
    """

    items: np.ndarray
    offsets: np.ndarray
    support: np.ndarray
    occurrences: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.support)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self.items[self.offsets[index] : self.offsets[index + 1]].tolist())

    def lengths(self) -> np.ndarray:
        """Items of each pattern, [P]."""
        return np.diff(self.offsets)

    def as_dict(self) -> dict[tuple[int, ...], int]:
        """{pattern: support}."""
        return {self[index]: int(count) for index, count in enumerate(self.support)}


def mine_patterns(
    items: np.ndarray, offsets: np.ndarray, alpha: int = 5, beta: int = 2, min_length: int = 2,
    max_length: int | None = None, memory_mb: float = 1024, desc: str | None = None, occurrences: bool = False,
) -> Patterns:  # fmt: skip
    """All patterns of `min_length` to `max_length` items within a span of `alpha` that `beta` or more sequences hold.

    Args:
        items: of the sequences one after the other, int [N]; ids from 0 on.
        offsets: sequence s is `items[offsets[s]:offsets[s + 1]]`; int [S + 1].
        alpha: positions a pattern may span, its first and last item included.
        beta: least number of sequences.
        min_length: least number of items of a pattern.
        max_length: largest number of items of a pattern; None: `alpha`.
        memory_mb: MiB that the candidates may take at a time, the result and the sequences not counted.
        desc: show a progress bar with this label.
        occurrences: whether to note the sequences, see `Patterns`.

    Raises:
        ValueError: an argument is out of range.
    """
    max_length = alpha if max_length is None else max_length
    for name, value, least in (("alpha", alpha, 1), ("beta", beta, 1), ("min_length", min_length, 1)):
        if value < least:
            raise ValueError(f"{name}: {value!r} must be at least {least}")
    if not min_length <= max_length <= alpha:
        raise ValueError(f"max_length: {max_length!r} must lie between min_length ({min_length}) and alpha ({alpha})")
    items, offsets = np.asarray(items, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    if len(items) and items.min() < 0:
        raise ValueError(f"items: {items.min()} is negative")
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    ends = np.repeat(offsets[1:], np.diff(offsets))
    log = _Log(items, sequence, ends, alpha, beta, int(items.max(initial=0)) + 1)

    starts = np.argsort(items, kind="stable")  # positions by first item
    support = _support(items[starts], sequence[starts])
    frequent = np.zeros(log.n_items, dtype=bool)
    frequent[support[0][support[1] >= beta]] = True
    log.frequent = frequent[items]
    starts = starts[frequent[items[starts]]]

    found: list[_Found] = []
    with tqdm(total=len(starts), desc=desc, disable=desc is None, unit="items", dynamic_ncols=True) as bar:
        for part in _parts(items[starts], starts, max(1, int(memory_mb * 2**20) // (_CANDIDATE_BYTES * alpha))):
            found.extend(_grow(log, part, min_length, max_length, occurrences))
            bar.update(len(part))
    return _assemble(found, offsets if occurrences else None)


#: Patterns [P, m], their support [P], and (pattern, sequence, place) rows or None.
_Found = tuple[np.ndarray, np.ndarray, Any]


@dataclass
class _Log:
    items: np.ndarray
    sequence: np.ndarray  # [N], sequence of each place
    ends: np.ndarray  # [N], where the sequence of each place ends
    alpha: int
    beta: int
    n_items: int
    frequent: Any = None  # bool [N], positions whose item alone is frequent


def _parts(first: np.ndarray, starts: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut `starts`, sorted by first item, into parts of about `size` that never divide an item."""
    at = 0
    while at < len(starts):
        stop = min(at + size, len(starts))
        stop = int(np.searchsorted(first, first[stop - 1], side="right"))
        yield np.sort(starts[at:stop])
        at = stop


def _grow(log: _Log, starts: np.ndarray, min_length: int, max_length: int, occurrences: bool) -> Iterator[_Found]:
    """What is found of each length, of the patterns that begin at `starts`, ascending positions."""
    heads, state = np.unique(log.items[starts], return_inverse=True)
    patterns = heads[:, None]  # [P, m]
    start, end = starts, starts  # first and last place of each occurrence of a pattern; ascending by start
    for length in range(1, max_length + 1):
        if length > 1:
            reach = np.minimum(start + log.alpha, log.ends[start]) - 1 - end  # positions behind `end` within the span
            grown = np.repeat(np.arange(len(start)), reach)
            step = np.arange(len(grown)) - np.repeat(np.cumsum(reach) - reach, reach) + 1
            last = end[grown] + step
            keep = log.frequent[last]
            grown, last = grown[keep], last[keep]
            key = state[grown] * log.n_items + log.items[last]
            start, end = start[grown], last
            order = np.argsort(key, kind="stable")
            keys, counts = _support(key[order], log.sequence[start[order]])
            keys = keys[counts >= log.beta]
            slot = np.minimum(np.searchsorted(keys, key), max(len(keys) - 1, 0))
            keep = keys[slot] == key if len(keys) else np.zeros(len(key), dtype=bool)
            start, end, state = start[keep], end[keep], slot[keep]
            patterns = np.column_stack([patterns[keys // log.n_items], keys % log.n_items])
            counts = counts[counts >= log.beta]
        else:
            order = np.argsort(state, kind="stable")
            counts = _support(state[order], log.sequence[start[order]])[1]
        if length >= min_length and len(patterns):
            yield patterns, counts, _first(state, log.sequence[start], end) if occurrences else None
        if not len(start):
            return


def _first(pattern: np.ndarray, sequence: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pattern, sequence, end) with the earliest end of each pattern and sequence."""
    order = np.lexsort((end, sequence, pattern))
    pattern, sequence = pattern[order], sequence[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (pattern[1:] != pattern[:-1]) | (sequence[1:] != sequence[:-1])
    return pattern[fresh], sequence[fresh], end[order][fresh]


def _support(keys: np.ndarray, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct `keys`, and in how many sequences each occurs; sorted by key, and by sequence within a key."""
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    fresh = first.copy()
    fresh[1:] |= sequence[1:] != sequence[:-1]
    return keys[first], np.add.reduceat(fresh, np.flatnonzero(first)) if len(keys) else np.zeros(0, dtype=np.int64)


def _assemble(found: list[_Found], starts: np.ndarray | None) -> Patterns:
    """Everything in one order; `starts` [S + 1] of the sequences, when the occurrences are wanted."""
    empty = np.zeros(0, dtype=np.int64)
    items, lengths, support, positions, first = [empty], [empty], [empty], [(empty, empty, empty)], 0
    for length in sorted({part[0].shape[1] for part in found}):
        parts = [part for part in found if part[0].shape[1] == length]
        table, counts = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
        order = np.lexsort(table.T[::-1])
        items.append(table[order].ravel())
        lengths.append(np.full(len(table), length))
        support.append(counts[order].astype(np.int64))
        if starts is not None:
            rank = np.empty_like(order)
            rank[order] = np.arange(first, first + len(order))
            begin = np.cumsum([0, *(len(part[0]) for part in parts)])
            pattern = np.concatenate([rank[part[2][0] + at] for part, at in zip(parts, begin)])
            sequence, end = (np.concatenate([part[2][which] for part in parts]) for which in (1, 2))
            turn = np.lexsort((sequence, pattern))
            positions.append((pattern[turn], sequence[turn], (end - starts[sequence])[turn]))
        first += len(table)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    occurrences = None
    if starts is not None:
        pattern, sequence, place = (np.concatenate([rows[which] for rows in positions]) for which in range(3))
        occurrences = pattern, sequence, place
    return Patterns(np.concatenate(items), offsets, np.concatenate(support), occurrences)
