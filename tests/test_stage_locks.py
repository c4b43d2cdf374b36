"""Two equal runs at the same time: one trains, the other waits, says so, and reuses what the first left."""

from __future__ import annotations

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


def run(role: str, work: str, options: str, result: str) -> None:
    """One of the two: the first one stays in its work until the second one waits."""
    import recbole_raserec.regeneration.stage as regeneration
    import recbole_raserec.storage.locks as locks
    from recbole_raserec import run_recbole_raserec
    from recbole_raserec.training.trainer import ResumableTrainer

    given = json.loads(options)
    owner, name = (regeneration, "make_pairs") if "regeneration" in given else (ResumableTrainer, "fit")
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
    run_recbole_raserec("SASRec", "tiny", config_dict={**given, "result_file": result}, argv=[])


def appear(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("more", [{}, REGENERATION], ids=["a training", "a regeneration"])
def test_the_second_of_two_equal_runs_waits_and_reuses(tmp_path, more):
    write_log(tmp_path, "tiny", random_log(0))
    options = json.dumps({**QUICK, **more, "data_path": str(tmp_path)})
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = {}
    for role in ("first", "second"):
        call = f"import test_stage_locks as t; t.run({role!r}, {str(tmp_path)!r}, {options!r}, {role + '.json'!r})"
        processes[role] = subprocess.Popen(
            [sys.executable, "-c", call], env={**os.environ, "PYTHONPATH": paths}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if role == "first":
            appear(tmp_path / "inside")
    said = {role: process.communicate(timeout=300)[0] for role, process in processes.items()}
    assert [process.returncode for process in processes.values()] == [0, 0], said
    records = [json.loads((tmp_path / f"{role}.json").read_text()) for role in processes]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert "waiting for it" not in said["first"]
    name = "Regeneration" if more else "SASRec"
    assert f"{name}: another run is working in " in said["second"]
    assert said["second"].count("waiting for it") <= (2 if more else 1)  # then perhaps for the training on the set
    assert ("Regeneration: reusing" if more else "SASRec: reusing the finished run in") in said["second"]
    assert "reusing" not in said["first"]
    for kind in ["SASRec", "regeneration", "regenerator"] if more else ["SASRec"]:
        stages = list((tmp_path / "saved").glob(f"{kind}-*"))
        assert len(stages) == (2 if more and kind == "SASRec" else 1), stages
