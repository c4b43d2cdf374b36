"""The memory bank of stage iii: <prefix, target> entries, searched by the encoding of the prefix.

An entry is a window of some user's history, or a mined pattern: its key encodes the items before a position, its target
is the item there.

Source: RaSeRec (AAAI 2025 / arXiv 2412.18378), retrieval-augmented module: memory construction and retrieval.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval.entries import OWNERS, ROWS, Array, Entries, GrowingArray, as_numpy, integers, normalised
from recbole_raserec.retrieval.index import INDEXES, FlatIndex, Index, make_index, resolve_kind
from recbole_raserec.retrieval.index_state import ARRAYS, State, restore, scrub, state_of
from recbole_raserec.retrieval.search import SCOPES, GuardedSearch, LeakageGuard, unpack
from recbole_raserec.storage import read_arrays, write_arrays

# A memory bank on disk: one directory of arrays, checked when it is read, replaced as a whole when it is written.


_KIND = "RaSeRec memory"
_VERSION = 2

#: Arguments of the bank that are stored with it.
OPTIONS = {
    "hidden_size": int, "similarity": str, "index": str, "ivf_lists": int, "ivf_probes": int, "seed": int,
    "scope": str, "min_support": int, "retrieve_by": str,
}  # fmt: skip


#: Arrays of an index and their description.
Stored = Optional[tuple[State, Any]]


def write_entries(path: Path, entries: Entries, options: dict[str, Any], fingerprint: Any, index: Stored) -> None:
    """Store entries, the bank's options and what its index has learned, see :func:`write_arrays`."""
    arrays = {name: array.values for name, array in entries.arrays.items()}
    learned, about = index or ({}, None)
    write_arrays(
        path, _KIND, _VERSION, {**arrays, **learned}, {**options, "fingerprint": fingerprint, "index_state": about}
    )


