"""The regenerated data set: original sequences, mined patterns, generated patterns, each once."""

from __future__ import annotations

import numpy as np

from recbole_raserec.data.patterns import Patterns
from recbole_raserec.data.regenerated import ORIGINS, Regenerated
from recbole_raserec.regeneration.inference import LEAST
from recbole_raserec.regeneration.sources import Sequences

_PATTERN, _GENERATED = ORIGINS.index("pattern"), ORIGINS.index("generated")


def combine(original: Sequences, read: Sequences, patterns: Patterns, generated: np.ndarray) -> Regenerated:
    """What joins the original sequences: every mined pattern, then every generated one, in the order of the sequences
    and conditions; of equal ones the first, and none that is an original sequence.

    Args:
        original: the training sequences. read: those the patterns were generated for.
        patterns: mined ones. generated: int64 [len(read), K, L], padded with 0.
    """
    ways = generated.shape[1]
    rows = generated.reshape(-1, generated.shape[2])
    lengths = (rows > 0).sum(axis=1)
    kept = np.flatnonzero(lengths >= LEAST)
    items = np.concatenate([patterns.items, rows[kept][rows[kept] > 0]])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([patterns.lengths(), lengths[kept]]))])
    users = np.concatenate([np.zeros(len(patterns), np.int64), np.repeat(read.users, ways)[kept]])
    origin = np.repeat(np.array([_PATTERN, _GENERATED], np.uint8), [len(patterns), len(kept)])
    fresh = first_of_each(
        np.concatenate([original.items, items]), np.concatenate([original.offsets, original.offsets[-1] + offsets[1:]])
    )[len(original) :]
    inside = np.repeat(fresh, np.diff(offsets))
    sizes = np.diff(offsets)[fresh]
    return Regenerated(
        items[inside].astype(np.int64), np.concatenate([[0], np.cumsum(sizes)]), users[fresh], origin[fresh]
    )


def first_of_each(items: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """bool [S]: no earlier sequence has the same items. Compared by their bytes, not by a hash."""
    data = np.ascontiguousarray(items, dtype=np.int64).tobytes()
    seen: set[bytes] = set()
    fresh = np.zeros(len(offsets) - 1, dtype=bool)
    for row, (start, stop) in enumerate(zip((8 * offsets[:-1]).tolist(), (8 * offsets[1:]).tolist())):
        key = data[start:stop]
        if key not in seen:
            seen.add(key)
            fresh[row] = True
    return fresh
