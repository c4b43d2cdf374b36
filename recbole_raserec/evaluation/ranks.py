"""The ranks of a run's test targets as a file, and what is computed from them: metrics by user and by group, and the
paired significance of the difference between two models.

Two tests answer different questions:

- *over users*: each user's metric is averaged over the seeds, and the differences of the users are tested. A small p
  says that the difference would be found with other users of the same kind. It takes the trained models as they are:
  with few seeds a lucky initialisation is as significant as a better method. With ten thousand users a difference too
  small to matter is significant too; look at its size first.
- *over seeds*: the means of the seeds are tested, each seed of the one against the same seed of the other. A small p
  says that the difference is not an accident of initialisation and order of the batches. It takes users and split as
  they are. With few seeds it has little power: two reach p < .05 only where the difference is more than 12 standard
  errors, so a large p is no evidence of equality.

Neither says anything about another data set, split, or other hyperparameters; both take their pairs for independent
(users who share items are not quite) and their mean difference for about normal (of few seeds it is not).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from scipy import stats
from scipy.sparse import csr_matrix

from recbole_raserec.errors import CheckpointError
from recbole_raserec.evaluation.protocols import PROTOCOLS, SAMPLED, Ranks, metrics_from_ranks, query_metrics
from recbole_raserec.storage import replacing

#: Names in the file: `<stage>/users`, `<stage>/queries`, `<stage>/<protocol>` for the ranks, and what targets are
#: grouped by.
USERS, QUERIES = "users", "queries"
POPULARITY, HISTORY = GROUPINGS = ("popularity", "history")
#: Digits of the figures of groups.
DECIMALS = 6
#: What the rounding of two figures to six decimals can make of their difference.
ROUNDING = 2e-6


@dataclass(frozen=True)
class StageRanks:
    """The ranks of one stage.

    Attributes:
        users: the user of each query, as the log calls them, str [n].
        queries: the query (0..n-1) of each target, int64 [P]; a query of a general model may have several.
        ranks: {protocol: 1-based int64 [P]}.
        groupings: {"popularity": int64 [P], users who had the target in the training split; "history": int64 [P],
            different items that its user had before the test}; empty in files of earlier versions.
    """

    users: np.ndarray
    queries: np.ndarray
    ranks: dict[str, np.ndarray]
    groupings: dict[str, np.ndarray]


def write_ranks(
    path: str | os.PathLike, stages: Mapping[str, Ranks], users: Sequence[str], seen: Mapping[str, csr_matrix]
) -> None:
    """Write the ranks of a run's stages as an `.npz` file without pickle, atomically.

    Args:
        stages: ranks by stage, from the base to the whole pipeline; they are read in that order.
        users: the name in the log of each internal user id.
        seen: bool [n_users, n_items], what was there before the targets of "valid" and of "test".
    """
    names = np.asarray(users, dtype=str)
    without = seen["valid"].getnnz(axis=1) == 0  # users without a validation target: all before the test is training
    popularity = seen["valid"].getnnz(axis=0) + seen["test"][without].getnnz(axis=0)  # [n_items]
    history = seen["test"].getnnz(axis=1)  # [n_users]
    arrays = {}
    for stage, ranks in stages.items():
        arrays[f"{stage}/{USERS}"] = names[ranks.users.numpy()]
        arrays[f"{stage}/{QUERIES}"] = ranks.queries.numpy().astype(np.int32)
        for protocol, values in ranks.by_protocol().items():
            arrays[f"{stage}/{protocol}"] = values.numpy().astype(np.int32)
        arrays[f"{stage}/{POPULARITY}"] = popularity[ranks.targets.numpy()].astype(np.int32)
        arrays[f"{stage}/{HISTORY}"] = history[ranks.users[ranks.queries].numpy()].astype(np.int32)
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_ranks(path: str | os.PathLike) -> dict[str, StageRanks]:
    """Read what `write_ranks` wrote: {stage: ranks}, the whole pipeline last.

    Raises:
        CheckpointError: the file is missing, damaged, or none of ranks.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist.")
    protocols = (*PROTOCOLS, SAMPLED)
    try:
        stages: dict[str, dict[str, np.ndarray]] = {}
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                stage, _, part = name.rpartition("/")
                stages.setdefault(stage, {})[part] = file[name] if part == USERS else file[name].astype(np.int64)
        return {
            stage: StageRanks(
                parts[USERS], parts[QUERIES],
                *({name: parts[name] for name in names if name in parts} for names in (protocols, GROUPINGS)),
            )
            for stage, parts in stages.items()
        }  # fmt: skip
    except (KeyError, ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a readable file of ranks ({error}).") from None


def user_metrics(
    ranks: StageRanks, protocol: str, options: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The metrics of each user, the mean over a user's queries; `options` give `metrics` and `topk`.

    Returns:
        (users str [U], sorted, {"recall@10": float64 [U], ...}).
    """
    given = torch.from_numpy(ranks.ranks[protocol])
    values = query_metrics(given, options, queries=torch.from_numpy(ranks.queries))  # [n] each
    users, place = np.unique(ranks.users, return_inverse=True)
    place = place.reshape(-1)
    counts = np.bincount(place)
    return users, {name: np.bincount(place, weights=each) / counts for name, each in values.items()}


def quintiles(values: np.ndarray) -> list[np.ndarray]:
    """Five groups of rows of about equal size by rising value; equal values stay together, so there may be fewer."""
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8), method="lower")
    group = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(group == number) for number in range(5) if (group == number).any()]


def grouped(ranks: StageRanks, options: Mapping[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    """One metric ("ndcg@10", say; `options` give `metrics` and `topk`) in quintiles of the targets, each its own query.

    Returns:
        {"popularity" | "history": {"3-7": {"targets": n, protocol: value}}}; empty for ranks without groupings, and for
        a metric that needs more than ranks.
    """
    found: dict[str, dict[str, Any]] = {}
    for grouping, values in ranks.groupings.items():
        found[grouping] = {}
        for rows in quintiles(values):
            figures = {
                name: metrics_from_ranks(torch.from_numpy(each[rows]), options, decimals=DECIMALS).get(metric)
                for name, each in ranks.ranks.items()
            }
            if None in figures.values():
                return {}  # a metric of lists or scores
            label = f"{values[rows].min()}-{values[rows].max()}"
            found[grouping][label] = {"targets": len(rows), **figures}
    return found


def paired_p(ours: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray) -> Optional[float]:
    """Two-sided p-value of the paired t-test that the mean difference of `ours` [n] and `base` [n] is zero.

    Returns:
        p in [0, 1]; None for fewer than two pairs, and for differences that are equal up to `ROUNDING` and not
        zero, which two seeds of few users bring about by chance: the statistic needs a spread.
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
    with at most that probability. None, where there was nothing to test, does not count and stays None.

    The i-th smallest of m (from 1) is multiplied by m - i + 1; none becomes smaller than one before it, or more than 1.

    Raises:
        ValueError: a value is not in [0, 1].

    References:
        Holm, S. (1979): A simple sequentially rejective multiple test procedure.
    """
    known = {place: value for place, value in enumerate(p) if value is not None}
    for value in known.values():
        if not 0 <= value <= 1:
            raise ValueError(f"{value} is no p-value.")
    corrected: list[Optional[float]] = [None] * len(p)
    largest = 0.0
    for done, place in enumerate(sorted(known, key=lambda place: known[place])):
        largest = max(largest, min(1.0, (len(known) - done) * known[place]))
        corrected[place] = largest
    return corrected
