"""What is drawn from the figures of a comparison: its tables, and with matplotlib its plots."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

from recbole_raserec import plots
from recbole_raserec.errors import MissingExtraError
from recbole_raserec.evaluation.report import PROTOCOL_TITLES, metric_title
from recbole_raserec.evaluation.tables import STYLES
from recbole_raserec.fileio import read_json, replacing

#: The figures; every table and the plots are drawn from this file.
FIGURES = "compare.json"

#: Files of the tables, and the plot of all metrics.
TABLES = {"text": "compare.txt", "markdown": "compare.md", "latex": "compare.tex", "csv": "compare.csv"}
PLOT = "compare.png"

#: Plots of groups of targets, and the words on their axes.
GROUPS = {"popularity": "users who had the target in training", "history": "items in the history"}

#: Plot of the validation values over the epochs.
TRAINING = "compare_training.png"

#: {title: {model: {x: values of the seeds}}}
Panels = dict[str, dict[str, dict[Any, list[float]]]]


def draw(output: Union[str, os.PathLike]) -> None:
    """Make the tables and, with matplotlib, the plots of a directory anew from its ``compare.json``."""
    folder = Path(output)
    content = read_json(folder / FIGURES)
    for style, name in TABLES.items():
        with replacing(folder / name) as part:
            Path(part).write_text(STYLES[style](content).rstrip("\n") + "\n", encoding="utf-8")
    try:
        if panels := metric_panels(content):
            plots.bars(folder / PLOT, panels, "", "mean over the seeds")
        for grouping, title in GROUPS.items():
            if panels := group_panels(content, grouping):
                plots.bars(folder / f"compare_{grouping}.png", panels, title, "mean over the seeds")
        if panels := training_panels(content):
            plots.lines(folder / TRAINING, panels, "epoch of the row's own training", "validation, mean over the seeds")
    except MissingExtraError as error:
        print(f"no {PLOT}: {error}", file=sys.stderr)


def _shown(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Bases and what stands on them, else all rows."""
    bases = {row["base"] for row in data["rows"]} - {None}
    return [row for row in data["rows"] if not bases or row["base"] or row["model"] in bases]


def metric_panels(content: Mapping[str, Any]) -> Panels:
    """{data set and protocol: {model: {metric: values of the seeds}}}."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        shown = _shown(data)
        for protocol in {each: None for row in shown for each in row["metrics"]}:
            panels[_title(name, protocol)] = {
                row["model"]: {
                    metric_title(metric).replace("@", "\n@"): [
                        seed["metrics"][protocol][metric] for seed in row["seeds"].values()
                    ]
                    for metric in row["metrics"][protocol]
                }
                for row in shown
                if protocol in row["metrics"]
            }
    return panels


def group_panels(content: Mapping[str, Any], grouping: str) -> Panels:
    """{data set, metric and protocol: {model: {quintile: values of the seeds}}}; runs without groups are left out."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        for row in _shown(data):
            for seed in row["seeds"].values():
                for quintile, figures in seed.get("groups", {}).get(grouping, {}).items():
                    for protocol in figures.keys() & row["metrics"].keys():
                        panel = panels.setdefault(f"{_title(name, protocol)}, {metric_title(seed['grouped'])}", {})
                        panel.setdefault(row["model"], {}).setdefault(quintile, []).append(figures[protocol])
    return dict(sorted(panels.items()))


def training_panels(content: Mapping[str, Any]) -> Panels:
    """{data set and metric: {model: {epoch: validation values of the seeds}}}, up to the last epoch of all seeds."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        for row in _shown(data):
            curves = [seed.get("curve") or {} for seed in row["seeds"].values()]
            valid = [dict(curve.get("valid", ())) for curve in curves]
            epochs = sorted(set.intersection(*map(set, valid))) if valid else []
            if epochs:
                panel = panels.setdefault(f"{name}: {metric_title(curves[0]['metric'])}", {})
                panel[row["model"]] = {epoch: [values[epoch] for values in valid] for epoch in epochs}
    return panels


def _title(dataset: str, protocol: str) -> str:
    return f"{dataset}: {PROTOCOL_TITLES[protocol].partition(' (')[0]}"
