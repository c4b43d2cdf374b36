"""The leakage guard: which entries of the memory a query must not see."""

from __future__ import annotations

from functools import cached_property

import numpy as np


class LeakageGuard:
    """Bars, for a query (user, position), every entry of that user whose target lies at or after that position.

    The query asks for the item at index `position` of the user's history. An entry of the same user with a target
    index >= `position` knows that item, or what comes after it. Entries of other users are never barred, and a negative
    user stands for nobody: such an entry is never barred, and such a query bars nothing.

    Args:
        users: user of each entry [N], int32.
        positions: index of each entry's target in its user's history [N], int32.
    """

    def __init__(self, users: np.ndarray, positions: np.ndarray):
        self._users = users
        self._positions = positions

    def barred(self, ids: np.ndarray, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether the query may not see these entries.

        Args:
            ids: entries [Q, F] or, the same for all queries, [F]; -1 (no entry) is allowed, its answer means nothing.
            users, positions: of the queries [Q].

        Returns:
            bool [Q, F].
        """
        own = self._users[ids] == users[:, None]  # [Q, F]
        later = self._positions[ids] >= positions[:, None]  # [Q, F]
        return own & later & (users >= 0)[:, None]

    def count(self, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """How many entries are barred for each query: int64 [Q]. Two binary searches per query."""
        codes, span = self._sorted
        first = users.astype(np.int64) * span  # [Q]
        begin = np.searchsorted(codes, first + np.clip(positions, 0, span).astype(np.int64))
        end = np.searchsorted(codes, first + span)
        return np.where(users >= 0, end - begin, 0)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, int]:
        """Every entry as one number, user * span + position, in order; computed only when a count is asked for."""
        span = int(self._positions.max(initial=0)) + 1
        return np.sort(self._users.astype(np.int64) * span + self._positions), span
