"""What a memory bank holds and how it changes: entries by id, and who may change them when."""

from __future__ import annotations

import threading

import numpy as np

from recbole_raserec.retrieval.entries import OWNERS, ROWS, Array, Entries


class Ledger:
    """The entries of a bank. What searches them is told of every change (:meth:`_changed`, :meth:`_removed`).

    Args:
        hidden_size: length H of a key. min_support: users a pattern needs; one that loses them is removed.
    """

    def __init__(self, hidden_size: int, min_support: int):
        self.hidden_size, self.min_support = int(hidden_size), int(min_support)
        self.version = 0  # rises with every change
        self._removals = 0  # rises with every removal
        self._lock = threading.RLock()
        self._entries = Entries(self.hidden_size)

    def __len__(self) -> int:
        """Entries ever added, removed ones included: ids are below it."""
        return len(self._entries)

    @property
    def live(self) -> int:
        """Entries that were not removed."""
        return len(self) - int(self._entries["gone"].sum())

    @property
    def keys(self) -> np.ndarray:
        """Encoded prefixes as they were added [N, H] float32, read-only."""
        return self._entries["keys"]

    @property
    def targets(self) -> np.ndarray:
        """Target item of each entry [N] int32, read-only."""
        return self._entries["targets"]

    @property
    def users(self) -> np.ndarray:
        """User each entry comes from [N] int32, read-only; negative: from no single user."""
        return self._entries["users"]

    @property
    def positions(self) -> np.ndarray:
        """Index of the target in its user's history [N] int32, read-only: the prefix has that many items."""
        return self._entries["positions"]

    @property
    def times(self) -> np.ndarray:
        """Time of the target [N] float64, read-only; NaN where unknown."""
        return self._entries["times"]

    @property
    def support(self) -> np.ndarray:
        """Users whose histories hold the entry [N] int32, read-only: 1 for a pair, 0 for a removed entry."""
        return self._entries["support"]

    @property
    def gone(self) -> np.ndarray:
        """Removed entries, bool [N], read-only."""
        return self._entries["gone"]

    @property
    def owners(self) -> dict[str, np.ndarray]:
        """Whose histories hold each pattern, and where it is first complete there: `owner_entries` int64 [M],
        `owner_users` int32 [M], `owner_positions` int32 [M], read-only.
        """
        return {name: self._entries[name] for name in OWNERS}

    def add(
        self,
        keys: Array,
        targets: Array,
        users: Array,
        positions: Array,
        times: Array | None = None,
        support: Array | None = None,
        owners: tuple[Array, Array, Array] | None = None,
    ) -> np.ndarray:
        """Append entries.

        Args:
            keys: encoded prefixes [N, H].
            targets, users, positions: integers [N]; positions are not negative.
            times: [N], or None when unknown.
            support: [N], users whose histories hold the entry; None: 1.
            owners: of patterns, which users those are: row of this call [M], user [M], and the position in the user's
                history [M] where the pattern is first complete.

        Returns:
            ids of the new entries, int64 [N].

        Raises:
            ValueError: shapes do not fit, or a value is not finite or out of range. The bank is unchanged then.
        """
        with self._lock:
            ids = self._entries.append(keys, targets, users, positions, times, support, owners)
            self.version += 1
            self._changed()
        return ids

    def merge(self, other: Ledger) -> np.ndarray:
        """Append the live entries of another bank, whose users must be numbered alike: ids int64 [N].

        Raises:
            ValueError: its keys have another length.
        """
        with other._lock:
            left = np.flatnonzero(~other.gone)
            row = np.full(len(other), -1)
            row[left] = np.arange(len(left))
            rows = {name: other._entries[name][left] for name in ROWS if name != "gone"}
            owners = [other._entries[name] for name in OWNERS]
        owned = (row[owners[0]], owners[1], owners[2])
        return self.add(**rows, owners=owned if len(owned[0]) else None)

    def forget(self, user: int) -> int:
        """Remove a user's pairs and share in patterns, and patterns that were frequent only with it.

        Returns:
            the number of entries removed. Nothing of them is left in the bank, in its index, and, after the next
            :meth:`save`, in its files. A search that is under way is made again.
        """
        with self._lock:
            if user < 0:
                return 0
            self._removals += 1  # first: a search that is under way must not take what changes now for settled
            return self._remove(self._entries.of_user(int(user), self.min_support))

    def expire(self, older_than: float) -> int:
        """Remove the entries of an earlier time than `older_than`; those of unknown time stay. Returns their number."""
        with self._lock:
            self._removals += 1
            with np.errstate(invalid="ignore"):
                ids = np.flatnonzero((self.times < older_than) & ~self.gone)
            return self._remove(ids)

    def _remove(self, ids: np.ndarray) -> int:
        self.version += 1
        self._changed()
        if len(ids):
            self._entries.wipe(ids)
            self._removed(ids)
        return len(ids)

    def _changed(self) -> None:
        """Entries were added or are being removed."""

    def _removed(self, ids: np.ndarray) -> None:
        """These entries were overwritten."""
