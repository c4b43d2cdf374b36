"""The comparison of models: what is planned, refused, run once and taken up again, and the tables made of it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_log, write_log

from recbole_raserec import cli
from recbole_raserec.comparison import cells as compare_cells
from recbole_raserec.comparison import driver
from recbole_raserec.comparison.driver import TABLES, compare
from recbole_raserec.comparison.plan import make_plan
from recbole_raserec.comparison.specs import Problems, parse_seeds, parse_specs, split_outside
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation.protocols import Ranks
from recbole_raserec.evaluation.ranks_file import write_ranks
from recbole_raserec.evaluation.tables import STYLES
from recbole_raserec.fileio import read_json

#: Stands in for the runner: writes what a run writes, notes start and end in a journal, and can be told to fail,
#: to die, or to wait for a file.
STAND_IN = """
import ast, json, os, pathlib, random, shutil, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv[1:])
target = pathlib.Path(words["result_file"])
orders = pathlib.Path(__file__).with_suffix(".json")
orders = json.loads(orders.read_text()) if orders.exists() else {}
journal = pathlib.Path(__file__).with_suffix(".journal")
def note(what):
    with open(journal, "a") as file:
        file.write(json.dumps([what, words["model"], words["dataset"], int(words["seed"]), time.time(), words]) + "\\n")
note("start")
order = orders.get(f"{words['model']}-{words['seed']}", "")
if order == "fail":
    print("something went wrong")
    print("error: no memory left")
    raise SystemExit(2)
if order == "die":
    os.kill(os.getpid(), 9)
until = time.time() + 90
while order.startswith("/") and not os.path.exists(order):
    if time.time() > until:
        raise SystemExit(3)
    time.sleep(0.02)
time.sleep(orders.get("sleep", 0))
ours = words["model"] == "RaSeRec"
metrics = {}
draw = random.Random(words["model"] + words["seed"])
for who in ["base", "ours"][: 1 + ours]:
    values = {
        protocol: {f"{m}@{k}": round(draw.random(), 6) for m in ("recall", "ndcg") for k in (5, 10, 20)}
        for protocol in ("seen_kept", "seen_removed")
    }
    metrics[who] = {"valid": values, "test": values}
