"""Plots: drawn, repeatable, and a clear error without matplotlib."""

from __future__ import annotations

import sys

import pytest

from recbole_raserec import plots
from recbole_raserec.errors import MissingExtraError

POINTS = {1: [0.1, 0.2], 10: [0.2, 0.3], 100: [0.25]}


def test_the_same_figures_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    for name in ("a", "b"):
        plots.lines(tmp_path / f"l{name}.png", {"t": {"x": POINTS}}, "K", "N", {"t": {"base": [0.1]}}, log=True)
        plots.bars(tmp_path / f"b{name}.png", {"t": {"x": POINTS, "y": POINTS}, "u": {"x": {"60%": [1.0]}}}, "g", "N")
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
        plots.bars(tmp_path / "x.png", {"t": {"x": POINTS}}, "K", "N")
    assert not list(tmp_path.iterdir())


def test_a_plot_lies_beside_its_figures(tmp_path):
    assert plots.plot_beside(tmp_path / "a.b.json", "_K") == tmp_path / "a.b_K.png"
