"""Many readers or one writer, and a writer that waits is let in before new readers; and one process a directory."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from recbole_raserec.errors import CheckpointError
from recbole_raserec.file_locks import lock_file

LOCK = "journal.lock"


class ReadWriteLock:
    """Not re-entrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = self._waiting = 0
        self._writing = False

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Hold it with other readers."""
        with self._condition:
            self._condition.wait_for(lambda: not self._writing and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Hold it alone."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._writing and not self._readers)
            self._waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()


class DirectoryLock:
    """Held by the one process that changes a checkpoint; the system frees it when that process ends, however it ends.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: there is no such directory, or another process holds it.
    """

    def __init__(self, directory: Path):
        path = Path(directory) / LOCK
        try:
            held = lock_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{Path(directory).absolute()} is no directory.") from None
        if held is None:
            holder = path.read_bytes()[:20].decode("ascii", "replace").strip()
            raise CheckpointError(
                f"{directory} is in use by another process{f' ({holder})' if holder else ''}, and one at a time may "
                "journal changes of a checkpoint: stop that one first, or serve a copy of the directory."
            )
        self._file = held
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())

    def release(self) -> None:
        """Let it go; again changes nothing. The file stays."""
        self._file.close()
