"""The memory bank of stage iii: <prefix, target> entries, searched by the encoding of the prefix.

An entry is a window of some user's history, or a mined pattern: its key encodes the items before a position, its target
is the item there.

Source: RaSeRec (AAAI 2025 / arXiv 2412.18378), retrieval-augmented module: memory construction and retrieval.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval.entries import Array, as_numpy, integers, normalised
from recbole_raserec.retrieval.files import OPTIONS, read_entries, write_entries
from recbole_raserec.retrieval.index import FlatIndex
from recbole_raserec.retrieval.index_state import state_of
from recbole_raserec.retrieval.indexed import IndexedLedger
from recbole_raserec.retrieval.search import GuardedSearch, unpack

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
        scope: `history` or `past`, see :class:`~recbole_raserec.retrieval.guard.LeakageGuard`.
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
