"""Plots of figures that lie beside them as JSON. They need matplotlib (``pip install 'recbole-raserec[plots]'``)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.errors import MissingExtraError
from recbole_raserec.fileio import replacing

#: x -> the values of all seeds there.
Points = Mapping[Any, Sequence[float]]


def lines(
    path: str | os.PathLike, panels: Mapping[str, Mapping[str, Points]], xlabel: str, ylabel: str,
    levels: Optional[Mapping[str, Mapping[str, Sequence[float]]]] = None, log: bool = False,
) -> None:  # fmt: skip
    """Curves with a band of one standard deviation, a panel each.

    Args:
        path: of the PNG; replaced atomically.
        panels: {title: {label: points}}; all x are numbers.
        levels: {title: {label: values}}, dashed horizontal lines.
        log: a logarithmic x axis.

    Raises:
        MissingExtraError: there is no matplotlib.
    """
    figure, axes = _axes(len(panels))
    for axis, (title, curves) in zip(axes, panels.items()):
        for label, points in curves.items():
            x = sorted(points)
            mean = np.array([np.mean(points[place]) for place in x])
            spread = np.array([np.std(points[place], ddof=1) if len(points[place]) > 1 else 0.0 for place in x])
            (line,) = axis.plot(x, mean, marker="o", label=label)
            axis.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
        for number, (label, values) in enumerate((levels or {}).get(title, {}).items()):
            axis.axhline(float(np.mean(values)), linestyle="--", color=f"C{len(curves) + number}", label=label)
        if log:
            axis.set_xscale("log")
        _finish(axis, title, xlabel, ylabel)
    _write(figure, path)


def bars(
    path: str | os.PathLike, panels: Mapping[str, Mapping[str, Points]], xlabel: str, ylabel: str
) -> None:  # fmt: skip
    """Groups of bars with one standard deviation, a panel each; `panels` is {title: {label: points}} with any x.

    Raises:
        MissingExtraError: there is no matplotlib.
    """
    figure, axes = _axes(len(panels))
    for axis, (title, series) in zip(axes, panels.items()):
        width = 0.8 / len(series)
        names: list[Any] = []
        for number, (label, points) in enumerate(series.items()):
            names = list(points)
            place = np.arange(len(names)) + (number - (len(series) - 1) / 2) * width
            spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in points.values()]
            axis.bar(place, [np.mean(values) for values in points.values()], width, yerr=spread, label=label, capsize=2)
        axis.set_xticks(np.arange(len(names)), [str(name) for name in names])
        _finish(axis, title, xlabel, ylabel)
    _write(figure, path)


def points(
    path: str | os.PathLike, series: Mapping[str, Sequence[tuple[Any, float]]], xlabel: str, ylabel: str,
    steps: Optional[Mapping[str, Sequence[tuple[Any, float]]]] = None, log: bool = False,
) -> None:  # fmt: skip
    """One panel of single points.

    Args:
        path: of the PNG; replaced atomically.
        series: {label: (x, y) pairs}; x are numbers, or texts that get a place each. A series without any is left out.
        steps: {label: (x, y) pairs}, drawn as lines that keep their height up to the next pair.
        log: a logarithmic x axis.

    Raises:
        MissingExtraError: there is no matplotlib.
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
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=8)


def _write(figure: Any, path: str | os.PathLike) -> None:
    with replacing(path) as part:
        # no date and version in the file: the same figures give the same bytes
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})


def plot_beside(path: str | os.PathLike, suffix: str = "") -> Path:
    """Where the plot of a JSON file goes: the same name, `suffix` added, ending in ``.png``."""
    path = Path(path)
    return path.with_name(f"{path.stem}{suffix}.png")
