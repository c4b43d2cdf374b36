"""Arrays that grow."""

from __future__ import annotations

import numpy as np


class GrowingArray:
    """Rows of one dtype and trailing shape; appending costs amortised constant time per row.

    Args:
        values: the first rows [N, ...]; kept without a copy, also when they are a read-only memory map
            (the first append then copies them into memory).
    """

    def __init__(self, values: np.ndarray):
        self._buffer = values
        self._size = len(values)

    def __len__(self) -> int:
        return self._size

    @property
    def values(self) -> np.ndarray:
        """The rows [N, ...] as a read-only view; it keeps its content when rows are appended later."""
        view = self._buffer[: self._size]
        view.flags.writeable = False
        return view

    def writable(self) -> np.ndarray:
        """The rows [N, ...] for changes in place; a memory map is copied into memory first."""
        if not self._buffer.flags.writeable:
            self._buffer = self._buffer[: self._size].copy()
        return self._buffer[: self._size]

    def append(self, rows: np.ndarray) -> None:
        """Append copies of `rows` [M, ...]."""
        size = self._size + len(rows)
        if size > len(self._buffer) or not self._buffer.flags.writeable:
            grown = np.empty((max(size, 2 * self._size), *self._buffer.shape[1:]), self._buffer.dtype)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : size] = rows
        # Last, so that a view taken meanwhile never shows a row that is not written yet.
        self._size = size
