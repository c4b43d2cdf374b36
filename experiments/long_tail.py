"""Long tail: whom and what does retrieval help? Metrics by popularity of the target and by length of the history.

    python experiments/long_tail.py --data_path=DIR [--dataset=ml-100k]

takes up the finished runs of RaSeRec over SASRec (or trains them), ranks the test targets with and without retrieval,
and reports both in quintiles: of the target's count in the training split, and of the items before the target. Writes
results/long_tail_<dataset>.json, the page (.md) and the plot (.png) beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import grid
import numpy as np
from grid import Results, mean
from trained import load

from recbole_raserec.evaluation import plots
from recbole_raserec.evaluation.protocols import PROTOCOLS, SEEN_KEPT
from recbole_raserec.evaluation.ranks import quintiles

ROWS = {"RaSeRec over SASRec": ("--model=RaSeRec", "--backbone=SASRec")}
GROUPINGS = ("target popularity", "history length")


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """{grouping: {group: {"targets", "base": {protocol: metrics}, "ours": ...}}}, and all targets as a group."""
    trained = load(options, seed, args)
    train, test = trained.base.splits.train._dataset, trained.test
    users, positions, _ = train.windows()
    items, _ = train.store.until(users, positions)
    counts = np.bincount(items, minlength=train.store.n_items)
    _, lengths, targets = test.windows()
    ranks = {"base": trained.ranks(trained.base.model), "ours": trained.ranks(trained.ours.model)}
    record: dict[str, Any] = {}
    for grouping, values in zip(GROUPINGS, (counts[targets], lengths)):
        groups = {f"{values[rows].min()}-{values[rows].max()}": rows for rows in quintiles(values)}
        groups["all"] = np.arange(len(values))
        record[grouping] = {
            name: {"targets": len(rows), **{who: trained.metrics(found, rows) for who, found in ranks.items()}}
            for name, rows in groups.items()
        }
    return record


def page(dataset: str, results: Results) -> str:
    """The tables."""
    lines = [
        "# Whom and what retrieval helps",
        "",
        f"`experiments/long_tail.py`, {dataset}: test split, leave-one-out, full",
        "ranking. Quintiles of the test targets by their count in the training split and by the items before them.",
        "NDCG@10, mean over the seeds, standard deviation in brackets; improvement of the means.",
    ]
    for label, runs in results.items():
        for grouping in GROUPINGS if runs else ():
            for protocol in PROTOCOLS:
                lines += ["", f"{label}, seeds {', '.join(runs)}, {protocol.replace('_', ' ')}", ""]
                lines += [f"| {grouping} | targets | base | with retrieval | improvement |", "|---|---|---|---|---|"]
                for group, figures in next(iter(runs.values()))[grouping].items():
                    pair = [
                        [run[grouping][group][who][protocol]["ndcg@10"] for run in runs.values()]
                        for who in ("base", "ours")
                    ]
                    gain = f"{100 * (sum(pair[1]) / sum(pair[0]) - 1):+.1f} %" if sum(pair[0]) else "-"
                    lines.append(f"| {group} | {figures['targets']} | {mean(pair[0])} | {mean(pair[1])} | {gain} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Any) -> None:
    """NDCG@10 with and without retrieval, a panel a grouping, seen items kept."""
    for runs in results.values():
        panels = {
            f"by {grouping}, seen items kept": {
                label: {
                    group: [run[grouping][group][who][SEEN_KEPT]["ndcg@10"] for run in runs.values()]
                    for group in next(iter(runs.values()))[grouping]
                }
                for label, who in (("SASRec", "base"), ("RaSeRec", "ours"))
            }
            for grouping in GROUPINGS
        }
        plots.plot_bars(path, panels, "quintile", "NDCG@10")


def main() -> None:
    """Measure what is missing; write figures, page and plot."""
    results, path = grid.main(__doc__, ROWS, "long_tail", page, "ml-100k", measure)
    draw(results, plots.plot_beside(path))


if __name__ == "__main__":
    main()
