"""The memory bank of stage iii: entries (prefix, next item), searched by the encoding of the prefix.

An entry is a window of some user's history, or a mined pattern: its key encodes the items before a position, its target
is the item there. On disk a bank is one directory of arrays, replaced as a whole.

Source: RaSeRec (AAAI 2025 / arXiv 2412.18378), retrieval-augmented module: memory construction and retrieval.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval.index import (
    INDEXES,
    STATE_ARRAYS,
    FlatIndex,
    Index,
    State,
    make_index,
    resolve_kind,
    restore,
    without,
)
from recbole_raserec.retrieval.search import SCOPES, GuardedSearch, LeakageGuard, unpack
from recbole_raserec.storage import read_arrays, read_tensors, write_arrays, write_tensors

Array = Union[np.ndarray, torch.Tensor]

SIMILARITIES = ("cosine", "dot")
RETRIEVE_BY = ("sequence", "target")
SEARCHES = ("cuda",)
"""Types of devices that search the flat index themselves, where the queries are on them; faiss searches on the CPU."""
SEARCH_SCORES = 1 << 18
"""Queries times entries from which they do. On an H200 one query of 131,413 entries took 1.45 ms, by faiss on 16 CPU
threads 1.28; one of 1,000,000 took a fifth of faiss's time, 32 of 131,413 less than a third (results/gpu.md)."""

#: A search that is kept writes what it has after that many seconds, between parts of that many scores or rows.
PART_SECONDS, PART_SCORES, PART_ROWS = 2.0, 1 << 28, 1024

#: Arrays with one row an entry.
ROWS = {
    "keys": "<f4", "targets": "<i4", "users": "<i4", "positions": "<i4", "times": "<f8", "support": "<i4",
    "gone": "|b1",
}  # fmt: skip
#: Arrays with one row a (pattern, user) whose history holds it, in the order of both; the position completes it there.
OWNERS = {"owner_entries": "<i8", "owner_users": "<i4", "owner_positions": "<i4"}

#: Arguments of the bank that are stored with it.
_OPTIONS = {
    "hidden_size": int, "similarity": str, "index": str, "ivf_lists": int, "ivf_probes": int, "seed": int,
    "scope": str, "min_support": int, "retrieve_by": str, "text_size": int, "text_weight": float,
}  # fmt: skip
_KIND, _VERSION = "RaSeRec memory", 2  # of the stored arrays
#: What the row of a removed entry holds.
_REMOVED = {"keys": 0, "targets": 0, "users": -1, "positions": 0, "times": np.nan, "support": 0, "gone": True}
#: Searches that are begun again when entries were removed meanwhile, before one is made under the lock.
_TRIES = 3


@dataclass(frozen=True)
class Neighbours:
    """What a search found, best first; entries with equal similarity in the order of their ids.

    Attributes:
        ids: entries [Q, K] int64; -1 where there are fewer than K.
        similarity: [Q, K] float32; 0 where there is no entry.
        mask: bool [Q, K], True where there is an entry. True columns come first.
    """

    ids: np.ndarray
    similarity: np.ndarray
    mask: np.ndarray


def _column(name: str) -> Any:
    """An array of the bank under its own name, read-only."""
    return property(lambda bank: bank._columns[name].values)


