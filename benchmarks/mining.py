"""Frequent patterns within a span, against seq2pat (``pip install --no-deps seq2pat``); the pairs built from them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.common import Case, config_of
from benchmarks.preparation import BIG, SHARE, generate

ALPHA, BETA = 5, 2


def _training_part(data_path: str) -> tuple[np.ndarray, np.ndarray]:
    """Items and offsets of the training part of amazon-beauty's leave-one-out split."""
    from recbole_raserec.data.splits import prepare_data

    train = prepare_data(config_of("SASRec", data_path)).train._dataset
    users, positions, _ = train.windows()
    return train.store.until(users, positions)


def _digest(patterns: dict[tuple[int, ...], int]) -> dict[str, int]:
    """Numbers that two sets of patterns with supports share only if they are equal, or by a great accident."""
    marks = [hash((pattern, support)) for pattern, support in patterns.items()]
    mixed = 0
    for mark in marks:
        mixed ^= mark
    return {"patterns": len(patterns), "sum": sum(marks), "xor": mixed}


def ours(data_path: str) -> dict[str, Any]:
    """The median of five runs."""
    from recbole_raserec.data.patterns import mine_patterns

    items, offsets = _training_part(data_path)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        mined = mine_patterns(items, offsets, ALPHA, BETA)
        seconds.append(time.perf_counter() - started)
    return {"seconds": float(np.median(seconds)), "note": f"{len(mined)} patterns", "found": _digest(mined.as_dict())}


def seq2pat(data_path: str) -> dict[str, Any]:
    """The median of five runs, the building of its input lists not counted."""
    from sequential.seq2pat import Seq2Pat

    items, offsets = _training_part(data_path)
    sequences = [items[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:]) if b > a]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        found = Seq2Pat(sequences=sequences, max_span=ALPHA).get_patterns(min_frequency=BETA)
        seconds.append(time.perf_counter() - started)
    patterns = {tuple(row[:-1]): row[-1] for row in found if len(row) > 2}
    return {
        "seconds": float(np.median(seconds)),
        "note": f"{len(patterns)} patterns of two or more items",
        "found": _digest(patterns),
    }


def equal(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Same patterns, same supports."""
    assert a["found"] == b["found"], (a["found"], b["found"])
    return f"{a['found']['patterns']} patterns with equal supports"


def big_log(users: int) -> tuple[np.ndarray, np.ndarray]:
    """Items and offsets of the generated log of `big-log`, without a file."""
    user, item, _ = generate(users)
    return item, np.concatenate([[0], np.cumsum(np.bincount(user, minlength=users))])


def big_ours(_: str) -> dict[str, Any]:
    """The whole log."""
    from recbole_raserec.data.patterns import mine_patterns

    items, offsets = big_log(BIG)
    started = time.perf_counter()
    mined = mine_patterns(items, offsets, ALPHA, BETA)
    return {"seconds": time.perf_counter() - started, "note": f"{len(items)} interactions, {len(mined)} patterns"}


def big_seq2pat(_: str) -> dict[str, Any]:
    """seq2pat on one in :data:`SHARE` of the users."""
    from sequential.seq2pat import Seq2Pat

    items, offsets = big_log(BIG // SHARE)
    sequences = [(items[a:b] + 1).tolist() for a, b in zip(offsets[:-1], offsets[1:])]  # it knows no item 0
    started = time.perf_counter()
    found = Seq2Pat(sequences=sequences, max_span=ALPHA).get_patterns(min_frequency=BETA)
    seconds = (time.perf_counter() - started) * SHARE
    note = f"one in {SHARE} of the users ({len(found)} patterns), time scaled; the peak is that of this part"
    return {"seconds": seconds, "note": note}


#: Sequences that the peer scans, and of which both sides report the pairs.
SCANNED = 40


def our_pairs(data_path: str) -> dict[str, Any]:
    """Pairs of all training sequences."""
    from recbole_raserec.data.patterns import mine_patterns
    from recbole_raserec.regeneration.pairs import build_pairs

    items, offsets = _training_part(data_path)
    patterns = mine_patterns(items, offsets, ALPHA, BETA)
    started = time.perf_counter()
    sequence, _ = build_pairs(items, offsets, patterns, 10, 0)
    seconds = time.perf_counter() - started
    sample = build_pairs(items, offsets[: SCANNED + 1], patterns, 10, 0)
    return {"seconds": seconds, "note": f"{len(sequence)} pairs", "pairs": np.column_stack(sample).tolist()}


def scanned_pairs(data_path: str) -> dict[str, Any]:
    """Each pattern tried on each sequence."""
    from recbole_raserec.data.patterns import mine_patterns
    from recbole_raserec.regeneration.pairs import draw

    items, offsets = _training_part(data_path)
    mined = mine_patterns(items, offsets, ALPHA, BETA)
    patterns = [mined[index] for index in range(len(mined))]
    sequences = [items[a:b].tolist() for a, b in zip(offsets[:SCANNED], offsets[1 : SCANNED + 1])]
    started = time.perf_counter()
    found = []
    for number, sequence in enumerate(sequences):
        for index, pattern in enumerate(patterns):
            rest = iter(sequence)
            if all(item in rest for item in pattern):
                found.append((number, index))
    pairs = np.array(found, dtype=np.int64).reshape(-1, 2)
    sample = draw(pairs[:, 0], pairs[:, 1], 10, 0)
    seconds = (time.perf_counter() - started) * (len(offsets) - 1) / SCANNED
    note = f"{SCANNED} of {len(offsets) - 1} sequences, scaled"
    return {"seconds": seconds, "note": note, "pairs": np.column_stack(sample).tolist()}


def same_pairs(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Same pairs for the same seed."""
    assert a["pairs"] == b["pairs"]
    return f"the {len(a['pairs'])} pairs of the first {SCANNED} sequences are the same"


CASES = {
    "mining-big": Case(
        f"a generated log of 10 M interactions: patterns within a span of {ALPHA} in at least {BETA} sequences",
        big_ours,
        big_seq2pat,
    ),
    "pair-building": Case(
        "amazon-beauty, training part: up to ten of its patterns for each sequence, against trying every pattern",
        our_pairs,
        scanned_pairs,
        same_pairs,
    ),
    "mining": Case(
        f"amazon-beauty, training part: patterns within a span of {ALPHA} in at least {BETA} sequences",
        ours,
        seq2pat,
        equal,
    ),
}
