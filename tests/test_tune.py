"""One search of three trials: what they share, what goes on after an interruption, and what is left behind."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, random_log, write_log

pytest.importorskip("optuna", reason="searches need optuna")

from tune_helpers import QUICK, SPACE, search, unfinished

from recbole_raserec.cli import main as cli
from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError
from recbole_raserec.evaluation import PROTOCOL_TITLES
from recbole_raserec.quick_start import run_recbole_raserec
from recbole_raserec.storage.locks import try_lock
from recbole_raserec.training.trainer import ResumableTrainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Three trials over alpha and top_k, undisturbed."""
    return search(tmp_path_factory.mktemp("shared"))


def without_seconds(record):
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in record["trials"]]


# ------------------------------------------------------------------ what trials share, and what they do not read


def test_trials_share_the_backbone_and_the_neighbours(shared):
    asked = [trial["options"]["top_k"] for trial in shared.record["trials"]]
    assert asked[0] < max(asked)  # a search for what the first trial asks for would not have been enough
    assert shared.trained.count(("SASRec", 0)) == 1
    assert [epoch for model, epoch in shared.trained if model == "RaSeRec"] == [0, 1] * 3
    best = shared.record["trials"][shared.record["best"]]
    # training and validation once, for the largest top_k of the space; the test once, by the best trial
    assert shared.searched == [6, 6, best["options"]["top_k"]]


