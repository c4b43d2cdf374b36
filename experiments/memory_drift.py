"""Preference drift: the memory grows along the time line, the weights stay. What is a fresher memory worth?

    python experiments/memory_drift.py --data_path=DIR [--dataset=ml-100k]

takes up the finished runs of RaSeRec over SASRec (or trains them), builds the memory again from its first 60, 80 and
100 percent and from the validation pairs on top, and tests with each. The time line: true timestamps (ml-100k), or,
where the timestamp is the position in the user's history (amazon-beauty), each user's own history. Writes
results/memory_drift_<dataset>.json, the page (.md) and the plot (.png) beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import grid
import numpy as np
from grid import POSITIONS, Results, cells
from trained import Trained, add_rows, bank_like, load

from recbole_raserec.evaluation import plots
from recbole_raserec.evaluation.protocols import PROTOCOLS

ROWS = {"RaSeRec over SASRec": ("--model=RaSeRec", "--backbone=SASRec")}
SHARES = (0.6, 0.8, 1.0)


def moments(trained: Trained, dataset: str, pairs: int) -> tuple[np.ndarray, dict[float, float]]:
    """Place of each of the first `pairs` memories on the time line, and where each share of it ends."""
    memory = trained.ours.model.memory
    if dataset in POSITIONS:
        users, positions = memory.users[:pairs], memory.positions[:pairs]
        last = np.zeros(int(users.max()) + 1)
        np.maximum.at(last, users, positions)
        return (positions + 1) / (last[users] + 1), {share: share for share in SHARES}
    times = memory.times[:pairs]
    return times, {share: float(np.quantile(times, share)) for share in SHARES}


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics by protocol without memory, with each part of it, and with the validation pairs."""
    trained = load(options, seed, args)
    full = trained.ours.model.memory
    pairs = len(trained.base.splits.train._dataset)
    when, ends = moments(trained, args.dataset, pairs)
    record: dict[str, Any] = {"no memory": trained.metrics(trained.ranks(trained.base.model))}
    bank, inside = bank_like(full), np.zeros(pairs, dtype=bool)
    for share, end in ends.items():
        fresh = (when <= end) & ~inside
        inside |= fresh
        add_rows(bank, full, np.flatnonzero(fresh))
        record[f"{share:.0%}"] = {**trained.metrics(trained.ranks_with(bank)), "memories": len(bank)}
    add_rows(bank, full, np.arange(pairs, len(full)))
    record["100% and validation"] = {**trained.metrics(trained.ranks_with(bank)), "memories": len(bank)}
    return record


def page(dataset: str, results: Results) -> str:
    """The table."""
    line = "each user's own history" if dataset in POSITIONS else "true timestamps of the training pairs"
    lines = [
        "# A memory that grows, weights that stay",
        "",
        f"`experiments/memory_drift.py`, {dataset}: test split, leave-one-out, full",
        f"ranking; time line: {line}. Mean over the seeds, standard deviation in brackets; R@10 / N@10.",
        "",
    ]
    for label, runs in results.items():
        lines += [
            f"{label}, seeds {', '.join(runs)}",
            "",
            "| memory | memories | seen kept | seen removed |",
            "|---|---|---|---|",
        ]
        for name in next(iter(runs.values()), {}):
            records = [run[name] for run in runs.values()]
            size = records[0].get("memories", 0)
            lines.append(f"| {name} | {size} | {' | '.join(cells(records))} |")
        lines.append("")
    return "\n".join(lines)


def draw(results: Results, path: Any) -> None:
    """NDCG@10 by memory, a panel a protocol."""
    panels: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        for label, runs in results.items():
            names = list(next(iter(runs.values())))
            points = {
                name.replace(" and ", "\nand "): [run[name][protocol]["ndcg@10"] for run in runs.values()]
                for name in names
            }
            panels.setdefault(protocol.replace("_", " "), {})[label] = points
    plots.plot_bars(path, panels, "memory", "NDCG@10")


def main() -> None:
    """Measure what is missing; write figures, page and plot."""
    results, path = grid.main(__doc__, ROWS, "memory_drift", page, "ml-100k", measure)
    draw(results, plots.plot_beside(path))


if __name__ == "__main__":
    main()
