"""What the processes of test_distributed.py do; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path

from recbole_raserec.errors import ConfigError


def sleep(number, folder, pids):
    """Say who this is, and stay."""
    part = Path(pids) / f"{number}.part"
    part.write_text(str(os.getpid()))
    part.rename(Path(pids) / f"{number}.pid")
    time.sleep(100)


def refuse(number, folder):
    """The second process refuses while the first one waits."""
    if number == 1:
        raise ConfigError(["first: problem", "second: problem"])
    time.sleep(100)


def divide(number, folder):
    """The second process has a bug."""
    if number == 1:
        raise ZeroDivisionError("nothing to divide by")
    time.sleep(100)


def abort_late(number, folder, notes):
    """Work done, but the libraries of the process would abort when they are destroyed."""
    import atexit
    import ctypes

    library = ctypes.CDLL(None)
    library.on_exit(library.abort, None)
    atexit.register((Path(notes) / f"{number}.end").write_text, "said")
    return number + 7


def sums(number, folder, layout):
    """What the processes of a layout come to together, seen from each."""
    import torch

    from recbole_raserec.distributed.group import current, joined
    from recbole_raserec.distributed.launch import open_store

    rank = layout.offset + number
    with joined(rank, layout.size, number, open_store(layout, rank, folder), cuda=False) as group:
        assert current() is group
        rows = torch.arange(7)
        found = {
            "rank": group.rank,
            "told": group.from_first(lambda: f"by {group.rank}"),
            "sum": group.add_up(torch.tensor([1.0, rank])).tolist(),
            "rows": group.joined_rows(rows[group.every(7)] ** 2, group.every(7), 7).tolist(),
            "few": group.joined_rows(rows[:3][group.every(3)] > 1, group.every(3), 3).tolist(),
            "same": (group.agreed("a"), group.agreed(rank)),
            "names": sorted(group.gathered({"x": torch.zeros(1)})),
        }
    assert current().size == 1
    return found


def pipelines(number, folder, layout, directory, jobs):
    """:func:`run_all` as one of the processes of a group."""
    import torch

    from recbole_raserec.distributed.group import joined
    from recbole_raserec.distributed.launch import open_store

    torch.set_num_threads(1)
    os.chdir(directory)
    with joined(number, layout.size, number, open_store(layout, number, folder), cuda=False):
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
