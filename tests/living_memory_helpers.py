"""What the tests of a memory that changes share: random entries."""

from __future__ import annotations

import numpy as np

HIDDEN = 16


def rows(rng, size, n_users=8, patterns=False):
    """Random entries; patterns come with owners."""
    keys = rng.standard_normal((size, HIDDEN)).astype(np.float32)
    targets, positions = rng.integers(1, 40, size), rng.integers(1, 9, size)
    times = rng.integers(0, 20, size).astype(float)
    if not patterns:
        return {"keys": keys, "targets": targets, "users": rng.integers(0, n_users, size), "positions": positions,
                "times": times}  # fmt: skip
    held = [rng.choice(n_users, rng.integers(2, min(n_users, 4) + 1), replace=False) for _ in range(size)]
    owners = (
        np.repeat(np.arange(size), [len(users) for users in held]), np.concatenate(held),
        rng.integers(1, 9, sum(len(users) for users in held)),
    )  # fmt: skip
    return {"keys": keys, "targets": targets, "users": np.full(size, -1), "positions": positions, "times": times,
            "support": np.array([len(users) for users in held]), "owners": owners}  # fmt: skip
