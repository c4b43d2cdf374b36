"""Changes in the order they were made, on the disk before they are acknowledged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recbole_raserec.errors import CheckpointError
from recbole_raserec.fileio import replacing, sync_directory

NAME = "journal.jsonl"


class Journal:
    """A file of one JSON object a line, ``{"n": number, ...}``, numbers rising.

    A last line without its end was cut off while it was written, was never acknowledged, and is dropped.

    Args:
        path: created when missing.

    Raises:
        CheckpointError: a whole line of it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._last = 0
        text = self.path.read_bytes() if self.path.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for record in _records(whole, self.path):
            self._last = record["n"]
        self._open()
        if len(whole) < len(text):
            self._file.truncate(len(whole))
        sync_directory(self.path.parent)

    def append(self, record: dict[str, Any], after: int = 0) -> int:
        """Write a record; when this returns, its number, it is on the disk. Numbers rise from `after` on."""
        number = max(self._last, after) + 1
        line = json.dumps({"n": number, **record}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(start)
            raise
        self._last = number
        return number

    def records(self, after: int) -> Iterator[dict[str, Any]]:
        """Records with a higher number than `after`, in order."""
        for record in _records(self.path.read_bytes(), self.path):
            if record["n"] > after:
                yield record

    def clear(self) -> None:
        """Drop all records: what they changed is stored elsewhere."""
        with replacing(self.path) as part:
            Path(part).write_bytes(b"")
        self._file.close()
        self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        # Unbuffered: what a full disk refused must not wait in a buffer and come after all, behind the next record.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  held as long as the journal


def _records(text: bytes, path: Path) -> Iterator[dict[str, Any]]:
    last = 0
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or type(record.get("n")) is not int or record["n"] <= last:
            raise CheckpointError(f"{path} is damaged in line {number}; restore it, or delete it to lose what follows.")
        last = record["n"]
        yield record
