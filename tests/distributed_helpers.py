"""What the processes of test_distributed.py do."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from recbole_raserec.distributed import current
from recbole_raserec.errors import ConfigError


def sleep(pids):
    """Say who this is, and stay."""
    part = Path(pids) / f"{current().rank}.part"
    part.write_text(str(os.getpid()))
    part.rename(Path(pids) / f"{current().rank}.pid")
    time.sleep(100)


def refuse():
    """The second process refuses while the first one waits."""
    if current().rank == 1:
        raise ConfigError(["first: problem", "second: problem"])
    time.sleep(100)


def divide():
    """The second process has a bug."""
    if current().rank == 1:
        raise ZeroDivisionError("nothing to divide by")
    time.sleep(100)


def abort_late(notes):
    """Work done, but the libraries of the process would abort when they are destroyed."""
    import atexit
    import ctypes

    library, number = ctypes.CDLL(None), current().rank
    library.on_exit(library.abort, None)
    atexit.register((Path(notes) / f"{number}.end").write_text, "said")
    return number + 7


def sums():
    """What the processes of a layout come to together, seen from each."""
    group, rows = current(), torch.arange(7)
    return {
        "rank": group.rank,
        "told": group.from_first(lambda: f"by {group.rank}"),
        "sum": group.add_up(torch.tensor([1.0, group.rank])).tolist(),
        "rows": group.joined_rows(rows[group.every(7)] ** 2, group.every(7), 7).tolist(),
        "few": group.joined_rows(rows[:3][group.every(3)] > 1, group.every(3), 3).tolist(),
        "same": (group.agreed("a"), group.agreed(group.rank)),
        "names": sorted(group.gathered({"x": torch.zeros(1)})),
    }


def pipelines(directory, jobs):
    """:func:`run_all` as one of the processes of a group."""
    torch.set_num_threads(1)
    os.chdir(directory)
    return run_all(jobs)


def run_all(jobs):
    """Each job's figures and the loss of each of its batches, or the problems it is refused with.

    Args:
        jobs: name -> (model, options).
    """
    from recbole_raserec.quick_start import run_process

    found = {}
    for name, (model, options) in jobs.items():
        with watched() as losses:
            try:
                record = run_process(model, "tiny", None, options, [])
            except ConfigError as error:
                found[name] = error.problems
                continue
        found[name] = {"metrics": record.get("metrics"), "losses": losses}
    return found


@contextmanager
def watched():
    """The losses that RecBole's trainer sees within."""
    from recbole.trainer import Trainer

    losses, check = [], Trainer._check_nan

    def note(self, loss):
        losses.append(loss.item())
        check(self, loss)

    Trainer._check_nan = note
    try:
        yield losses
    finally:
        Trainer._check_nan = check
