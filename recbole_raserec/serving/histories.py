"""What every user did so far, by internal ids: read from a checkpoint, grown and forgotten while it serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_raserec.errors import CheckpointError
from recbole_raserec.stored_arrays import read_arrays, write_arrays

DIRECTORY = "histories"

_KIND, _VERSION = "user histories", 1
_ARRAYS = {"offsets": "<i8", "items": "<i4"}


class Histories:
    """Items of each user in the order of time.

    Args:
        offsets: int64 [U + 1]. items: int [N]; user u has ``items[offsets[u]:offsets[u + 1]]``.
    """

    def __init__(self, offsets: np.ndarray, items: np.ndarray):
        self._offsets, self._items = offsets, items
        self._changed: dict[int, np.ndarray] = {}  # replaced as a whole: a reader keeps what it holds
        self._users = len(offsets) - 1

    def __len__(self) -> int:
        """User ids in use, that of the padding included."""
        return self._users

    def of(self, user: int) -> np.ndarray:
        """A user's items, oldest first, int [n]; empty for one that nothing is known of."""
        found = self._changed.get(user)
        if found is not None:
            return found
        if not 0 <= user < len(self._offsets) - 1:
            return np.empty(0, np.int32)
        return self._items[self._offsets[user] : self._offsets[user + 1]]

    def append(self, user: int, items: np.ndarray) -> None:
        """Add items to the end of a user's history; a new user's number is the next one."""
        self._changed[user] = np.concatenate([self.of(user), np.asarray(items, dtype=np.int32)])
        self._users = max(self._users, user + 1)

    def forget(self, user: int) -> None:
        """Empty a user's history."""
        self._changed[user] = np.empty(0, np.int32)
        self._users = max(self._users, user + 1)

    def save(self, directory: Path) -> None:
        """Write all of it, atomically, into `directory`."""
        rows = [self.of(user) for user in range(len(self))]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        items = np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32)
        write_arrays(directory, _KIND, _VERSION, {"offsets": offsets, "items": items}, {})

    @classmethod
    def load(cls, directory: Path, n_users: int, n_items: int) -> Histories:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: missing, damaged, or of other users or items.
        """
        arrays, _ = read_arrays(directory, _KIND, _VERSION, _ARRAYS)
        offsets, items = arrays["offsets"], arrays["items"]
        sound = len(offsets) >= 1 and offsets[0] == 0 and offsets[-1] == len(items) and (np.diff(offsets) >= 0).all()
        if not sound or len(offsets) - 1 > n_users or (len(items) and not 0 < items.min() <= items.max() < n_items):
            raise CheckpointError(f"{directory} does not hold histories of this checkpoint's users and items.")
        return cls(offsets, items)
