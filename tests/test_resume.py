"""Runs that are killed and started again end with the figures of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, random_log, write_log
from pipeline_helpers import PLANTED, TINY, figures, run

from recbole_raserec.errors import CheckpointError
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.storage.files import read_tensors
from recbole_raserec.training import stage as stages
from recbole_raserec.training.trainer import ResumableTrainer

# ------------------------------------------------------------------ kill -9


def last_epoch(saved, model):
    """The last epoch whose state is on disk, -1 without one."""
    for state in saved.glob(f"{model}-*/state.safetensors"):
        return read_tensors(state)[1]["epoch"]
    return -1


def there(saved, pattern):
    return any(saved.glob(pattern))


#: Moments in the order of a run: what is on disk when the kill is sent.
MOMENTS = {
    "backbone epochs": lambda saved: last_epoch(saved, "SASRec") >= 1,
    "encoding for the memory": lambda saved: there(saved, "SASRec-*/checkpoint.json"),
    "searching": lambda saved: there(saved, "RaSeRec-*"),
    "module epochs": lambda saved: last_epoch(saved, "RaSeRec") >= 1,
    "final writing": lambda saved: there(saved, "RaSeRec-*/ids.json"),
}


class Command:
    """The command line program in a directory of its own."""

    def __init__(self, directory, dataset, data_path, options):
        self.directory, self.saved = directory, directory / "saved"
        directory.mkdir(parents=True, exist_ok=True)
        given = {"show_progress": False, "state": "WARNING", "data_path": data_path, "result_file": "r.json", **options}
        self.words = [sys.executable, str(ROOT / "run_recbole_raserec.py"), "--model=RaSeRec", f"--dataset={dataset}"]
        self.words += [f"--{name}={value}" for name, value in given.items()]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self):
        # To a file: a pipe that is not emptied would stop the program.
        with (self.directory / "output.txt").open("w") as output:
            return subprocess.Popen(
                self.words, cwd=self.directory, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def output(self):
        return (self.directory / "output.txt").read_text()

    def kill_at(self, reached):
        """Start it and kill it as soon as `reached(saved)`."""
        process = self.start()
        try:
            deadline = time.monotonic() + 600  # a machine that is busy with other work
            while not reached(self.saved):
                assert process.poll() is None, self.output()
                assert time.monotonic() < deadline, "the moment never came"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, self.output()
        assert not (self.directory / "r.json").exists()

    def finish(self):
        assert self.start().wait(timeout=300) == 0, self.output()
        return json.loads((self.directory / "r.json").read_text())


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_killed_in_every_stage_packed(planted_run, tmp_path):
    command = Command(tmp_path / "killed", "planted", ROOT / "dataset", PLANTED)
    killed = []
    for name, reached in MOMENTS.items():
        if not reached(command.saved):  # a kill that came late may have passed the next moment too
            command.kill_at(reached)
            killed.append(name)
    assert {"backbone epochs", "module epochs"} <= set(killed)
    assert len(killed) >= 4, killed
    record = command.finish()
    assert figures(record) == figures(planted_run.record)
    kept = ({p.name for p in of.saved.iterdir()} - {"log", "log_tensorboard"} for of in (command, planted_run))
    assert next(kept) == next(kept)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX systems")
def test_killed_in_both_trainings_prefix(tmp_path):
    write_log(tmp_path, "mid", random_log(5, users=250, items=60, longest=20))
    options = {**TINY, "hidden_size": 16, "inner_size": 16, "epochs": 5, "ram_epochs": 5, "ram_train_batch_size": 64}
    command = Command(tmp_path / "killed", "mid", tmp_path, options)
    command.kill_at(MOMENTS["backbone epochs"])
    assert 1 <= last_epoch(command.saved, "SASRec") < 4
    command.kill_at(MOMENTS["module epochs"])
    assert last_epoch(command.saved, "RaSeRec") >= 1
    record = command.finish()
    whole = run(tmp_path / "whole", dataset="mid", data_path=str(tmp_path), **options)
    assert whole.record["options"]["training"] == "prefix"
    assert figures(record) == figures(whole.record)


# ------------------------------------------------------------------ interrupted again and again, in one process

FORMS = {
    "prefix": {},
    "packed": {"training": "packed"},
    "DuoRec prefix": {"backbone": "DuoRec"},
    "DuoRec packed": {"backbone": "DuoRec", "training": "packed", "contrast": "us"},
    "unfrozen": {"freeze_backbone": False, "memory_refresh": 2},
    "unbucketed": {"bucket_batches": False},
    "sampled negatives": {"loss_type": "BPR"},
    "GRU4Rec": {"backbone": "GRU4Rec"},
    "averaged": {"training": "packed", "packed_copies": 2, "weight_averaging": 0.9, "ram_weight_averaging": 0.9},
    "early stopping": {
        "epochs": 12, "ram_epochs": 12, "learning_rate": 0.05, "stopping_step": 1, "ram_learning_rate": 0.05,
        "ram_stopping_step": 1,
    },
}  # fmt: skip


def breaking(patch, method, at, after):
    """Let the `at`-th call of the trainer's `method` end in an interrupt, before or after it has done its work."""
    original, calls = getattr(ResumableTrainer, method), []

    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at and not after:
            raise KeyboardInterrupt
        result = original(self, *args, **kwargs)
        if len(calls) == at:
            raise KeyboardInterrupt
        return result

    patch.setattr(ResumableTrainer, method, broken)


