"""Ranks by definition."""

from __future__ import annotations

import numpy as np


def sorted_rank(scores: np.ndarray, target: int, taken_out: set) -> int:
    """The definition: sort the items that are left by descending score, then by id, and look the target up."""
    left = [item for item in range(1, len(scores)) if item == target or item not in taken_out]
    return sorted(left, key=lambda item: (-scores[item], item)).index(target) + 1
