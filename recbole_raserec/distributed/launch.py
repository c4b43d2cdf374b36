"""Starting a run in several processes: which options ask for it, what cannot be run so, and what each process does.

The options are those of RecBole's ``run``: `nproc` processes on this machine, `world_size` on all machines together;
`ip` and `port` of the machine whose first process is number 0; `group_offset`, the number of the first process of this
machine.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from recbole_raserec.errors import ProcessError, RaSeRecError

#: Where process 0 listens when several machines take part, as in RecBole.
IP, PORT = "localhost", 5678

#: File through which the processes of one machine find each other.
_STORE = "store"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which processes run where.

    Attributes:
        nproc: on this machine. size: on all of them. offset: number of the first one here.
        ip, port: where process 0 listens; of no meaning on a single machine.
    """

    nproc: int = 1
    size: int = 1
    offset: int = 0
    ip: str = IP
    port: int = PORT

    @property
    def several_machines(self) -> bool:
        return self.size > self.nproc


def layout_of(options: Any) -> Layout:
    """The layout that a configuration or its options ask for, unchecked, see :func:`layout_problems`."""
    nproc, size = options.get("nproc") or 1, options.get("world_size") or -1
    size = nproc if size <= 0 else size
    offset, ip, port = (options.get(name) for name in ("group_offset", "ip", "port"))
    return Layout(nproc, size, offset or 0, ip or IP, int(port or PORT))


def start(layout: Layout, do: Callable[..., Any], arguments: Sequence[Any], cuda: bool, threads: Any = None) -> Any:
    """Call `do` with `arguments` in the processes of `layout`, each of which is one of their group meanwhile.

    Args:
        layout: which processes run.
        do: a function of a module; it and its arguments are pickled.
        arguments: of `do`.
        cuda: whether the processes compute on GPUs.
        threads: of each process, where the user chose a number; None: the cores are shared out.

    Returns:
        what `do` gave in process 0; None on a machine that has it not.

    Raises:
        RaSeRecError: what the first process that failed raised.
        ProcessError: it died, or raised something else.
    """
    return supervise(work, (layout, do, tuple(arguments), cuda, threads), layout.nproc)


def work(
    local_rank: int, folder: Path, layout: Layout, do: Callable[..., Any], arguments: tuple, cuda: bool, threads: Any
) -> Any:
    """What each process of :func:`start` does."""
    import torch
    from tqdm import tqdm

    from recbole_raserec.distributed.group import joined

    tqdm.set_lock(threading.RLock())  # its own is one between processes, left over when they are ended
    if not threads:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // layout.nproc)))
    rank = layout.offset + local_rank
    with joined(rank, layout.size, local_rank, open_store(layout, rank, folder), cuda):
        return do(*arguments)


def open_store(layout: Layout, rank: int, folder: Path) -> Any:
    """Where the processes find each other: a file of this machine's `folder`, or process 0 at `ip` and `port`."""
    from torch import distributed

    if not layout.several_machines:
        if sys.platform == "linux":  # what a machine's processes tell each other stays on it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return distributed.FileStore(str(folder / _STORE), layout.size)
    return distributed.TCPStore(layout.ip, layout.port, layout.size, rank == 0)


def silence() -> None:
    """From now on this process shows and logs nothing."""
    import logging

    from recbole.trainer import trainer

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    trainer.get_tensorboard = lambda _: _NoBoard()


class _NoBoard:
    """A TensorBoard that forgets."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Processes that are started together, and end together when one fails or the user interrupts.
#
# Standard library alone: what they do is the caller's.


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