def read_entries(path: Path, fingerprint: Any, verify: bool) -> tuple[Entries, dict[str, Any], Stored]:
    """What :func:`write_entries` wrote: entries over memory-mapped arrays, the options, and the index's arrays.

    Raises:
        CheckpointError: missing, damaged, foreign, or of another fingerprint (unless None is expected).
    """
    arrays, meta = read_arrays(path, _KIND, _VERSION, {**ROWS, **OWNERS}, verify, ARRAYS)
    if not isinstance(meta, dict) or any(type(meta.get(name)) is not kind for name, kind in OPTIONS.items()):
        raise CheckpointError(f"{path}: its description is incomplete ({meta!r}). Delete it and build it again.")
    if fingerprint is not None and meta.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} was built with another model or data set: its fingerprint is {meta.get('fingerprint')!r}, "
            f"expected {fingerprint!r}. Name another directory, or delete it and build it again."
        )
    learned = {name: arrays.pop(name) for name in ARRAYS if name in arrays}
    size, owners, width = len(arrays["gone"]), len(arrays["owner_users"]), meta["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {name: (owners if name in OWNERS else size,) for name in arrays}
    shapes["keys"] = (size, width)
    if any(array.shape != shapes[name] for name, array in arrays.items()):
        raise CheckpointError(f"{path}: its arrays do not fit together. Delete it and build it again.")
    entries = arrays["owner_entries"]
    if owners and not 0 <= int(entries.min()) <= int(entries.max()) < size:
        raise CheckpointError(f"{path}: its patterns name entries it does not have. Delete it and build it again.")
    stored = (learned, meta.get("index_state")) if learned else None
    return Entries(width, arrays), {name: meta[name] for name in OPTIONS}, stored


# What a memory bank holds and how it changes: entries by id, and who may change them when.


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


# What a memory bank is searched by: the vectors that queries are compared with, their index and the leakage guard.


SIMILARITIES = ("cosine", "dot")
RETRIEVE_BY = ("sequence", "target")


class IndexedLedger(Ledger):
    """Entries with what searches them, brought up to date at the first search after a change.

    It takes what :class:`~recbole_raserec.retrieval.memory.MemoryBank` takes.
    """

    def __init__(
        self,
        hidden_size: int,
        similarity: str = "cosine",
        index: str = "auto",
        ivf_lists: int = 128,
        ivf_probes: int = 8,
        seed: int = 0,
        scope: str = "history",
        min_support: int = 2,
        retrieve_by: str = "sequence",
    ):
        problems = []
        for name, value, known in (
            ("similarity", similarity, SIMILARITIES), ("index", index, INDEXES), ("memory_scope", scope, SCOPES),
            ("retrieve_by", retrieve_by, RETRIEVE_BY),
        ):  # fmt: skip
            if value not in known:
                problems.append(f"{name}: {value!r} is not one of {', '.join(known)}")
        sizes = {"hidden_size": hidden_size, "ivf_lists": ivf_lists, "ivf_probes": ivf_probes}
        for name, number in {**sizes, "memory_min_support": min_support}.items():
            if number < 1:
                problems.append(f"{name}: {number!r} must be at least 1")
        if problems:
            raise ConfigError(problems)
        super().__init__(hidden_size, min_support)
        self.similarity, self.index, self.scope = similarity, index, scope
        self.ivf_lists, self.ivf_probes = int(ivf_lists), int(ivf_probes)
        self.seed, self.retrieve_by = int(seed), retrieve_by
        self._target_vectors: np.ndarray | None = None
        self._path: Path | None = None  # of a stored bank
        self._reset_index()

    def _reset_index(self) -> None:
        self._index: Index | None = None
        self._stored: Stored = None  # what a stored index had learned
        # Keys as they are searched: with `dot` the keys themselves, not a second copy of them.
        self._vectors = GrowingArray(np.empty((0, self.hidden_size), np.float32))
        self._longest = 0.0
        self._guard: LeakageGuard | None = None

    @property
    def index_recall(self) -> float | None:
        """Measured recall of the index (1.0 when exact); None before the first search."""
        return None if self._index is None else self._index.recall

    def _changed(self) -> None:
        self._guard = None

    def _removed(self, ids: np.ndarray) -> None:
        known = ids[ids < len(self._vectors)]
        if self._searches_keys_in_place and self._vectors:
            self._vectors = GrowingArray(self.keys[: len(self._vectors)])
        elif len(known):
            self._vectors.writable()[known] = 0
        if self._stored is not None:
            left = scrub(self._stored[0], ids)
            self._stored = None if left is None else (left, self._stored[1])
        if self._index is not None and not isinstance(self._index, FlatIndex):
            self._index.remove(known)

    def set_keys(self, keys: Array) -> None:
        """Replace the keys of all entries [N, H], after the backbone changed; everything else stays.

        Raises:
            ValueError: not one finite key of length H per entry.
        """
        matrix = self._entries.matrix("keys", keys)
        if len(matrix) != len(self):
            raise ValueError(f"keys: expected one for each of the {len(self)} entries, got {len(matrix)}")
        with self._lock:
            matrix = matrix.copy()
            matrix[self.gone] = 0
            self._entries.arrays["keys"] = GrowingArray(matrix)
            self.version += 1
            self._reset_index()

    @property
    def target_vectors(self) -> np.ndarray | None:
        """What :meth:`set_target_vectors` gave, [V, H]."""
        return self._target_vectors

    def set_target_vectors(self, vectors: Array) -> None:
        """Give the vectors of all items [V, H], which queries are compared with under `retrieve_by: target`."""
        with self._lock:
            self._target_vectors = self._entries.matrix("target vectors", vectors)
            if self.retrieve_by == "target":
                self.version += 1
                self._reset_index()

    @property
    def _searches_keys_in_place(self) -> bool:
        return self.similarity == "dot" and self.retrieve_by == "sequence"

    def _compared(self, start: int) -> np.ndarray:
        """What queries are compared with, of the entries from `start` on."""
        if self.retrieve_by == "sequence":
            return self.keys[start:]
        if self._target_vectors is None or len(self._target_vectors) <= self.targets.max(initial=0):
            raise ValueError("retrieve_by: target needs the vectors of all items; call set_target_vectors first.")
        vectors = self._target_vectors[self.targets[start:]]
        vectors[self.gone[start:]] = 0
        return vectors

    def _prepare(self) -> GuardedSearch:
        """A search of what the bank holds now; later additions do not touch it."""
        known, size = len(self._vectors), len(self)
        if known < size:
            vectors, longest = normalised(self._compared(known), self.similarity)
            self._longest = max(self._longest, longest)
            if self._searches_keys_in_place:
                self._vectors = GrowingArray(self.keys)
            else:
                self._vectors.append(vectors)
        vectors = self._vectors.values
        if self._index is None and self._stored is not None:
            self._index = self._restore(vectors)
        stale = self._index is None or self._index.kind != resolve_kind(self.index, size) or self._index.outgrown(size)
        if self._index is None or stale:
            self._index = make_index(self.index, vectors, self.ivf_lists, self.ivf_probes, self.seed)
            if not isinstance(self._index, FlatIndex):
                self._index.remove(np.flatnonzero(self.gone))
        elif isinstance(self._index, FlatIndex):
            self._index = FlatIndex(vectors)
        elif len(self._index) < size:
            self._index.extend(vectors)
        if self._guard is None:
            entries = self._entries
            needed = entries.leaning(self.min_support)
            gone = entries["gone"].copy()
            self._guard = LeakageGuard(self.users, self.positions, needed, gone, self.times, self.scope)
        return GuardedSearch(self._index, vectors, self._longest, self._guard)

    def _restore(self, vectors: np.ndarray) -> Index:
        """The index of a stored bank."""
        assert self._stored is not None
        try:
            index = restore(*self._stored, vectors, self.ivf_probes)
        except ValueError as error:
            raise CheckpointError(f"{self._path} is damaged: {error}. Delete it and build it again.") from None
        index.remove(np.flatnonzero(self.gone[: len(index)]))
        self._stored = None
        return index


#: Searches that are begun again when entries were removed meanwhile, before one is made that nobody may disturb.
_TRIES = 3


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


class MemoryBank(IndexedLedger):
    """Entries <prefix, target> and their search, with the leakage guard built in.

    An entry's id is the order of its arrival and never changes, also when others are removed; what is removed is
    overwritten. Vectors are indexed at the first search after a change. Any number of threads may search while others
    add and remove: a search gives what the bank held at one moment between its beginning and its end.

    Args:
        hidden_size: length H of a key.
        similarity: `cosine` (keys and queries are normalised for the search) or `dot`.
        index: `flat` (exact), `ivf`, `ivfpq`, `hnsw` (approximate) or `auto` (flat up to a million entries, then ivf).
        ivf_lists, ivf_probes: of the inverted files.
        seed: of their training.
        scope: `history` or `past`, see :class:`~recbole_raserec.retrieval.search.LeakageGuard`.
        min_support: users a pattern needs; one that loses them by :meth:`forget` is removed.
        retrieve_by: what a query is compared with: an entry's key (`sequence`), or the vector of its target (`target`;
            :meth:`set_target_vectors` gives them).

    Raises:
        ConfigError: an argument is out of range.
    """

    def search(
        self,
        queries: Array,
        top_k: int,
        users: Array | None,
        positions: Array | None,
        desc: str | None = None,
        times: Array | None = None,
    ) -> Neighbours:
        """The `top_k` most similar entries that each query may see; the leakage guard bars the others.

        With the flat index the result is exact whatever is barred, and does not depend on how queries are batched:
        similarities are computed in float64 and rounded to float32, ties go to the lower id. An approximate index may
        give a row fewer than `top_k`.

        Args:
            queries: encoded histories [Q, H].
            top_k: K.
            users, positions: integers [Q]: the query predicts item `positions` of `users`' history. Both None, or a
                negative user: the query belongs to no user of the memory, nothing is barred.
            desc: show a progress bar with this label.
            times: [Q], read with the scope `past`; None: the queries are asked now.

        Returns:
            Neighbours with [Q, K] arrays.

        Raises:
            ValueError: shapes do not fit, a value is not finite, or only one of users and positions is given.
        """
        if top_k < 1:
            raise ValueError(f"top_k: {top_k!r} must be at least 1")
        if (users is None) != (positions is None):
            raise ValueError("users and positions: give both, or None for both")
        vectors = normalised(self._entries.matrix("queries", queries), self.similarity)[0]  # [Q, H]
        size = len(vectors)
        who = integers("users", np.full(size, -1) if users is None else users, size)
        when = integers("positions", np.zeros(size, int) if positions is None else positions, size)
        asked = None if times is None else as_numpy(times).astype(np.float64)
        if asked is not None and asked.shape != (size,):
            raise ValueError(f"times: expected shape [{size}], got {list(asked.shape)}")
        if not len(self) or not size:
            return Neighbours(*unpack(np.zeros((size, top_k), np.uint64)))

        def run(search: GuardedSearch) -> Neighbours:
            with tqdm(total=size, desc=desc, disable=desc is None, dynamic_ncols=True) as bar:
                return Neighbours(*unpack(search.run(vectors, who, when, int(top_k), bar, asked)))

        for _ in range(_TRIES):
            with self._lock:
                search, removals = self._prepare(), self._removals
                if not isinstance(self._index, FlatIndex):  # faiss's other indexes must not change under a search
                    return run(search)
            found = run(search)
            if removals == self._removals:
                return found
        with self._lock:
            return run(self._prepare())

    def save(self, directory: str | os.PathLike, fingerprint: Any = None) -> None:
        """Store the bank in `directory`, replacing atomically the bank that may be there.

        Args:
            directory: made when missing.
            fingerprint: JSON-able; what the keys depend on (weights, data).
        """
        options = {name: getattr(self, name) for name in OPTIONS}
        with self._lock:
            write_entries(Path(directory), self._entries, options, fingerprint, self._stored or state_of(self._index))

    @classmethod
    def load(cls, directory: str | os.PathLike, fingerprint: Any = None, verify: bool = True) -> MemoryBank:
        """Open a stored bank; its arrays are memory-mapped, and copied only when entries are added or removed.

        Args:
            directory: given to :meth:`save`.
            fingerprint: when not None, must equal the one it was saved with.
            verify: check the SHA-256 of every file (reads them once).

        Raises:
            CheckpointError: missing, damaged, foreign, or of another fingerprint.
        """
        path = Path(directory)
        entries, options, index = read_entries(path, fingerprint, verify)
        try:
            bank = cls(**options)
        except ConfigError as error:
            raise CheckpointError(f"{path} cannot be used: {error}. Delete it and build it again.") from None
        bank._entries = entries
        bank._reset_index()
        if index is not None:
            bank._stored, bank._path = index, path
        return bank
