"""Two processes make the steps of one; one that fails ends the run, and a killed run goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import distributed_helpers
import pytest
from conftest import random_log, write_log

from recbole_raserec.distributed import current
from recbole_raserec.distributed.launch import Layout, start, work
from recbole_raserec.errors import ProcessError
from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.quick_start import run_process, run_recbole_raserec
from recbole_raserec.storage.files import read_tensors

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")

COMMON = {
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_batch_size": 48,
    "epochs": 3,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "show_progress": False,
    "state": "WARNING",
    "threads": 1,
    "learning_rate": 0.003,
    "softmax_precision": "float32",  # to bfloat16 the gradients of half a batch are rounded in another way
}
STILL = {"hidden_size": 16, "inner_size": 32, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
DROPPING = {**STILL, "hidden_dropout_prob": 0.3, "attn_dropout_prob": 0.3}
RETRIEVAL = {
    "backbone": "SASRec",
    "ram_inner_size": 16,
    "ram_dropout": 0.0,
    "ram_epochs": 2,
    "ram_train_batch_size": 64,
    "top_k": 4,
}

#: Name -> (model, options), trained by one process and by two. Bases of RaSeRec are found where SASRec left them.
JOBS = {
    "prefix": ("SASRec", STILL),
    "packed": ("SASRec", {**STILL, "training": "packed", "packed_copies": 2, "weight_averaging": 0.9}),
    "clipped": (
        "SASRec",
        {**STILL, "loss_type": "BPR", "train_neg_sample_args": {}, "clip_grad_norm": {"max_norm": 0.1}},
    ),
    "GRU4Rec": ("GRU4Rec", {"embedding_size": 16, "hidden_size": 16, "dropout_prob": 0.0}),
    "NARM": ("NARM", {"embedding_size": 16, "hidden_size": 16, "dropout_probs": [0.0, 0.0], "training": "packed"}),
    "BERT4Rec": ("BERT4Rec", STILL),
    "RaSeRec": ("RaSeRec", {**STILL, **RETRIEVAL}),
    "RaSeRec, all of it": ("RaSeRec", {**STILL, **RETRIEVAL, "freeze_backbone": False}),
    "BPR": ("BPR", {"embedding_size": 16}),
}
#: Dropout is on: what two processes draw is what they draw again when they are started again.
LONG = {**DROPPING, "epochs": 12, "stopping_step": 20, "nproc": 2}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A directory with the log."""
    directory = tmp_path_factory.mktemp("distributed")
    write_log(directory, "tiny", random_log(3, users=70, items=40))
    return directory


def given(logs, saved, options):
    """The options of a run that keeps its checkpoints in `saved`."""
    return {**COMMON, "data_path": str(logs), "checkpoint_dir": str(logs / saved), **options}


def jobs(logs, saved):
    return {name: (model, given(logs, saved, options)) for name, (model, options) in JOBS.items()}


@pytest.fixture(scope="module")
def alone(logs):
    """The jobs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(logs)
        return distributed_helpers.run_all(jobs(logs, "alone"))


@pytest.fixture(scope="module")
def killed(logs):
    """What ends a run of which the second process was killed after some epochs, and the last epoch it finished."""
    saved = logs / "killed"
    if os.name != "posix":
        return "", -1

    def kill():
        while last_epoch(saved) < 1:
            time.sleep(0.002)
        victim = next(child for child in multiprocessing.active_children() if child.name == "process 1")
        os.kill(victim.pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(logs)
        threading.Thread(target=kill, daemon=True).start()
        with pytest.raises(ProcessError) as caught:
            run_recbole_raserec("SASRec", "tiny", config_dict=given(logs, "killed", LONG), argv=[])
    assert not multiprocessing.active_children()
    return str(caught.value), last_epoch(saved)


@pytest.fixture(scope="module")
def together(logs, killed):
    """The jobs in two processes, one that is refused, one with dropout, and the same one, killed before, goes on."""
    more = {
        "SHAN": ("SHAN", given(logs, "two", {"embedding_size": 16})),
        "undisturbed": ("SASRec", given(logs, "two", LONG)),
        "killed": ("SASRec", given(logs, "killed", LONG)),
    }
    return start(Layout(2, 2), distributed_helpers.pipelines, (str(logs), {**jobs(logs, "two"), **more}), threads=1)


# ------------------------------------------------------------------ the same training, the same figures


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_make_the_steps_of_one(alone, together, name):
    assert len(alone[name]["losses"]) >= 4
    assert together[name]["losses"] == pytest.approx(alone[name]["losses"], rel=1e-5)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_find_the_figures_of_one(alone, together, name):
    for who, phases in alone[name]["metrics"].items():
        for phase in ("valid", "test"):
            for protocol in PROTOCOLS:
                expected = pytest.approx(phases[phase][protocol], abs=1e-6)
                assert together[name]["metrics"][who][phase][protocol] == expected, (who, phase, protocol)


def test_the_first_process_alone_writes(logs, alone, together):
    one, two = ({p.name.rpartition("-")[0] for p in (logs / saved).iterdir()} for saved in ("alone", "two"))
    assert one <= two
    boards = list((logs / "two" / "log_tensorboard").iterdir())
    assert boards
    assert all(len(list(board.glob("events.*"))) == 1 for board in boards)
    for part in logs.rglob("*.part"):
        raise AssertionError(part)


def test_a_loss_that_is_no_mean_over_rows_is_refused(together):
    assert len(together["SHAN"]) == 1
    for words in (" SHAN ", "no mean over rows", "leave nproc"):
        assert words in together["SHAN"][0]


def test_a_process_does_what_the_runner_does(logs, monkeypatch):
    """What each process of `launch` is given to do, in this one."""
    monkeypatch.chdir(logs)
    options = given(logs, "worked", {**STILL, "threads": None})
    record = work(0, logs, Layout(), run_process, ("SASRec", "tiny", None, options, []), False, None)
    assert record["model"] == "SASRec"
    assert record["metrics"]["base"]["test"]
    assert current().size == 1


# ------------------------------------------------------------------ killed, and started again


def last_epoch(saved):
    """The last epoch whose state is on disk, -1 without one."""
    for state in saved.glob("SASRec-*/state.safetensors"):
        return read_tensors(state)[1]["epoch"]
    return -1


@posix
def test_a_killed_process_ends_the_run(killed):
    message, epoch = killed
    assert message.startswith("process 1 of 2 was ended by signal SIGKILL")
    assert 1 <= epoch < LONG["epochs"] - 1


@posix
def test_a_killed_run_goes_on_with_the_figures_of_one_nobody_disturbed(killed, together):
    epoch, steps = killed[1], len(together["undisturbed"]["losses"]) // LONG["epochs"]
    assert len(together["killed"]["losses"]) == (LONG["epochs"] - 1 - epoch) * steps
    assert together["killed"]["losses"] == together["undisturbed"]["losses"][(epoch + 1) * steps :]
    assert together["killed"]["metrics"] == together["undisturbed"]["metrics"]
