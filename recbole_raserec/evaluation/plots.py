"""Plots of figures that lie beside them as JSON, written atomically.

Each raises MissingExtraError without matplotlib (`pip install 'recbole-raserec[plots]'`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from recbole_raserec.errors import MissingExtraError
from recbole_raserec.storage import replacing

#: Labels of more characters do not fit into a panel.
LONG_LABEL = 30

Target = Union[str, os.PathLike]
#: x -> the values of all seeds there.
Points = Mapping[Any, Sequence[float]]


def plot_lines(
    path: Target, panels: Mapping[str, Mapping[str, Points]], xlabel: str, ylabel: str,
    levels: Optional[Mapping[str, Mapping[str, Sequence[float]]]] = None, log: bool = False,
) -> None:  # fmt: skip
    """Curves with a band of one standard deviation, a panel each.

    Args:
        path: of the PNG.
        panels: {title: {label: points}}; all x are numbers.
        levels: {title: {label: values}}, dashed horizontal lines.
        log: a logarithmic x axis.
    """
    figure, axes = _axes(len(panels))
    colors = _colors([*panels.values(), *(levels or {}).values()])
    for axis, (title, curves) in zip(axes, panels.items()):
        for label, points in curves.items():
            x = sorted(points)
            mean = np.array([np.mean(points[place]) for place in x])
            spread = np.array([_spread(points[place]) for place in x])
            axis.plot(x, mean, marker="o", label=label, color=colors[label])
            axis.fill_between(x, mean - spread, mean + spread, color=colors[label], alpha=0.2, linewidth=0)
        for label, values in (levels or {}).get(title, {}).items():
            axis.axhline(float(np.mean(values)), linestyle="--", color=colors[label], label=label)
        if log:
            axis.set_xscale("log")
        _finish(axis, title, xlabel, ylabel)
    _write(figure, path)


def plot_bars(path: Target, panels: Mapping[str, Mapping[str, Points]], xlabel: str, ylabel: str) -> None:
    """Groups of bars with one standard deviation, a panel each; `panels` is {title: {label: points}} with any x."""
    figure, axes = _axes(len(panels))
    colors = _colors(panels.values())
    for axis, (title, series) in zip(axes, panels.items()):
        width = 0.8 / len(series)
        names: list[Any] = []
        for number, (label, points) in enumerate(series.items()):
            names = list(points)
            place = np.arange(len(names)) + (number - (len(series) - 1) / 2) * width
            means, spread = map(np.mean, points.values()), map(_spread, points.values())
            axis.bar(place, [*means], width, yerr=[*spread], label=label, capsize=2, color=colors[label])
        axis.set_xticks(np.arange(len(names)), [str(name) for name in names])
        _finish(axis, title, xlabel, ylabel)
    _write(figure, path)


def plot_points(
    path: Target, series: Mapping[str, Sequence[tuple[Any, float]]], xlabel: str, ylabel: str,
    steps: Optional[Mapping[str, Sequence[tuple[Any, float]]]] = None, log: bool = False,
) -> None:  # fmt: skip
    """One panel of single points.

    Args:
        path: of the PNG.
        series: {label: (x, y) pairs}; x are numbers, or texts that get a place each. A series without any is left out.
        steps: {label: (x, y) pairs}, drawn as lines that keep their height up to the next pair.
        log: a logarithmic x axis.
    """
    figure, (axis,) = _axes(1)
    for label, pairs in series.items():
        if pairs:
            axis.scatter(*zip(*pairs), label=label, s=18, marker="x" if label == "pruned" else "o")
    for label, pairs in (steps or {}).items():
        if pairs:
            axis.step(*zip(*pairs), where="post", label=label, color="0.4")
    if log:
        axis.set_xscale("log")
    _finish(axis, "", xlabel, ylabel)
    _write(figure, path)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _axes(panels: int) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plots", "matplotlib", "plots are drawn with it") from None
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _finish(axis: Any, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)


def _colors(panels: Iterable[Iterable[str]]) -> dict[str, Any]:
    """A colour for each label, the same in all panels."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel))
    if len(labels) <= 10:
        return {label: f"C{number}" for number, label in enumerate(labels)}
    from matplotlib import colormaps

    return {label: colormaps["tab20"](number % 20) for number, label in enumerate(labels)}


def _legend(figure: Any) -> None:
    """In the panels; where a label is long, one for all of them below, for which the figure grows."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if len(entries) < 2:
        return
    if max(map(len, entries)) <= LONG_LABEL:
        for axis in figure.axes:
            if len(axis.get_legend_handles_labels()[1]) > 1:
                axis.legend(fontsize=8)
        return
    labels = [_wrapped(label, int(13 * figure.get_figwidth())) for label in entries]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.17 * lines)
    figure.legend(entries.values(), labels, loc="outside lower left", fontsize=8)


def _wrapped(label: str, width: int) -> str:
    """`label` in lines of about `width` characters, broken before the colons of a model's options."""
    lines = [""]
    for part in re.split("(?=:)", label):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("    ")
        lines[-1] += part
    return "\n".join(lines)


def _write(figure: Any, path: Target) -> None:
    _legend(figure)
    with replacing(path) as part:
        # no date and version in the file: the same figures give the same bytes
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def plot_beside(path: Target, suffix: str = "") -> Path:
    """Where the plot of a JSON file goes: the same name, `suffix` added, ending in `.png`."""
    path = Path(path)
    return path.with_name(f"{path.stem}{suffix}.png")