@pytest.mark.parametrize(
    ("form", "method", "after"),
    [
        *((form, "_train_epoch", True) for form in FORMS),
        # the best weights are on disk, the state that belongs to them is not
        *(
            (form, "save_state", False)
            for form in ("prefix", "DuoRec packed", "unfrozen", "averaged", "early stopping")
        ),
    ],
)
def test_interrupted_in_every_epoch(tiny_run, form, method, after):
    options = {"epochs": 3, "ram_epochs": 3, **FORMS[form]}
    whole = tiny_run(checkpoint_dir="whole", **options)
    backbone = whole.record["backbone"]
    trained = {name: sum(model == name for model, _ in whole.trained) for name in (backbone, "RaSeRec")}
    if form == "early stopping":
        assert max(trained.values()) < 12
    attempts, broken = 0, None
    while broken is None:
        attempts += 1
        assert attempts < 40
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            breaking(patch, method, 1 if attempts == 1 else 2, after)
            broken = tiny_run(checkpoint_dir="broken", **options)
    # the first attempt ends in the first epoch, each later one in its second, the last in none
    assert attempts >= sum(trained.values())
    assert figures(broken.record) == figures(whole.record)
    assert [broken.base.fingerprint, broken.ours.fingerprint] == [whole.base.fingerprint, whole.ours.fingerprint]


@pytest.mark.parametrize(
    ("owner", "name"), [(stages, "write_checkpoint"), (MemoryBank, "save"), (stages, "evaluate")], ids=lambda x: str(x)
)
def test_interrupted_while_it_ends(tiny_run, tmp_path, owner, name):
    whole = tiny_run(checkpoint_dir="whole")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(checkpoint_dir="broken")
    assert not there(tmp_path / "broken", "RaSeRec-*/checkpoint.json")
    assert figures(tiny_run(checkpoint_dir="broken").record) == figures(whole.record)


# ------------------------------------------------------------------ a state that cannot be used


@pytest.fixture
def interrupted(tiny_run, tmp_path):
    """A run whose module has trained one of three epochs: `again()` continues it, `directory` is the module's."""

    def again(**options):
        return tiny_run(**{"ram_epochs": 3, **options})

    with pytest.MonkeyPatch.context() as patch:
        # one epoch of the backbone, one of the module; the next is cut off
        breaking(patch, "_train_epoch", 3, True)
        with pytest.raises(KeyboardInterrupt):
            again()
    (again.directory,) = (tmp_path / "saved").glob("RaSeRec-*")
    assert last_epoch(tmp_path / "saved", "RaSeRec") == 0
    return again


def shorten(state, _):
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])


def overwrite(state, _):
    state.write_bytes(b"\x80\x04 no such format" * 40)


def exchange(state, saved):
    (other,) = saved.glob("SASRec-*/state.safetensors")
    shutil.copy(other, state)


@pytest.mark.parametrize("harm", [shorten, overwrite, exchange])
def test_a_damaged_state_is_told_with_the_remedy_and_nothing_else_is_harmed(interrupted, tmp_path, harm):
    state = interrupted.directory / "state.safetensors"
    harm(state, tmp_path / "saved")

    def contents():
        files = (path for path in (tmp_path / "saved").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files if not {"log", "log_tensorboard"} & set(path.parts)}

    before = contents()
    with pytest.raises(CheckpointError) as error:
        interrupted()
    message = str(error.value)
    assert f"{interrupted.directory.name}/state.safetensors" in message
    assert "elete" in message
    assert "--resume=false" in message
    assert contents() == before
    # the remedy works, and costs the module's training alone
    shutil.rmtree(interrupted.directory)
    repaired = interrupted()
    assert repaired.trained == [("RaSeRec", epoch) for epoch in range(3)]
    assert figures(repaired.record) == figures(interrupted(checkpoint_dir="whole").record)


def test_the_other_remedy_starts_over(interrupted):
    shorten(interrupted.directory / "state.safetensors", None)
    repaired = interrupted(resume=False)
    assert repaired.trained == [("SASRec", 0), *(("RaSeRec", epoch) for epoch in range(3))]
    assert figures(repaired.record) == figures(interrupted(checkpoint_dir="whole").record)


def test_damaged_weights_of_a_finished_run_are_told(interrupted):
    interrupted()
    shorten(interrupted.directory / "model.safetensors", None)
    with pytest.raises(CheckpointError, match=rf"{interrupted.directory.name}/model\.safetensors"):
        interrupted()


def test_an_interrupted_run_is_no_checkpoint_for_others(interrupted, tiny_run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        breaking(patch, "_train_epoch", 2, True)
        with pytest.raises(KeyboardInterrupt):
            tiny_run(epochs=3, checkpoint_dir="unfinished")
    (half,) = (tmp_path / "unfinished").glob("*-*")
    with pytest.raises(CheckpointError, match="not a checkpoint directory"):
        tiny_run(backbone_checkpoint=str(half))


def test_more_epochs_are_another_run(interrupted, tmp_path):
    interrupted()
    longer = interrupted(ram_epochs=4)
    assert [epoch for _, epoch in longer.trained] == [0, 1, 2, 3]
    assert len(list((tmp_path / "saved").glob("RaSeRec-*"))) == 2
