"""Paired significance of the difference between two models on the same users, and Holm's correction.

Two tests, which answer different questions:

- *over users*: each user's metric is averaged over the seeds, and the differences of the users are tested. A small p
  says that the difference is not an accident of the users who happen to be in the log: it would be found with other
  users of the same kind. It takes the trained models as they are. With few seeds it says nothing about another seed:
  a lucky initialisation that ranks better for everybody is as significant here as a better method. With ten thousand
  users a difference too small to matter is significant too; look at its size first.
- *over seeds*: the means of the seeds are tested, each seed of the one against the same seed of the other. A small p
  says that the difference is not an accident of initialisation and order of the batches. It takes the users and the
  split as they are. With few seeds it has little power: two seeds reach p < .05 only where the difference is more than
  12 standard errors, so a large p is no evidence of equality.

Neither says anything about another data set, another split, or other hyperparameters, and both take their pairs for
independent (users who share items are not quite). The t-test assumes that the mean difference is about normal, which
thousands of users give and a handful of seeds do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import numpy as np
from scipy import stats

#: What the rounding of two figures to six decimals can make of their difference.
ROUNDING = 2e-6


def paired_p(ours: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray) -> Optional[float]:
    """Two-sided p-value of the paired t-test that the mean difference is zero.

    Args:
        ours, base: [n] values, pair by pair.

    Returns:
        p in [0, 1]; None for fewer than two pairs, and for differences that are equal up to :data:`ROUNDING` and not
        zero, which two seeds of few users bring about by chance: the statistic has no spread to stand on there.
        Differences that are all zero give 1.

    Raises:
        ValueError: the two have different lengths, or hold something not finite.
    """
    ours, base = np.asarray(ours, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if ours.shape != base.shape or ours.ndim != 1:
        raise ValueError(f"pairs need two lists of the same length, not {ours.shape} and {base.shape}.")
    difference = ours - base
    if not np.isfinite(difference).all():
        raise ValueError("a value is not finite.")
    if len(difference) < 2:
        return None
    if np.ptp(difference) <= ROUNDING:
        return 1.0 if np.abs(difference).max() <= ROUNDING else None
    return float(stats.ttest_rel(ours, base).pvalue)


def holm(p: Sequence[Optional[float]]) -> list[Optional[float]]:
    """Holm's correction: the p-values of a family, so that rejecting those below a level errs anywhere in the family
    with at most that probability.

    The i-th smallest of m (from 1) is multiplied by m - i + 1; none becomes smaller than one before it, or more than 1.

    Args:
        p: one value for each comparison of the family; None where there was nothing to test, which does not count.

    Returns:
        the corrected values, in the order of `p`; None stays None.

    Raises:
        ValueError: a value is not in [0, 1].

    References:
        Holm, S. (1979): A simple sequentially rejective multiple test procedure.
    """
    known = [place for place, value in enumerate(p) if value is not None]
    for place in known:
        if not 0 <= _value(p[place]) <= 1:
            raise ValueError(f"{p[place]} is no p-value.")
    corrected: list[Optional[float]] = [None] * len(p)
    largest = 0.0
    for done, place in enumerate(sorted(known, key=lambda place: _value(p[place]))):
        largest = max(largest, min(1.0, (len(known) - done) * _value(p[place])))
        corrected[place] = largest
    return corrected


def _value(p: Optional[float]) -> float:
    return math.nan if p is None else p
