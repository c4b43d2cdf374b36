"""Mined patterns against every subsequence of every window, written out."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.data.patterns import mine_patterns


def flat(sequences):
    lengths = [len(sequence) for sequence in sequences]
    items = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
    return items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def brute_force(sequences, alpha, beta, min_length, max_length):
    support = Counter()
    for sequence in sequences:
        within = set()
        for length in range(min_length, max_length + 1):
            for places in combinations(range(len(sequence)), length):
                if places[-1] - places[0] < alpha:
                    within.add(tuple(sequence[place] for place in places))
        support.update(within)
    return {pattern: count for pattern, count in support.items() if count >= beta}


SEQUENCES = st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=12)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, st.integers(1, 6), st.integers(1, 4), st.data(), st.sampled_from([0, 1024]))
def test_every_pattern_with_its_support(sequences, alpha, beta, data, memory_mb):
    max_length = data.draw(st.integers(1, alpha))
    min_length = data.draw(st.integers(1, max_length))
    mined = mine_patterns(*flat(sequences), alpha, beta, min_length, max_length, memory_mb)  # 0: item by item
    assert mined.as_dict() == brute_force(sequences, alpha, beta, min_length, max_length)
    listed = [mined[index] for index in range(len(mined))]
    assert listed == sorted(listed, key=lambda pattern: (len(pattern), pattern))
    assert mined.offsets[-1] == len(mined.items)
    assert mined.lengths().tolist() == [len(pattern) for pattern in listed]


def test_large_ids_and_long_patterns_do_not_overflow():
    sequences = [[10**8 + place for place in range(12)]] * 3
    mined = mine_patterns(*flat(sequences), alpha=12, beta=3)
    assert len(mined) == 2**12 - 1 - 12
    assert set(mined.support.tolist()) == {3}
    assert mined[len(mined) - 1] == tuple(sequences[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0}, "alpha"),
        ({"beta": 0}, "beta"),
        ({"min_length": 0}, "min_length"),
        ({"max_length": 6}, "max_length"),
        ({"min_length": 4, "max_length": 3}, "max_length"),
    ],
)
def test_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        mine_patterns(*flat([[1, 2]]), **options)
    with pytest.raises(ValueError, match="-3"):
        mine_patterns(*flat([[1, -3]]))


def test_nothing_to_mine():
    for sequences in ([], [[]], [[1], [2]], [[1, 2], [2, 1]]):
        mined = mine_patterns(*flat(sequences))
        assert len(mined) == 0
        assert mined.as_dict() == {}


def test_the_number_of_patterns_of_amazon_beauty(real_data):
    """The training part of the leave-one-out split, alpha 5, beta 2: the published setting."""
    with open(real_data / "amazon-beauty" / "amazon-beauty.inter", encoding="utf-8") as file:
        next(file)
        rows = [line.split("\t") for line in file]
    order = sorted(range(len(rows)), key=lambda row: (rows[row][0], float(rows[row][2])))
    ids = {token: number for number, token in enumerate(sorted({row[1] for row in rows}))}
    histories: dict = {}
    for row in order:
        histories.setdefault(rows[row][0], []).append(ids[rows[row][1]])
    training = [history[:-2] for history in histories.values()]
    mined = mine_patterns(*flat(training))
    assert len(mined) == 40_664
    whole, in_parts = mined.as_dict(), mine_patterns(*flat(training), memory_mb=1).as_dict()
    assert whole == in_parts
