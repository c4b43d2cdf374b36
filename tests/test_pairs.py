"""Pairs of sequences and the patterns they contain, against a scan of all patterns for each sequence."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_patterns import SEQUENCES, flat

from recbole_raserec.data.patterns import Patterns, mine_patterns
from recbole_raserec.regeneration import pairs
from recbole_raserec.regeneration.pairs import build_pairs, contained_patterns


def contains(sequence, pattern):
    rest = iter(sequence)
    return all(item in rest for item in pattern)


def scan(sequences, patterns):
    return [
        (number, index)
        for number, sequence in enumerate(sequences)
        for index in range(len(patterns))
        if contains(sequence, patterns[index])
    ]


def patterns_of(rows):
    items, offsets = flat(rows)
    return Patterns(items, offsets, np.ones(len(rows), dtype=np.int64))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, SEQUENCES, st.integers(1, 4), st.sampled_from([1, 1 << 21]))
def test_every_contained_pattern(sequences, others, beta, rows):
    mined = mine_patterns(*flat(sequences), alpha=4, beta=beta)
    with mock.patch.object(pairs, "_ROWS", rows):
        for log in (sequences, others):  # the log they were mined from, and another
            found = contained_patterns(*flat(log), mined)
            assert list(zip(*(part.tolist() for part in found))) == scan(log, mined)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.sets(st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple), max_size=12))
def test_any_set_of_patterns(sequences, rows):
    """Not only mined ones, whose beginnings are patterns too."""
    patterns = patterns_of(sorted(rows, key=lambda row: (len(row), row)))
    found = contained_patterns(*flat(sequences), patterns)
    assert list(zip(*(part.tolist() for part in found))) == scan(sequences, patterns)


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(1, 5), st.integers(0, 2**31))
def test_a_draw_of_each_sequence(sequences, per_sequence, seed):
    mined = mine_patterns(*flat(sequences), alpha=4, beta=1)
    everything = scan(sequences, mined)
    drawn = list(zip(*(part.tolist() for part in build_pairs(*flat(sequences), mined, per_sequence, seed))))
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(everything)
    counts = Counter(number for number, _ in everything)
    assert Counter(number for number, _ in drawn) == {n: min(c, per_sequence) for n, c in counts.items()}
    again = build_pairs(*flat(sequences), mined, per_sequence, seed)
    assert drawn == list(zip(*(part.tolist() for part in again)))


def test_the_draw_is_uniform():
    sequences = [[1, 2, 3, 4]]
    mined = mine_patterns(*flat(sequences), alpha=4, beta=1)
    assert len(mined) == 11
    counts = Counter()
    for seed in range(4400):
        counts.update(build_pairs(*flat(sequences), mined, 3, seed)[1].tolist())
    expected = 4400 * 3 / 11
    assert all(abs(counts[index] - expected) < 5 * expected**0.5 for index in range(11))


def test_no_pairs_at_all_is_an_error():
    with pytest.raises(ValueError, match="per_sequence"):
        build_pairs(*flat([[1, 2]]), mine_patterns(*flat([[1, 2]])), 0)
