"""Starts the runs of a comparison, each in a process of its own; what is finished is not run again.

A run starts when those it reuses a part of have ended. Two comparisons in one directory, or a process that outlived the
one that started it, may work at the same run: each stage is locked while it is trained, so the later process waits and
reuses it, and its figures are the same.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Callable, Optional

from recbole_raserec.comparison.figures import Finished
from recbole_raserec.comparison.plan import Run
from recbole_raserec.config import parse_value
from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage import read_json

#: The command of a run; the options follow.
COMMAND = (sys.executable, "-m", "recbole_raserec.cli.main", "run")

#: The first characters of a line in a run's log with which a start begins.
_START = "# start: "

#: Lines of a failed run that are shown; seconds between two looks for an interrupt.
_LAST_LINES, _PAUSE = 6, 0.5

Say = Callable[[str], None]


def finished(folder: Path, run: Run) -> Optional[Finished]:
    """The whole run, if it is in `folder`. A run writes the ranks first, the record last."""
    ranks = folder / f"{run.name}.npz"
    if not ranks.is_file():
        return None
    try:
        record = read_json(folder / f"{run.name}.json")
    except CheckpointError:
        return None
    starts = sum(line.startswith(_START) for line in _log(folder, run))
    return Finished(record, ranks, continued=starts > 1)


def run_all(
    runs: Sequence[Run], folder: Path, jobs: int, words: Callable[[Run], Sequence[str]],
    environment: Mapping[str, str], say: Say,
) -> dict[str, str]:  # fmt: skip
    """Run what is not finished; a failed run ends none of the others but those whose base it is.

    Args:
        runs: in the order to start them.
        folder: of their files.
        jobs: runs at a time.
        words: the options of a run.
        environment: of the processes.
        say: takes a line about each run.

    Returns:
        `{name of a failed run: its last words}`.
    """
    progress, failed = _Progress(runs, jobs, say), dict[str, str]()
    todo = {run.name: run for run in runs if not progress.take(run, finished(folder, run), "cached")}
    places = {name: place for place, name in enumerate(todo)}
    order = TopologicalSorter({name: run.needs & todo.keys() for name, run in todo.items()})
    order.prepare()
    waiting: list[str] = []
    running: dict[Future, Run] = {}
    processes: list[subprocess.Popen] = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while order.is_active():
                ready, waiting = sorted([*waiting, *order.get_ready()], key=places.__getitem__), []
                for run in [todo[name] for name in ready]:
                    if run.base in failed:
                        failed[run.name] = f"its base failed ({run.base})"
                        progress.leave(run, "failed")
                    elif len(running) == jobs:
                        waiting.append(run.name)
                        continue
                    elif not progress.take(run, finished(folder, run), "done elsewhere"):
                        processes.append(_start([*COMMAND, *words(run)], folder, run, environment))
                        running[pool.submit(processes[-1].wait)] = run
                        progress.started[run] = time.monotonic()
                        continue
                    order.done(run.name)
                for future in wait(running, _PAUSE, FIRST_COMPLETED).done:
                    run = running.pop(future)
                    seconds = time.monotonic() - progress.started.pop(run)
                    if not progress.take(run, finished(folder, run), "done", seconds):
                        failed[run.name] = _last_words(folder, run, future.result())
                        progress.leave(run, f"failed after {duration(seconds)}")
                    order.done(run.name)
        finally:
            _end(processes)
    return failed


def _start(command: Sequence[str], folder: Path, run: Run, environment: Mapping[str, str]) -> subprocess.Popen:
    with open(folder / f"{run.name}.log", "a", encoding="utf-8") as log:
        log.write(_START + " ".join(command) + "\n")
        log.flush()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment)
        )


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End what still runs: the comparison was interrupted. A second interrupt ends the waiting."""
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()
    try:
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    finally:
        for process in left:
            process.kill()


class _Progress:
    """Says how each run ended, how many are left, and about how long they take."""

    def __init__(self, runs: Sequence[Run], jobs: int, say: Say):
        self.left, self.started = list(runs), dict[Run, float]()
        self._total, self._jobs, self._say = len(runs), jobs, say
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def take(self, run: Run, found: Optional[Finished], how: str, seconds: Optional[float] = None) -> bool:
        """Cross off a run if it is finished; it took `seconds`, or what its record says."""
        if found is None:
            return False
        seconds = found.record["seconds"]["this_run"] if seconds is None else seconds
        self._seconds.setdefault((run.dataset, run.row), []).append(seconds)
        self.leave(run, f"{how}, {duration(seconds)}")
        return True

    def leave(self, run: Run, how: str) -> None:
        """Cross off a run that ended in this way."""
        self.left.remove(run)
        count = len(self.left)
        done = f"[{self._total - count:{len(str(self._total))}}/{self._total}]"
        self._say(f"{done} {run.title}: {how}; {f'{count} left{self._estimate()}' if count else 'none left'}")

    def _estimate(self) -> str:
        """The time left, from what like runs took; that some wait for others is not counted."""
        known = [seconds for values in self._seconds.values() for seconds in values]
        if not known:
            return ""
        total = 0.0
        for run in self.left:
            same = self._seconds.get((run.dataset, run.row))
            like = [s for (dataset, _), values in self._seconds.items() if dataset == run.dataset for s in values]
            passed = time.monotonic() - self.started[run] if run in self.started else 0.0
            total += max(0.0, statistics.fmean(same or like or known) - passed)
        return f", about {duration(total / min(self._jobs, len(self.left)))}"


def duration(seconds: float) -> str:
    """Seconds in words, in two units: 14 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _log(folder: Path, run: Run) -> list[str]:
    try:
        return (folder / f"{run.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _last_words(folder: Path, run: Run, code: int) -> str:
    """How a run ended: its last lines, or the signal that ended it."""
    lines = _log(folder, run)
    first = max((number for number, line in enumerate(lines) if line.startswith(_START)), default=-1)
    last = [line for line in lines[first + 1 :] if line.strip()][-_LAST_LINES:]
    end = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return "\n".join([*last, f"({end}; all of it: {folder / f'{run.name}.log'})"])


def command_words(run: Run, folder: Path, set_options: Mapping[str, Any]) -> list[str]:
    """The options of a run: its own, then those the comparison sets (`set_options` win)."""
    files = {"result_file": str(folder / f"{run.name}.json"), "ranks_file": str(folder / f"{run.name}.npz")}
    words = [f"--model={run.model}", f"--dataset={run.dataset}"]
    for name, value in {**run.options, **set_options, "seed": run.seed, **files}.items():
        same = isinstance(value, str) and parse_value(value) == value  # not the text of a number, of a list, ...
        words.append(f"--{name}={value if same else repr(value)}")
    return words


def environment_of(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the runs: the given one, and a checkout that is not installed is found from anywhere."""
    root = Path(__file__).resolve().parents[2]
    made = dict(given)
    if (root / "setup.py").is_file():
        made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), made.get("PYTHONPATH")]))
    return made
