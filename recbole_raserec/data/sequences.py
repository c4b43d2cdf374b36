"""User sequences as one CSR store, of which windows, memories and histories are made.

Memory is O(interactions): a prefix window is an index (user, position), materialised only for the batch that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import scipy.sparse as sp


def pad_rows(
    items: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: Optional[int] = None, fill: int = 0
) -> np.ndarray:
    """Runs of a flat array as the rows of a matrix, left-aligned.

    Args:
        items: flat values [T].
        starts: where each run begins, [B].
        lengths: how many values it has, [B].
        width: columns L of the matrix; None: as many as the longest run.
        fill: value of the padding.

    Returns:
        [B, L] of the type of `items`.
    """
    if width is None:
        width = int(lengths.max()) if len(lengths) else 0
    columns = np.arange(width)
    inside = columns < np.asarray(lengths)[:, None]
    index = np.where(inside, np.asarray(starts)[:, None] + columns, 0)
    if not len(items):
        return np.full(inside.shape, fill, dtype=items.dtype)
    rows = items[index]
    rows[~inside] = fill
    return rows


def pad_lists(rows: Sequence[Sequence[int]], width: Optional[int] = None) -> tuple[np.ndarray, np.ndarray]:
    """Lists of item ids as a batch.

    Args:
        rows: B lists.
        width: columns L; None: as many as the longest list.

    Returns:
        item_seq int64 [B, L], left-aligned, padded with 0; item_seq_len int64 [B].
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *(np.asarray(row, dtype=np.int64) for row in rows)])
    return pad_rows(flat, np.cumsum(lengths) - lengths, lengths, width), lengths


class SequenceStore:
    """Every user's items in time order.

    Items of user `u` are `items[offsets[u]:offsets[u + 1]]`. Ids are RecBole's internal ones: 0 is padding, users
    run over `1 .. n_users - 1`, items over `1 .. n_items - 1`.

    Args:
        users: non-decreasing (rows sorted by user, then time), int [N].
        items: int [N].
        n_users: number of user ids, padding included.
        n_items: number of item ids, padding included.
        times: float [N] or None.

    Raises:
        ValueError: `users` is not sorted.
    """

    def __init__(
        self, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int, times: Optional[np.ndarray] = None
    ):
        users = np.asarray(users, dtype=np.int64)
        if len(users) > 1 and (np.diff(users) < 0).any():
            raise ValueError("users must be sorted: sort the interactions by user, then by time.")
        self.n_users, self.n_items = int(n_users), int(n_items)
        self.offsets = np.zeros(self.n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=self.n_users), out=self.offsets[1:])
        self.items = np.asarray(items, dtype=np.int64)
        self.times = None if times is None else np.asarray(times, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.items)

    def lengths(self) -> np.ndarray:
        """Interactions of each user, [n_users]."""
        return np.diff(self.offsets)

    def users(self) -> np.ndarray:
        """User of each interaction, [N]."""
        return np.repeat(np.arange(self.n_users), self.lengths())

    def until(self, users: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Histories up to each user's largest of `positions`, that item included; of other users nothing.

        Returns:
            items int64 [M], one history after the other; offsets int64 [n_users + 1].
        """
        size = np.zeros(self.n_users, dtype=np.int64)
        np.maximum.at(size, users, np.asarray(positions) + 1)
        kept = np.arange(len(self.items)) - self.offsets[self.users()] < size[self.users()]
        return self.items[kept], np.concatenate([[0], np.cumsum(size)])

    def windows(
        self, users: np.ndarray, positions: np.ndarray, max_length: int, width: Optional[int] = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees before ``items[offsets[users] + positions]``: the last `max_length` earlier items.

        Args:
            users: [B].
            positions: [B], index of the target in its user's own history (so the prefix has that length).
            max_length: longest prefix kept.
            width: columns L; None: as many as the longest row.

        Returns:
            item_seq int64 [B, L], left-aligned and padded with 0; item_seq_len int64 [B].
        """
        positions = np.asarray(positions, dtype=np.int64)
        lengths = np.minimum(positions, max_length)
        starts = self.offsets[np.asarray(users, dtype=np.int64)] + positions - lengths
        return pad_rows(self.items, starts, lengths, width), lengths

    def window_rows(
        self, users: np.ndarray, positions: np.ndarray, max_length: int, width: Optional[int] = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the windows, [B, L] with -1 as padding, and their lengths [B]; L is `width` or the longest."""
        positions = np.asarray(positions, dtype=np.int64)
        ends = self.offsets[np.asarray(users, dtype=np.int64)] + positions
        lengths = np.minimum(positions, max_length)
        columns = np.arange(width if width is not None else (int(lengths.max()) if len(lengths) else 0))
        rows = (ends - lengths)[:, None] + columns
        rows[columns >= lengths[:, None]] = -1
        return rows, lengths

    def seen(self, users: np.ndarray, positions: np.ndarray) -> sp.csr_matrix:
        """Items each user interacted with before `positions` as a boolean matrix [n_users, n_items].

        One row a user: `users` must not repeat (leave-one-out has one query a user and phase); of a repeated user the
        earliest position counts, so nothing at or after a target is ever marked.
        """
        cut = np.zeros(self.n_users, dtype=np.int64)
        order = np.argsort(-np.asarray(positions), kind="stable")
        cut[np.asarray(users)[order]] = np.asarray(positions)[order]
        owner = self.users()
        keep = np.arange(len(self.items)) - self.offsets[owner] < cut[owner]
        data = np.ones(int(keep.sum()), dtype=bool)
        matrix = sp.csr_matrix((data, (owner[keep], self.items[keep])), shape=(self.n_users, self.n_items))
        matrix.sum_duplicates()
        return matrix
