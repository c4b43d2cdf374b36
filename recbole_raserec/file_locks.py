"""Locks between processes: files that the system lets go of when their holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Callable, Optional

#: Seconds between two looks at a lock that is waited for.
_PAUSE = 0.1

#: What a file system says that has no locks: nobody waits there.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS)})

#: What it says of a lock that somebody has.
_HELD = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK})

#: Whether a started process can be given an open file, and holds its lock with its starter.
INHERITED = sys.platform != "win32"


def lock_file(path: str | os.PathLike) -> Optional[IO[bytes]]:
    """The open file at `path`, made if it is not there, with its lock; None if somebody has that.

    Closing it lets go; so does the end of the last process that has it open. It stays where it is, with what is in it:
    deleting it could delete the lock of the next holder.

    Raises:
        OSError: the file cannot be opened, or the system fails to lock it.
    """
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  held as long as the lock
    try:
        _lock(file.fileno())
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return file
        file.close()
        if error.errno not in _HELD:
            raise
        return None
    return file


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike, waiting: Optional[Callable[[], None]] = None) -> Iterator[None]:
    """Inside, no other process is inside for the same `path`; the others wait, until it ends or dies.

    The lock is a file beside `path`.

    Args:
        waiting: called once if somebody is inside.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.name}.lock")
    held = lock_file(name)
    if held is None and waiting is not None:
        waiting()
    while held is None:
        time.sleep(_PAUSE)
        held = lock_file(name)
    with held:
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # away from what the file holds, which a locked byte would hide
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
