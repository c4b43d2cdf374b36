"""What a run leaves beside its results: log, TensorBoard, Weights & Biases, MLflow, and where all of it lies."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT, random_log, write_log
from pipeline_helpers import TINY, small
from recbole.utils import set_color

from recbole_raserec import Recommender, run_recbole_raserec
from recbole_raserec.config import Config
from recbole_raserec.errors import ConfigError

RUN = {**TINY, **small("SASRec"), "epochs": 2, "data_path": ".", "state": "WARNING", "show_progress": False}
STAGES = ("recommendation", "retrieval")


@pytest.fixture
def run(workdir):
    """Factory of runs on a small log in the working directory."""
    write_log(workdir, "tiny", random_log(0))
    return lambda model="RaSeRec", **options: run_recbole_raserec(
        model, "tiny", config_dict={**RUN, **options}, argv=[]
    )


def expected(record):
    """The test figures of the stages by the names under which trackers have them."""
    pairs = zip(STAGES, (record["metrics"]["base"], record["metrics"]["ours"]))
    return {
        f"{stage}/test/{protocol}/{metric}": value
        for stage, phases in pairs
        for protocol, values in phases["test"].items()
        for metric, value in values.items()
    }


def test_tensorboard_has_every_stage_both_protocols_and_the_test(run, workdir):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = run()
    assert sorted(os.listdir(workdir)) == ["saved", "tiny"]  # nothing of RecBole's in the working directory
    (board,) = (workdir / "saved" / "log_tensorboard").iterdir()
    read = event_accumulator.EventAccumulator(str(board))
    read.Reload()
    tags = set(read.Tags()["scalars"])
    for stage in STAGES:
        assert {f"{stage}/train/loss", f"{stage}/valid/ndcg@10", f"{stage}/best/seen_removed/ndcg@10"} <= tags
    curve = read.Scalars("recommendation/valid/seen_kept/ndcg@10")
    assert [event.step for event in curve] == [0, 1]
    assert [event.value for event in curve] == pytest.approx([v for _, v in record["curves"]["base"]["valid"]])
    assert {name: read.Scalars(name)[0].value for name in expected(record)} == pytest.approx(expected(record))
    run()  # a finished run has figures, too, on a board of its own
    assert len(list((workdir / "saved" / "log_tensorboard").iterdir())) == 2


def test_the_record_names_the_checkpoints(run, workdir):
    record = run(result_file="r.json", log_dir="logs", checkpoint_dir="elsewhere")
    assert sorted(os.listdir(workdir / "logs")) == ["log_tensorboard"]
    assert record["checkpoint"] == record["checkpoints"]["base + (iii)"]
    assert Recommender.load(record["checkpoint"]).name == "RaSeRec"
    assert Recommender.load(record["checkpoints"]["base"]).name == "SASRec"
    assert record["checkpoint"] in (workdir / "r.json").read_text()


def stand_in(monkeypatch, name, **attributes):
    """A module in place of a package, which the checks find."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    module.__spec__ = importlib.util.spec_from_loader(name, None, origin="here")
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Wandb:
    """A run of wandb that remembers."""

    def __init__(self):
        self.summary, self.logged, self.steps, self.ended = {}, [], [], None

    def define_metric(self, name, step_metric):
        self.steps.append((name, step_metric))

    def log(self, figures):
        self.logged.append(figures)

    def finish(self, exit_code):
        self.ended = exit_code


def test_what_is_sent_to_wandb(run, monkeypatch):
    ours, made = Wandb(), []

    def init(**options):
        made.append(options)
        module.run = ours

    module = stand_in(monkeypatch, "wandb", run=None, init=init)
    record = run(log_wandb=True, wandb_project="mine")
    assert made[0]["project"] == "mine"
    assert made[0]["config"]["model"] == "RaSeRec"
    assert ours.steps == [(f"{stage}/*", f"{stage}/epoch") for stage in STAGES]
    assert [row["recommendation/epoch"] for row in ours.logged if "recommendation/valid/ndcg@10" in row] == [0, 1]
    assert expected(record).items() <= ours.summary.items()
    assert ours.ended == 0
    ours.ended = None
    with pytest.raises(ConfigError, match="no memory at all"):
        run(log_wandb=True, memory_min_length=1000)  # within a run of the caller's, which is left open
    assert len(made) == 1
    assert ours.ended is None


