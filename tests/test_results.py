"""The smallest of the committed tables, made again by the command that stands on its page."""

from __future__ import annotations

import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT

from recbole_raserec.cli.main import main

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
    own = ("- made by", "- with python")  # this directory, these packages
    headings = [
        line
        for line in printed.splitlines()
        if line.startswith(("**", "| model", "- ")) and "mean ±" not in line and not line.startswith(own)
    ]
    assert len(headings) > 10
    assert [line for line in headings if line not in page] == []


PAGES = sorted(path for path in (ROOT / "results").glob("*.md") if "## Made by" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_commands_of_a_page_make_all_of_its_runs(page, monkeypatch):
    """Each run of the figures is in one command, which its script understands."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    grid = importlib.import_module("grid")
    commands = re.findall(r"^python experiments/.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    made = []
    for line in commands:
        words = shlex.split(line)[1:]
        script = importlib.import_module(words[0].removeprefix("experiments/").removesuffix(".py"))
        rows = {**getattr(script, "ROWS", {}), **getattr(script, "RUNS", {})}
        if hasattr(script, "RECBOLE"):
            rows[script.RECBOLE] = ()
        parser = grid.arguments("", rows, "none")
        parser.add_argument("--adapters", type=lambda name: (ROOT / name).resolve(strict=True))
        args = parser.parse_args(words[1:])
        assert f"{script.__name__}_{args.dataset}" == page.stem
        made += [(row, str(seed)) for row in args.rows for seed in args.seeds]
        for option in args.options:
            assert re.fullmatch(r"\w+=.+", option)
    kept = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    assert sorted(made) == sorted((row, seed) for row, runs in kept.items() for seed in runs)


def test_there_are_such_pages():
    assert len(PAGES) > 8
