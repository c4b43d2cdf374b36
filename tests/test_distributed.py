"""Two processes make the steps of one; one that fails ends the run, and a killed run goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import distributed_helpers
import pytest
from conftest import ROOT, random_log, write_log

from recbole_raserec.config import Config
from recbole_raserec.configuration.sources import parse_arguments
from recbole_raserec.distributed import launch as launcher
from recbole_raserec.distributed.group import Group, current
from recbole_raserec.distributed.launch import Layout, layout_of
from recbole_raserec.distributed.supervisor import supervise
from recbole_raserec.errors import ConfigError, ProcessError
from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.fileio import read_tensors
from recbole_raserec.quick_start import check_run, run_recbole_raserec
from recbole_raserec.regenerate import regenerate_dataset
from recbole_raserec.tune import tune_hyper_parameters

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
    "RaSeRec": ("RaSeRec", {**STILL, **RETRIEVAL}),
    "RaSeRec, all of it": ("RaSeRec", {**STILL, **RETRIEVAL, "freeze_backbone": False}),
    "BPR": ("BPR", {"embedding_size": 16}),
}
#: Dropout is on: what two processes draw is what they draw again when they are started anew.
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
    layout = Layout(nproc=2, size=2)
    return supervise(distributed_helpers.pipelines, (layout, str(logs), {**jobs(logs, "two"), **more}), 2)


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
    boards = [p.name for p in (logs / "log_tensorboard").iterdir()]
    assert len(boards) == len(set(boards))
    for part in logs.rglob("*.part"):
        raise AssertionError(part)


def test_a_loss_that_is_no_mean_over_rows_is_refused(together):
    assert len(together["SHAN"]) == 1
    for words in (" SHAN ", "no mean over rows", "leave nproc"):
        assert words in together["SHAN"][0]


def test_a_process_does_what_the_runner_does(logs, monkeypatch):
    """What each process of `launch` is given to do, in this one."""
    monkeypatch.chdir(logs)
    monkeypatch.setattr(launcher, "supervise", lambda do, arguments, count: do(0, logs, *arguments))
    options = given(logs, "worked", {**STILL, "threads": None})
    config = Config("SASRec", "tiny", config_dict=options, argv=[])
    record = launcher.launch(config, ("SASRec", "tiny", None, options, []))
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


# ------------------------------------------------------------------ the processes


def test_an_error_of_this_package_is_raised_as_it_was():
    with pytest.raises(ConfigError) as caught:
        supervise(distributed_helpers.refuse, (), 2)
    assert caught.value.problems == ["first: problem", "second: problem"]
    assert str(caught.value) == str(ConfigError(["first: problem", "second: problem"]))
    assert not multiprocessing.active_children()


def test_any_other_error_is_told_in_full():
    with pytest.raises(ProcessError, match=r"(?s)process 1 of 2 failed:.*ZeroDivisionError: nothing to divide by"):
        supervise(distributed_helpers.divide, (), 2)
    assert not multiprocessing.active_children()


def appear(folder, count):
    """Wait for the processes of `sleep`; their numbers."""
    until = time.monotonic() + 60
    while len(list(folder.glob("*.pid"))) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(path.read_text()) for path in folder.glob("*.pid")]


@posix
def test_an_interrupt_ends_all_processes(tmp_path):
    def interrupt():
        appear(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            supervise(distributed_helpers.sleep, (str(tmp_path),), 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


@posix
def test_processes_end_with_the_one_that_started_them(tmp_path):
    program = "from recbole_raserec.distributed.supervisor import supervise; import distributed_helpers, sys; "
    program += "supervise(distributed_helpers.sleep, (sys.argv[1],), 2)"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    pids = appear(tmp_path, 2)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = f"/proc/{pid}/stat"  # one that has ended and that nobody has asked for is still there
    return not os.path.exists(stat) or open(stat).read().rpartition(")")[2].split()[0] != "Z"


def test_two_machines():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [Layout(nproc=1, size=2, offset=offset, ip="localhost", port=port) for offset in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda layout: supervise(distributed_helpers.sums, (layout,), 1), machines))
    for rank in (0, 1):
        assert found[rank] == {
            "rank": rank, "told": "by 0", "sum": [2.0, 1.0], "rows": [0, 1, 4, 9, 16, 25, 36],
            "few": [False, False, True], "same": (True, False), "names": ["x", "x.1"],
        }  # fmt: skip


def test_rows_are_shared_out_without_gap_or_overlap():
    assert current().span(9) == (0, 9)
    for size in (1, 2, 3, 5):
        group = [Group(rank, size) for rank in range(size)]
        for rows in (0, 1, 2, 3, 7, 10, 64):
            places = [row for of in group for row in range(*of.span(rows))]
            assert places == list(range(rows))
            assert sorted(row for of in group for row in range(rows)[of.every(rows)]) == places
            assert all(stop - start != 1 for start, stop in (of.span(rows) for of in group)) or rows == 1


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Layout()),
        ({"nproc": 1, "world_size": -1}, Layout()),
        ({"nproc": 3}, Layout(3, 3)),
        ({"nproc": 2, "world_size": 4, "ip": "10.0.0.1", "port": "29500", "group_offset": 2},
         Layout(2, 4, 2, "10.0.0.1", 29500)),
    ],
)  # fmt: skip
def test_the_options_are_read_as_recbole_reads_them(options, expected):
    assert layout_of(options) == expected
    assert expected.several_machines == (len(options) > 2)


@pytest.mark.parametrize(
    ("model", "words", "parts"),
    [
        ("DuoRec", "--nproc=2", ["contrast: us_x", "contrast: none"]),
        ("RaSeRec", "--nproc=2 --backbone=DuoRec", ["contrast: us_x", "contrast: none"]),
        ("DARec", "--nproc=2", ["DARec's losses", "leave nproc"]),
        ("S3Rec", "--nproc=2", ["S3RecTrainer"]),
        ("Pop", "--nproc=2", ["TraditionalTrainer"]),
        ("GRU4Rec", "--nproc=2 --learner=sparse_adam", ["learner: adam"]),
        ("GRU4Rec", "--nproc=2 --enable_scaler=True", ["enable_scaler: true"]),
        ("BPR", "--nproc=2 --train_neg_sample_args={'dynamic':True,'candidate_num':2}", ["dynamic: false"]),
        ("GRU4Rec", "--nproc=2 --world_size=1", ["world_size: 1", "nproc: 2"]),
        ("GRU4Rec", "--nproc=1 --group_offset=1", ["group_offset: 1", "world_size"]),
        ("GRU4Rec", "--nproc=0", ["nproc: 0"]),
        ("GRU4Rec", "--port=high", ["port: 'high'"]),
        ("GRU4Rec", "--local_rank=0", ["local_rank: 0", "set nproc"]),
        ("GRU4Rec", "--offset=1", ["offset: 1", "set group_offset"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_any_data_are_read(model, words, parts):
    with pytest.raises(ConfigError) as caught:
        check_run(Config(model, "nowhere", config_dict=parse_arguments(words.split())[0], argv=[]))
    assert len(caught.value.problems) == 1
    for part in parts:
        assert part in caught.value.problems[0]


def test_trials_of_a_search_run_in_one_process(tmp_path):
    with pytest.raises(ConfigError, match="nproc: 2 processes share a run"):
        tune_hyper_parameters("SASRec", "nowhere", str(tmp_path), argv=["--nproc=2"])


def test_a_data_set_is_regenerated_in_one_process(tmp_path):
    with pytest.raises(ConfigError, match="nproc: 2 processes share a training"):
        regenerate_dataset("nowhere", tmp_path, argv=["--nproc=2"])


def test_the_number_of_processes_is_part_of_what_decides_a_result():
    one, two, four = (
        Config("SASRec", "nowhere", config_dict=options, argv=[]).training_options()
        for options in ({"nproc": 1}, {"nproc": 2}, {"nproc": 1, "world_size": 2, "group_offset": 1, "port": 1234})
    )
    assert "world_size" not in one
    assert two == four == {**one, "world_size": 2}
