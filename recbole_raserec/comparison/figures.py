"""The figures of a comparison: result records and ranks of many runs as rows with means, spreads and significance."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.evaluation import grouped, holm, improvement, paired_p, read_ranks, user_metrics

#: The two tests of significance, see `recbole_raserec.evaluation.ranks`.
TESTS = ("users", "seeds")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        record: what `result_file` received. ranks: path of what `ranks_file` received.
        continued: an earlier start of it was interrupted; its last process did only the rest of the work.
    """

    record: dict[str, Any]
    ranks: Path
    continued: bool = False

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """{protocol: {metric: value}} of the test."""
        of = self.record["metrics"]
        return of.get("ours", of["base"])["test"]

    @property
    def validation(self) -> dict[str, dict[str, float]]:
        """{protocol: {metric: value}} of the validation, for the weights that were kept."""
        of = self.record["metrics"]
        return of.get("ours", of["base"]).get("valid", {})

    @property
    def parameters(self) -> Optional[int]:
        of = self.record["parameters"]
        return of.get("ours", of.get("base"))

    @property
    def curve(self) -> dict[str, Any]:
        """Of the training of what is beyond the base; empty in records of earlier versions."""
        of = self.record.get("curves", {})
        return of.get("ours", of.get("base", {}))

    @property
    def training_seconds(self) -> float:
        """Of all that this run has beyond its base, over all its starts."""
        own = {name: seconds for name, seconds in self.record["seconds"].items() if name != "this_run"}
        if "ours" in self.record["metrics"]:
            own.pop("recommendation", None)
        return sum(own.values())


@dataclass(frozen=True)
class Row:
    """A model in the table of one data set: its label, the label of its base if it has one, its runs by seed."""

    label: str
    base: Optional[str]
    runs: Mapping[int, Run]
    failed: Mapping[int, str]


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """One data set's part of ``compare.json``.

    Returns:
        {"protocol": of the runs, "users": tested, "rows": [...]}; "protocol" and "users" are None when all runs failed.
        Of each row: "model", "base", "seeds" (metrics, seconds, ... of each run), "failed" ({seed: last words}),
        "metrics" and "validation" ({protocol: {metric: {"mean", "std"}}}, of the test and of the validation),
        "valid_metric" (which stops the training of a model without a base), "improvement_percent" and "significance" by
        protocol and metric where there is a base ("users" and "seeds" are p-values, "users_holm" and "seeds_holm"
        corrected over all rows and metrics of this data set and protocol), "pairs" (how many were compared),
        "parameters", "training_seconds", "wall_seconds", "peak_memory_mb".

    Raises:
        CheckpointError: a file of ranks is damaged.
    """
    found = [_row(row) for row in rows]
    runs = {row.label: row.runs for row in rows}
    users = None
    for row, made in zip(rows, found):
        if row.base is not None:
            _compare(made, row.runs, runs[row.base])
        for run in row.runs.values():
            users = len(np.unique(_last(run).users)) if users is None else users
    _correct(found)
    first = next((run.record for row in rows for run in row.runs.values()), None)
    protocol = None if first is None else _protocol(first)
    return {"protocol": protocol, "users": users, "rows": found}


