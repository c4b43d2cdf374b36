"""Results for people (tables for the terminal and for Markdown) and for programs (a JSON record)."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from recbole_raserec.evaluation.protocols import PROTOCOLS, SEEN_KEPT, SEEN_REMOVED, Metrics
from recbole_raserec.fileio import write_json
from recbole_raserec.kernels.native import loaded

PROTOCOL_TITLES = {
    SEEN_KEPT: "seen items kept in the ranking (RecBole's way for sequential models)",
    SEEN_REMOVED: "seen items removed from the ranking",
}
IMPROVEMENT = "improvement"
ABSENT = "-"
_METRIC_TITLES = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}
_DISTRIBUTIONS = {
    "recbole_raserec": ("recbole-raserec",),
    "recbole": ("recbole",),
    "torch": ("torch",),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "pandas": ("pandas",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11"),
}

Results = Mapping[str, Metrics]  # protocol -> {"recall@10": value, ...}


def comparison_table(
    base: Results,
    ours: Results,
    names: Sequence[str] = ("SASRec", "RaSeRec"),
    *,
    style: str = "text",
    width: int = 80,
    digits: int = 4,
) -> str:
    """Base, ours and the improvement in percent: one block for each protocol, named in words.

    Args:
        base, ours: metrics by protocol, with the same protocols and metrics.
        names: what the two rows are called.
        style: "text" for the terminal or "markdown".
        width: columns of the terminal; metrics that do not fit go into a second band of the same block.
        digits: digits after the point of the metrics.

    Raises:
        ValueError: the two do not have the same protocols and metrics, or the style is unknown.
    """
    return _table([(names[0], base), (names[1], ours)], True, style, width, digits)


def stages_table(results: Mapping[str, Results], *, style: str = "text", width: int = 80, digits: int = 4) -> str:
    """One row for each stage of the pipeline, and the improvement of the last over the first in percent.

    Raises:
        ValueError: the rows do not have the same protocols and metrics, or the style is unknown.
    """
    return _table(list(results.items()), True, style, width, digits)


def results_table(results: Mapping[str, Results], *, style: str = "text", width: int = 80, digits: int = 4) -> str:
    """One row a model, one block a protocol; `results` is {model: {protocol: metrics}}, one model or more.

    Raises:
        ValueError: the models do not have the same protocols and metrics, or the style is unknown.
    """
    return _table(list(results.items()), False, style, width, digits)


def record_table(record: Mapping[str, Any], *, style: str = "text", width: int = 80, digits: int = 4) -> str:
    """The test figures of a record of :func:`result_record`, in the table that fits it."""
    metrics, name = record["metrics"], record["backbone"] or record["model"]
    if "stages" in metrics:
        rows = {stage.replace("base", name): phases["test"] for stage, phases in metrics["stages"].items()}
        return stages_table(rows, style=style, width=width, digits=digits)
    if "ours" not in metrics:
        return results_table({name: metrics["base"]["test"]}, style=style, width=width, digits=digits)
    pair = metrics["base"]["test"], metrics["ours"]["test"]
    return comparison_table(*pair, (name, record["model"]), style=style, width=width, digits=digits)


def improvement(base: float, ours: float) -> float | None:
    """Improvement of `ours` over `base` in percent; None where there is no base to improve on."""
    return None if base == 0 or not math.isfinite(base) or not math.isfinite(ours) else 100 * (ours - base) / base


def result_record(
    *,
    model: str,
    dataset: str,
    seed: int,
    metrics: Mapping[str, Any],
    protocol: Mapping[str, Any],
    seconds: Mapping[str, float],
    backbone: str | None = None,
    options: Mapping[str, Any] | None = None,
    parameters: Mapping[str, int] | None = None,
    peak_memory_mb: float | None = None,
    curves: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything a result needs to be understood and repeated, ready for JSON.

    Args:
        model, backbone, dataset, seed: of the run; no backbone for a baseline.
        metrics: {"base" | "ours": {"valid" | "test": {protocol: {"recall@10": value}}}}; a baseline has only "base".
            Where both are there, "improvement_percent" is added to the record for each phase they share.
        protocol: what the figures mean, see :func:`protocol_description`.
        seconds: wall time of each stage.
        options: the options of the run that differ from the defaults, or all of them.
        parameters: {"base" | "ours": learned numbers of the model}.
        peak_memory_mb: largest memory of the process, MiB; None where that cannot be told.
        curves: {"base" | "ours": validation values and training losses by epoch}.
    """
    base, ours = metrics.get("base"), metrics.get("ours")
    record: dict[str, Any] = {
        "model": model,
        "backbone": backbone,
        "dataset": dataset,
        "seed": seed,
        "metrics": metrics,
    }
    if base is not None and ours is not None:
        record["improvement_percent"] = {
            phase: {
                name: {key: _rounded(improvement(value, ours[phase][name][key]), 2) for key, value in values.items()}
                for name, values in results.items()
                if name in ours[phase]
            }
            for phase, results in base.items()
            if phase in ours
        }
    record["protocol"] = protocol
    record["seconds"] = {stage: round(float(value), 3) for stage, value in seconds.items()}
    record["parameters"] = parameters or {}
    record["peak_memory_mb"] = _rounded(peak_memory_mb, 1)
    record["curves"] = curves or {}
    record["versions"] = versions()
    record["options"] = options or {}
    return _plain(record)


