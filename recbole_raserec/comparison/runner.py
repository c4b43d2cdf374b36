"""Running the cells of a comparison: each in a process of its own, what is finished never again."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Callable, Optional

from recbole_raserec.comparison.figures import Run
from recbole_raserec.comparison.plan import Cell
from recbole_raserec.config import parse_value
from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage import INHERITED, lock_file, read_json

#: The runner of a cell; the options follow.
RUNNER = (sys.executable, "-m", "recbole_raserec.cli.main", "run")

#: The first characters of a line in a cell's log with which a start begins.
_START = "# start: "

#: Seconds between two looks at what runs; lines of a failed run that are shown.
_PAUSE, _LAST_LINES = 0.1, 6

Say = Callable[[str], None]


def finished(folder: Path, cell: Cell) -> Optional[Run]:
    """The cell's run, if there is a whole one in `folder`. The runner writes the ranks first, the record last."""
    ranks = folder / f"{cell.name}.npz"
    if not ranks.is_file():
        return None
    try:
        record = read_json(folder / f"{cell.name}.json")
    except CheckpointError:
        return None
    return Run(record, ranks, continued=_starts(folder, cell) > 1)


def _starts(folder: Path, cell: Cell) -> int:
    with contextlib.suppress(FileNotFoundError), open(folder / f"{cell.name}.log", encoding="utf-8") as log:
        return sum(line.startswith(_START) for line in log)
    return 0


def run_cells(
    cells: Sequence[Cell], folder: Path, jobs: int, words: Callable[[Cell], Sequence[str]],
    environment: Mapping[str, str], say: Say,
) -> dict[str, str]:  # fmt: skip
    """Run what is not finished, `jobs` cells at a time; a failed one ends none but those that stand on it.

    A cell whose process outlived the program that started it is waited for: it holds its locks until it ends.

    Args:
        cells: in the order to run, a base before what stands on it. folder: of their files.
        words: the options of a cell's run. environment: of its process.
        say: takes a line about each cell.

    Returns:
        {name of a failed cell: its last words}.
    """
    work = _Work(list(cells), folder, jobs, say)
    try:
        while work.waiting or work.running:
            for cell in list(work.running):
                work.collect(cell)
            for cell in list(work.waiting):
                if len(work.running) < jobs:
                    work.start(cell, words, environment)
            if work.running or work.waiting:
                time.sleep(_PAUSE)
    finally:
        work.end_all()
    return work.failed


@dataclass
class _Process:
    """A running cell: its process, when it began, and the open files that hold its locks."""

    process: subprocess.Popen
    since: float
    locks: list[IO[bytes]]


