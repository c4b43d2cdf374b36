"""Keep freed memory in the process: on CPU, fresh pages cost more than the arithmetic that fills them."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to serve large tensors from its heap and not to give freed memory back to the system.

    By default each tensor above some 32 MiB is mapped when it is made and unmapped when it dies, so every step of a
    training pays for zeroed pages again. Set before a run; the process keeps its peak memory until it ends. Does
    nothing (and returns False) without glibc, or when the environment already chooses (``MALLOC_MMAP_THRESHOLD_``,
    ``MALLOC_TRIM_THRESHOLD_``, a preloaded allocator).
    """
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
