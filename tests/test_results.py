"""The smallest of the committed tables, made again by the command that stands on its page."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from conftest import ROOT

from recbole_raserec.cli import main

PAGE = ROOT / "results" / "comparison_planted.md"

#: Of a mean over two seeds of 600 users; rounding differs between processors and builds of torch.
TOLERANCE = 0.01


def command() -> list[str]:
    """The words of the page's command."""
    found = re.search(r"```\n(recbole-raserec compare .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return shlex.split(found.group(1).replace("\\\n", " "))[1:]


def test_the_command_on_the_page_makes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [word for word in command() if not word.startswith("--output=")]
    assert main([*words, f"--output={tmp_path}", "--jobs=2", "--format=markdown"]) == 0
    printed, page = capsys.readouterr().out, PAGE.read_text(encoding="utf-8")
    made, kept = (
        json.loads(path.read_text(encoding="utf-8"))["datasets"]["planted"]
        for path in (tmp_path / "compare.json", PAGE.with_suffix(".json"))
    )
    assert made["protocol"] == kept["protocol"]
    assert made["users"] == kept["users"]
    assert [row["model"] for row in made["rows"]] == [row["model"] for row in kept["rows"]]
    for ours, theirs in zip(made["rows"], kept["rows"]):
        for protocol, values in theirs["metrics"].items():
            for metric, expected in values.items():
                mean = ours["metrics"][protocol][metric]["mean"]
                assert mean == pytest.approx(expected["mean"], abs=TOLERANCE), (ours["model"], protocol, metric)
    # the page shows these figures in this form: headings, labels and notes are the printed ones
    headings = [
        line for line in printed.splitlines() if line.startswith(("**", "| model", "- ")) and "mean ±" not in line
    ]
    assert len(headings) > 10
    assert [line for line in headings if line not in page] == []