class MemoryBank:
    """Entries (prefix, target) and their search, with the leakage guard built in.

    An entry's id is the order of its arrival and never changes, also when others are removed; what is removed is
    overwritten. Vectors are indexed at the first search after a change. Any number of threads may search while others
    add and remove: a search gives what the bank held at one moment between its beginning and its end.

    Args:
        hidden_size: length H of a key.
        similarity: `cosine` (keys and queries are normalised for the search) or `dot`.
        text_size: length S of the text's vector at the end of a key; the others are the user's.
        text_weight: gamma. The similarity is that of the users' vectors plus gamma times the cosine of the texts': the
            product of `[k / |k|, sqrt(gamma) t / |t|]` with the query's, which every index searches.
        index: `flat` (exact), `ivf`, `ivfpq`, `hnsw` (approximate) or `auto` (flat up to a million entries, then ivf).
        ivf_lists: groups of the inverted files.
        ivf_probes: groups a query looks into.
        seed: of the training of inverted files.
        scope: `history` or `past`, see `LeakageGuard`.
        min_support: users a pattern needs; one that loses them by `forget` is removed.
        retrieve_by: what a query is compared with: an entry's key (`sequence`), or the vector of its target (`target`;
            `set_target_vectors` gives them).

    Attributes:
        keys: encoded prefixes as they were added, [N, H] float32; read-only, as all arrays with one row an entry.
        targets: target item of each entry, [N] int32.
        users: user each entry comes from, [N] int32; negative: from no single user.
        positions: index of the target in its user's history, [N] int32: the prefix has that many items.
        times: time of the target, [N] float64; NaN where unknown.
        support: users whose histories hold the entry, [N] int32: 1 for a pair, 0 for a removed entry.
        gone: removed entries, bool [N].
        version: rises with every change.
        target_vectors: what `set_target_vectors` gave, [V, H].

    Raises:
        ConfigError: an argument is out of range.
    """

    keys, targets, users, positions, times, support, gone = (_column(name) for name in ROWS)

    _index: Index | None
    _stored: State | None  # what a stored index had learned
    _vectors: GrowingArray  # keys as they are searched: with `dot` the keys themselves, not a second copy of them
    _longest: float
    _guard: LeakageGuard | None
    _device_copy: torch.Tensor | None = None  # of the vectors

    def __init__(
        self, hidden_size: int, similarity: str = "cosine", index: str = "auto", ivf_lists: int = 128,
        ivf_probes: int = 8, seed: int = 0, scope: str = "history", min_support: int = 2,
        retrieve_by: str = "sequence", text_size: int = 0, text_weight: float = 0.0,
    ):  # fmt: skip
        words = (
            ("similarity", similarity, SIMILARITIES), ("index", index, INDEXES), ("memory_scope", scope, SCOPES),
            ("retrieve_by", retrieve_by, RETRIEVE_BY),
        )  # fmt: skip
        sizes = (
            ("hidden_size", hidden_size), ("ivf_lists", ivf_lists), ("ivf_probes", ivf_probes),
            ("memory_min_support", min_support),
        )  # fmt: skip
        wrong = [entry for entry in words if entry[1] not in entry[2]]
        problems = [f"{name}: {value!r} is not one of {', '.join(known)}" for name, value, known in wrong]
        problems += [f"{name}: {number!r} must be at least 1" for name, number in sizes if number < 1]
        if text_size and retrieve_by == "target":
            problems.append("memory_text: retrieve_by: target compares next items; leave memory_text out")
        if problems:
            raise ConfigError(problems)
        self.text_size, self.text_weight = int(text_size), float(text_weight)
        self.hidden_size, self.min_support = int(hidden_size), int(min_support)
        self.similarity, self.index, self.scope = similarity, index, scope
        self.ivf_lists, self.ivf_probes = int(ivf_lists), int(ivf_probes)
        self.seed, self.retrieve_by = int(seed), retrieve_by
        self.version = 0
        self._removals = 0  # rises with every removal
        self._lock = threading.RLock()
        self._columns = {
            name: GrowingArray(np.empty((0, self.hidden_size) if name == "keys" else 0, dtype))
            for name, dtype in {**ROWS, **OWNERS}.items()
        }
        self.target_vectors: np.ndarray | None = None
        self._path: Path | None = None  # of a stored bank
        self._reset_index()

    def __getstate__(self) -> dict[str, Any]:
        """Without the lock and the index, which is built again: for copies, and for RecBole's checkpoints."""
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_index", "_vectors", "_guard", "_stored")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())
        self._reset_index()

    def __len__(self) -> int:
        """Entries ever added, removed ones included: ids are below it."""
        return len(self._columns["gone"])

    @property
    def live(self) -> int:
        """Entries that were not removed."""
        return len(self) - int(self.gone.sum())

    @property
    def owners(self) -> dict[str, np.ndarray]:
        """Whose histories hold each pattern, and where it is first complete there: the arrays `OWNERS`, [M] each."""
        return {name: self._columns[name].values for name in OWNERS}

    @property
    def index_recall(self) -> float | None:
        """Measured recall of the index (1.0 when exact); None before the first search."""
        return None if self._index is None else self._index.recall

    def add(
        self, keys: Array, targets: Array, users: Array, positions: Array, times: Array | None = None,
        support: Array | None = None, owners: tuple[Array, Array, Array] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Append entries, whose columns are those of the bank [N], and return their ids, int64 [N].

        Args:
            keys: [N, H].
            targets: integers.
            users: integers.
            positions: integers, not negative.
            times: None: unknown.
            support: None: 1.
            owners: of patterns, whose histories hold them: row of this call [M], user [M], and the position in the
                user's history [M] where the pattern is first complete.

        Raises:
            ValueError: shapes do not fit, or a value is not finite or out of range. The bank is unchanged then.
        """
        rows = {"keys": self._matrix("keys", keys)}
        size = len(rows["keys"])
        for name, values in (("targets", targets), ("users", users), ("positions", positions)):
            rows[name] = _integers(name, values, size)
        if size and rows["positions"].min() < 0:
            least = rows["positions"].min()
            raise ValueError(f"positions: {least} is negative; give the target's index in its history")
        rows["times"] = np.full(size, np.nan) if times is None else _times(times, size)
        rows["support"] = np.ones(size, np.int32) if support is None else _integers("support", support, size)
        if size and rows["support"].min() < 1:
            raise ValueError(f"support: {rows['support'].min()} must be at least 1")
        rows["gone"] = np.zeros(size, dtype=bool)  # last: its length is the number of entries
        owned = [_integers(name, values, len(owners[0])) for name, values in zip(OWNERS, owners)] if owners else []
        if owned and len(owned[0]) and not 0 <= int(owned[0].min()) <= int(owned[0].max()) < size:
            raise ValueError(f"owners: entries must lie in [0, {size})")
        with self._lock:
            first = len(self)
            if owned:
                order = np.lexsort((owned[1], owned[0]))
                for name, values in zip(OWNERS, (owned[0].astype(np.int64) + first, *owned[1:])):
                    self._columns[name].append(values[order])
            for name, values in rows.items():
                self._columns[name].append(values)
            self.version += 1
            self._guard = None
        return np.arange(first, first + size, dtype=np.int64)

    def merge(self, other: MemoryBank) -> np.ndarray:
        """Append the live entries of another bank, with users numbered alike and keys of length H: ids int64 [N]."""
        with other._lock:
            left = np.flatnonzero(~other.gone)
            row = np.full(len(other), -1)
            row[left] = np.arange(len(left))
            rows = {name: other._columns[name].values[left] for name in ROWS if name != "gone"}
            entries, users, positions = other.owners.values()
        return self.add(**rows, owners=(row[entries], users, positions) if len(entries) else None)

    def forget(self, user: int) -> int:
        """Remove a user's pairs and share in patterns, and patterns that were frequent only with it; returns how many.

        Nothing of them is left in the bank, in its index, and, after the next `save`, in its files. A search that is
        under way is made again.
        """
        with self._lock:
            if user < 0:
                return 0
            self._removals += 1  # first: a search that is under way must not take what changes now for settled
            lost = self.users == user
            entries, owners, _ = self.owners.values()
            owned = owners == user
            if owned.any():
                np.subtract.at(self._columns["support"].writable(), entries[owned], 1)
                self._keep_owners(~owned)
                lost = lost | ((self.support < self.min_support) & (self.users < 0))
            return self._remove(np.flatnonzero(lost & ~self.gone))

    def expire(self, older_than: float) -> int:
        """Remove the entries of an earlier time than `older_than`; those of unknown time stay. Returns their number."""
        with self._lock:
            self._removals += 1
            with np.errstate(invalid="ignore"):
                return self._remove(np.flatnonzero((self.times < older_than) & ~self.gone))

    def set_keys(self, keys: Array) -> None:
        """Replace the keys of all entries by finite ones [N, H], after the backbone changed; everything else stays."""
        matrix = self._matrix("keys", keys)
        if len(matrix) != len(self):
            raise ValueError(f"keys: expected one for each of the {len(self)} entries, got {len(matrix)}")
        with self._lock:
            matrix = matrix.copy()
            matrix[self.gone] = 0
            self._columns["keys"] = GrowingArray(matrix)
            self.version += 1
            self._reset_index()

    def set_target_vectors(self, vectors: Array) -> None:
        """Give the vectors of all items [V, H], which queries are compared with under `retrieve_by: target`."""
        with self._lock:
            self.target_vectors = self._matrix("target vectors", vectors)
            if self.retrieve_by == "target":
                self.version += 1
                self._reset_index()

    def _remove(self, ids: np.ndarray) -> int:
        """Overwrite entries, which keep their ids, everywhere; returns their number."""
        self.version += 1
        self._guard = self._device_copy = None
        if not len(ids):
            return 0
        for name, value in _REMOVED.items():
            self._columns[name].writable()[ids] = value
        lost = np.isin(self._columns["owner_entries"].values, ids)
        if lost.any():
            self._keep_owners(~lost)
        known = ids[ids < len(self._vectors)]
        if self._searches_keys_in_place and self._vectors:
            self._vectors = GrowingArray(self.keys[: len(self._vectors)])
        elif len(known):
            self._vectors.writable()[known] = 0
        if self._stored is not None:
            self._stored = without(self._stored, ids)
        if self._index is not None:
            self._index.remove(known)
        return len(ids)

    def _keep_owners(self, kept: np.ndarray) -> None:
        for name, values in self.owners.items():
            self._columns[name] = GrowingArray(values[kept])

    def search(
        self, queries: Array, top_k: int, users: Array | None, positions: Array | None, desc: str | None = None,
        times: Array | None = None, kept: Path | None = None,
    ) -> Neighbours:  # fmt: skip
        """The `top_k` most similar entries that each query may see, arrays [Q, K]; the leakage guard bars the others.

        With the flat index the result is exact whatever is barred, and does not depend on how queries are batched:
        similarities are computed in float64 and rounded to float32, ties go to the lower id. An approximate index may
        give a row fewer than `top_k`.

        Args:
            queries: encoded histories [Q, H].
            top_k: K.
            users: integers [Q], whose history is asked about; negative, or None for all: of no user of the memory,
                nothing is barred.
            positions: integers [Q], which item of that history is to be predicted; None where `users` is.
            desc: show a progress bar with this label.
            times: [Q], read with the scope `past`; None: the queries are asked now.
            kept: file of what an earlier call found that was killed: the same search, exact, goes on there.

        Raises:
            ValueError: shapes do not fit, a value is not finite, or only one of users and positions is given.
        """
        if top_k < 1:
            raise ValueError(f"top_k: {top_k!r} must be at least 1")
        if (users is None) != (positions is None):
            raise ValueError("users and positions: give both, or None for both")
        vectors = self._normalised(self._matrix("queries", queries))[0]  # [Q, H]
        size = len(vectors)
        who = _integers("users", np.full(size, -1) if users is None else users, size)
        when = _integers("positions", np.zeros(size, int) if positions is None else positions, size)
        asked = None if times is None else _times(times, size)
        device = None
        if isinstance(queries, torch.Tensor) and queries.device.type in SEARCHES and size * len(self) >= SEARCH_SCORES:
            device = queries.device
        if not len(self) or not size:
            return Neighbours(*unpack(np.zeros((size, top_k), np.uint64)))

        def run(search: GuardedSearch) -> Neighbours:
            with tqdm(total=size, desc=desc, disable=desc is None, dynamic_ncols=True) as bar:
                if kept is None:
                    return Neighbours(*unpack(search.run(vectors, who, when, int(top_k), bar, asked)))
                known, codes = _read_codes(kept, size, int(top_k)), np.zeros((size, int(top_k)), np.uint64)
                codes[: len(known)] = known
                bar.update(len(known))
                wrote, pause, rows = time.monotonic(), PART_SECONDS, max(PART_ROWS, PART_SCORES // len(self))
                for start in range(len(known), size, rows):
                    part = slice(start, start + rows)
                    at = None if asked is None else asked[part]
                    codes[part] = search.run(vectors[part], who[part], when[part], int(top_k), bar, at)
                    if (begun := time.monotonic()) - wrote > pause and part.stop < size:
                        write_tensors(kept, {"codes": torch.from_numpy(codes[: part.stop].view(np.int64))})
                        wrote = time.monotonic()
                        pause = PART_SECONDS + 20 * (wrote - begun)
                return Neighbours(*unpack(codes))

        for _ in range(_TRIES):
            with self._lock:
                search, removals = self._prepare(device), self._removals
                if not isinstance(self._index, FlatIndex):  # faiss's other indexes must not change under a search
                    return run(search)
            found = run(search)
            if removals == self._removals:
                return found
        with self._lock:
            return run(self._prepare(device))

    def _reset_index(self) -> None:
        self._index = self._stored = self._guard = self._device_copy = None
        self._vectors, self._longest = GrowingArray(np.empty((0, self.hidden_size), np.float32)), 0.0

    @property
    def _searches_keys_in_place(self) -> bool:
        return self.similarity == "dot" and self.retrieve_by == "sequence" and not self.text_size

    def _normalised(self, matrix: np.ndarray) -> tuple[np.ndarray, float]:
        """Rows as they are searched [N, H] float32, and the length of the longest of them."""
        if not self.text_size:
            return _normalised(matrix, self.similarity)
        found, longest = _normalised(matrix[:, : -self.text_size], self.similarity)
        texts, _ = _normalised(matrix[:, -self.text_size :], "cosine")
        texts *= np.float32(np.sqrt(self.text_weight))
        return np.concatenate([found, texts], axis=1), float(np.sqrt(longest**2 + self.text_weight)) * (1 + 1e-6)

    def _compared(self, start: int) -> np.ndarray:
        """What queries are compared with, of the entries from `start` on."""
        if self.retrieve_by == "sequence":
            return self.keys[start:]
        if self.target_vectors is None or len(self.target_vectors) <= self.targets.max(initial=0):
            raise ValueError("retrieve_by: target needs the vectors of all items; call set_target_vectors first.")
        vectors = self.target_vectors[self.targets[start:]]
        vectors[self.gone[start:]] = 0
        return vectors

    def _prepare(self, device: torch.device | None = None) -> GuardedSearch:
        """A search of what the bank holds now; later additions do not touch it. The flat index searches on `device`."""
        known, size = len(self._vectors), len(self)
        if known < size:
            vectors, longest = self._normalised(self._compared(known))
            self._longest = max(self._longest, longest)
            if self._searches_keys_in_place:
                self._vectors = GrowingArray(self.keys)
            else:
                self._vectors.append(vectors)
        vectors = self._vectors.values
        if self._index is None and self._stored is not None:
            try:
                self._index = restore(*self._stored, vectors, self.ivf_probes)
            except ValueError as error:
                raise CheckpointError(f"{self._path} is damaged: {error}. Delete it and build it again.") from None
            self._index.remove(np.flatnonzero(self.gone[: len(self._index)]))
            self._stored = None
        stale = self._index is None or self._index.kind != resolve_kind(self.index, size) or self._index.outgrown(size)
        if self._index is None or stale:
            self._index = make_index(self.index, vectors, self.ivf_lists, self.ivf_probes, self.seed)
            self._index.remove(np.flatnonzero(self.gone))
        elif isinstance(self._index, FlatIndex):  # not changed: a search may be under way
            self._index = FlatIndex(vectors)
        elif len(self._index) < size:
            self._index.extend(vectors)
        if device is not None and isinstance(self._index, FlatIndex):
            self._index = FlatIndex(vectors, self._on_device(vectors, device))
        if self._guard is None:
            entries, owners, first = self.owners.values()
            rare = self.support[entries] <= self.min_support  # too rare without that user
            needed = entries[rare], owners[rare], first[rare]
            self._guard = LeakageGuard(self.users, self.positions, needed, self.gone.copy(), self.times, self.scope)
        return GuardedSearch(self._index, vectors, self._longest, self._guard)

    def _on_device(self, vectors: np.ndarray, device: torch.device) -> torch.Tensor:
        """`vectors` on `device`; only those that came after the last search are copied there."""
        held = self._device_copy
        if held is None or held.device != device or len(held) > len(vectors):
            held = torch.empty(0, vectors.shape[1], device=device)
        if len(held) < len(vectors):
            held = torch.cat([held, torch.tensor(vectors[len(held) :], device=device)])
        self._device_copy = held
        return held

    def _matrix(self, name: str, values: Array) -> np.ndarray:
        """`values` as finite float32 [rows, H]."""
        matrix = np.ascontiguousarray(_as_numpy(values), dtype=np.float32)
        if matrix.ndim != 2 or matrix.shape[1] != self.hidden_size:
            raise ValueError(f"{name}: expected shape [rows, {self.hidden_size}], got {list(matrix.shape)}")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name}: holds values that are not finite; look for a diverged backbone")
        return matrix

    def save(self, directory: str | os.PathLike, fingerprint: Any = None) -> None:
        """Store the bank in `directory`, replacing atomically the bank that may be there.

        `fingerprint`, JSON-able, is of what the keys depend on (weights, data).
        """
        options = {name: getattr(self, name) for name in _OPTIONS}
        with self._lock:
            state = self._stored or (None if self._index is None else self._index.state())
            learned, about = state or ({}, None)
            arrays = {name: column.values for name, column in self._columns.items()}
            meta = {**options, "fingerprint": fingerprint, "index_state": about}
            write_arrays(Path(directory), _KIND, _VERSION, {**arrays, **learned}, meta)

    @classmethod
    def load(cls, directory: str | os.PathLike, fingerprint: Any = None, verify: bool = True) -> MemoryBank:
        """Open what `save` stored; its arrays are memory-mapped, and copied only when entries are added or removed.

        Args:
            directory: of the bank.
            fingerprint: when not None, must equal the one it was saved with.
            verify: check the SHA-256 of every file (reads them once).

        Raises:
            CheckpointError: missing, damaged, not a memory, or of another fingerprint.
        """
        path = Path(directory)
        arrays, meta = read_arrays(path, _KIND, _VERSION, {**ROWS, **OWNERS}, verify, STATE_ARRAYS)
        meta = {"text_size": 0, "text_weight": 0.0, **meta} if isinstance(meta, dict) else meta  # older banks
        if not isinstance(meta, dict) or any(type(meta.get(name)) is not kind for name, kind in _OPTIONS.items()):
            raise CheckpointError(f"{path}: its description is incomplete ({meta!r}). Delete it and build it again.")
        if fingerprint is not None and meta.get("fingerprint") != fingerprint:
            raise CheckpointError(
                f"{path} was built with another model or data set: its fingerprint is {meta.get('fingerprint')!r}, "
                f"expected {fingerprint!r}. Name another directory, or delete it and build it again."
            )
        learned = {name: arrays.pop(name) for name in STATE_ARRAYS if name in arrays}
        size, owners = len(arrays["gone"]), arrays["owner_entries"]
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(ROWS, (size,)), **dict.fromkeys(OWNERS, (len(arrays["owner_users"]),)),
            "keys": (size, meta["hidden_size"]),
        }  # fmt: skip
        if any(array.shape != shapes[name] for name, array in arrays.items()):
            raise CheckpointError(f"{path}: its arrays do not fit together. Delete it and build it again.")
        if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < size:
            raise CheckpointError(f"{path}: its patterns name entries it does not have. Delete it and build it again.")
        try:
            bank = cls(**{name: meta[name] for name in _OPTIONS})
        except ConfigError as error:
            raise CheckpointError(f"{path} cannot be used: {error}. Delete it and build it again.") from None
        bank._columns = {name: GrowingArray(values) for name, values in arrays.items()}
        if learned:
            bank._stored, bank._path = (learned, meta.get("index_state", {})), path
        return bank


def _read_codes(path: Path, size: int, top_k: int) -> np.ndarray:
    """Codes [n, K] uint64 of the first n of `size` queries, by a search that was killed; n is 0 without one."""
    try:
        codes = read_tensors(path)[0]["codes"].numpy().view(np.uint64) if path.is_file() else None
        if codes is not None:
            getLogger().info(f"{path.parent}: {len(codes)} of {size} queries were searched before; the search goes on")
            return codes
    except CheckpointError as error:
        getLogger().warning(f"{error} All is searched again.")
    return np.empty((0, top_k), np.uint64)


class GrowingArray:
    """Rows of one dtype and trailing shape; appending costs amortised constant time per row.

    Args:
        values: the first rows [N, ...], kept without a copy; a read-only memory map is copied by the first append.
    """

    def __init__(self, values: np.ndarray):
        self._buffer, self._size = values, len(values)

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
        self._size = size  # last, so that a view taken meanwhile never shows a row that is not written yet


def _as_numpy(values: Array) -> np.ndarray:
    """A tensor of any device and precision, or an array, as an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        narrow = values.is_floating_point() and values.dtype != torch.float64  # numpy has no bfloat16
        return (values.float() if narrow else values).numpy()
    return np.asarray(values)


def _integers(name: str, values: Array, size: int) -> np.ndarray:
    """`values` as int32 [size]."""
    array = _as_numpy(values)
    if array.shape != (size,) or (size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: expected {size} integers, got {array.dtype} {list(array.shape)}")
    if size and not -(1 << 31) <= int(array.min()) <= int(array.max()) < 1 << 31:
        raise ValueError(f"{name}: {array.min()} to {array.max()} does not fit in 32 bits")
    return array.astype(np.int32)


def _times(values: Array, size: int) -> np.ndarray:
    """`values` as float64 [size]."""
    array = _as_numpy(values).astype(np.float64)
    if array.shape != (size,):
        raise ValueError(f"times: expected shape [{size}], got {list(array.shape)}")
    return array


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
