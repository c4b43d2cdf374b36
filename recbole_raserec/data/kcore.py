"""k-core filtering of an interaction log."""

from __future__ import annotations

import numpy as np


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k-core: the largest part of the log in which every user and every item has at least `k` rows.

    Removing a rare item can make a user rare, and so on; the passes are repeated until one removes nothing. The result
    does not depend on the order of the rows. Cost: O(N) a pass, and each pass sees only what the last one left.

    Args:
        users: int array [N], ids from 0.
        items: int array [N], ids from 0.
        k: smallest number of rows; 0 and 1 keep everything.

    Returns:
        bool array [N], True for the rows kept. All False when there is no k-core.
    """
    rows = np.arange(len(users))
    while k > 1 and len(rows):
        by_user, by_item = users[rows], items[rows]
        frequent = (np.bincount(by_user)[by_user] >= k) & (np.bincount(by_item)[by_item] >= k)
        if frequent.all():
            break
        rows = rows[frequent]
    mask = np.zeros(len(users), dtype=bool)
    mask[rows] = True
    return mask
