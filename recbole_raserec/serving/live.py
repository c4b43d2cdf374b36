"""A memory in use: new interactions join it and its users' histories, users are forgotten, all of it is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch

from recbole_raserec.data import Catalogue, Histories
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.recommendation import Backbone
from recbole_raserec.retrieval import RaSeRec
from recbole_raserec.serving.inputs import as_id
from recbole_raserec.storage import lock_file, replacing, save_parts, sync_directory

# Many readers or one writer, and a writer that waits is let in before new readers; and one process a directory.


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


# Changes in the order they were made, on the disk before they are acknowledged.


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


#: Prefixes encoded together.
BATCH = 512

#: What an id of a forgotten user is replaced by.
FORGOTTEN = ""

Event = tuple[str, str, Optional[float]]


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did: events taken up, memories added, users seen for the first time, events of unknown items."""

    events: int
    memories: int
    new_users: int
    dropped: int


class LiveMemory:
    """Histories, users and memory of a :class:`~recbole_raserec.serving.recommender.Recommender`.

    Readers hold the lock together, a change holds it alone, and only for the moment in which it takes effect.
    """

    model: Any
    options: Any
    device: Any
    longest: int
    _trims: bool
    _trained_users: int
    _number: dict[str, int]
    items: list[str]

    def __init__(self, directory: Path, users: Sequence[str], catalogue: Catalogue, applied: int = 0):
        self.directory, self.catalogue, self.applied = Path(directory), catalogue, applied
        self.users = list(users)
        self._user_number = {token: number for number, token in enumerate(self.users) if number and token != FORGOTTEN}
        self._lock, self._changing = ReadWriteLock(), threading.Lock()
        self._saved = applied
        self._journal: Optional[Journal] = None
        self._held: Optional[DirectoryLock] = None
        self._wrapped: Optional[Backbone] = None

    @property
    def histories(self) -> Histories:
        """What the users did.

        Raises:
            InputError: the checkpoint does not know.
        """
        if self.catalogue.histories is None:
            raise InputError(f"{self.directory} keeps no histories of users (benchmark files, or an older release).")
        return self.catalogue.histories

    def stored(self, users: Iterable[str]) -> list[np.ndarray]:
        """Stored histories by internal item ids, oldest item first.

        Args:
            users: external ids.

        Returns:
            an array int64 [n] for each; empty for an unknown user.
        """
        return [self.histories.of(number).astype(np.int64) for number in self._user_numbers(users)]

    def _user_numbers(self, users: Iterable[str]) -> np.ndarray:
        return np.array([self._user_number.get(user, 0) for user in users], dtype=np.int64)

    @property
    def n_users(self) -> int:
        """Users that are known: those of the training and of updates, without the forgotten ones."""
        return len(self._user_number)

    @property
    def unsaved(self) -> int:
        """Journaled changes since the last :meth:`save` into the checkpoint directory."""
        return self.applied - self._saved

    # -- changes ----------------------------------------------------------------------------------------------------

    def keep_journal(self, path: Path) -> int:
        """Take up what a journal holds beyond the saved state; from now on changes are in it before they take effect.

        Args:
            path: of the journal; made when missing.

        Returns:
            the number of changes taken up.
        """
        journal = Journal(path)
        count = 0
        for record in journal.records(self.applied):
            if "forget" in record:
                self._forget(record["forget"])
            else:
                self._apply([(user, item, time) for user, item, time in record["events"]])
            self.applied = record["n"]
            count += 1
        self._journal = journal
        return count

    def update(self, events: Any, strict: bool = False) -> Update:
        """Take up new interactions: they end the histories of their users and join the memory; the next call uses them.

        Args:
            events: (user, item) or (user, item, time) each, in the order they happened; mappings with these keys; or a
                pandas or polars DataFrame with the log's columns. Users may be new, items may not.
            strict: an unknown item is an error, and nothing is taken up; otherwise it is dropped, and counted.

        Returns:
            what was taken up.

        Raises:
            InputError: an event is none of these.
        """
        listed = self._events(events)
        unknown = [item for _, item, _ in listed if item not in self._number]
        if unknown and strict:
            raise InputError(f"events: {unknown[0]!r:.80} is no item of this model ({len(unknown)} unknown in all).")
        listed = [event for event in listed if event[1] in self._number]
        _ = self.histories  # asked before anything is written
        with self._changing:
            if listed and self._journal is not None:
                self.applied = self._journal.append({"events": listed}, self.applied)
            done = self._apply(listed)
        return dataclasses.replace(done, dropped=len(unknown))

    def forget(self, user: Any) -> int:
        """Forget a user: id, history and memories, the ones in files with the next :meth:`save`.

        Args:
            user: external id; an unknown one changes nothing.

        Returns:
            the number of memories removed.
        """
        name = as_id(user, "user")
        with self._changing:
            if name not in self._user_number:
                return 0
            if self._journal is not None:
                self.applied = self._journal.append({"forget": name}, self.applied)
            return self._forget(name)

    def save(self, directory: Union[str, Path, None] = None) -> Path:
        """Write users, histories and memory, as a whole, into the checkpoint directory; or all of the checkpoint into
        another one.

        Args:
            directory: None: the one it was loaded from, whose journal is emptied then.

        Returns:
            the directory.
        """
        target = Path(directory) if directory is not None else self.directory
        with self._changing:
            memory = self.model.memory if isinstance(self.model, RaSeRec) else None
            ids = {"users": self.users, "items": self.items}
            save_parts(self.directory, target, ids, memory, self.catalogue, self._trained_users, self.applied)
            if target.resolve() == self.directory.resolve():
                self._saved = self.applied
                if self._journal is not None:
                    self._journal.clear()
        return target

    def close(self) -> None:
        """Close the journal, and let another process have the directory."""
        if self._journal is not None:
            self._journal.close()
        if self._held is not None:
            self._held.release()

    # -- how --------------------------------------------------------------------------------------------------------

    def _apply(self, events: Sequence[Event]) -> Update:
        histories, known = self.histories, len(self.users)
        shortest = self.options["memory_min_length"] or 1
        longest = self.options["memory_max_length"] or math.inf
        grown: dict[str, list[int]] = {}
        numbers: dict[str, int] = {}
        rows: list[tuple[str, int, int, Optional[float]]] = []  # user, position, target, time
        for user, item, time in events:
            if user not in grown:
                numbers[user] = self._user_number.get(user, 0)
                if not numbers[user]:
                    numbers[user] = known
                    known += 1
                grown[user] = self.histories.of(numbers[user]).tolist()
            if shortest <= len(grown[user]) <= longest:
                rows.append((user, len(grown[user]), self._number[item], time))
            grown[user].append(self._number[item])
        rows = rows if isinstance(self.model, RaSeRec) else []
        # No more of a prefix than is read: whole ones of a long history would take its length squared.
        prefixes = [grown[user][max(position - self.longest, 0) : position] for user, position, _, _ in rows]
        keys = self._keys(prefixes, [numbers[row[0]] for row in rows])
        new = [user for user in grown if numbers[user] >= len(self.users)]
        with self._lock.write():
            for user in new:
                self._user_number[user] = numbers[user]
                self.users.append(user)
            for user, items in grown.items():
                before = len(histories.of(numbers[user]))
                histories.append(numbers[user], np.array(items[before:], dtype=np.int32))
                np.add.at(self.catalogue.counts, items[before:], 1)
            if rows:
                times = [math.nan if time is None else time for *_, time in rows]
                users = [numbers[user] for user, *_ in rows]
                self.model.memory.add(keys, [row[2] for row in rows], users, [row[1] for row in rows], times)
        return Update(len(events), len(rows), len(new), 0)

    def _forget(self, name: str) -> int:
        number = self._user_number.get(name)
        if number is None:
            return 0
        with self._lock.write():
            removed = self.model.memory.forget(number) if isinstance(self.model, RaSeRec) else 0
            if self.catalogue.histories is not None:
                np.subtract.at(self.catalogue.counts, self.histories.of(number), 1)
                self.histories.forget(number)
            self.users[number] = FORGOTTEN
            del self._user_number[name]
        return removed

    @torch.no_grad()
    def _keys(self, prefixes: list[list[int]], users: list[int]) -> np.ndarray:
        """The backbone's vectors of prefixes of at most `longest` items, [N, H]."""
        parts: list[np.ndarray] = []
        for start in range(0, len(prefixes), BATCH):
            rows = prefixes[start : start + BATCH]
            item_seq = np.zeros((len(rows), max(map(len, rows)) if self._trims else self.longest), dtype=np.int64)
            for line, row in zip(item_seq, rows):
                line[: len(row)] = row
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            owners = torch.tensor(users[start : start + BATCH], device=self.device)
            owners = torch.where(owners < self._trained_users, owners, 0)
            parts.append(self.model.encode(torch.from_numpy(item_seq).to(self.device), lengths, owners).cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)

    def _events(self, events: Any) -> list[Event]:
        names = [self.options[name] for name in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
        if hasattr(events, "columns") and hasattr(events, "to_dict"):
            missing = [name for name in names[:2] if name not in events.columns]
            if missing:
                raise InputError(f"events: the table has no column {missing[0]}; name its columns {', '.join(names)}.")
            columns = [events[name].to_list() for name in names if name in events.columns]
            events = list(zip(*columns))
        if isinstance(events, (str, bytes, Mapping)) or not isinstance(events, Iterable):
            raise InputError("events: give a list of (user, item) or (user, item, time).")
        return [_event(event) for event in events]


def _event(event: Any) -> Event:
    if isinstance(event, Mapping):
        event = [event.get("user"), event.get("item"), event.get("time")]
    if isinstance(event, (str, bytes)) or not isinstance(event, Sequence) or not 2 <= len(event) <= 3:
        raise InputError(f"events: {event!r:.80} is no (user, item) or (user, item, time).")
    time = event[2] if len(event) == 3 else None
    if time is not None and (isinstance(time, bool) or not isinstance(time, (int, float, np.number))):
        raise InputError(f"events: the time {time!r:.80} is no number.")
    try:
        time = None if time is None else float(time)
    except OverflowError:  # of a whole number of hundreds of digits
        time = math.inf
    if time is not None and not math.isfinite(time):
        raise InputError(f"events: the time {time!r} is not finite.")
    user = as_id(event[0], "events")
    if user == FORGOTTEN:
        raise InputError("events: the id of a user is empty.")
    try:
        user.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: neither journal nor checkpoint could hold it
        raise InputError(f"events: {user!r:.80} is no id; it cannot be written as UTF-8.") from None
    return user, as_id(event[1], "events"), time