def write_result(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, atomically."""
    write_json(path, _plain(record))


def protocol_description(
    config: Any, *, validation_in_history: bool = True, validation_in_memory: bool = False
) -> dict[str, Any]:
    """In words and options, how the figures of a run came about.

    Args:
        config: gives `eval_args`.
        validation_in_history: the test queries read the validation item as the last of their history.
        validation_in_memory: the validation pairs had joined the memory when the test was run.
    """
    eval_args = config["eval_args"] or {}
    return {
        "split": eval_args.get("split"),
        "group_by": eval_args.get("group_by"),
        "order": eval_args.get("order"),
        "ranking": "every item of the data set",
        "seen_items": {name: PROTOCOL_TITLES[name] for name in PROTOCOLS},
        "seen_means": "every item of the user before the target, in the whole log; the target itself is never removed",
        "ties": "among equal scores the lower internal item id ranks first",
        "validation_in_history": validation_in_history,
        "validation_in_memory": validation_in_memory,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the figures, and the compiled kernels; None: not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        found[name] = next((version for version in map(_version, distributions) if version), None)
    kernels = loaded()
    found["kernels"] = None if kernels is None else kernels.name.lstrip("_")
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _table(results: Sequence[tuple[str, Results]], compare: bool, style: str, width: int, digits: int) -> str:
    if style not in ("text", "markdown"):
        raise ValueError(f"style is {style!r}; it must be 'text' or 'markdown'.")
    protocols, metrics = _shared_keys(results)
    blocks = []
    for protocol in protocols:
        rows = [["model", *map(metric_title, metrics)]]
        rows += [[name, *(f"{of[protocol][key]:.{digits}f}" for key in metrics)] for name, of in results]
        if compare:
            base, ours = results[0][1][protocol], results[-1][1][protocol]
            rows.append([IMPROVEMENT, *(percent(improvement(base[key], ours[key])) for key in metrics)])
        title = PROTOCOL_TITLES.get(protocol, protocol)
        blocks.append(markdown_block(title, rows) if style == "markdown" else text_block(title, rows, width))
    return "\n\n".join(blocks)


def _shared_keys(results: Sequence[tuple[str, Results]]) -> tuple[list[str], list[str]]:
    """Protocols and metrics of all models, which must agree."""
    if not results:
        raise ValueError("there is no result to show.")
    first, *others = [(name, {protocol: list(values) for protocol, values in of.items()}) for name, of in results]
    for name, shape in others:
        if shape != first[1]:
            raise ValueError(f"{first[0]} and {name} were not evaluated alike: {first[1]} against {shape}.")
    protocols = [name for name in PROTOCOLS if name in first[1]]
    protocols += [name for name in first[1] if name not in PROTOCOLS]
    return protocols, first[1][protocols[0]] if protocols else []


def text_block(title: str, rows: list[list[str]], width: int) -> str:
    """Rows under a title, first column to the left, the others to the right, in bands no wider than `width`."""
    name_width = max(len(row[0]) for row in rows)
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(1, len(rows[0]))]
    bands: list[list[int]] = [[]]
    for column, needed in enumerate(widths, start=1):
        taken = name_width + sum(widths[other - 1] for other in bands[-1])
        if bands[-1] and taken + needed > width:
            bands.append([])
        bands[-1].append(column)
    lines = [title]
    for band in bands:
        lines.append("-" * (name_width + sum(widths[column - 1] for column in band)))
        for row in rows:
            lines.append(row[0].ljust(name_width) + "".join(row[column].rjust(widths[column - 1]) for column in band))
    return "\n".join(lines)


def markdown_block(title: str, rows: list[list[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table under a bold title."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in [head, ruler, *body])])


def metric_title(key: str) -> str:
    """A metric as a table's head names it: "ndcg@10" is "NDCG@10"."""
    name, at, k = key.partition("@")
    return _METRIC_TITLES.get(name, name.capitalize()) + at + k


def percent(value: float | None) -> str:
    """A signed percentage, :data:`ABSENT` for None."""
    return ABSENT if value is None else f"{value:+.2f}%"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _plain(value: Any) -> Any:
    """`value` in the types JSON has: numpy numbers as numbers, what is not finite as null, the rest as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
