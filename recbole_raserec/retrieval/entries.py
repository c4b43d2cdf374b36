"""The entries of a memory: arrays that grow, rows that are wiped, ids that never change."""

from __future__ import annotations

from typing import Optional, Union

import numpy as np
import torch

# Arrays that grow.


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


Array = Union[np.ndarray, torch.Tensor]

#: Arrays with one row an entry.
ROWS = {
    "keys": "<f4", "targets": "<i4", "users": "<i4", "positions": "<i4", "times": "<f8", "support": "<i4",
    "gone": "|b1",
}  # fmt: skip
#: Arrays with one row a (pattern, user) whose history holds it.
OWNERS = {"owner_entries": "<i8", "owner_users": "<i4", "owner_positions": "<i4"}
#: What a wiped row holds.
_WIPED = {"keys": 0, "targets": 0, "users": -1, "positions": 0, "times": np.nan, "support": 0, "gone": True}


class Entries:
    """Rows of a memory bank. An entry's id is the order of its arrival.

    Args:
        hidden_size: H, length of a key. arrays: those of :data:`ROWS` and :data:`OWNERS`; None: no entries.
    """

    def __init__(self, hidden_size: int, arrays: Optional[dict[str, np.ndarray]] = None):
        self.hidden_size = hidden_size
        if arrays is None:
            arrays = {
                name: np.empty((0, hidden_size) if name == "keys" else 0, dtype)
                for name, dtype in {**ROWS, **OWNERS}.items()
            }
        self.arrays = {name: GrowingArray(values) for name, values in arrays.items()}

    def __len__(self) -> int:
        return len(self.arrays["gone"])

    def __getitem__(self, name: str) -> np.ndarray:
        """One of the arrays, read-only."""
        return self.arrays[name].values

    def append(
        self, keys: Array, targets: Array, users: Array, positions: Array, times: Optional[Array],
        support: Optional[Array], owners: Optional[tuple[Array, Array, Array]],
    ) -> np.ndarray:  # fmt: skip
        """See :meth:`MemoryBank.add`."""
        rows = {"keys": self.matrix("keys", keys)}
        size, first = len(rows["keys"]), len(self)
        for name, values in (("targets", targets), ("users", users), ("positions", positions)):
            rows[name] = integers(name, values, size)
        if size and rows["positions"].min() < 0:
            raise ValueError(
                f"positions: {rows['positions'].min()} is negative; give the target's index in its history"
            )
        rows["times"] = np.full(size, np.nan) if times is None else as_numpy(times).astype(np.float64)
        if rows["times"].shape != (size,):
            raise ValueError(f"times: expected shape [{size}], got {list(rows['times'].shape)}")
        rows["support"] = np.ones(size, np.int32) if support is None else integers("support", support, size)
        if size and rows["support"].min() < 1:
            raise ValueError(f"support: {rows['support'].min()} must be at least 1")
        rows["gone"] = np.zeros(size, dtype=bool)
        if owners is not None:
            count = len(owners[0])
            parts = [integers(name, values, count) for name, values in zip(OWNERS, owners)]
            if count and not 0 <= int(parts[0].min()) <= int(parts[0].max()) < size:
                raise ValueError(f"owners: entries must lie in [0, {size})")
            order = np.lexsort((parts[1], parts[0]))
            for name, values in zip(OWNERS, (parts[0].astype(np.int64) + first, parts[1], parts[2])):
                self.arrays[name].append(values[order])
        for name, values in rows.items():  # `gone` last: its length is the number of entries
            self.arrays[name].append(values)
        return np.arange(first, first + size, dtype=np.int64)

    def of_user(self, user: int, min_support: int) -> np.ndarray:
        """Give up a user's share in patterns; ids that have to go: the user's pairs, and patterns now too rare."""
        pairs = self["users"] == user
        owned = self["owner_users"] == user
        if owned.any():
            support = self.arrays["support"].writable()
            np.subtract.at(support, self["owner_entries"][owned], 1)
            for name in OWNERS:
                self.arrays[name] = GrowingArray(self[name][~owned])
            pairs = pairs | ((support < min_support) & (self["users"] < 0))
        return np.flatnonzero(pairs & ~self["gone"])

    def wipe(self, ids: np.ndarray) -> None:
        """Overwrite entries, which keep their ids; nothing of them is left in the arrays."""
        for name, value in _WIPED.items():
            self.arrays[name].writable()[ids] = value
        lost = np.isin(self["owner_entries"], ids)
        if lost.any():
            for name in OWNERS:
                self.arrays[name] = GrowingArray(self[name][~lost])

    def leaning(self, min_support: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(entry, user, position) of the patterns that would be too rare without that user."""
        entries = self["owner_entries"]
        rare = self["support"][entries] <= min_support
        return entries[rare], self["owner_users"][rare], self["owner_positions"][rare]

    def matrix(self, name: str, values: Array) -> np.ndarray:
        """`values` as finite float32 [rows, H]."""
        matrix = np.ascontiguousarray(as_numpy(values), dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.hidden_size:
            raise ValueError(f"{name}: expected shape [rows, {self.hidden_size}], got {list(matrix.shape)}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: holds values that are not finite; look for a diverged backbone")
        return matrix


def as_numpy(values: Array) -> np.ndarray:
    """A tensor of any device and precision, or an array, as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = values.float() if values.is_floating_point() and values.dtype != torch.float64 else values
        return values.numpy()
    return np.asarray(values)


def integers(name: str, values: Array, size: int) -> np.ndarray:
    """`values` as int32 [size]."""
    array = as_numpy(values)
    if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected {size} integers, got {array.dtype} {list(array.shape)}")
    if size and not -(1 << 31) <= int(array.min()) <= int(array.max()) < 1 << 31:
        raise ValueError(f"{name}: {array.min()} to {array.max()} does not fit in 32 bits")
    return array.astype(np.int32)


def normalised(matrix: np.ndarray, similarity: str) -> tuple[np.ndarray, float]:
    """Rows as they are searched [N, H] float32, and the length of the longest of them."""
    result = np.empty_like(matrix) if similarity == "cosine" else matrix
    longest = 0.0
    for start in range(0, len(matrix), 1 << 14):  # the float64 copy stays small
        rows = matrix[start : start + (1 << 14)].astype(np.float64)
        lengths = np.sqrt(np.einsum("nh,nh->n", rows, rows))
        if similarity == "cosine":
            result[start : start + (1 << 14)] = rows / np.where(lengths > 0, lengths, 1)[:, None]
            lengths = np.ones(1)
        longest = max(longest, float(lengths.max(initial=0)))
    return result, longest
