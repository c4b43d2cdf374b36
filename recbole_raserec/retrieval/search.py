"""The leakage guard, which bars what a query must not see, and the exact K best of the entries it may see.

The search stands on top of an index that knows nothing of what is barred. The guard and the ranking by packed codes are
written by hand: no library filters by user and position, or promises exact results whatever is filtered.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.retrieval.index import Index

#: `history`: of the query's own user nothing from its position on. `past`: of no user anything from its time on.
SCOPES = ("history", "past")


class LeakageGuard:
    """Bars, for a query (user, position), every entry that knows what that user does from that position on.

    The query asks for the item at index `position` of the user's history.

    - A pair of the same user with a target index >= `position` knows that item, or what comes after it.
    - A pattern belongs to no user, but to all whose histories hold it. It is barred where it would not be frequent
      enough without the query's user, whose history holds it only from `position` on.
    - Entries that were removed are barred for all queries.
    - With the scope `past`, a query with a time sees only entries of an earlier time. (Stricter than the papers, whose
      memories hold other users' later items.) A pattern's time is that at which it became frequent.

    Entries of other users are not barred otherwise. A negative user means no user: such an entry is never barred by its
    user, and such a query bars no user's.

    Args:
        users: user of each entry [N], int32; negative: of none.
        positions: index of each entry's target in its user's history [N], int32.
        needed: of entries that lean on a user: entry, user, and position from which on that user's history holds the
            pattern; int arrays [M] each, sorted by entry and user.
        gone: bool [N], removed entries; None: none is.
        times: float64 [N], read with the scope `past`; unknown (NaN) is barred for a query with a time.
        scope: one of `SCOPES`.
    """

    def __init__(
        self, users: np.ndarray, positions: np.ndarray, needed: Optional[tuple[np.ndarray, ...]] = None,
        gone: Optional[np.ndarray] = None, times: Optional[np.ndarray] = None, scope: str = "history",
    ):  # fmt: skip
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
        """Whether the queries may not see these entries, bool [Q, F].

        Args:
            ids: entries [Q, F] or, the same for all queries, [F]; -1 (no entry) is allowed, its answer means nothing.
            users: [Q].
            positions: [Q].
            times: [Q], or None for queries of the present.
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
            dated, unknown = self._dated
            return gone + (len(dated) - np.searchsorted(dated, times) + unknown)
        codes, span = self._sorted
        first = users.astype(np.int64) * span  # [Q]
        begin = np.searchsorted(codes, first + np.clip(positions, 0, span).astype(np.int64))
        end = np.searchsorted(codes, first + span)
        return gone + np.where(users >= 0, end - begin, 0)

    @cached_property
    def _dated(self) -> tuple[np.ndarray, int]:
        """Known times in order, and the number of unknown ones."""
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


_SLACK = 12  # entries fetched beyond K: most rows lose fewer than that to the guard and to ties
_REFINE = 4  # times as many are fetched from an index with coarse scores
_WIDEN = 4  # how much wider a row is searched that was not settled
_WIDEST = 64  # times the first fetch; beyond it, scoring every entry is cheaper than a wider search
_BLOCK_SCORES = 1 << 30  # queries x entries in one call of the index: between two steps of the progress bar
_BLOCK_CELLS = 1 << 21  # queries x fetched entries held at a time
_BLOCK_PAIRS = 1 << 12  # pairs scored at a time: what stays in the cache
_BLOCK_DEVICE_PAIRS = 1 << 20  # the same on a GPU
_BLOCK_ENTRIES = 1 << 16  # entries scored at a time when every one is

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class GuardedSearch:
    """Search an index for more than K, take out what is barred, and search wider only where that was not enough.

    The index ranks by float32 products, whose last bits depend on the batch. So its scores only choose candidates:
    everything within the rounding error of the K-th allowed score. Those are scored again in float64, and a row is
    settled when nothing the index did not return can be among them.

    Index and guard are over the same `vectors`, float32 [N, H]; `longest` is the Euclidean length of the longest of
    them, for the bound on the rounding error.
    """

    def __init__(self, index: Index, vectors: np.ndarray, longest: float, guard: LeakageGuard):
        self._index, self._vectors, self._longest, self._guard = index, vectors, longest, guard

    def run(
        self, queries: np.ndarray, users: np.ndarray, positions: np.ndarray, top_k: int, bar: Any,
        times: Optional[np.ndarray] = None,
    ) -> np.ndarray:  # fmt: skip
        """Codes of `pack`, best first [Q, K] uint64; 0 where there is no entry.

        `queries` are float32 [Q, H]; `users`, `positions` and `times` as of `LeakageGuard.barred`; `bar` is told how
        many queries are settled.
        """
        best = np.zeros((len(queries), top_k), np.uint64)  # [Q, K]
        size = len(self._vectors)
        fetch = min(size, (top_k + _SLACK) * (_REFINE if self._index.coarse else 1))
        widest = fetch * _WIDEST
        pending = np.arange(len(queries))
        while len(pending):
            every = self._index.exact and fetch > widest
            left = []
            rows_at_once = max(1, min(_BLOCK_CELLS // fetch, max(1024, _BLOCK_SCORES // size)))
            for start in range(0, len(pending), 64 if every else rows_at_once):
                rows = pending[start : start + (64 if every else rows_at_once)]
                asked = queries[rows], users[rows], positions[rows], None if times is None else times[rows], top_k
                if every:
                    codes, settled = self._score_all(*asked), np.ones(len(rows), bool)
                else:
                    codes, settled = self._score_fetched(*asked, fetch)
                best[rows[settled]] = codes[settled]
                left.append(rows[~settled])
                bar.update(int(settled.sum()))
            pending = np.concatenate(left)
            fetch = min(size, fetch * _WIDEN)
        return best

    def _score_fetched(
        self, queries: np.ndarray, users: np.ndarray, positions: np.ndarray, times: Optional[np.ndarray], top_k: int,
        fetch: int,
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """Codes [Q, K], and which rows they are final for: bool [Q]."""
        size, width = self._vectors.shape
        scores, found = self._index.search(queries, fetch)  # [Q, fetch] each
        allowed = (found >= 0) & ~self._guard.barred(found, users, positions, times)  # [Q, fetch]
        rank = np.cumsum(allowed, axis=1, dtype=np.int32)
        enough = rank[:, -1] >= top_k
        # An inner product of H float32 terms is off by at most H * 2^-24 * |q| * |v|; two of them are compared here.
        lengths = np.sqrt(np.einsum("qh,qh->q", queries, queries, dtype=np.float64))
        error = 2 * (width + 4) * (2.0**-24 * lengths * self._longest + 1e-37)
        kth = scores[np.arange(len(queries)), (rank >= top_k).argmax(axis=1)]
        cut = np.where(enough, kth - error, -np.inf)  # [Q]
        if self._index.coarse:
            cut[:] = -np.inf  # all that was fetched is scored again
        if fetch >= size:
            settled = np.ones(len(queries), bool)
        elif self._index.exact:
            settled = enough & (scores[:, -1] < cut)
        else:
            settled = enough | (found[:, -1] < 0)
        short = np.flatnonzero(~settled & ~enough)
        if len(short):
            # Everything the row may see was among what was fetched.
            when = None if times is None else times[short]
            settled[short] = rank[short, -1] == size - self._guard.count(users[short], positions[short], when)
        row, column = np.nonzero(allowed & settled[:, None] & (scores >= cut[:, None]))
        entries = found[row, column]
        codes = np.zeros((len(queries), max(fetch, top_k)), np.uint64)
        codes[row, column] = pack(self._score_pairs(queries, row, entries), entries)
        return _largest(codes, top_k), settled

    def _score_pairs(self, queries: np.ndarray, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Inner products of queries[rows] and vectors[entries]: [P] float32, rounded once from float64."""
        result = np.empty(len(rows), np.float32)
        if (table := getattr(self._index, "on_device", None)) is not None:
            asked = torch.from_numpy(queries).to(table.device)
            for start in range(0, len(rows), _BLOCK_DEVICE_PAIRS):
                part = slice(start, start + _BLOCK_DEVICE_PAIRS)
                row, entry = (torch.from_numpy(x[part]).to(table.device) for x in (rows, entries))
                products = (asked[row].double() * table[entry].double()).sum(dim=1)
                result[part] = products.float().cpu().numpy()
            return result
        for start in range(0, len(rows), _BLOCK_PAIRS):
            part = slice(start, start + _BLOCK_PAIRS)
            left = queries[rows[part]].astype(np.float64)
            right = self._vectors[entries[part]].astype(np.float64)
            result[part] = np.einsum("ph,ph->p", left, right)
        return result

    def _score_all(
        self, queries: np.ndarray, users: np.ndarray, positions: np.ndarray, times: Optional[np.ndarray], top_k: int
    ) -> np.ndarray:
        """Codes [Q, K] from every entry, for the few rows where a great many entries are barred or tie."""
        exact = queries.astype(np.float64)
        best = np.zeros((len(queries), top_k), np.uint64)
        for start in range(0, len(self._vectors), _BLOCK_ENTRIES):
            vectors = self._vectors[start : start + _BLOCK_ENTRIES]
            entries = np.arange(start, start + len(vectors))
            scores = (exact @ vectors.astype(np.float64).T).astype(np.float32)  # [Q, block]
            codes = pack(scores, entries[None, :])
            codes[self._guard.barred(entries, users, positions, times)] = 0
            best = _largest(np.concatenate([best, codes], axis=1), top_k)
        return best


def pack(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One uint64, never 0, for each (score, id), greater for a greater score and, at the same score, for a lower id.

    Scores are float32, ids integers in 0..2^32-1, of a shape that broadcasts to that of the scores.
    """
    # The bits of floats order like integers, apart from the sign; adding 0.0 makes -0.0 and 0.0 the same.
    bits = (np.asarray(scores, np.float32) + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered.astype(np.uint64) << _SHIFT) | (_LOW - ids.astype(np.uint64))


def unpack(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids (int64, -1 for code 0), scores (float32, 0 for code 0) and mask (False for code 0) behind codes."""
    mask = codes != 0
    ordered = (codes >> _SHIFT).astype(np.uint32)
    scores = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered).view(np.float32)
    ids = (_LOW - (codes & _LOW)).astype(np.int64)
    return np.where(mask, ids, -1), np.where(mask, scores, np.float32(0)), mask


def _largest(codes: np.ndarray, top_k: int) -> np.ndarray:
    """The `top_k` largest codes of each row, in falling order: [Q, F] -> [Q, K]."""
    if codes.shape[1] > 4 * top_k:
        codes = np.partition(codes, codes.shape[1] - top_k, axis=1)[:, -top_k:]
    return np.sort(codes, axis=1)[:, ::-1][:, :top_k]
