"""The journal of a served checkpoint: each change is in it, on the disk, before it is acknowledged and takes effect.

A file of JSON lines. The first names the journal by a mark, which the checkpoint's manifest has too, and the number of
the last acknowledged record; each other is a record, numbered without gaps. Each line ends with the CRC-32 of what is
before. A record without its end was cut off while it was written, was never acknowledged, and is dropped. Anything else
that does not fit is an error, and `recbole-raserec doctor DIR --repair` keeps what can be read.

By hand, and not sqlite3, whose write-ahead log loses records without a word (docs/serving.md). Version 0.1.0 wrote
records alone, without CRCs; such a file is taken up, and replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple, Optional

from filelock import BaseFileLock

from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.storage import (
    check_files,
    live_parts,
    mark_journal,
    read_ids,
    read_manifest,
    replacing,
    room_for,
    try_lock,
)

#: In the checkpoint directory: the journal, its lock, the process that holds that; what a repair read.
JOURNAL, LOCK, HOLDER, DAMAGED = "journal.jsonl", "journal.lock", "journal.pid", "journal.damaged"
LINE_BYTES = 1 << 26  # of the longest line
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}')


class Content(NamedTuple):
    """What a journal file holds."""

    mark: Optional[str]  # None: a file of 0.1.0
    records: list[dict[str, Any]]
    last: int  # number
    size: int  # bytes of whole lines


def lock_directory(directory: Path) -> BaseFileLock:
    """The lock of the one process that changes a checkpoint, held; the system frees it when that process ends.

    A `CheckpointError` says that there is no such directory, or that another process holds it.
    """
    try:
        lock = try_lock(directory / LOCK)
    except FileNotFoundError:
        raise CheckpointError(f"{directory.absolute()} is no directory.") from None
    except OSError as error:  # a read-only file system, or another user's directory
        why = f"{directory} takes no journal of changes ({error.strerror})"
        raise CheckpointError(f"{why}; serve it with --read_only, or a copy of it.") from None
    if lock is None:
        holder = directory / HOLDER
        process = holder.read_bytes()[:20].decode("ascii", "replace").strip() if holder.is_file() else ""
        raise CheckpointError(
            f"{directory} is in use by another process{process and f' ({process})'}, and one at a time may journal "
            "changes of a checkpoint: stop that one first, or serve a copy of the directory."
        )
    with contextlib.suppress(OSError):  # a full disk; it only tells who holds the lock
        (directory / HOLDER).write_text(str(os.getpid()), encoding="ascii")
    return lock


def read_journal(directory: Path, manifest: Mapping[str, Any], applied: int) -> Content:
    """What a checkpoint's journal holds; a `CheckpointError` where it does not hold all that was acknowledged.

    `applied` is the number of the last change that the saved parts hold.
    """
    content, damage = _scan(directory, manifest, applied)
    for line, why in damage[:1]:
        remedy = f"Restore it from a copy, or keep what can be read: recbole-raserec doctor {directory} --repair"
        raise CheckpointError(f"{directory / JOURNAL} is damaged in line {line}: {why}. {remedy}")
    return content


def _scan(directory: Path, manifest: Mapping[str, Any], applied: int) -> tuple[Content, list[tuple[int, str]]]:
    """The sound records of a journal; lines that do not fit, from 1 on, and why."""
    path, mark, damage = directory / JOURNAL, manifest.get("journal"), list[tuple[int, str]]()
    if not path.is_file():
        gone = (1, "the file is missing, and the checkpoint had a journal")
        return Content(None, [], applied, 0), [gone] if mark else []
    lines = list(_lines(path))
    if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < LINE_BYTES:
        lines.pop()  # cut off
    size, records, last = sum(map(len, lines)), list[dict[str, Any]](), None
    marked = bool(mark) or any(b'"crc": "' in line for line in lines)
    header = (_line(lines.pop(0), True) or {}) if marked and lines else {}
    found, acknowledged = header.get("journal"), str(header.get("last", ""))
    if marked and not (isinstance(found, str) and acknowledged.isdecimal()):
        damage.append((1, "it is not the line that names the journal"))
    elif mark and found != mark:
        other = f"it is the journal {found}, this checkpoint has {mark}"
        return Content(None, [], applied, 0), [(1, f"{other}; changes of the other one are not for it")]
    for number, line in enumerate(lines, start=2 if marked else 1):
        record = _line(line, marked)
        if record is None or type(record.get("n")) is not int:
            damage.append((number, "it is not a change as it was written"))
            continue
        if record["n"] != last + 1 if last is not None else record["n"] > applied + 1:
            damage.append((number, f"change {record['n']} follows on {applied if last is None else last}"))
        last = record["n"]
        records.append(record)
    known, reached = int(acknowledged or 0) if found and not damage else 0, max(last or 0, applied)
    if known > reached:
        damage.append((len(lines) + 2, f"changes {reached + 1} to {known} are missing"))
    if not damage and records and not mark and manifest["version"] > 1:
        damage.append((2, "the checkpoint has no journal yet; this one is of another state of it"))
    return Content(found, records, max(reached, known), size), damage


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while line := file.readline(LINE_BYTES):
            yield line
            if not line.endswith(b"\n"):  # the last one, or what is no line
                return


def _line(line: bytes, marked: bool) -> Optional[dict[str, Any]]:
    """The object of a line, without its checksum; None where it is not what was written."""
    crc = _CRC.fullmatch(line[-21:-1])
    if marked and (crc is None or int(crc[1], 16) != zlib.crc32(line[:-21])):
        return None
    try:
        found = json.loads(line[:-21] + b"}" if marked else line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _encoded(value: Mapping[str, Any]) -> bytes:
    body = json.dumps(value, ensure_ascii=False, allow_nan=False)[:-1].encode()
    return body + f', "crc": "{zlib.crc32(body):08x}"}}\n'.encode()


def _header(mark: str, last: int) -> bytes:
    return _encoded({"journal": mark, "last": f"{last:020d}"})  # always of the same length


def _write(path: Path, mark: str, records: Iterable[Mapping[str, Any]], last: int) -> None:
    with replacing(path) as part:
        part.write_bytes(b"".join([_header(mark, last), *map(_encoded, records)]))


class Journal:
    """The journal of a checkpoint that this process holds the lock of; the file is created when missing.

    Attributes:
        records: what it held when it was opened.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any], applied: int):
        self.path, content = directory / JOURNAL, read_journal(directory, manifest, applied)
        self.mark, self.records, self._last = content.mark or secrets.token_hex(8), content.records, content.last
        torn = self.path.stat().st_size - content.size if self.path.is_file() else 0
        if torn:
            getLogger().warning(f"{self.path}: its last {torn} bytes are a change that was cut off, and are dropped")
        if content.mark is None:
            _write(self.path, self.mark, self.records, self._last)
        mark_journal(directory, manifest, self.mark)
        self._end = content.size if content.mark is not None else self.path.stat().st_size
        self._open()

    def append(self, record: dict[str, Any]) -> int:
        """Write a record; when this returns, its number, it is on the disk."""
        number = self._last + 1
        line = _encoded({"n": number, **record})
        if len(line) >= LINE_BYTES:
            raise InputError(f"{len(line)} bytes of changes at a time, {LINE_BYTES} are the most; give fewer.")
        with room_for(self.path):
            try:
                self._put(self._end, line, cut=True)
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # otherwise it is cut before the next one
                    self._file.truncate(self._end)
                raise
        self._last, self._end = number, self._end + len(line)
        with contextlib.suppress(OSError):  # without a sync: it may be late, and is never early
            self._put(0, _header(self.mark, number))
        return number

    def clear(self) -> None:
        """Drop all records: what they changed is stored elsewhere."""
        self._file.close()  # Windows replaces no open file
        try:
            _write(self.path, self.mark, (), self._last)
        finally:
            self._end = self.path.stat().st_size
            self._open()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        # Unbuffered: what a full disk refused must not wait in a buffer and come after all, behind the next record.
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  held as long as the journal

    def _put(self, place: int, data: bytes, cut: bool = False) -> None:
        self._file.seek(place)
        if cut:
            self._file.truncate()
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]


