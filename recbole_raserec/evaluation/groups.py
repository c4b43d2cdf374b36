"""Metrics of test targets in groups: by how many had the target in training, and by the length of the history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recbole_raserec.evaluation.protocols import metrics_from_ranks
from recbole_raserec.evaluation.ranks_file import StageRanks

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
