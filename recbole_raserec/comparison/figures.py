"""The figures of a comparison: the result records and ranks of many runs as rows with means, spreads and significance.

A row is a model on one data set. It has the mean and standard deviation of every metric over its seeds and, where it
has a base, its improvement over the base and two p-values of each metric: over users and over seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.evaluation import grouped, holm, improvement, paired_p, read_ranks, user_metrics


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    record: dict[str, Any]  # what `result_file` received
    ranks: Path  # of what `ranks_file` received
    continued: bool = False  # started more than once; its last process did only the rest of the work

    def last(self, part: str, default: Any = None) -> Any:
        """The part of the record of what is beyond the base, or of the base where there is nothing else."""
        of = self.record.get(part, {})
        return of.get("ours", of.get("base", default))

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """`{protocol: {metric: value}}` of the test."""
        return self.last("metrics")["test"]

    @property
    def training_seconds(self) -> float:
        """Of all that this run trains beyond its base, over all its starts."""
        own = {name: seconds for name, seconds in self.record["seconds"].items() if name != "this_run"}
        if "ours" in self.record["metrics"]:
            own.pop("recommendation", None)
        return sum(own.values())

    def last_ranks(self) -> Any:
        """The ranks of the last stage."""
        return list(read_ranks(self.ranks).values())[-1]


@dataclass(frozen=True)
class Row:
    """A model in the table of one data set."""

    label: str
    base: Optional[str]  # label of the row of its base
    runs: Mapping[int, Finished]  # by seed
    failed: Mapping[int, str]  # the last words of the failed runs, by seed


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """One data set's part of `compare.json`.

    Returns:
        `{"protocol": of the runs, "users": tested, "rows": [...]}`; "protocol" and "users" are None when all runs
        failed. Of each row: "model", "base", "seeds" (metrics, seconds, ... of each run), "failed" (`{seed: last
        words}`), "metrics" and "validation" (`{protocol: {metric: {"mean", "std"}}}`, of the test and of the
        validation), "valid_metric" (which stops the training of a model without a base), "improvement_percent" and
        "significance" by protocol and metric where there is a base ("users" and "seeds" are p-values, "users_holm" and
        "seeds_holm" corrected over all rows and metrics of this data set and protocol), "pairs" (how many were
        compared), "parameters", "training_seconds", "wall_seconds", "peak_memory_mb".

    Raises:
        CheckpointError: a file of ranks is damaged.
        ValueError: the runs do not rank the same items: all, or those of one way to sample them.
    """
    ranked = {run.record["protocol"].get("ranking"): row.label for row in rows for run in row.runs.values()}
    if len(ranked) > 1:
        ways = "; ".join(f"{label}: {way}" for way, label in ranked.items())
        raise ValueError(f"runs that rank different items cannot be compared: {ways}.")
    found = [_row(row) for row in rows]
    runs = {row.label: row.runs for row in rows}
    for row, made in zip(rows, found):
        if row.base is not None:
            _compare(made, row.runs, runs[row.base])
    _correct(found)
    first = next((run for row in rows for run in row.runs.values()), None)
    if first is None:
        return {"protocol": None, "users": None, "rows": found}
    # whether validation joined differs by model, and stands in the rows
    of = {name: value for name, value in first.record["protocol"].items() if not name.startswith("validation_in")}
    protocol = {**of, **{name: first.record["options"][name] for name in ("metrics", "topk")}}
    return {"protocol": protocol, "users": len(np.unique(first.last_ranks().users)), "rows": found}


def spread(values: Iterable[Optional[float]]) -> dict[str, Optional[float]]:
    """Mean and standard deviation (of a sample: divided by n - 1); None where there are too few values."""
    known = [value for value in values if value is not None]
    return {
        "mean": round(statistics.fmean(known), 6) if known else None,
        "std": round(statistics.stdev(known), 6) if len(known) > 1 else None,
    }


def _row(row: Row) -> dict[str, Any]:
    runs = dict(sorted(row.runs.items()))
    whole = [run.record for run in runs.values() if not run.continued]
    first = next(iter(runs.values()), None)
    joined = ("validation_in_history", "validation_in_memory")
    return {
        "model": row.label,
        "base": row.base,
        **{name: None if first is None else first.record["protocol"][name] for name in joined},
        "metrics": _spreads([run.metrics for run in runs.values()]),
        "validation": _spreads([run.last("metrics").get("valid", {}) for run in runs.values()]),
        "valid_metric": None if first is None else _valid_metric(first),
        "parameters": None if first is None else first.last("parameters"),
        "training_seconds": spread(run.training_seconds for run in runs.values()),
        "wall_seconds": spread(record["seconds"]["this_run"] for record in whole),
        "peak_memory_mb": spread(record["peak_memory_mb"] for record in whole),
        "seeds": {str(seed): _seed(run) for seed, run in runs.items()},
        "failed": {str(seed): words for seed, words in sorted(row.failed.items())},
    }


def _spreads(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """`{protocol: {metric: value}}` of each run as `{protocol: {metric: {"mean", "std"}}}`."""
    return {
        protocol: {metric: spread(run[protocol][metric] for run in runs) for metric in metrics}
        for protocol, metrics in (runs[0] if runs else {}).items()
    }


def _valid_metric(run: Finished) -> str:
    return str(run.record["options"].get("valid_metric", "")).lower()


def _seed(run: Finished) -> dict[str, Any]:
    """A run in its row; "groups" are of "grouped", the metric that stops the training early."""
    record, metric = run.record, _valid_metric(run)
    groups = {}
    if metric in next(iter(run.metrics.values()), {}):
        groups = {"grouped": metric, "groups": grouped(run.last_ranks(), record["options"], metric)}
    return {
        "metrics": run.metrics,
        "training_seconds": round(run.training_seconds, 3),
        "wall_seconds": record["seconds"]["this_run"],
        "peak_memory_mb": record["peak_memory_mb"],
        "continued": run.continued,
        "curve": run.last("curves", {}),  # empty in records of earlier versions
        **groups,
        "threads": record["options"].get("threads"),
    }


def _compare(made: dict[str, Any], ours: Mapping[int, Finished], base: Mapping[int, Finished]) -> None:
    """Add to a row its improvement over the base and the p-values, of the seeds that both finished."""
    both = sorted(ours.keys() & base.keys())
    gains: dict[str, dict[str, Any]] = {}
    tests: dict[str, dict[str, Any]] = {}
    made.update(improvement_percent=gains, significance=tests, pairs={"users": 0, "seeds": len(both)})
    for protocol in made["metrics"] if both else ():
        ours_users, ours_values = _over_seeds([ours[seed] for seed in both], protocol)
        base_users, base_values = _over_seeds([base[seed] for seed in both], protocol)
        users, left, right = np.intersect1d(ours_users, base_users, assume_unique=True, return_indices=True)
        made["pairs"]["users"] = len(users)
        gains[protocol], tests[protocol] = {}, {}
        for metric in made["metrics"][protocol]:
            by_seed = [[runs[seed].metrics[protocol][metric] for seed in both] for runs in (ours, base)]
            gain = improvement(statistics.fmean(by_seed[1]), statistics.fmean(by_seed[0]))
            gains[protocol][metric] = None if gain is None else round(gain, 2)
            tests[protocol][metric] = {
                # a metric of lists or scores has no value for each user
                "users": paired_p(ours_values[metric][left], base_values[metric][right])
                if metric in ours_values
                else None,
                "seeds": paired_p(*by_seed),
            }


def _over_seeds(runs: Sequence[Finished], protocol: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(users str [U], `{metric: [U]}`): each user's metrics, averaged over the runs; users that all runs tested."""
    users, total = user_metrics(runs[0].last_ranks(), protocol, runs[0].record["options"])
    for run in runs[1:]:
        others, values = user_metrics(run.last_ranks(), protocol, run.record["options"])
        users, left, right = np.intersect1d(users, others, assume_unique=True, return_indices=True)
        total = {metric: total[metric][left] + values[metric][right] for metric in total}
    return users, {metric: values / len(runs) for metric, values in total.items()}


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Holm's correction, one family for each protocol and test: all rows, all metrics."""
    compared = [row["significance"] for row in rows if row.get("significance")]
    for protocol in {name: None for tests in compared for name in tests}:
        family = [entry for tests in compared for entry in tests.get(protocol, {}).values()]
        for test in ("users", "seeds"):
            for entry, value in zip(family, holm([entry[test] for entry in family])):
                entry[f"{test}_holm"] = value
