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
from typing import Any, Callable, Optional

from filelock import BaseFileLock, FileLock, Timeout

#: What a file system without locks answers. (filelock 3, on Python 3.9, reports ENOSYS alone.)
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


def descriptor(lock: BaseFileLock) -> Optional[int]:
    """The open file of a held lock, for a started process to inherit, which then holds it too.

    `release()` lets go for both. None where processes do not inherit files, or the file system has no locks.
    """
    return lock._context.lock_file_fd if os.name == "posix" else None


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


# Until their users have switched to `locked` and `try_lock`:
INHERITED = os.name == "posix"


class _LockedFile:
    """A held lock with the methods of an open file."""

    def __init__(self, path: Any, lock: BaseFileLock):
        self._lock, self._file = lock, open(path, "r+b", buffering=0)  # noqa: SIM115
        self.write, self.truncate = self._file.write, self._file.truncate

    def fileno(self) -> int:
        return descriptor(self._lock) or self._file.fileno()

    def close(self) -> None:
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def lock_file(path: Any) -> Any:
    lock = try_lock(path)
    return None if lock is None else _LockedFile(path, lock)


def one_at_a_time(path: Any, waiting: Optional[Callable[[], None]] = None) -> Any:
    return locked(path)
