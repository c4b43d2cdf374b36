"""What the tests of the memory bank share: entries, and a bank of them."""

from __future__ import annotations

import numpy as np

from recbole_raserec.retrieval.memory import MemoryBank

HIDDEN = 4


def log_of(seed, n_users, length, distinct=None):
    """Entries (keys, targets, users, positions) of `n_users` histories; few distinct keys make many ties."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, n_users)
    users = np.repeat(np.arange(1, n_users + 1), lengths)
    positions = np.concatenate([np.arange(1, n + 1) for n in lengths])
    keys = rng.standard_normal((len(users), HIDDEN)).astype(np.float32)
    if distinct:
        keys = keys[rng.integers(0, min(distinct, len(keys)), len(keys))]
    order = rng.permutation(len(users))
    return keys, rng.integers(1, 50, len(users)), users[order], positions[order]


def bank_of(entries, **options):
    bank = MemoryBank(HIDDEN, **options)
    bank.add(*entries)
    return bank
