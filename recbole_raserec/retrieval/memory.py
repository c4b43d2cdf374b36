"""The memory bank of stage iii: <prefix, target> entries, searched by the encoding of the prefix.

An entry is a window of some user's history: its key encodes the items before a position, its target is the item there.

Source: RaSeRec (AAAI 2025 / arXiv 2412.18378), retrieval-augmented module: memory construction and retrieval.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval.arrays import GrowingArray, read_arrays, write_arrays
from recbole_raserec.retrieval.guard import LeakageGuard
from recbole_raserec.retrieval.index import INDEXES, Index, make_index, resolve_kind
from recbole_raserec.retrieval.search import GuardedSearch, unpack

Array = Union[np.ndarray, torch.Tensor]

SIMILARITIES = ("cosine", "dot")

_KIND = "RaSeRec memory"
_VERSION = 1
_DTYPES = {"keys": "<f4", "targets": "<i4", "users": "<i4", "positions": "<i4", "times": "<f8"}
_META = {"hidden_size": int, "similarity": str, "index": str, "ivf_lists": int, "ivf_probes": int, "seed": int}


@dataclass(frozen=True)
class Neighbours:
    """What a search found, best first; entries with equal similarity in the order of their ids.

    Attributes:
        ids: entries [Q, K] int64; -1 where there are fewer than K.
        similarity: cosine or inner product [Q, K] float32; 0 where there is no entry.
        mask: bool [Q, K], True where there is an entry. True columns come first.
    """

    ids: np.ndarray
    similarity: np.ndarray
    mask: np.ndarray


class MemoryBank:
    """Entries <prefix, target> and their search, with the leakage guard built in.

    An entry's id is the order of its arrival and never changes. Vectors are indexed at the first search after a change.

    Args:
        hidden_size: length H of a key.
        similarity: `cosine` (keys and queries are normalised for the search) or `dot`.
        index: `flat` (exact), `ivf` (approximate) or `auto` (flat up to a million entries).
        ivf_lists, ivf_probes: of the ivf index.
        seed: of the ivf index's training.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        similarity: str = "cosine",
        index: str = "auto",
        ivf_lists: int = 128,
        ivf_probes: int = 8,
        seed: int = 0,
    ):
        problems = []
        if similarity not in SIMILARITIES:
            problems.append(f"similarity: {similarity!r} is not one of {', '.join(SIMILARITIES)}")
        if index not in INDEXES:
            problems.append(f"index: {index!r} is not one of {', '.join(INDEXES)}")
        for name, value in (("hidden_size", hidden_size), ("ivf_lists", ivf_lists), ("ivf_probes", ivf_probes)):
            if value < 1:
                problems.append(f"{name}: {value!r} must be at least 1")
        if problems:
            raise ConfigError(problems)
        self.hidden_size = int(hidden_size)
        self.similarity = similarity
        self.index = index
        self.ivf_lists = int(ivf_lists)
        self.ivf_probes = int(ivf_probes)
        self.seed = int(seed)
        empty = {name: np.empty((0, self.hidden_size) if name == "keys" else 0, _DTYPES[name]) for name in _DTYPES}
        self._install(empty)

    def _install(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = {name: GrowingArray(values) for name, values in arrays.items()}
        self._reset_index()

    def _reset_index(self) -> None:
        self._index: Index | None = None
        # Keys as they are searched: with `dot` the keys themselves, not a second copy of them.
        self._vectors = GrowingArray(np.empty((0, self.hidden_size), np.float32))
        self._longest = 0.0
        self._guard = LeakageGuard(self.users, self.positions)

    def __len__(self) -> int:
        return len(self._arrays["times"])

    @property
    def keys(self) -> np.ndarray:
        """Encoded prefixes as they were added [N, H] float32, read-only."""
        return self._arrays["keys"].values

    @property
    def targets(self) -> np.ndarray:
        """Target item of each entry [N] int32, read-only."""
        return self._arrays["targets"].values

    @property
    def users(self) -> np.ndarray:
        """User each entry comes from [N] int32, read-only; negative: from no user."""
        return self._arrays["users"].values

    @property
    def positions(self) -> np.ndarray:
        """Index of the target in its user's history [N] int32, read-only: the prefix has that many items."""
        return self._arrays["positions"].values

    @property
    def times(self) -> np.ndarray:
        """Time of the target [N] float64, read-only; NaN where unknown."""
        return self._arrays["times"].values

    @property
    def index_recall(self) -> float | None:
        """Measured recall of the index (1.0 when exact); None before the first search."""
        return None if self._index is None else self._index.recall

    def add(
        self, keys: Array, targets: Array, users: Array, positions: Array, times: Array | None = None
    ) -> np.ndarray:
        """Append entries.

        Args:
            keys: encoded prefixes [N, H].
            targets, users, positions: integers [N]; positions are not negative.
            times: [N], or None when unknown.

        Returns:
            ids of the new entries, int64 [N].

        Raises:
            ValueError: shapes do not fit, or a value is not finite or out of range. The bank is unchanged then.
        """
        rows = {"keys": self._matrix("keys", keys)}
        size = len(rows["keys"])
        for name, values in (("targets", targets), ("users", users), ("positions", positions)):
            rows[name] = _integers(name, values, size)
        if size and rows["positions"].min() < 0:
            raise ValueError(
                f"positions: {rows['positions'].min()} is negative; give the target's index in its history"
            )
        rows["times"] = np.full(size, np.nan) if times is None else _numpy(times).astype(np.float64)
        if rows["times"].shape != (size,):
            raise ValueError(f"times: expected shape [{size}], got {list(rows['times'].shape)}")
        first = len(self)
        for name in _DTYPES:
            self._arrays[name].append(rows[name])
        self._guard = LeakageGuard(self.users, self.positions)
        return np.arange(first, first + size, dtype=np.int64)

    def set_keys(self, keys: Array) -> None:
        """Replace the keys of all entries [N, H], after the backbone changed; everything else stays.

        Raises:
            ValueError: not one finite key of length H per entry.
        """
        matrix = self._matrix("keys", keys)
        if len(matrix) != len(self):
            raise ValueError(f"keys: expected one for each of the {len(self)} entries, got {len(matrix)}")
        self._arrays["keys"] = GrowingArray(matrix.copy())
        self._reset_index()

    def search(
        self,
        queries: Array,
        top_k: int,
        users: Array | None,
        positions: Array | None,
        desc: str | None = None,
    ) -> Neighbours:
        """The `top_k` most similar entries that each query may see; see :class:`LeakageGuard` for those it may not.

        With the flat index the result is exact whatever is barred, and does not depend on how queries are batched:
        similarities are computed in float64 and rounded to float32, ties go to the lower id. An approximate index may
        give a row fewer than `top_k`.

        Args:
            queries: encoded histories [Q, H].
            top_k: K.
            users, positions: integers [Q]: the query predicts item `positions` of `users`' history. Both None, or a
                negative user: the query belongs to no user of the memory, nothing is barred.
            desc: show a progress bar with this label.

        Returns:
            Neighbours with [Q, K] arrays.

        Raises:
            ValueError: shapes do not fit, a value is not finite, or only one of users and positions is given.
        """
        if top_k < 1:
            raise ValueError(f"top_k: {top_k!r} must be at least 1")
        if (users is None) != (positions is None):
            raise ValueError("users and positions: give both, or None for both")
        vectors = _normalised(self._matrix("queries", queries), self.similarity)[0]  # [Q, H]
        size = len(vectors)
        who = _integers("users", np.full(size, -1) if users is None else users, size)
        when = _integers("positions", np.zeros(size, int) if positions is None else positions, size)
        if not len(self) or not size:
            return Neighbours(*unpack(np.zeros((size, top_k), np.uint64)))
        search = GuardedSearch(*self._prepare(), self._guard)
        with tqdm(total=size, desc=desc, disable=desc is None, dynamic_ncols=True) as bar:
            codes = search.run(vectors, who, when, int(top_k), bar)  # [Q, K]
        return Neighbours(*unpack(codes))

    def save(self, directory: str | os.PathLike, fingerprint: Any = None) -> None:
        """Store the bank in `directory`, replacing atomically the bank that may be there.

        Args:
            directory: made when missing.
            fingerprint: JSON-able; what the keys depend on (weights, data).
        """
        meta = {name: getattr(self, name) for name in _META}
        arrays = {name: array.values for name, array in self._arrays.items()}
        write_arrays(Path(directory), _KIND, _VERSION, arrays, {**meta, "fingerprint": fingerprint})

    @classmethod
    def load(cls, directory: str | os.PathLike, fingerprint: Any = None, verify: bool = True) -> MemoryBank:
        """Open a stored bank; its arrays are memory-mapped, and copied only when entries are added.

        Args:
            directory: given to :meth:`save`.
            fingerprint: when not None, must equal the one it was saved with.
            verify: check the SHA-256 of every file (reads them once).

        Raises:
            CheckpointError: missing, damaged, foreign, or of another fingerprint.
        """
        path = Path(directory)
        arrays, meta = read_arrays(path, _KIND, _VERSION, _DTYPES, verify)
        if not isinstance(meta, dict) or any(type(meta.get(name)) is not kind for name, kind in _META.items()):
            raise CheckpointError(f"{path}: its description is incomplete ({meta!r}). Delete it and build it again.")
        if fingerprint is not None and meta.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{path} was built with another model or data set: its fingerprint is {meta.get('fingerprint')!r}, "
                f"expected {fingerprint!r}. Name another directory, or delete it and build it again."
            )
        size, width = len(arrays["times"]), meta["hidden_size"]
        shapes = {name: (size, width) if name == "keys" else (size,) for name in arrays}
        if any(array.shape != shapes[name] for name, array in arrays.items()):
            raise CheckpointError(f"{path}: its arrays do not fit together. Delete it and build it again.")
        try:
            bank = cls(**{name: meta[name] for name in _META})
        except ConfigError as error:
            raise CheckpointError(f"{path} cannot be used: {error}. Delete it and build it again.") from None
        bank._install(arrays)
        return bank

    def _matrix(self, name: str, values: Array) -> np.ndarray:
        matrix = np.ascontiguousarray(_numpy(values), dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.hidden_size:
            raise ValueError(f"{name}: expected shape [rows, {self.hidden_size}], got {list(matrix.shape)}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: holds values that are not finite; look for a diverged backbone")
        return matrix

    def _prepare(self) -> tuple[Index, np.ndarray, float]:
        """The index brought up to date, the vectors it searches [N, H], and the length of the longest of them."""
        known = len(self._vectors)
        if known < len(self):
            vectors, longest = _normalised(self.keys[known:], self.similarity)
            self._longest = max(self._longest, longest)
            if self.similarity == "dot":
                self._vectors = GrowingArray(self.keys)
            else:
                self._vectors.append(vectors)
        vectors = self._vectors.values
        size = len(vectors)
        stale = self._index is None or self._index.kind != resolve_kind(self.index, size) or self._index.outgrown(size)
        if self._index is None or stale:
            self._index = make_index(self.index, vectors, self.ivf_lists, self.ivf_probes, self.seed)
        elif len(self._index) < size:
            self._index.extend(vectors)
        return self._index, vectors, self._longest


def _numpy(values: Array) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16.
        values = values.float() if values.is_floating_point() and values.dtype != torch.float64 else values
        return values.numpy()
    return np.asarray(values)


def _integers(name: str, values: Array, size: int) -> np.ndarray:
    """`values` as int32 [size]."""
    array = _numpy(values)
    if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected {size} integers, got {array.dtype} {list(array.shape)}")
    if size and not -(1 << 31) <= int(array.min()) <= int(array.max()) < 1 << 31:
        raise ValueError(f"{name}: {array.min()} to {array.max()} does not fit in 32 bits")
    return array.astype(np.int32)


def _normalised(matrix: np.ndarray, similarity: str) -> tuple[np.ndarray, float]:
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
