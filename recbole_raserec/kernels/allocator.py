"""The process's memory: freed memory is kept, as on CPU fresh pages cost more than what fills them; the peak."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve large tensors from its heap and not to give freed memory back to the system.

    By default each tensor above some 32 MiB is mapped when it is made and unmapped when it dies, so every step of a
    training pays for zeroed pages again. Set before a run; the process keeps its peak memory until it ends. Does
    nothing (and returns False) without glibc, or when the environment already chooses (`MALLOC_MMAP_THRESHOLD_`,
    `MALLOC_TRIM_THRESHOLD_`, a preloaded allocator).
    """
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))


class FreedMemory:
    """What `keep_freed_memory` keeps, bounded: batches of always new shapes leave holes that nothing fits again.

    Training BERT4Rec on amazon-beauty grows by some 100 MiB an epoch so, with or without `keep_freed_memory`,
    while what it uses stays below 600 MiB.
    """

    def __init__(self) -> None:
        self._least: float | None = None

    def bound(self) -> bool:
        """Give freed memory back to the system if the process has come to hold twice the least it held at a call.

        Returns:
            whether it did.
        """
        now = resident_mb()
        self._least = now if self._least is None else min(self._least, now)
        return now > 2 * self._least and _trim()


def _trim() -> bool:
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError, TypeError):  # not glibc; TypeError: Windows has no library of that name
        return False


def resident_mb() -> float:
    """Memory that this process holds, MiB."""
    return psutil.Process().memory_info().rss / 2**20


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, MiB.

    psutil tells it on Windows alone. Linux counts into `ru_maxrss` what the process held before it became this program,
    its parent's memory; the figure in `/proc` starts afresh.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
