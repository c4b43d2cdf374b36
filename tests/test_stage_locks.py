"""Two equal runs at the same time: one trains, the other waits, says so, and reuses what the first left."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, random_log, write_log

QUICK = {
    "MAX_ITEM_LIST_LENGTH": 8, "train_batch_size": 48, "epochs": 2, "threads": 1, "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "hidden_size": 16, "inner_size": 16, "n_layers": 1,
}  # fmt: skip
REGENERATION = {
    "regeneration": True, "regen_pretrained": False, "regen_hidden_size": 8, "regen_epochs": 1, "regen_layers": 1,
    "regen_inner_size": 16, "regen_conditions": 2, "regen_batch_pairs": 64,
}  # fmt: skip
WEIGHTS = {"regeneration": "personalised", "regen_rows": "patterns", "regen_personal_epochs": 1, "regen_min_support": 3}

#: Name of what waits -> options, where the first run is held up, what the second says later, directories that remain.
CASES = {
    "SASRec": ({}, ("training.trainer", "ResumableTrainer", "fit"), "SASRec: reusing the finished run", {"SASRec": 1}),
    "Regeneration": (
        REGENERATION, ("regeneration.stage", "", "make_pairs"), "Regeneration: reusing",
        {"SASRec": 2, "regeneration": 1, "regenerator": 1},
    ),
    "Personalised weights": (
        WEIGHTS, ("regeneration.personaliser", "Learner", "learn"), "Regeneration: reusing",
        {"SASRec": 2, "regeneration": 1, "personalised": 1},
    ),
}  # fmt: skip


def run(role: str, case: str, work: str) -> None:
    """One of the two: the first one stays in its work until the second one waits."""
    import recbole_raserec.storage.locks as locks
    from recbole_raserec import run_recbole_raserec

    options, (module, kind, name), *_ = CASES[case]
    owner = importlib.import_module(f"recbole_raserec.{module}")
    owner = getattr(owner, kind) if kind else owner
    slow, logger = getattr(owner, name), locks.getLogger()

    def held(*arguments, **named):
        Path(work, "inside").touch()
        appear(Path(work, "waiting"))
        return slow(*arguments, **named)

    class Telling:
        def info(self, text):
            logger.info(text)
            Path(work, "waiting").touch()

    if role == "first":
        setattr(owner, name, held)
    else:
        locks.getLogger = Telling
    os.chdir(work)
    given = {**QUICK, **options, "data_path": work, "result_file": f"{role}.json"}
    run_recbole_raserec("SASRec", "tiny", config_dict=given, argv=[])


def appear(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("case", CASES)
def test_the_second_of_two_equal_runs_waits_and_reuses(tmp_path, case):
    write_log(tmp_path, "tiny", random_log(0))
    paths, processes = os.pathsep.join([str(ROOT), str(ROOT / "tests")]), {}
    for role in ("first", "second"):
        processes[role] = subprocess.Popen(
            [sys.executable, "-c", f"import test_stage_locks as t; t.run({role!r}, {case!r}, {str(tmp_path)!r})"],
            env={**os.environ, "PYTHONPATH": paths}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if role == "first":
            appear(tmp_path / "inside")
    said = {role: process.communicate(timeout=300)[0] for role, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0], said
    first, second = (json.loads((tmp_path / f"{role}.json").read_text()) for role in processes)
    assert first["metrics"] == second["metrics"]
    _, _, later, directories = CASES[case]
    assert "waiting for it" not in said["first"]
    assert said["second"].count(f"{case}: another run is working in ") == 1
    assert later in said["second"].split("waiting for it")[1]
    for kind, count in directories.items():
        assert len(list((tmp_path / "saved").glob(f"{kind}-*"))) == count
