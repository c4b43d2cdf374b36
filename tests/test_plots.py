"""Plots: drawn, repeatable, and a clear error without matplotlib."""

from __future__ import annotations

import sys

import pytest

from recbole_raserec.errors import MissingExtraError
from recbole_raserec.evaluation import plots

POINTS = {1: [0.1, 0.2], 10: [0.2, 0.3], 100: [0.25]}


def test_the_same_figures_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    for name in ("a", "b"):
        plots.plot_lines(tmp_path / f"l{name}.png", {"t": {"x": POINTS}}, "K", "N", {"t": {"base": [0.1]}}, log=True)
        plots.plot_bars(
            tmp_path / f"b{name}.png", {"t": {"x": POINTS, "y": POINTS}, "u": {"x": {"60%": [1.0]}}}, "g", "N"
        )
    for kind in "lb":
        first, second = ((tmp_path / f"{kind}{name}.png").read_bytes() for name in ("a", "b"))
        assert first == second
        assert first.startswith(b"\x89PNG")
    assert (tmp_path / "la.png").read_bytes() != (tmp_path / "ba.png").read_bytes()


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'recbole-raserec\[plots\]'"):
        plots.plot_bars(tmp_path / "x.png", {"t": {"x": POINTS}}, "K", "N")
    assert not list(tmp_path.iterdir())


def test_a_plot_lies_beside_its_figures(tmp_path):
    assert plots.plot_beside(tmp_path / "a.b.json", "_K") == tmp_path / "a.b_K.png"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    figure = pytest.importorskip("matplotlib.figure", reason="plots need matplotlib")
    written, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: written.append(self) or save(self, *a, **k))
    return written


LONG = "RaSeRec:backbone=SASRec:training=packed:head=both:memory=both:alpha=0.2:ram_learning_rate=0.0002:top_k=50"


def test_long_names_stand_below_the_panels(tmp_path, figures):
    plots.plot_bars(tmp_path / "x.png", {"t": {LONG: POINTS, "SASRec": POINTS}, "u": {"SASRec": POINTS}}, "K", "N")
    [figure] = figures
    [legend] = figure.legends
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    box = legend.get_window_extent()
    assert all(box.y1 <= axis.get_window_extent().y0 for axis in figure.axes)
    assert all(axis.get_window_extent().height > 200 for axis in figure.axes)  # the figure has grown for it
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    first, second = (text.get_text() for text in legend.get_texts())
    assert first.replace("\n    ", "") == LONG
    assert "\n" not in second


def test_short_names_stand_in_the_panels(tmp_path, figures):
    plots.plot_lines(tmp_path / "x.png", {"t": {"a": POINTS, "b": POINTS}, "u": {"b": POINTS}}, "K", "N")
    [figure] = figures
    assert not figure.legends
    assert [axis.get_legend() is not None for axis in figure.axes] == [True, False]
    colors = [{line.get_label(): line.get_color() for line in axis.lines} for axis in figure.axes]
    assert colors[0]["b"] == colors[1]["b"] != colors[0]["a"]


def test_more_labels_than_ten_differ(tmp_path, figures):
    plots.plot_bars(tmp_path / "x.png", {"t": {f"model {n}": POINTS for n in range(15)}}, "K", "N")
    colors = {patch.get_facecolor() for patch in figures[0].axes[0].patches}
    assert len(colors) == 15
