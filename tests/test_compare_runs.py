"""The runs of a comparison: each once, side by side, failed, killed and taken up again, and by the real runner."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from compare_helpers import MODELS, go
from conftest import ROOT, random_log, write_log

from recbole_raserec.cli import main as cli
from recbole_raserec.comparison import driver, runner
from recbole_raserec.comparison.driver import compare
from recbole_raserec.errors import ConfigError
from recbole_raserec.storage.files import read_json


def test_every_run_runs_once_and_is_found_again(stand_in, capsys):
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


def test_a_damaged_or_half_written_run_runs_again(stand_in, workdir):
    go(models="SASRec", seeds=3)
    cells = sorted((workdir / "out" / "cells").glob("*.json"))
    cells[0].write_text(cells[0].read_text()[:50])
    cells[1].with_suffix(".npz").unlink()
    go(models="SASRec", seeds=3)
    assert [seed for _, seed in stand_in.started()] == [2020, 2021, 2022, 2020, 2021]


def test_a_failed_run_ends_none_of_the_others(stand_in, capsys):
    stand_in.order(**{"SASRec-2021": "fail", "BPR-2020": "die", "BPR-2021": "die"})
    words = ["compare", f"--models={MODELS}", "--datasets=tiny", "--seeds=2", "--output=out", "--data_path=data"]
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert ("RaSeRec", 2021) not in stand_in.started()  # its base failed
    assert ("RaSeRec", 2020) in stand_in.started()
    error = printed.err[printed.err.index("error: ") :]
    assert error.startswith("error: 4 of the runs failed; the same command tries them again")
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


def test_jobs_run_side_by_side_and_after_their_base(stand_in, monkeypatch, capsys):
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
    assert together("RaSeRec", "RaSeRec0.3")
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
        assert "the run SASRec-tiny-2020-" in problem
        assert "another output directory" in problem
    assert stand_in.started() == [("SASRec", 2020)]
    go(models="BPR", datasets="other", seeds=1, argv=["--metrics=['ndcg','Recall']", "--topk=[20,10,5]"])  # the same


def starting(stand_in, words, output):
    """The command in a process of its own."""
    code = (
        "import sys; from recbole_raserec.cli import main as cli; from recbole_raserec.comparison import runner; "
        f"runner.COMMAND = {stand_in.command!r}; sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment, stdout=output, stderr=output)


def until(condition, process, path):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


WORDS = ["compare", f"--models={MODELS}", "--datasets=tiny", "--seeds=2", "--output=out", "--data_path=data"]


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_killed_and_started_again(stand_in, workdir):
    """The run of the killed command lives on; the second start of it, and all else, give the figures of one start."""
    stand_in.order(**{"BPR-2020": str(workdir / "go")})
    path = workdir / "output.txt"
    with path.open("w") as output:
        first = starting(stand_in, WORDS, output)
        try:
            until(lambda: ("BPR", 2020) in stand_in.started(), first, path)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        assert not (workdir / "out" / "compare.json").exists()
        second = starting(stand_in, WORDS, output)
        until(lambda: stand_in.started().count(("BPR", 2020)) == 2, second, path)
        (workdir / "go").touch()
        assert second.wait(timeout=120) == 0, path.read_text()
    started = stand_in.started()
    assert all(started.count(run) == 1 for run in set(started) - {("BPR", 2020)})
    assert "SASRec: cached" in path.read_text()
    rows = read_json("out/compare.json")["datasets"]["tiny"]["rows"]
    continued = [(row["model"], seed) for row in rows for seed, run in row["seeds"].items() if run["continued"]]
    assert continued == [("BPR", "2020")]  # its time is no run's
    figures = [row["metrics"] for row in rows]
    assert [row["metrics"] for row in go(output="alone")["datasets"]["tiny"]["rows"]] == figures


def test_two_at_once_give_the_figures_of_one(stand_in, workdir):
    stand_in.order(sleep=0.2)
    path = workdir / "output.txt"
    with path.open("w") as output:
        both = [starting(stand_in, WORDS, output) for _ in range(2)]
        assert [process.wait(timeout=120) for process in both] == [0, 0], path.read_text()
    rows = read_json("out/compare.json")["datasets"]["tiny"]["rows"]
    alone = go(output="alone")["datasets"]["tiny"]["rows"]
    assert [row["metrics"] for row in rows] == [row["metrics"] for row in alone]
    assert [len(row["seeds"]) for row in rows] == [2, 2, 2]


@pytest.mark.skipif(os.name != "posix", reason="a signal to a thread is one of POSIX systems")
def test_an_interrupt_ends_the_runs(stand_in, workdir, monkeypatch):
    stand_in.order(**{"BPR-2020": str(workdir / "never"), "SASRec-2020": str(workdir / "never")})
    processes, seen = [], []
    popen = subprocess.Popen

    def started(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    def interrupt():
        deadline = time.monotonic() + 60
        while len(stand_in.started()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        seen[:] = stand_in.started()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(runner.subprocess, "Popen", started)
    thread = threading.Thread(target=interrupt)
    thread.start()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt):
            go(models="SASRec,BPR", seeds=1, jobs=2)
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert sorted(seen) == [("BPR", 2020), ("SASRec", 2020)]
    assert all(process.poll() is not None for process in processes)


# ------------------------------------------------------------------ the real runner

QUICK = ["--MAX_ITEM_LIST_LENGTH=8", "--epochs=1", "--train_batch_size=64", "--hidden_size=16", "--inner_size=16"]


def test_the_command_of_a_run_is_that_of_the_package(workdir):
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
    """The runs in this process: what is built on a base reuses the base's checkpoint."""
    write_log(workdir / "data", "tiny", random_log(0))
    trained = []

    class Here:
        def __init__(self, command, stdout, **_):
            before = set(Path("out/saved").glob("*"))
            with contextlib.redirect_stdout(stdout):
                self.code = cli.main(command[len(runner.COMMAND) - 1 :])
            made = {path.name.split("-")[0] for path in set(Path("out/saved").glob("*")) - before}
            trained.append(made - {"neighbours", "log", "log_tensorboard"})

        def wait(self):
            return self.code

        poll = wait

    monkeypatch.setattr(runner.subprocess, "Popen", Here)
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
