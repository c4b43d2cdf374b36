"""Starting a run in several processes, and ending all of them when one fails or the user interrupts.

The options are those of RecBole's ``run``: `nproc` processes on this machine, `world_size` on all machines together;
`ip` and `port` of the machine whose first process is number 0; `group_offset`, the number of the first process of this
machine.
"""

from __future__ import annotations

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

#: Seconds that processes get to end on their own, and in which the death of one explains the errors of others.
_GRACE, _TOGETHER = 5.0, 0.5

_ERROR, _RESULT, _STORE = "error.pickle", "result.pickle", "store"


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


def layout_problems(config: Any, target: Any) -> list[str]:
    """What of a configuration cannot run in the processes it asks for, one sentence each; empty if all is well.

    Args:
        config: of the run. target: of the model that stage ii trains.
    """
    layout = layout_of(config.final_config_dict)
    problems = []
    if layout.offset + layout.nproc > layout.size:
        problems.append(
            f"world_size: {layout.size} processes are fewer than group_offset: {layout.offset} and nproc: "
            f"{layout.nproc} make; set world_size to the number of processes on all machines"
        )
    if layout.size <= 1 or problems:
        return problems
    import torch

    asked, remedy = f"nproc: {layout.size} processes", "leave nproc and world_size out (threads: N)"
    if not torch.distributed.is_available():
        problems.append(
            f"{asked} need torch.distributed, which this build of torch lacks; install another, or {remedy}"
        )
    if config["device"].type == "cuda" and torch.cuda.device_count() < layout.nproc:
        problems.append(
            f"gpu_id: {config['gpu_id']} names {torch.cuda.device_count()} GPUs that are there, for nproc: "
            f"{layout.nproc}; name one for each process, write use_gpu: false, or {remedy}"
        )
    return problems + _training_problems(target, asked, remedy)


def _training_problems(target: Any, asked: str, remedy: str) -> list[str]:
    """What of a model's training cannot be split into shares of each batch."""
    from recbole.trainer import Trainer

    from recbole_raserec.registry import get_trainer_class

    model, trainer, problems = target["model"], get_trainer_class(target), []
    if model == "DARec":
        problems.append(
            f"{asked} share the rows of a batch, but DARec's losses compare the rows with each other; {remedy}"
        )
    elif trainer is not Trainer:
        problems.append(
            f"{asked} share the steps of RecBole's Trainer, but {model} is trained by {trainer.__name__}, in another "
            f"way; {remedy}"
        )
    if model == "DuoRec" and target["contrast"] != "none":
        problems.append(
            f"{asked} share the rows of a batch, but contrast: {target['contrast']} compares each of them with all "
            f"others; write contrast: none, or {remedy}"
        )
    if (target["train_neg_sample_args"] or {}).get("dynamic"):
        problems.append(
            f"{asked} draw the same negatives, but train_neg_sample_args: dynamic takes them from the model while it "
            f"trains; write dynamic: false, or {remedy}"
        )
    if target["learner"] == "sparse_adam":
        problems.append(f"{asked} add dense gradients up; write learner: adam instead of sparse_adam, or {remedy}")
    if target["enable_scaler"]:
        problems.append(f"{asked} do not scale the loss; leave enable_scaler: true out, or {remedy}")
    return problems


def launch(config: Any, given: Sequence[Any]) -> dict[str, Any]:
    """Run a checked configuration in its processes.

    Args:
        config: of the run. given: the arguments it was made of: model, data set, config files, options, command line.

    Returns:
        the record of process 0; on a machine that has it not, an empty one.

    Raises:
        RaSeRecError: what the first process that failed raised. ProcessError: it died, or raised something else.
    """
    layout = layout_of(config.final_config_dict)
    return supervise(work, (layout, tuple(given)), layout.nproc) or {}


def work(local_rank: int, folder: Path, layout: Layout, given: Sequence[Any]) -> Any:
    """What each process does: join the group and run; the record from process 0, None from the others."""
    import torch
    from tqdm import tqdm

    from recbole_raserec.config import Config
    from recbole_raserec.distributed import joined

    tqdm.set_lock(threading.RLock())  # its own is one between processes, left over when they are ended
    model, dataset, files, options, argv = given
    config = Config(model, dataset, files, options, argv)
    if not config["threads"]:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores() // layout.nproc)))
    rank = layout.offset + local_rank
    store = open_store(layout, rank, folder)
    with joined(rank, layout.size, local_rank, store, config["device"].type == "cuda") as group:
        from recbole_raserec.quick_start import run

        if not group.first:
            config = silent(config)
            run(config)
            return None
        from recbole.utils import init_logger

        init_logger(config)
        return run(config)


def open_store(layout: Layout, rank: int, folder: Path) -> Any:
    """Where the processes find each other: a file of this machine's `folder`, or process 0 at `ip` and `port`."""
    from torch import distributed

    if not layout.several_machines:
        if sys.platform == "linux":  # what a machine's processes tell each other stays on it
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return distributed.FileStore(str(folder / _STORE), layout.size)
    return distributed.TCPStore(layout.ip, layout.port, layout.size, rank == 0)


def silent(config: Any) -> Any:
    """The configuration of a process that shows nothing, and from now on nothing is shown or logged by this process."""
    import logging

    from recbole.trainer import trainer

    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    trainer.get_tensorboard = lambda _: _NoBoard()
    return config.with_options({"show_progress": False, "state": "ERROR", "log_wandb": False})


class _NoBoard:
    """A TensorBoard that forgets."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------------------- processes


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
