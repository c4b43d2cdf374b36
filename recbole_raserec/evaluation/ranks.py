"""The ranks of a run's test targets as a file: what significance over users, and any other metric, is computed from."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from recbole_raserec.errors import CheckpointError
from recbole_raserec.evaluation.protocols import PROTOCOLS, Ranks, metrics_from_ranks, query_metrics
from recbole_raserec.storage import replacing

#: Names in the file: ``<stage>/users``, ``<stage>/queries``, ``<stage>/<protocol>`` for the ranks, and what targets are
#: grouped by.
USERS, QUERIES = "users", "queries"
POPULARITY, HISTORY = GROUPINGS = ("popularity", "history")


@dataclass(frozen=True)
class StageRanks:
    """The ranks of one stage.

    Attributes:
        users: str [n], the user of each query, as the log calls them.
        queries: int64 [P], the query (0..n-1) of each target; a query of a general model may have several.
        ranks: {protocol: int64 [P]}, 1-based.
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
    """Write the ranks of a run's stages as an ``.npz`` file without pickle, atomically.

    Args:
        path: of the file.
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
    """Read what :func:`write_ranks` wrote: {stage: ranks}, the whole pipeline last.

    Raises:
        CheckpointError: the file is missing, damaged, or none of ranks.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        stages = {name.rpartition("/")[0]: name for name in arrays}
        return {
            stage: StageRanks(
                arrays[f"{stage}/{USERS}"],
                arrays[f"{stage}/{QUERIES}"].astype(np.int64),
                *(
                    {name: arrays[f"{stage}/{name}"].astype(np.int64) for name in names if f"{stage}/{name}" in arrays}
                    for names in (PROTOCOLS, GROUPINGS)
                ),
            )
            for stage in stages
        }
    except (KeyError, ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a readable file of ranks ({error}).") from None


def user_metrics(
    ranks: StageRanks, protocol: str, options: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The metrics of each user, the mean over a user's queries where there are several.

    Args:
        ranks: of one stage. protocol: one of those it has.
        options: give `metrics` and `topk`.

    Returns:
        (users str [U], sorted, {"recall@10": float64 [U], ...}).
    """
    values = query_metrics(
        torch.from_numpy(ranks.ranks[protocol]), options, queries=torch.from_numpy(ranks.queries)
    )  # [n] each
    users, place = np.unique(ranks.users, return_inverse=True)
    place = place.reshape(-1)
    counts = np.bincount(place)
    return users, {name: np.bincount(place, weights=each) / counts for name, each in values.items()}


# Metrics of test targets in groups: by how many had the target in training, and by the length of the history.


#: Digits of the figures.
DECIMALS = 6


def quintiles(values: np.ndarray) -> list[np.ndarray]:
    """Five groups of rows of about equal size by rising value; equal values stay together, so there may be fewer."""
    edges = np.quantile(values, (0.2, 0.4, 0.6, 0.8), method="lower")
    group = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(group == number) for number in range(5) if (group == number).any()]


def grouped(ranks: StageRanks, options: Mapping[str, Any], metric: str) -> dict[str, dict[str, Any]]:
    """One metric in quintiles of the targets, a target being a query of its own.

    Args:
        ranks: of one stage. options: give `metrics` and `topk`. metric: "ndcg@10", say, one of them.

    Returns:
        {"popularity" | "history": {"3-7": {"targets": n, protocol: value}}}; empty for ranks without groupings.
    """
    found: dict[str, dict[str, Any]] = {}
    for grouping, values in ranks.groupings.items():
        found[grouping] = {}
        for rows in quintiles(values):
            chosen = {name: torch.from_numpy(each[rows]) for name, each in ranks.ranks.items()}
            found[grouping][f"{values[rows].min()}-{values[rows].max()}"] = {
                "targets": len(rows),
                **{name: _metric(each, options, metric) for name, each in chosen.items()},
            }
    return found


def _metric(ranks: torch.Tensor, options: Mapping[str, Any], metric: str) -> float:
    return metrics_from_ranks(ranks, options, decimals=DECIMALS)[metric]