class _Work:
    """What is to do, what runs, what is done."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int, say: Say):
        self.folder, self.total, self._jobs, self._say = folder, len(cells), jobs, say
        self.waiting, self.running = cells, dict[Cell, _Process]()
        self.failed: dict[str, str] = {}
        self._seconds: dict[tuple[str, str], list[float]] = {}
        self._elsewhere: set[str] = set()
        for cell in list(cells):
            self._take(cell, "cached")

    def _take(self, cell: Cell, how: str, seconds: Optional[float] = None) -> bool:
        """Cross a cell off the list if it is finished; it took `seconds`, or what its record says."""
        run = finished(self.folder, cell)
        if run is None:
            return False
        seconds = run.record["seconds"]["this_run"] if seconds is None else seconds
        self._seconds.setdefault((cell.row, cell.dataset), []).append(seconds)
        self.waiting.remove(cell)
        self._tell(cell, f"{how}, {duration(seconds)}")
        return True

    def start(self, cell: Cell, words: Callable[[Cell], Sequence[str]], environment: Mapping[str, str]) -> None:
        """Start a cell, unless its base is missing or somebody is at what it shares."""
        if cell.base in self.failed:
            self._fail(cell, f"its base failed ({cell.base})")
            return
        busy = frozenset[str]().union(*(other.shares for other in self.running))
        if any(cell.base == other.name for other in self.waiting) or busy & cell.shares:
            return
        locks = _lock(self.folder / "locks", cell.shares)
        if locks is None:
            if cell.name not in self._elsewhere:
                self._elsewhere.add(cell.name)
                self._say(f"{_title(cell)}: a process of an earlier start is still at it or at its base; waiting")
            return
        if self._take(cell, "done elsewhere"):
            _close(locks)
            return
        command = [*RUNNER, *words(cell)]
        with open(self.folder / f"{cell.name}.log", "a", encoding="utf-8") as log:
            log.write(_START + " ".join(command) + "\n")
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment),
                pass_fds=[lock.fileno() for lock in locks],
            )  # fmt: skip
        self.waiting.remove(cell)
        self.running[cell] = _Process(process, time.monotonic(), locks)

    def collect(self, cell: Cell) -> None:
        """Take the result of a cell whose process has ended."""
        of = self.running[cell]
        code = of.process.poll()
        if code is None:
            return
        del self.running[cell]
        _close(of.locks)
        self.waiting.append(cell)
        seconds = time.monotonic() - of.since
        if not self._take(cell, "done", seconds):
            self._fail(cell, _last_words(self.folder / f"{cell.name}.log", code), seconds)

    def end_all(self) -> None:
        """End what still runs: the comparison was interrupted. A second interrupt ends the waiting."""
        for of in self.running.values():
            of.process.terminate()
        try:
            for of in self.running.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    of.process.wait(timeout=10)
        finally:
            for of in self.running.values():
                of.process.kill()
                of.process.wait()
                _close(of.locks)

    def _fail(self, cell: Cell, words: str, seconds: Optional[float] = None) -> None:
        self.waiting.remove(cell)
        self.failed[cell.name] = words
        self._tell(cell, "failed" if seconds is None else f"failed after {duration(seconds)}")

    def _tell(self, cell: Cell, how: str) -> None:
        left = len(self.waiting) + len(self.running)
        done = f"[{self.total - left:{len(str(self.total))}}/{self.total}]"
        self._say(f"{done} {_title(cell)}: {how}; " + (f"{left} left{self._estimate()}" if left else "none left"))

    def _estimate(self) -> str:
        """The time left, from what like cells took; that cells which share something take turns is not counted."""
        known = [seconds for values in self._seconds.values() for seconds in values]
        if not known:
            return ""
        total = 0.0
        for cell in [*self.waiting, *self.running]:
            same = self._seconds.get((cell.row, cell.dataset))
            like = [s for (_, dataset), values in self._seconds.items() if dataset == cell.dataset for s in values]
            passed = time.monotonic() - self.running[cell].since if cell in self.running else 0.0
            total += max(0.0, statistics.fmean(same or like or known) - passed)
        return f", about {duration(total / min(self._jobs, len(self.waiting) + len(self.running)))}"


def _title(cell: Cell) -> str:
    return f"{cell.dataset} seed {cell.seed} {cell.row}"


def duration(seconds: float) -> str:
    """Seconds in words, to two places: 14 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _lock(folder: Path, names: frozenset[str]) -> Optional[list[IO[bytes]]]:
    """Open files that hold a lock for each name, for a started process to inherit; None if somebody has one.

    Where processes do not inherit files there are none.
    """
    if not INHERITED:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    held: list[IO[bytes]] = []
    for name in sorted(names):
        file = lock_file(folder / name)
        if file is None:
            _close(held)
            return None
        held.append(file)
    return held


def _close(files: Sequence[IO[bytes]]) -> None:
    for file in files:
        file.close()


def _last_words(log: Path, code: int) -> str:
    """How a run ended: its last lines, or the signal that ended it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first = max((place for place, line in enumerate(lines) if line.startswith(_START)), default=-1)
    last = [line for line in lines[first + 1 :] if line.strip()][-_LAST_LINES:]
    end = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return "\n".join([*last, f"({end}; all of it: {log})"])


def _words_of(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as the command line takes them, which reads a text as what it looks like."""
    for name, value in options.items():
        plain = isinstance(value, str) and parse_value(value) == value
        yield f"--{name}={value if plain else repr(value)}"


def command_words(cell: Cell, folder: Path, set_options: Mapping[str, Any]) -> list[str]:
    """The options of a cell's run: its own, then those the comparison sets (`set_options` win)."""
    own = {**cell.options, **set_options}
    own.update(
        seed=cell.seed, result_file=str(folder / f"{cell.name}.json"), ranks_file=str(folder / f"{cell.name}.npz")
    )
    return [f"--model={cell.model}", f"--dataset={cell.dataset}", *_words_of(own)]


def environment_of(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of the runs: the given one, and a checkout that is not installed is found from anywhere."""
    root = Path(__file__).resolve().parents[1]
    made = dict(given)
    if (root / "setup.py").is_file():
        made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), made.get("PYTHONPATH")]))
    return made
