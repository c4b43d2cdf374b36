"""Locks between processes: files that the system releases when their holder ends, however it ends.

They are those of the library `filelock`. On a file system without locks work goes on unlocked, with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import Optional

from filelock import BaseFileLock, FileLock, Timeout

#: What a file system without locks answers.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS)})


def try_lock(path: str | os.PathLike, wait: bool = False) -> Optional[BaseFileLock]:
    """Lock the file at `path`, which is created and stays; its content is not kept.

    The lock is let go by its `release()` from any thread, and by the end of the last process that holds it.

    Returns:
        the held lock; None if another holder has it; with `wait` it is waited for instead.

    Raises:
        OSError: the file cannot be opened, or the system fails to lock it.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait, poll_interval=0.1)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        getLogger().warning(f"{path}: this file system has no locks; runs that share the directory are not kept apart")
    return lock


@contextlib.contextmanager
def locked(directory: str | os.PathLike, name: str = "") -> Iterator[None]:
    """Hold `directory`, which is created, by its file `.lock`; what waits logs so once, under its `name`."""
    path = Path(directory) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(path)
    if lock is None:
        prefix = f"{name}: " if name else ""
        getLogger().info(f"{prefix}another run is working in {path.parent}; waiting for it")
        lock = try_lock(path, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()
