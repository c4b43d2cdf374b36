"""What a memory bank is searched by: the vectors that queries are compared with, their index and the leakage guard."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval.arrays import GrowingArray
from recbole_raserec.retrieval.choice import INDEXES, Index, make_index, resolve_kind
from recbole_raserec.retrieval.entries import Array, normalised
from recbole_raserec.retrieval.files import Stored
from recbole_raserec.retrieval.guard import SCOPES, LeakageGuard
from recbole_raserec.retrieval.index import FlatIndex
from recbole_raserec.retrieval.index_state import restore, scrub
from recbole_raserec.retrieval.ledger import Ledger
from recbole_raserec.retrieval.search import GuardedSearch

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
