"""Processes that are started together, and end together when one fails or the user interrupts.

Standard library alone: what they do is the caller's.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from recbole_raserec.errors import ProcessError, RaSeRecError

#: Seconds that processes get to end on their own, and in which the death of one explains the errors of others.
_GRACE, _TOGETHER = 5.0, 0.5

_ERROR, _RESULT = "error.pickle", "result.pickle"


def supervise(do: Callable[..., Any], arguments: Sequence[Any], processes: int) -> Any:
    """Call ``do(number, folder, *arguments)`` in new processes with numbers from 0.

    When one of them fails, when this process is interrupted or when it ends in any way, all of them end.

    Args:
        do: a function of a module. arguments: of it, that pickle.

    Returns:
        what number 0 returned.

    Raises:
        RaSeRecError: as the first process that failed raised it.
        ProcessError: one was killed, or raised any other error, which the message has in full.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="recbole-raserec-") as name:
        folder = Path(name)
        started = []
        try:
            for number in range(processes):
                process = context.Process(target=_main, args=(do, number, folder, arguments), name=f"process {number}")
                process.start()
                started.append(process)
            running = list(started)
            while running:
                multiprocessing.connection.wait([process.sentinel for process in running])
                codes = [process.exitcode for process in running]  # asked once: the next answer may be another
                if any(codes):
                    raise _failure(started, folder)
                running = [process for process, code in zip(running, codes) if code is None]
        finally:
            _end(started)
        with open(folder / _RESULT, "rb") as file:
            return pickle.load(file)


def _main(do: Callable[..., Any], number: int, folder: Path, arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started this process hears of it too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if number:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    try:
        result = do(number, folder, *arguments)
        if number == 0:
            (folder / _RESULT).write_bytes(pickle.dumps(result))
    except BaseException as error:
        _leave_error(folder, number, error)
        os._exit(1)  # at once: nothing here may wait for a process that is gone
    _leave()


def _leave() -> None:
    """End as Python ends, but without the destructors of C++ libraries: they can abort a process that has done its work
    ("terminate called without an active exception") when threads of its group are still there."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _leave_error(folder: Path, number: int, error: BaseException) -> None:
    """Write the error down, unless another process was first: its end is what made this one fail."""
    told: dict[str, Any] = {"number": number, "text": traceback.format_exc()}
    if isinstance(error, RaSeRecError):
        told.update(kind=type(error), words=str(error), state=vars(error))
    with contextlib.suppress(OSError), open(folder / _ERROR, "xb") as file:
        file.write(pickle.dumps(told))


def _failure(started: Sequence[Any], folder: Path) -> RaSeRecError:
    """The error to raise after a process ended with one."""
    until = time.monotonic() + _TOGETHER
    while time.monotonic() < until and not any((process.exitcode or 0) < 0 for process in started):
        time.sleep(0.02)
    for process in started:
        if (process.exitcode or 0) < 0:
            name = signal.Signals(-process.exitcode).name
            return ProcessError(
                f"{process.name} of {len(started)} was ended by signal {name} (SIGKILL often means: out of memory); "
                "the others were ended with it. The same command continues from the last finished epoch."
            )
    try:
        told = pickle.loads((folder / _ERROR).read_bytes())
    except (OSError, EOFError, pickle.UnpicklingError):
        codes = ", ".join(f"{p.name}: {p.exitcode}" for p in started if p.exitcode)
        return ProcessError(
            f"a process ended before it began ({codes}). A script that asks for nproc is imported by each of them: "
            "call run_recbole_raserec below `if __name__ == '__main__':`."
        )
    if "kind" in told:
        error = told["kind"].__new__(told["kind"])
        error.args = (told["words"],)
        vars(error).update(told["state"])
        return error
    return ProcessError(f"process {told['number']} of {len(started)} failed:\n{told['text']}")


def _end(started: Sequence[Any]) -> None:
    """End what still runs."""
    try:
        for process in started:
            if process.is_alive():
                process.terminate()
        until = time.monotonic() + _GRACE
        for process in started:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