options = {key: ast.literal_eval(words[key]) for key in ("topk",) if key in words}
options = {"topk": [5, 10, 20], "metrics": ["Recall", "NDCG"], "threads": words.get("threads"), **options}
options.update(user_inter_num_interval="[0,inf)", item_inter_num_interval="[0,inf)")
options["eval_args"] = {
    "split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": {"valid": "full", "test": "full"}
}
protocol = {
    "split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "ranking": "every item of the data set",
    "seen_items": {"seen_kept": "kept_items", "seen_removed": "removed_items"}, "seen_means": "all before",
    "ties": "lower id", "validation_in_history": True, "validation_in_memory": ours,
}
record = {
    "model": words["model"], "dataset": words["dataset"], "metrics": metrics, "protocol": protocol, "options": options,
    "seconds": {"recommendation": 1.0, "this_run": 2.5, **({"retrieval": 0.5} if ours else {})},
    "parameters": {"base": 1000, **({"ours": 1234} if ours else {})}, "peak_memory_mb": 321.0, "versions": {},
}
note("end")
shutil.copy(pathlib.Path(__file__).with_name("ours.npz" if ours else "base.npz"), words["ranks_file"])
part = target.with_suffix(".part")
part.write_text(json.dumps(record))
os.replace(part, target)
"""

MODELS = "SASRec,BPR,RaSeRec:backbone=SASRec"


class StandIn:
    """The stand-in below a directory: what it is to do (`order`), and what it did (`notes`)."""

    def __init__(self, directory):
        self.script = directory / "runner.py"
        self.script.write_text(STAND_IN)
        self.command = (sys.executable, "-S", str(self.script))
        for name, seed in (("base", 0), ("ours", 1)):
            kept = torch.from_numpy(np.random.default_rng(seed).integers(1, 30, 20))
            ranks = Ranks(kept, kept - 1 + (kept == 1), torch.arange(20), torch.arange(20))
            write_ranks(directory / f"{name}.npz", {"base": ranks}, [f"u{number}" for number in range(20)])

    def order(self, **orders):
        self.script.with_suffix(".json").write_text(json.dumps(orders))

    def notes(self, what="start"):
        journal = self.script.with_suffix(".journal")
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [note[1:] for note in map(json.loads, lines) if note[0] == what]

    def started(self):
        return [(model, seed) for model, _, seed, *_ in self.notes()]


def prepared(directory, patch):
    """A directory with data and the stand-in, which runs the cells."""
    write_log(directory / "data", "tiny", random_log(0))
    write_log(directory / "data", "other", random_log(1))
    made = StandIn(directory)
    patch.setattr(compare_cells, "RUNNER", made.command)
    patch.setattr(compare_cells, "_PAUSE", 0.01)
    return made


@pytest.fixture
def stand_in(workdir, monkeypatch):
    return prepared(workdir, monkeypatch)


def go(models=MODELS, datasets="tiny", seeds=2, output="out", jobs=1, argv=()):
    return compare(models, datasets, seeds, output, jobs, argv=["--data_path=data", *argv])


# ------------------------------------------------------------------ what is asked for


def test_specs_are_split_outside_of_brackets_and_quotes():
    problems = Problems()
    text = "SASRec, RaSeRec:backbone=SASRec;topk=[5,10],BPR:eval_args={'split': {'LS': 'x'}}:note='a,b;c:d'"
    specs = parse_specs(text, problems)
    assert [spec.model for spec in specs] == ["SASRec", "RaSeRec", "BPR"]
    assert specs[1].options == {"backbone": "SASRec", "topk": "[5,10]"}
    assert specs[2].options == {"eval_args": "{'split': {'LS': 'x'}}", "note": "'a,b;c:d'"}
    assert specs[1].label == "RaSeRec:backbone=SASRec:topk=[5,10]"
    assert parse_specs(["SASRec", "A:b=1"], problems)[1].options == {"b": "1"}
    assert problems.found == {}
    assert split_outside("", ",") == [""]


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("5", (2020, 2021, 2022, 2023, 2024)), (2, (2020, 2021)), ("1", (2020,)), ("2020,2021", (2020, 2021)),
        ("2020,", (2020,)), ("7, 3", (7, 3)), ([7], (7,)), ("1,2", (1, 2)),
    ],
)  # fmt: skip
def test_seeds(given, seeds):
    problems = Problems()
    assert parse_seeds(given, problems) == seeds
    assert problems.found == {}


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("0", "--seeds=5"), ("-1", "--seeds=5"), ("few", "--seeds=5"), ("", "--seeds=5"), ("1.5", "--seeds=5"),
        ("2020", "--seeds=2020,"), ("1,1", "twice"), ([1, "2"], "--seeds=5"), ([], "--seeds=5"), (",", "--seeds=5"),
    ],
)  # fmt: skip
def test_wrong_seeds(given, word):
    problems = Problems()
    assert parse_seeds(given, problems) == ()
    (problem,) = problems.found
    assert problem.startswith("seeds: ")
    assert str(given) in problem
    assert word in problem


def test_all_that_is_wrong_is_told_at_once_and_nothing_runs(stand_in, capsys, workdir):
    words = ["compare", "--models=SASRek,RaSeRec:top_k=0:alhpa=1,BPR:seed=3:backbone,SASRec", "--datasets=nowhere,tiny"]
    words += ["--seeds=2020", "--jobs=none", "--format=html", "--data_path=data", "--result_file=x", "--dataset=tiny"]
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    problems = printed.err.split("\n  - ")
    assert problems[0] == "error: 12 problems in the configuration:", printed.err
    for start in (
        "dataset: 'tiny': a comparison has several; write --datasets=tiny",
        "format: 'html' is unknown; choose one of text, markdown, latex, csv, json",
        "jobs: 'none' is no number of processes; write for example --jobs=2",
        "models: 'BPR:seed=3:backbone': seed cannot be given there; write --seeds=...",
        "models: 'BPR:seed=3:backbone': 'backbone' is not of the form key=value",
        "seeds: 2020 would be 2020 seeds; for the seed 2020 write --seeds=2020,",
        "output: is not given; name the directory",
        "result_file: cannot be given here; the figures go into the output directory",
        "models: SASRek: model: 'SASRek' is not a model; did you mean SASRec?",
        "models: RaSeRec:top_k=0:alhpa=1: alhpa: 1 (on the command line) is not an option; did you mean alpha?",
        "datasets: the data set 'nowhere' is not there",
        "models: RaSeRec:top_k=0:alhpa=1: top_k: 0 (on the command line) is not an integer >= 1",
    ):
        assert any(problem.startswith(start) for problem in problems[1:]), (start, printed.err)
    assert printed.out == ""
    assert stand_in.started() == []
    assert sorted(path.name for path in workdir.iterdir()) == ["base.npz", "data", "ours.npz", "runner.py"]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"datasets": "nowhere"}, "datasets: the data set 'nowhere' is not there"),
        ({"models": "RaSeRec,RaSeRec:backbone=DuoRec"}, "RaSeRec and RaSeRec:backbone=DuoRec are the same run"),
        ({"models": "SASRec,SASRec"}, "SASRec is given twice"),
        ({"models": ""}, "--models=SASRec,RaSeRec:backbone=SASRec"),
        ({"models": "SASRec:data_path=x"}, "write --data_path=x"),
        ({"models": "RaSeRec:backbone=GRU4RecF"}, "GRU4RecF"),
        ({"argv": ["--backbone_checkpoint=x"], "models": "RaSeRec"}, "every base is trained with every seed"),
        ({"argv": ["--resume=false"]}, "resume: cannot be given here"),
        ({"argv": ["--top_k=3"]}, "give it to those that do, as NAME:top_k=VALUE"),
        ({"argv": ["--top_k=3"], "models": "SASRec,RaSeRec"}, "models: SASRec: top_k: 3 (on the command line)"),
        ({"models": "SASRec:top_k=3"}, "this run does not read it, remove it"),
        ({"output": "runner.py"}, "runner.py is a file"),
        ({"models": "SASRec,BPR:topk=[5,10]"}, "topk is [5, 10, 20] for SASRec, and [5, 10] for BPR:topk=[5,10]"),
        ({"models": "SASRec,BPR:user_inter_num_interval='[2,inf)'"}, "user_inter_num_interval"),
    ],
)
def test_refused(stand_in, given, word):
    with pytest.raises(ConfigError) as error:
        go(**given)
    assert word in str(error.value), error.value
    assert len(error.value.problems) == 1
    assert stand_in.started() == []


def test_a_set_checkpoint_in_a_file_is_refused_too(stand_in, workdir):
    (workdir / "o.yaml").write_text("backbone_checkpoint: x\nresume: false\n")
    with pytest.raises(ConfigError) as error:
        compare("RaSeRec", "tiny", 1, "out", config_file_list=["o.yaml"], argv=["--data_path=data"])
    assert [problem.split(":")[0] for problem in error.value.problems] == ["backbone_checkpoint", "resume"]


# ------------------------------------------------------------------ what is planned


def plan(models, seeds=1, datasets="tiny", argv=(), files=()):
    return make_plan(models, datasets, seeds, "out", list(files), ["--data_path=data", *argv])


def test_the_base_is_one_row_and_one_cell_and_runs_first(stand_in):
    models = "RaSeRec:backbone=SASRec,RaSeRec:backbone=SASRec:alpha=0.3,SASRec,RaSeRec:backbone=SASRec:n_layers=1,BPR"
    made = plan(models)
    assert made.rows == {
        "tiny": {
            "SASRec": None,
            "RaSeRec:backbone=SASRec": "SASRec",
            "RaSeRec:backbone=SASRec:alpha=0.3": "SASRec",
            "SASRec:n_layers=1": None,
            "RaSeRec:backbone=SASRec:n_layers=1": "SASRec:n_layers=1",
            "BPR": None,
        }
    }
    assert [cell.row for cell in made.cells] == list(made.rows["tiny"])
    by_row = {cell.row: cell for cell in made.cells}
    assert by_row["RaSeRec:backbone=SASRec"].base == by_row["SASRec"].name
    assert not by_row["BPR"].shares & by_row["SASRec"].shares
    first, second = (by_row[row].shares for row in list(made.rows["tiny"])[1:3])
    assert first & second == {by_row["SASRec"].name}


def test_a_row_with_regeneration_stands_on_the_row_without(stand_in):
    made = plan("RaSeRec:backbone=SASRec:regeneration=true,DuoRec:regeneration=true:lmd=0.2,RaSeRec:backbone=SASRec")
    assert made.rows["tiny"] == {
        "SASRec": None,
        "RaSeRec:backbone=SASRec:regeneration=true": "SASRec",
        "DuoRec:lmd=0.2": None,
        "DuoRec:regeneration=true:lmd=0.2": "DuoRec:lmd=0.2",
        "RaSeRec:backbone=SASRec": "SASRec",
    }
    regenerated = [cell for cell in made.cells if "regeneration" in cell.options]
    assert len(regenerated) == 2
    assert "regeneration-tiny-2020" in regenerated[0].shares & regenerated[1].shares


def test_what_decides_a_figure_names_the_cell(stand_in, workdir):
    def names(models="RaSeRec:backbone=SASRec", **given):
        return [cell.name for cell in plan(models, **given).cells]

    before = names()
    assert [name.rpartition("-")[0] for name in before] == ["SASRec-tiny-2020", "RaSeRec-tiny-2020"]
    for same in ("threads=1", "checkpoint_dir=x", "show_progress=true", "eval_memory_mb=64", "learning_rate=0.001"):
        assert names(argv=[f"--{same}"]) == before
    for other in ("epochs=3", "topk=[5,10]", "metrics=['NDCG','MRR']", "eval_args={'split':{'LS':'test_only'}}"):
        assert not set(names(argv=[f"--{other}"])) & set(before)
    changed = names("RaSeRec:backbone=SASRec:alpha=0.4")
    assert (changed[0] == before[0], changed[1] == before[1]) == (True, False)
    (workdir / "o.yaml").write_text("top_k: 7\n")
    from_file = names(files=["o.yaml"])
    assert (from_file[0] == before[0], from_file[1] == before[1]) == (True, False)
    log = workdir / "data" / "tiny" / "tiny.inter"
    log.write_text(log.read_text().replace("u1\t", "u99\t"))
    assert not set(names()) & set(before)


def test_other_versions_are_other_cells(stand_in, monkeypatch):
    from recbole_raserec.comparison import plan as compare_plan

    before = [cell.name for cell in plan("SASRec").cells]
    found = compare_plan.versions()
    monkeypatch.setattr(compare_plan, "versions", lambda: {**found, "torch": "9.9"})
    assert [cell.name for cell in plan("SASRec").cells] != before


# ------------------------------------------------------------------ what is run


def test_every_cell_runs_once_and_is_found_again(stand_in, capsys):
    content = go(datasets="tiny,other", seeds=1)
    assert len(stand_in.notes()) == 6
    assert [(model, dataset, seed) for model, dataset, seed, *_ in stand_in.notes()][:3] == [
        ("SASRec", "tiny", 2020), ("BPR", "tiny", 2020), ("RaSeRec", "tiny", 2020)
    ]  # fmt: skip
    words = stand_in.notes()[2][-1]
    assert words["backbone"] == "SASRec"
    assert words["data_path"] == "data"
    assert words["checkpoint_dir"] == str(Path("out/saved"))
    assert "threads" not in words
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert re.fullmatch(r"\[1/6\] tiny seed 2020 SASRec: done, \d+ s; 5 left, about \d+ s", lines[0])
    assert lines[-1].endswith("; none left")
    again = go(datasets="tiny,other", seeds=1)
    assert len(stand_in.notes()) == 6
    assert again == content
    assert all(": cached, 2 s; " in line for line in capsys.readouterr().err.splitlines())
    go(models="SASRec,GRU4Rec", datasets="tiny", seeds=1)
    assert [model for model, *_ in stand_in.notes()][6:] == ["GRU4Rec"]


def test_a_damaged_or_half_written_cell_runs_again(stand_in, workdir):
    go(models="SASRec", seeds=3)
    cells = sorted((workdir / "out" / "cells").glob("*.json"))
    cells[0].write_text(cells[0].read_text()[:50])
    cells[1].with_suffix(".npz").unlink()
    go(models="SASRec", seeds=3)
    assert [seed for _, seed in stand_in.started()] == [2020, 2021, 2022, 2020, 2021]


def test_a_failed_cell_ends_none_of_the_others(stand_in, capsys):
    stand_in.order(**{"SASRec-2021": "fail", "BPR-2020": "die", "BPR-2021": "die"})
    words = ["compare", f"--models={MODELS}", "--datasets=tiny", "--seeds=2", "--output=out", "--data_path=data"]
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert ("RaSeRec", 2021) not in stand_in.started()  # its base failed
    assert ("RaSeRec", 2020) in stand_in.started()
    error = printed.err[printed.err.index("error: ") :]
    assert error.startswith("error: 4 of the cells failed; the same command tries them again")
    assert "tiny, seed 2021, SASRec:\n    something went wrong\n    error: no memory left\n" in error
    assert "ended with exit code 2" in error
    assert "its base failed (SASRec-tiny-2021-" in error
    assert "ended by signal 9" in error
    rows = {line.split()[0]: line.split() for line in printed.out.splitlines() if line.strip()}
    blocks = printed.out.split("tiny: ")
    assert len(blocks) == 4  # two protocols, and the costs
    assert [line.split()[1:] for line in blocks[1].splitlines() if line.startswith("BPR")] == [["-"] * 6]
    assert rows["SASRec"][1:4] == ["1", "of", "2"]
    assert rows["BPR"][1:] == ["0", "of", "2", "-", "-", "-", "-"]
    assert "failed: BPR, seed 2020, 2021" in printed.out
    content = read_json("out/compare.json")
    assert {(of["model"], of["seed"]) for of in content["failed"]} == {
        ("SASRec", 2021), ("BPR", 2020), ("BPR", 2021), ("RaSeRec:backbone=SASRec", 2021)
    }  # fmt: skip
    row = content["datasets"]["tiny"]["rows"][2]
    assert row["pairs"] == {"users": 20, "seeds": 1}
    stand_in.order()
    before = len(stand_in.started())
    assert cli.main(words) == 0
    assert sorted(stand_in.started()[before:]) == [("BPR", 2020), ("BPR", 2021), ("RaSeRec", 2021), ("SASRec", 2021)]
    rows = read_json("out/compare.json")["datasets"]["tiny"]["rows"]
    assert [seed["continued"] for seed in rows[0]["seeds"].values()] == [False, True]
    assert rows[0]["wall_seconds"] == {"mean": 2.5, "std": None}  # the interrupted run's time is no run's


def test_jobs_run_side_by_side_but_not_on_the_same_base(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(driver, "_cores", lambda: 9)
    stand_in.order(sleep=0.4)
    go(models="SASRec,BPR,RaSeRec:backbone=SASRec,RaSeRec:backbone=SASRec:alpha=0.3", seeds=1, jobs=4)
    spans = {}
    for what, at in (("start", 0), ("end", 1)):
        for model, _, _, when, words in stand_in.notes(what):
            spans.setdefault(model + words.get("alpha", ""), [0, 0])[at] = when
            assert words["threads"] == "2"

    def together(one, other):
        return max(spans[one][0], spans[other][0]) < min(spans[one][1], spans[other][1])

    assert len(spans) == 4
    assert together("SASRec", "BPR")
    assert not together("SASRec", "RaSeRec")
    assert not together("RaSeRec", "RaSeRec0.3")
    assert "waiting" not in capsys.readouterr().err  # for its own cells it says nothing
    go(models="GRU4Rec", seeds=1, jobs=4, argv=["--threads=3"])
    assert stand_in.notes()[-1][-1]["threads"] == "3"


def test_figures_of_another_protocol_are_refused(stand_in):
    go(models="SASRec", seeds=1)
    for option, there, here in (
        ("topk=[10,5]", "[5, 10, 20]", "[5, 10]"),
        ("metrics=['NDCG','mrr']", "['ndcg', 'recall']", "['mrr', 'ndcg']"),
        ("eval_args={'split': {'RS': [0.8, 0.1, 0.1]}}", "valid_and_test", "[0.8, 0.1, 0.1]"),
    ):
        with pytest.raises(ConfigError) as error:
            go(models="BPR", datasets="other", seeds=1, argv=[f"--{option}", "--valid_metric=NDCG@10"])
        (problem,) = error.value.problems
        name = option.partition("=")[0]
        assert problem.startswith(f"output: out would hold figures of two protocols: {name} is "), problem
        assert there in problem
        assert here in problem
        assert "the cell SASRec-tiny-2020-" in problem
        assert "another output directory" in problem
    assert stand_in.started() == [("SASRec", 2020)]
    go(models="BPR", datasets="other", seeds=1, argv=["--metrics=['ndcg','Recall']", "--topk=[20,10,5]"])  # the same


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_killed_and_started_again(stand_in, workdir, capsys, monkeypatch):
    stand_in.order(**{"BPR-2020": str(workdir / "go")})
    words = ["compare", f"--models={MODELS}", "--datasets=tiny", "--seeds=2", "--output=out", "--data_path=data"]
    code = (
        "import sys; from recbole_raserec import cli; from recbole_raserec.comparison import cells as compare_cells; "
        f"compare_cells.RUNNER = {stand_in.command!r}; sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (workdir / "first.txt").open("w") as output:
        first = subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while ("BPR", 2020) not in stand_in.started():
            assert first.poll() is None, (workdir / "first.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (workdir / "out" / "compare.json").exists()
    said = []

    def say(line):
        said.append(line)
        if "still at it" in line:  # the run of the first start lives on, and may end now
            (workdir / "go").touch()

    monkeypatch.setattr(driver, "_say", say)
    assert cli.main(words) == 0
    assert sorted(stand_in.started()) == sorted(
        (model, seed) for model in ("SASRec", "BPR", "RaSeRec") for seed in (2020, 2021)
    )
    assert sum("still at it" in line for line in said) == 1
    assert any("SASRec: cached" in line for line in said)
    assert any("BPR: done elsewhere" in line for line in said)
    rows = read_json("out/compare.json")["datasets"]["tiny"]["rows"]
    assert not any(seed["continued"] for row in rows for seed in row["seeds"].values())


def test_an_interrupt_ends_the_runs(stand_in, workdir, monkeypatch):
    stand_in.order(**{"BPR-2020": str(workdir / "never"), "SASRec-2020": str(workdir / "never")})
    seen, interrupts = [], []

    def pause(seconds):
        seen[:] = stand_in.started()
        if len(seen) == 2 and not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_cells.time, "sleep", pause)
    processes = []
    popen = subprocess.Popen

    def starting(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(compare_cells.subprocess, "Popen", starting)
    with pytest.raises(KeyboardInterrupt):
        go(models="SASRec,BPR", seeds=1, jobs=2)
    assert sorted(seen) == [("BPR", 2020), ("SASRec", 2020)]
    assert all(process.poll() is not None for process in processes)


# ------------------------------------------------------------------ tables


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
    assert float(line["p_users_holm"]) == row["significance"]["seen_removed"]["ndcg@10"]["users_holm"]
    assert (line["base"], line["seeds"], line["parameters"], line["ties"]) == ("SASRec", "2", "1234", "lower id")
    assert (line["validation_in_history"], line["validation_in_memory"]) == ("True", "True")
    assert lines[0]["base"] == lines[0]["p_users"] == ""


def test_latex_is_escaped_and_balanced(content):
    text = STYLES["latex"](content)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == 3
    bare = text.replace(r"\\", "").replace(r"\_", "").replace(r"\%", "").replace("$\\pm$", "").replace("$<$", "")
    assert not set("_%#$±<") & set(bare)
    tabulars = re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", text, re.S)
    assert len(tabulars) == 3
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
    monkeypatch.setattr(driver.plots, "bars", lambda path, panels, *words: drawn.append(panels))
    driver.draw("out")
    (panels,) = drawn
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
    assert all(f"--{name}=" in printed for name in driver.OWN)


# ------------------------------------------------------------------ the real runner

QUICK = ["--MAX_ITEM_LIST_LENGTH=8", "--epochs=1", "--train_batch_size=64", "--hidden_size=16", "--inner_size=16"]


def test_the_command_of_a_cell_is_a_run_of_the_package(workdir):
    write_log(workdir / "data", "tiny", random_log(0))
    content = go(models="SASRec", seeds=1, argv=QUICK)
    assert content["failed"] == []
    (row,) = content["datasets"]["tiny"]["rows"]
    assert row["parameters"] > 0
    assert row["wall_seconds"]["mean"] > 0
    assert row["peak_memory_mb"]["mean"] > 50
    assert 0 < row["metrics"]["seen_removed"]["recall@20"]["mean"] <= 1
    assert content["datasets"]["tiny"]["users"] == 30
    assert len(list(Path("out/saved").glob("SASRec-tiny-*/checkpoint.json"))) == 1


def test_base_and_retrieval_are_one_run_of_the_base(workdir, monkeypatch):
    """The runs of the cells in this process: what stands on a base takes up the base's checkpoint."""
    write_log(workdir / "data", "tiny", random_log(0))
    trained = []

    class Here:
        def __init__(self, command, stdout, **_):
            before = set(Path("out/saved").glob("*"))
            with contextlib.redirect_stdout(stdout):
                self.code = cli.main(command[len(compare_cells.RUNNER) - 1 :])
            made = {path.name.split("-")[0] for path in set(Path("out/saved").glob("*")) - before}
            trained.append(made - {"neighbours"})

        def poll(self):
            return self.code

    monkeypatch.setattr(compare_cells.subprocess, "Popen", Here)
    (workdir / "o.yaml").write_text("top_k: 4\nram_inner_size: 16\nram_epochs: 1\nloss_type: CE\n")
    words = ["--data_path=data", *QUICK]
    content = compare("RaSeRec:backbone=SASRec", "tiny", 1, "out", config_file_list=["o.yaml"], argv=words)
    assert content["failed"] == []
    assert trained == [{"SASRec"}, {"RaSeRec"}]
    base, ours = content["datasets"]["tiny"]["rows"]
    assert (base["model"], ours["base"]) == ("SASRec", "SASRec")
    for path in Path("out/cells").glob("RaSeRec-*.json"):
        record = read_json(path)
        assert record["options"]["top_k"] == 4
        seed = str(record["seed"])
        assert record["metrics"]["base"]["test"] == base["seeds"][seed]["metrics"]
        assert record["metrics"]["ours"]["test"] == ours["seeds"][seed]["metrics"]
    assert (base["validation_in_memory"], ours["validation_in_memory"]) == (False, True)
    assert ours["pairs"] == {"users": 30, "seeds": 1}
    assert 0 <= ours["significance"]["seen_kept"]["ndcg@10"]["users"] <= 1
