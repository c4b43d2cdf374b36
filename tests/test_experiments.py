"""The experiments' scripts, on the small data set of the repository: what they write, and that they resume."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG"
#: Options that make a run on the small data set take seconds.
SMALL = ["epochs=2", "ram_epochs=1", "show_progress=False", "hidden_size=16", "n_layers=1", "inner_size=16"]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script in a directory of its own and gives its figures and its page."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments, small=SMALL):
        module = importlib.import_module(name)
        output = tmp_path / "out" / f"{name}.json"
        argv = [f"{name}.py", f"--data_path={ROOT / 'dataset'}", "--dataset=planted", f"--output={output}"]
        monkeypatch.setattr(sys, "argv", [*argv, "--options", *small, *arguments])
        module.main()
        rows = json.loads(output.read_text())["rows"]
        for record in (record for runs in rows.values() for record in runs.values()):
            assert f"--options {small[0]}" in record["arguments"]
            assert record["versions"]["recbole"] == "1.2.1"
        figures = importlib.import_module("grid").figures(rows)
        return {"rows": figures}, output.with_suffix(".md").read_text(), output

    return run


def test_options_of_the_retrieval_stage(script):
    chosen = ["--seeds", "1", "--rows", "default", "K 5", "alpha 0.9"]
    figures, page, output = script("retrieval_options", *chosen)
    rows = {label: list(runs) for label, runs in figures["rows"].items() if runs}
    assert rows == {"default": ["1"], "K 5": ["1"], "alpha 0.9": ["1"]}
    default, other = (figures["rows"][label]["1"] for label in ("default", "K 5"))
    assert default["base"] == other["base"]
    assert default["test"] != other["test"]
    assert "| K 5 | 1 |" in page
    assert "| backbone alone | 1 |" in page
    for name in ("K", "alpha"):
        assert output.with_name(f"retrieval_options_{name}.png").read_bytes().startswith(PNG)
    (cached,) = Path("saved").glob("neighbours")
    assert len(list(cached.iterdir())) >= 2

    before = output.stat().st_mtime_ns
    assert script("retrieval_options", *chosen)[0] == figures
    assert output.stat().st_mtime_ns == before  # nothing was run


def test_a_memory_that_grows(script):
    figures, page, output = script("memory_drift", "--seeds", "1")
    (runs,) = figures["rows"].values()
    sizes = {name: record.get("memories") for name, record in runs["1"].items()}
    assert list(sizes) == ["no memory", "60%", "80%", "100%", "100% and validation"]
    assert sizes["60%"] == pytest.approx(0.6 * sizes["100%"], rel=0.01)
    assert sizes["100% and validation"] == sizes["100%"] + 600  # users
    assert page.count("\n| ") == 6
    assert output.with_suffix(".png").read_bytes().startswith(PNG)
    # weights fixed, the whole memory: what the run itself reports
    (manifest,) = Path("saved").glob("RaSeRec-*/checkpoint.json")
    reported = json.loads(manifest.read_text())["metrics"]["test"]
    assert {key: runs["1"]["100% and validation"][key] for key in reported} == reported


def test_a_time_line_of_positions(script, monkeypatch):
    module = importlib.import_module("memory_drift")
    monkeypatch.setattr(module, "POSITIONS", ("planted",))
    figures, page, _ = script("memory_drift", "--seeds", "1")
    (runs,) = figures["rows"].values()
    assert runs["1"]["60%"]["memories"] == pytest.approx(0.6 * runs["1"]["100%"]["memories"], rel=0.1)
    assert "each user's own history" in page


def test_groups_of_targets(script):
    figures, page, output = script("long_tail", "--seeds", "1")
    (runs,) = figures["rows"].values()
    for groups in runs["1"].values():
        parts = {name: group for name, group in groups.items() if name != "all"}
        assert 2 <= len(parts) <= 5
        assert sum(group["targets"] for group in parts.values()) == groups["all"]["targets"] == 600
        for who in ("base", "ours"):
            whole = sum(
                group["targets"] * group[who]["seen_kept"]["ndcg@10"] for group in parts.values()
            ) / groups["all"]["targets"]  # fmt: skip
            assert whole == pytest.approx(groups["all"][who]["seen_kept"]["ndcg@10"], abs=2e-6)
    assert output.with_suffix(".png").read_bytes().startswith(PNG)
    assert "target popularity" in page


def test_the_regenerator_against_baselines(script):
    quick = [option for option in SMALL if not option.startswith("ram")]
    quick += ["regen_epochs=2", "regen_layers=1", "regen_inner_size=16", "regen_heads=1"]
    figures, page, _ = script("regenerator", "--seeds", "1", small=quick)
    assert list(figures["rows"]) == ["from SASRec's item vectors", "from scratch"]
    for runs in figures["rows"].values():
        record = runs["1"]
        assert all(0 < record[name] < 50 for name in ("regenerator", "unigram", "copy"))
        assert record["gamma 1"]["distinct"] >= 1
    assert "| from scratch | 1 |" in page


def test_what_a_pair_costs_under_the_baselines(monkeypatch):
    """A source of two items, patterns of exactly two: the first choice is the only open one."""
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import math

    cost = importlib.import_module("regenerator")._cost
    ends = {0: 0.0, 1: 0.0, 2: 1.0}
    assert cost((7, 9), [7, 9], ends, lambda item, place: 1.0) == pytest.approx(math.log(0.5))
    assert cost((7, 9), [7, 8, 9], ends, lambda item, place: 1.0) == pytest.approx(math.log(1 / 3) + math.log(1 / 2))
    behind = cost((9, 7), [7, 9], ends, lambda item, place: 1.0 if place >= 0 else 1e-3)
    assert behind == pytest.approx(math.log(0.5))  # one item left, wherever it stands


def test_darec_part_by_part(script, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra llm")
    from darec_helpers import tiny_llm, write_items

    adapters = tmp_path / "adapters.yaml"
    adapters.write_text("adapter_sizes: [[0, 4], [2, 0]]\n")
    small = [f"item_text_encoder={tiny_llm(tmp_path)}", "text_items=8", "item_text_length=4", "top_k=4", "epochs=1"]
    small = [*SMALL[:3], *small]
    rows = ["SASRec", "adapters by search", "RaSeRec over DARec"]
    data = tmp_path / "data" / "planted"
    shutil.copytree(ROOT / "dataset" / "planted", data)
    write_items(data.parent, "planted", 60)
    arguments = ["--seeds", "1", f"--data_path={data.parent}", f"--adapters={adapters}", "--rows", *rows]
    figures, page, _ = script("darec", *arguments, small=small[1:])
    records = {label: runs["1"] for label, runs in figures["rows"].items() if runs}
    assert list(records) == rows
    assert records["RaSeRec over DARec"]["parameters"] == 0  # the backbone is frozen
    assert records["adapters by search"]["parameters"] > 0
    for record in records.values():
        assert record["cold"]["targets"] + record["warm"]["targets"] == record["all"]["targets"] == 600
    assert "| adapters by search | " in page


def test_cold_items(script, monkeypatch):
    made, page, _ = script("cold_items", "--seeds", "1", "--rows", "SASRec")
    record = made["rows"]["SASRec"]["1"]
    assert record["cold"]["targets"] > 50  # a fifth of 600, about
    assert record["cold"]["targets"] + record["warm"]["targets"] == record["all"]["targets"] == 600
    assert f"| SASRec | cold | {record['cold']['targets']} | " in page
    copy = Path("saved/data/planted-cold/planted-cold.inter")
    before, after = (read(path) for path in (ROOT / "dataset" / "planted" / "planted.inter", copy))
    assert after < before
    users = [user for user, *_ in before]
    for user in set(users):  # the last two of each user's interactions stay
        rows = sorted((row for row in before if row[0] == user), key=lambda row: float(row[2]))
        assert set(rows[-2:]) <= after


def read(path):
    return {tuple(line.split("\t")) for line in path.read_text().splitlines()[1:]}


def test_added_items(script, tmp_path, monkeypatch):
    source = ROOT / "dataset" / "planted" / "planted.inter"
    items = sorted({line.split("\t")[1] for line in source.read_text().splitlines()[1:]})
    folder = tmp_path / "data" / "planted"
    folder.mkdir(parents=True)
    (folder / source.name).write_bytes(source.read_bytes())
    lines = ["item_id:token\ttitle:token_seq", *(f"{item}\tthe {item} thing {n % 7}" for n, item in enumerate(items))]
    (folder / "planted.item").write_text("\n".join(lines) + "\n")
    small = ["epochs=1", "item_text_encoder=tfidf", "show_progress=False", "hidden_size=16", "inner_size=16"]
    where = [f"--data_path={tmp_path / 'data'}", "--seeds", "1", "--rows", "SASRec, text"]
    made, page, _ = script("added_items", *where, small=small)
    record = made["rows"]["SASRec, text"]["1"]
    for name in ("full", "added"):
        taken, others = record[name]["taken"], record[name]["others"]
        assert taken["targets"] > 0
        assert taken["targets"] + others["targets"] == record[name]["all"]["targets"] == 600
    assert record["items"] == len(items)
    copy = read(
        Path("saved/data") / f"planted-without-{len(items) // 10}" / f"planted-without-{len(items) // 10}.inter"
    )
    assert copy < read(source)
    assert f"| SASRec, text | without them | taken | {record['added']['taken']['targets']} | " in page


def test_which_interactions_are_cut(script):
    cut_out = importlib.import_module("cold_items").interactions_to_cut
    rng = np.random.default_rng(0)
    items = rng.integers(1, 60, 4000)
    items[:3] = 60
    counts = np.bincount(items, minlength=61)
    cut = cut_out(items, 61)
    left = np.bincount(items[~cut], minlength=61)
    changed = left < counts
    assert changed.sum() == round(0.2 * (counts > 4).sum())
    assert left[changed].max() <= 4
    assert np.array_equal(cut, cut_out(items, 61))