def test_trials_are_the_runs_they_stand_for(shared, tmp_path):
    """Shared searches and stages change nothing: each trial's value is that of a plain run of its options."""
    write_log(tmp_path, "tiny", random_log(0))
    trial = shared.record["trials"][0]
    given = {**QUICK, **trial["options"], "data_path": str(tmp_path), "checkpoint_dir": str(tmp_path / "saved")}
    given = {**given, "show_progress": False, "state": "WARNING"}
    with contextlib.redirect_stdout(io.StringIO()):
        record = run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])
    assert record["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == trial["value"]


def test_no_trial_reads_a_test_pair_and_the_best_is_tested_once(shared):
    assert shared.tested == [True, True]  # backbone and module of the best trial, when all trials were over
    assert shared.printed.count("seen items removed from the ranking") == 1
    best = json.loads((shared.output / "best.json").read_text())
    assert best["trial"] == shared.record["best"]
    assert best["record"]["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == max(
        trial["value"] for trial in shared.record["trials"]
    )
    assert len(unfinished(shared.directory)) == 2  # those of the other trials


def test_the_same_command_again_only_prints(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    again = search(tmp_path / "copy")
    assert (again.trained, again.searched, again.tested) == ([], [], [])
    assert again.record == shared.record
    assert again.printed == shared.printed[shared.printed.index("\nRaSeRec-tiny:") :]


def test_the_same_seed_gives_the_same_trials(shared, tmp_path):
    same = search(tmp_path)
    assert without_seconds(same.record) == without_seconds(shared.record)
    assert (same.output / "best.yaml").read_text() == (shared.output / "best.yaml").read_text()


def test_more_trials_go_on_from_there(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    more = search(tmp_path / "copy", trials=4)
    assert [model for model, _ in more.trained] == ["RaSeRec", "RaSeRec"]
    assert len(more.searched) == (more.record["best"] == 3)  # the test, of a new best one
    assert without_seconds(more.record)[:3] == without_seconds(shared.record)


# ------------------------------------------------------------------ interrupted and killed


def test_an_interrupted_search_goes_on_with_the_trials_that_are_missing(shared, tmp_path, monkeypatch):
    train_epoch, calls = ResumableTrainer._train_epoch, []

    def interrupted(self, *args, **kwargs):
        calls.append(self.config["model"])
        if len(calls) == 5:  # the backbone's one, the first trial's two, the second epoch of the second trial
            raise KeyboardInterrupt
        return train_epoch(self, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path)
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", train_epoch)
    rest = search(tmp_path)
    assert [epoch for _, epoch in rest.trained] == [1, 0, 1]
    assert without_seconds(rest.record) == without_seconds(shared.record)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_a_killed_search_goes_on(shared, tmp_path):
    write_log(tmp_path, "tiny", random_log(0))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "recbole_raserec.cli.main",
        "tune",
        "--model=RaSeRec",
        "--dataset=tiny",
        "--output=out",
    ]
    words += ["--data_path=.", "--trials=3", "--space=space.yaml", *(f"--{k}={v}" for k, v in QUICK.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("saved/RaSeRec-*/state.safetensors"))) < 2:
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    rest = search(tmp_path)
    assert 1 <= len(rest.trained) <= 4
    assert without_seconds(rest.record) == without_seconds(shared.record)


def test_a_directory_holds_one_search(shared, tmp_path):
    shutil.copytree(shared.directory, tmp_path / "copy")
    with pytest.raises(ConfigError, match="another study: seed of options is 2020 there and 5 here") as error:
        search(tmp_path / "copy", seed=5)
    assert "Name another directory" in str(error.value)
    with pytest.raises(ConfigError, match="sampler is 'tpe' there and 'random' here"):
        search(tmp_path / "copy", sampler="random")
    with pytest.raises(ConfigError, match="high of top_k of space is 6 there and 5 here"):
        search(tmp_path / "copy", space={**SPACE, "top_k": {**SPACE["top_k"], "high": 5}})
    with pytest.raises(ConfigError, match=r"another study: .*regen"):
        search(tmp_path / "copy", regeneration=True)
    lock = try_lock(tmp_path / "copy" / "out" / ".lock")
    with pytest.raises(ConfigError, match="another process"):
        search(tmp_path / "copy")
    lock.release()
    log = random_log(0)
    write_log(tmp_path / "copy", "tiny", [(log[0][0], (log[0][1] + 1) % 25, log[0][2]), *log[1:]])
    with pytest.raises(CheckpointError, match="trials on other data"):
        search(tmp_path / "copy", trials=4)
    (tmp_path / "copy" / "out" / "study.db").write_text("no study")
    with pytest.raises(ConfigError, match="cannot be opened as a study"):
        search(tmp_path / "copy")


# ------------------------------------------------------------------ what is left behind


def test_best_yaml_is_a_configuration_of_the_best_trial(shared, tmp_path, monkeypatch):
    shutil.copytree(shared.directory, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    trained = []
    monkeypatch.setattr(ResumableTrainer, "_train_epoch", lambda *_, **__: trained.append(1))
    assert cli.main(["--config_files=out/best.yaml", "--result_file=r.json", "--show_progress=false"]) == 0
    assert not trained
    best = shared.record["trials"][shared.record["best"]]
    record = json.loads(Path("r.json").read_text())
    assert {name: record["options"][name] for name in SPACE} == best["options"]
    assert record["metrics"]["ours"]["valid"]["seen_kept"]["ndcg@10"] == best["value"]
    header = [line for line in Path("out/best.yaml").read_text().splitlines() if line.startswith("#")]
    assert header == [
        "# The best of 3 trials of the study RaSeRec-tiny (sampler tpe, pruner median, seed 2020):",
        f"# trial {best['number']}, validation NDCG@10 {best['value']:.6f}, {PROTOCOL_TITLES['seen_kept']}.",
        "# Searched: alpha, top_k.",
    ]


def test_files_table_and_plots(shared):
    record = shared.record
    assert json.loads((shared.output / "study.json").read_text()) == record
    assert (record["metric"], record["direction"], record["protocol"]) == ("NDCG@10", "maximize", "seen_kept")
    assert sum(record["importances"].values()) == pytest.approx(1)
    rows = list(csv.DictReader((shared.output / "trials.csv").open(encoding="utf-8")))
    for row, trial in zip(rows, record["trials"]):
        assert (int(row["trial"]), float(row["value"]), row["epochs"]) == (trial["number"], trial["value"], "2")
        assert {"alpha": float(row["alpha"]), "top_k": int(row["top_k"])} == trial["options"]
        assert trial["seconds"] > 0
    table = shared.printed[shared.printed.index("RaSeRec-tiny: 3 complete") :].splitlines()
    ranked = sorted(record["trials"], key=lambda trial: -trial["value"])
    assert [line.split()[0] for line in table[4:7]] == [str(trial["number"]) for trial in ranked]
    assert [line.split()[1] for line in table[4:7]] == [f"{trial['value']:.4f}" for trial in ranked]


def test_plots(shared):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    names = {"history.png", "alpha.png", "top_k.png"}
    assert {path.name for path in (shared.output / "plots").iterdir()} == names
    assert all((shared.output / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_without_matplotlib_there_are_no_plots(shared, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise MissingExtraError("plots", "matplotlib", "plots are drawn with it")

    monkeypatch.setattr("recbole_raserec.tuning.tune.plot_points", missing)
    shutil.copytree(shared.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("plots"))
    assert search(tmp_path / "copy").record == shared.record
    assert not (tmp_path / "copy" / "out" / "plots").exists()
