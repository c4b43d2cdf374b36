"""The runs of a comparison: each once, side by side, failed, killed and taken up again, and by the real runner."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare_helpers import MODELS, go
from conftest import ROOT, random_log, write_log

from recbole_raserec.cli import main as cli
from recbole_raserec.comparison import driver
from recbole_raserec.comparison import runner as compare_cells
from recbole_raserec.comparison.driver import compare
from recbole_raserec.errors import ConfigError
from recbole_raserec.storage.files import read_json


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
    assert len(blocks) == 5  # two protocols, the validation, and the costs
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
    monkeypatch.setattr(driver, "cores", lambda: 9)
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
        "import sys; from recbole_raserec.cli import main as cli; "
        "from recbole_raserec.comparison import runner as compare_cells; "
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
    if importlib.util.find_spec("matplotlib"):
        drawn = {"compare.png", "compare_popularity.png", "compare_history.png", "compare_training.png"}
        assert {path.name for path in Path("out").glob("*.png")} == drawn


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
