"""The leakage guard: which entries of the memory a query must not see."""

from __future__ import annotations

from functools import cached_property
from typing import Optional

import numpy as np

#: `history`: of the query's own user nothing from its position on. `past`: of nobody anything from its time on.
SCOPES = ("history", "past")


class LeakageGuard:
    """Bars, for a query (user, position), every entry that knows what that user does from that position on.

    The query asks for the item at index `position` of the user's history.

    - A pair of the same user with a target index >= `position` knows that item, or what comes after it.
    - A pattern belongs to no user, but to all whose histories hold it. It is barred where it would not be frequent
      enough without the query's user, whose history holds it only from `position` on.
    - Entries that were removed are barred for everyone.
    - With the scope ``past``, a query with a time sees only entries of an earlier time: what nobody had done yet, or
      did at that very moment, is barred. (Stricter than the papers, whose memories hold other users' later items.) A
      pattern's time is that at which it became frequent.

    Entries of other users are not barred otherwise. A negative user stands for nobody: such an entry is never barred by
    its user, and such a query bars no user's.

    Args:
        users: user of each entry [N], int32; negative: of none.
        positions: index of each entry's target in its user's history [N], int32.
        needed: of entries that lean on a user: entry, user, and position from which on that user's history holds the
            pattern; int arrays [M] each, sorted by entry and user.
        gone: bool [N], removed entries; None: none is.
        times: float64 [N], read with the scope ``past``; unknown (NaN) is barred for a query with a time.
        scope: one of :data:`SCOPES`.
    """

    def __init__(
        self,
        users: np.ndarray,
        positions: np.ndarray,
        needed: Optional[tuple[np.ndarray, np.ndarray, np.ndarray]] = None,
        gone: Optional[np.ndarray] = None,
        times: Optional[np.ndarray] = None,
        scope: str = "history",
    ):
        self._users, self._positions = users, positions
        self._gone = gone if gone is not None and gone.any() else None
        self._times = times if scope == "past" else None
        self._needed = None
        if needed is not None and len(needed[0]):
            entries, owners, first = (np.asarray(x, dtype=np.int64) for x in needed)
            self._span = int(owners.max()) + 1
            self._needed = entries * self._span + owners, owners, first
            self._leans = np.zeros(len(users), dtype=bool)
            self._leans[entries] = True

    def barred(
        self, ids: np.ndarray, users: np.ndarray, positions: np.ndarray, times: Optional[np.ndarray] = None
    ) -> np.ndarray:
        """Whether the query may not see these entries.

        Args:
            ids: entries [Q, F] or, the same for all queries, [F]; -1 (no entry) is allowed, its answer means nothing.
            users, positions: of the queries [Q]. times: [Q], or None for queries of the present.

        Returns:
            bool [Q, F].
        """
        known = (users >= 0)[:, None]
        result = (self._users[ids] == users[:, None]) & (self._positions[ids] >= positions[:, None]) & known  # [Q, F]
        if self._needed is not None:
            codes, _, first = self._needed
            every = np.broadcast_to(ids, result.shape)
            row, column = np.nonzero(self._leans[every] & (every >= 0) & known & (users < self._span)[:, None])
            wanted = every[row, column] * self._span + users[row]
            slot = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
            result[row, column] |= (codes[slot] == wanted) & (first[slot] >= positions[row])
        if self._gone is not None:
            result |= self._gone[ids]
        if self._times is not None and times is not None:
            result |= ~(self._times[ids] < times[:, None])
        return result

    def count(self, users: np.ndarray, positions: np.ndarray, times: Optional[np.ndarray] = None) -> np.ndarray:
        """How many entries are barred for each query: int64 [Q]. A few binary searches per query.

        With times it is never too many: a later entry of the query's own user that is dated before the query, which a
        history in time order does not have, is not counted.
        """
        gone = 0 if self._gone is None else int(self._gone.sum())
        if self._times is not None and times is not None:
            return gone + self._late(times)
        codes, span = self._sorted
        first = users.astype(np.int64) * span  # [Q]
        begin = np.searchsorted(codes, first + np.clip(positions, 0, span).astype(np.int64))
        end = np.searchsorted(codes, first + span)
        return gone + np.where(users >= 0, end - begin, 0)

    def _late(self, times: np.ndarray) -> np.ndarray:
        dated, unknown = self._dated
        return len(dated) - np.searchsorted(dated, times) + unknown

    @cached_property
    def _dated(self) -> tuple[np.ndarray, int]:
        assert self._times is not None
        left = self._times if self._gone is None else self._times[~self._gone]
        dated = np.sort(left[~np.isnan(left)])
        return dated, len(left) - len(dated)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, int]:
        """Every bar as one number, user * span + position, in order; computed only when a count is asked for."""
        users, positions = self._users.astype(np.int64), self._positions
        if self._gone is not None:
            users, positions = users[~self._gone], positions[~self._gone]
        if self._needed is not None:
            _, owners, first = self._needed
            users, positions = np.concatenate([users, owners]), np.concatenate([positions, first])
        span = int(positions.max(initial=0)) + 1
        return np.sort(users * span + positions), span