def test_a_missing_package_is_one_sentence(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("wandb", "mlflow") else find(name, *rest)
    )
    with pytest.raises(ConfigError) as error:
        run(log_wandb=True, log_mlflow=True)
    assert error.value.problems == [
        f"log_{name}: true needs the package {name}, which is not installed; "
        f"pip install 'recbole-raserec[{name}]', or leave it out"
        for name in ("wandb", "mlflow")
    ]


def test_real_wandb(run, workdir, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    mine = wandb.init(project="mine", dir=str(workdir))
    try:
        record = run(log_wandb=True)
        assert wandb.run is mine
        summary = dict(mine.summary)
    finally:
        mine.finish()
    assert expected(record).items() <= summary.items()
    assert summary["recommendation/epoch"] == 1


def test_real_mlflow(run, workdir):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    record = run(log_mlflow=True)
    (found,) = mlflow.MlflowClient((workdir / "saved" / "mlruns").as_uri()).search_runs(["0"])
    assert found.info.status == "FINISHED"
    assert found.data.params["backbone"] == "SASRec"
    named = {name.replace("@", "_at_"): value for name, value in expected(record).items()}
    assert named.items() <= found.data.metrics.items()
    assert "retrieval/valid/ndcg_at_10" in found.data.metrics


COMMAND = """
from recbole_raserec import run_recbole_raserec
for seed in (1, 2):
    options = {"seed": seed, "epochs": 3, "hidden_size": 16, "data_path": "."}
    run_recbole_raserec("SASRec", "tiny", config_dict=options, argv=[])
"""


def test_a_log_that_is_no_terminal_has_a_line_an_epoch_and_no_colours(workdir):
    write_log(workdir, "tiny", random_log(0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, env=environment, check=True)
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout
    epochs = re.findall(r"recommendation epoch (\d) \[[\d.]+ s\]: loss \d.*; recall@5 .*ndcg@20 ", done.stderr)
    assert epochs == ["0", "1", "2"] * 2
    assert len(re.findall("epoch", done.stderr)) == 8  # and which was the best
    logs = sorted((workdir / "saved" / "log" / "SASRec").iterdir())
    assert [log.read_text().count("recommendation epoch") for log in logs] == [3, 3]  # a file for each run


def test_progress_bars_are_for_terminals(monkeypatch):
    def shown(**given):
        return Config("SASRec", "tiny", config_dict=given, argv=[])["show_progress"]

    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True, write=print, flush=print))
    assert shown()
    assert not shown(show_progress=False)
    monkeypatch.setattr(sys, "stderr", None)
    assert not shown()
    assert shown(show_progress=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_colours_and_the_name_of_the_file(workdir, monkeypatch, terminal):
    from recbole.utils.logger import init_logger

    stream = types.SimpleNamespace(isatty=lambda: terminal, text="", flush=lambda: None)
    stream.write = lambda text: setattr(stream, "text", stream.text + text)
    root, before = logging.getLogger(), logging.getLogger().handlers[:]
    monkeypatch.setattr(sys, "stderr", stream)
    try:
        root.handlers[:] = []
        config = Config("SASRec", "tiny", config_dict={"log_dir": "here"}, argv=[])
        config["model"] = "package.module:Mine"
        init_logger(config)
        monkeypatch.delenv("NO_COLOR", raising=False)
        root.info(set_color("one", "blue"))
        monkeypatch.setenv("NO_COLOR", "1")
        assert set_color("two", "blue") == "two"
        assert ("\x1b" in stream.text) == terminal
        (path,) = (workdir / "here" / "log" / "Mine").iterdir()
        assert path.name.startswith("Mine-tiny-")
        assert path.read_text().endswith("INFO  one\n")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:] = before