def _protocol(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same for all rows; whether validation joined differs by model, and stands in the rows."""
    of = {name: value for name, value in record["protocol"].items() if not name.startswith("validation_in")}
    return {**of, "metrics": record["options"]["metrics"], "topk": record["options"]["topk"]}


def _row(row: Row) -> dict[str, Any]:
    runs = dict(sorted(row.runs.items()))
    whole = [run for run in runs.values() if not run.continued]
    made: dict[str, Any] = {"model": row.label, "base": row.base}
    any_run = next(iter(runs.values()), None)
    for name in ("validation_in_history", "validation_in_memory"):
        made[name] = None if any_run is None else any_run.record["protocol"][name]
    made["metrics"] = _spreads([run.metrics for run in runs.values()])
    made["validation"] = _spreads([run.validation for run in runs.values()])
    made["valid_metric"] = None if any_run is None else str(any_run.record["options"].get("valid_metric", "")).lower()
    made["parameters"] = None if any_run is None else any_run.parameters
    made["training_seconds"] = spread(run.training_seconds for run in runs.values())
    made["wall_seconds"] = spread(run.record["seconds"]["this_run"] for run in whole)
    made["peak_memory_mb"] = spread(run.record["peak_memory_mb"] for run in whole)
    made["seeds"] = {str(seed): _seed(run) for seed, run in runs.items()}
    made["failed"] = {str(seed): words for seed, words in sorted(row.failed.items())}
    return made


def _spreads(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """{protocol: {metric: value}} of each run as {protocol: {metric: {"mean", "std"}}}."""
    return {
        protocol: {metric: spread(run[protocol][metric] for run in runs) for metric in metrics}
        for protocol, metrics in (runs[0] if runs else {}).items()
    }


def _seed(run: Run) -> dict[str, Any]:
    record = run.record
    return {
        "metrics": run.metrics,
        "training_seconds": round(run.training_seconds, 3),
        "wall_seconds": record["seconds"]["this_run"],
        "peak_memory_mb": record["peak_memory_mb"],
        "continued": run.continued,
        "curve": run.curve,
        **_groups(run),
        "threads": record["options"].get("threads"),
    }


def _groups(run: Run) -> dict[str, Any]:
    """ "grouped", the metric that stops the training early, and "groups" of it, see :func:`groups.grouped`."""
    metric = str(run.record["options"].get("valid_metric", "")).lower()
    if metric not in next(iter(run.metrics.values()), {}):
        return {}
    return {"grouped": metric, "groups": grouped(_last(run), run.record["options"], metric)}


def spread(values: Iterable[Optional[float]]) -> dict[str, Optional[float]]:
    """Mean and standard deviation (of a sample: divided by n - 1); None where there are too few values."""
    known = [value for value in values if value is not None]
    return {
        "mean": round(statistics.fmean(known), 6) if known else None,
        "std": round(statistics.stdev(known), 6) if len(known) > 1 else None,
    }


def _compare(made: dict[str, Any], ours: Mapping[int, Run], base: Mapping[int, Run]) -> None:
    """Add to a row its improvement over the base and the p-values, of the seeds that both finished."""
    both = sorted(ours.keys() & base.keys())
    made["improvement_percent"], made["significance"] = {}, {}
    made["pairs"] = {"users": 0, "seeds": len(both)}
    for protocol in made["metrics"] if both else ():
        ours_users, ours_values = _over_seeds([ours[seed] for seed in both], protocol)
        base_users, base_values = _over_seeds([base[seed] for seed in both], protocol)
        users, left, right = np.intersect1d(ours_users, base_users, assume_unique=True, return_indices=True)
        made["pairs"]["users"] = len(users)
        made["improvement_percent"][protocol], made["significance"][protocol] = {}, {}
        for metric in made["metrics"][protocol]:
            by_seed = [[runs[seed].metrics[protocol][metric] for seed in both] for runs in (ours, base)]
            gain = improvement(statistics.fmean(by_seed[1]), statistics.fmean(by_seed[0]))
            made["improvement_percent"][protocol][metric] = None if gain is None else round(gain, 2)
            made["significance"][protocol][metric] = {
                "users": paired_p(ours_values[metric][left], base_values[metric][right]),
                "seeds": paired_p(*by_seed),
            }


def _over_seeds(runs: Sequence[Run], protocol: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(users str [U], {metric: [U]}): each user's metrics, averaged over the runs; users that all runs tested."""
    users, total = user_metrics(_last(runs[0]), protocol, runs[0].record["options"])
    for run in runs[1:]:
        others, values = user_metrics(_last(run), protocol, run.record["options"])
        users, left, right = np.intersect1d(users, others, assume_unique=True, return_indices=True)
        total = {metric: total[metric][left] + values[metric][right] for metric in total}
    return users, {metric: values / len(runs) for metric, values in total.items()}


def _last(run: Run) -> Any:
    return list(read_ranks(run.ranks).values())[-1]


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Holm's correction, one family for each protocol and test: all rows, all metrics."""
    compared = [row for row in rows if row.get("significance")]
    for protocol in {name: None for row in compared for name in row["significance"]}:
        family = [entry for row in compared for entry in row["significance"].get(protocol, {}).values()]
        for test in TESTS:
            for entry, value in zip(family, holm([entry[test] for entry in family])):
                entry[f"{test}_holm"] = value
