"""Starting a run in several processes: which options ask for it, what cannot be run so, and what each process does.

The options are those of RecBole's ``run``: `nproc` processes on this machine, `world_size` on all machines together;
`ip` and `port` of the machine whose first process is number 0; `group_offset`, the number of the first process of this
machine.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

from recbole_raserec.distributed.supervisor import supervise

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
    elif model == "FEARec":
        problems.append(
            f"{asked} share the rows of a batch, but FEARec chooses its delays by the mean over all of them; {remedy}"
        )
    elif trainer is not Trainer:
        problems.append(
            f"{asked} share the steps of RecBole's Trainer, but {model} is trained by {trainer.__name__}, in another "
            f"way; {remedy}"
        )
    if target["contrast"] not in (None, "none"):
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
    from recbole_raserec.distributed.group import joined

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
