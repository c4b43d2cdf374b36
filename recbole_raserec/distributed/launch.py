"""Starting a run in several processes, all of which end together.

`torch.multiprocessing` starts and watches the processes. By hand, because it offers neither: an error of this package
comes back as the exception that it was (torch's launchers, the elastic one too, return its text), process 0 returns a
result, and no process outlives the one that started it, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from tqdm import tqdm

from recbole_raserec.distributed.group import joined
from recbole_raserec.errors import ProcessError, RaSeRecError

#: Seconds by which errors are held back: the death of another process may be their reason, and is told instead.
_HOLD = 0.5
_ERROR, _RESULT = "error.pickle", "result.pickle"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which processes run where, as the options of RecBole's `run` say."""

    nproc: int = 1  # on this machine
    size: int = 1  # on all machines: `world_size`
    offset: int = 0  # number of the first one here: `group_offset`
    ip: str = "localhost"  # where process 0 listens if there are several machines
    port: int = 5678


def layout_of(options: Mapping[str, Any]) -> Layout:
    """The layout that options ask for, unchecked."""
    nproc, size = options.get("nproc") or 1, options.get("world_size") or -1
    offset, ip, port = (options.get(name) for name in ("group_offset", "ip", "port"))
    return Layout(nproc, nproc if size <= 0 else size, offset or 0, ip or Layout.ip, int(port or Layout.port))


def start(
    layout: Layout, do: Callable[..., Any], arguments: Sequence[Any], cuda: bool = False, threads: Optional[int] = None
) -> Any:
    """Call `do(*arguments)` in the processes of `layout`, each of which is one of their group meanwhile.

    When one of them fails, when this process is interrupted or when it ends in any way, all of them end.

    Args:
        layout: which processes run.
        do: a function of a module; it and its `arguments` are pickled.
        cuda: whether the processes compute on GPUs.
        threads: of each process, where the user chose a number; None: the cores are shared out.

    Returns:
        what `do` returned in the first process of this machine.

    Raises:
        RaSeRecError: as the first process that failed raised it.
        ProcessError: a process was killed, or raised any other error, which the message holds in full.
    """
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it names all processes that it ends
    with tempfile.TemporaryDirectory(prefix="recbole-raserec-") as name:
        folder = Path(name)
        given = (folder, layout, do, tuple(arguments), cuda, threads)
        context = start_processes(_main, given, layout.nproc, join=False)
        for number, process in enumerate(context.processes):
            process.name = f"process {number}"
        try:
            while not context.join(grace_period=0):
                pass
        except ProcessRaisedException as error:
            raise ProcessError(f"process {error.error_index} of {layout.nproc} failed:{error.msg}") from None
        except ProcessExitedException as error:
            raise _failure(error, layout.nproc, folder) from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return pickle.loads((folder / _RESULT).read_bytes())


def _main(local_rank: int, folder: Path, *given: Any) -> None:
    """A new process. It ends inside: destructors of C++ libraries can abort one while its group still has threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who started this process is interrupted too, and ends it
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    if local_rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process
    try:
        result = work(local_rank, folder, *given)
    except RaSeRecError as error:
        with contextlib.suppress(FileExistsError), open(folder / _ERROR, "xb") as file:  # the first one's
            pickle.dump((type(error), error.args, vars(error)), file)
        os._exit(1)  # at once: nothing here may wait for a process that is gone
    except BaseException as error:
        time.sleep(_HOLD)
        if isinstance(error, Exception):
            raise
        raise RuntimeError(repr(error)) from error
    if local_rank == 0:
        (folder / _RESULT).write_bytes(pickle.dumps(result))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def work(
    local_rank: int, folder: Path, layout: Layout, do: Callable[..., Any], arguments: tuple[Any, ...], cuda: bool,
    threads: Optional[int],
) -> Any:  # fmt: skip
    """What each process of `start` does: `do(*arguments)` as one of the group that finds itself through `folder`."""
    tqdm.set_lock(threading.RLock())  # its own is shared between processes and stays when they are ended
    if not threads:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // layout.nproc)))
    rank = layout.offset + local_rank
    with joined(rank, layout.size, local_rank, _store(layout, rank, folder), cuda):
        return do(*arguments)


def _store(layout: Layout, rank: int, folder: Path) -> distributed.Store:
    """Where the processes find each other: a file of this machine's `folder`, or process 0 at `ip` and `port`."""
    if layout.size == layout.nproc:
        if sys.platform == "linux":  # what a machine's processes tell each other stays on it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return distributed.FileStore(str(folder / "store"), layout.size)
    return distributed.TCPStore(layout.ip, layout.port, layout.size, rank == 0)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _failure(found: ProcessExitedException, count: int, folder: Path) -> RaSeRecError:
    """The error to raise after a process ended without a traceback."""
    if found.signal_name:
        return ProcessError(
            f"process {found.error_index} of {count} was ended by signal {found.signal_name} (SIGKILL often means: out "
            "of memory); the others were ended with it. The same command continues from the last finished epoch."
        )
    if not (folder / _ERROR).exists():
        return ProcessError(
            f"a process ended before it began (process {found.error_index}: {found.exit_code}). A script that asks for "
            "nproc is imported by each of them: call run_recbole_raserec below `if __name__ == '__main__':`."
        )
    kind, arguments, state = pickle.loads((folder / _ERROR).read_bytes())
    error = kind.__new__(kind, *arguments)  # not the constructor, which takes something else than the text
    vars(error).update(state)
    return error


def silence() -> None:
    """From now on this process shows and logs nothing."""
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