def check_directory(directory: Path, repair: bool = False) -> list[str]:
    """Check the files and the journal of a checkpoint, for people; raises a `CheckpointError` where one is damaged.

    With `repair`, a damaged journal is replaced by what can be read of it; the old one is kept beside it.
    """
    lock = lock_directory(directory) if repair else None
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        applied, said = live_parts(directory, manifest)[3], [f"{directory}: the files are those that were written"]
        content, damage = _scan(directory, manifest, applied)
        if not damage or not repair:
            records = read_journal(directory, manifest, applied).records
            return [*said, f"{JOURNAL}: sound, {sum(x['n'] > applied for x in records)} changes since the last save"]
        said += [f"{JOURNAL}, line {line}: {why}" for line, why in damage]
        items, kept = set(read_ids(directory)["items"]), list[dict[str, Any]]()
        for number, record in sorted({record["n"]: record for record in content.records}.items()):
            items.update(item.get(manifest["options"]["ITEM_ID_FIELD"]) for item in record.get("items", ()))
            if unknown := [event for event in record.get("events", ()) if event[1] not in items]:
                said.append(f"change {number}: {len(unknown)} events are dropped, their items are not known")
                record = {"events": [event for event in record["events"] if event not in unknown]}
            if number > applied:
                kept.append({**record, "n": applied + len(kept) + 1})
        if (directory / JOURNAL).is_file():
            os.replace(directory / JOURNAL, directory / DAMAGED)
            said.append(f"the journal as it was is {DAMAGED}; delete it when it is not needed, it names users")
        mark = manifest.get("journal") or secrets.token_hex(8)
        _write(directory / JOURNAL, mark, kept, applied + len(kept))
        mark_journal(directory, manifest, mark)
        return [*said, f"{JOURNAL}: {len(kept)} changes since the last save are kept"]
    finally:
        if lock is not None:
            lock.release()
