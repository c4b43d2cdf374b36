"""The tables and the plot of a comparison: every row, the protocol, and the figures of the JSON file."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from compare_helpers import go, prepared

from recbole_raserec.cli import main as cli
from recbole_raserec.comparison import driver
from recbole_raserec.comparison.driver import TABLES
from recbole_raserec.evaluation.report import STYLES
from recbole_raserec.storage.files import read_json


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        prepared(directory, patch)
        return go(), directory / "out"


@pytest.fixture
def content(finished, workdir):
    shutil.copytree(finished[1], workdir / "out")
    return finished[0]


def test_every_table_names_the_protocol_and_has_every_row(content):
    for style, name in TABLES.items():
        text = STYLES[style](content)
        assert Path("out", name).read_text(encoding="utf-8").rstrip("\n") == text.rstrip("\n")
        plain = " ".join(text.replace("\\_", "_").split())
        for words in ("valid_and_test", "every item of the data set", "kept_items", "removed_items", "lower id"):
            assert words in plain, (style, words)
        if style == "csv":
            continue
        assert "validation pairs in the memory: RaSeRec:backbone=SASRec" in plain
        assert "validation items in the history that the test reads: SASRec, BPR, RaSeRec" in plain
        assert "over SASRec" in plain
        assert "Holm" in plain
        assert "1,234" in plain
    assert max(map(len, STYLES["text"](content).splitlines())) <= 120


def test_the_command_in_the_table_makes_it_again(content, finished, capsys):
    shutil.copytree(finished[1].parent / "data", "data")
    printed = " ".join(STYLES["markdown"](content).split())
    command = re.search(r"made by `(recbole-raserec compare .*?)`", printed).group(1)
    assert command == content["command"]
    assert f"torch {content['versions']['torch']}" in printed
    before = Path("out", "compare.json").read_text(encoding="utf-8")
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().err.count(": cached, ") == 6
    after = read_json(Path("out", "compare.json"))
    assert after["command"] == command
    assert after["datasets"] == json.loads(before)["datasets"]


def test_the_figures_of_the_text_table_are_those_of_the_json(content):
    text = STYLES["text"](content)
    row = content["datasets"]["tiny"]["rows"][2]
    kept = {line.split()[0]: line for line in text.split("\n\n")[0].splitlines()}
    value = row["metrics"]["seen_kept"]["recall@5"]
    assert kept["RaSeRec:backbone=SASRec"].split()[1:] != []
    assert f"{value['mean']:.4f} ±{value['std']:.4f}" in text
    lines = text.split("\n\n")[0].splitlines()
    over = next(line for line in lines if line.startswith("- over SASRec"))
    assert over.split()[3] == f"{row['improvement_percent']['seen_kept']['recall@5']:+.2f}%"
    for test in ("users", "seeds"):
        line = next(line for line in lines if line.startswith(f"- p over {test}"))
        assert float(line.split()[4]) == pytest.approx(
            row["significance"]["seen_kept"]["recall@5"][f"{test}_holm"], abs=5e-4
        )


def test_validation_has_a_table_of_its_own_and_earlier_figures_have_none(content):
    title = "**tiny: validation**"
    row = content["datasets"]["tiny"]["rows"][2]
    page = STYLES["markdown"](content)
    block = page[page.index(title) :].split("\n\n")[1].splitlines()
    assert block[0] == "| model | NDCG@10, seen kept | NDCG@10, seen removed |"
    kept, removed = (row["validation"][each]["ndcg@10"] for each in ("seen_kept", "seen_removed"))
    assert f"| {row['model']} | {kept['mean']:.4f} ±{kept['std']:.4f} | {removed['mean']:.4f} ±" in block[4]
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path("out/cells").glob("RaSeRec-*.json"))]
    values = [run["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] for run in runs]
    assert kept["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)
    old = json.loads(json.dumps(content))
    for each in old["datasets"]["tiny"]["rows"]:
        del each["validation"], each["valid_metric"]
    for style in STYLES.values():
        style(old)
    assert title not in STYLES["markdown"](old)


def test_csv_has_one_line_a_figure(content):
    lines = list(csv.DictReader(io.StringIO(STYLES["csv"](content))))
    assert len(lines) == 3 * 2 * 6
    line = next(
        each
        for each in lines
        if (each["model"], each["protocol"], each["metric"]) == ("RaSeRec:backbone=SASRec", "seen_removed", "ndcg@10")
    )
    row = content["datasets"]["tiny"]["rows"][2]
    assert float(line["mean"]) == row["metrics"]["seen_removed"]["ndcg@10"]["mean"]
    assert float(line["validation_mean"]) == row["validation"]["seen_removed"]["ndcg@10"]["mean"]
    assert float(line["p_users_holm"]) == row["significance"]["seen_removed"]["ndcg@10"]["users_holm"]
    assert (line["base"], line["seeds"], line["parameters"], line["ties"]) == ("SASRec", "2", "1234", "lower id")
    assert (line["validation_in_history"], line["validation_in_memory"]) == ("True", "True")
    assert lines[0]["base"] == lines[0]["p_users"] == ""


def test_latex_is_escaped_and_balanced(content):
    text = STYLES["latex"](content)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == 4
    bare = text.replace(r"\\", "")
    for escaped in (r"\_", r"\%", r"$\pm$", r"\ensuremath{<}"):
        bare = bare.replace(escaped, "")
    assert not set("_%#$±<") & set(bare)
    tabulars = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", text, re.S)
    assert len(tabulars) == 4
    for columns, body in tabulars:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert rows
        assert all(line.count(" & ") == len(columns) - 1 for line in rows)


def test_the_plot_shows_base_and_ours_and_is_drawn_from_the_file(content, monkeypatch):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    picture = Path("out/compare.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    drawn = []
    monkeypatch.setattr(driver, "plot_bars", lambda path, panels, *words: drawn.append(panels))
    driver.draw("out")
    panels, *groups = drawn
    assert len(groups) == 2
    assert [title.partition(":")[0] for title in panels] == ["tiny", "tiny"]
    for panel in panels.values():
        assert list(panel) == ["SASRec", "RaSeRec:backbone=SASRec"]
        assert all(len(values) == 2 for points in panel.values() for values in points.values())


def test_without_matplotlib_the_rest_is_written(stand_in, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    go(models="SASRec", seeds=1)
    assert "no compare.png: matplotlib is not installed" in capsys.readouterr().err
    assert {path.name for path in Path("out").glob("compare.*")} == {"compare.json", *TABLES.values()}


@pytest.mark.parametrize("style", ["text", "markdown", "latex", "csv", "json"])
def test_the_format_is_what_is_printed(stand_in, capsys, style):
    words = ["compare", "--models=SASRec", "--datasets=tiny", "--seeds=1", "--output=out", "--data_path=data"]
    assert cli.main([*words, f"--format={style}"]) == 0
    printed = capsys.readouterr().out
    name = "compare.json" if style == "json" else TABLES[style]
    assert printed == Path("out", name).read_text(encoding="utf-8")
    if style == "json":
        assert json.loads(printed) == read_json("out/compare.json")


def test_help(capsys):
    assert cli.main(["compare", "--help"]) == 0
    printed = capsys.readouterr().out
    names = ("models", "datasets", "seeds", "output", "jobs", "format")
    assert all(f"--{name}" in printed for name in names)
