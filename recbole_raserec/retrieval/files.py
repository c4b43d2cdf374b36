"""A memory bank on disk: one directory of arrays, checked when it is read, replaced as a whole when it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from recbole_raserec.errors import CheckpointError
from recbole_raserec.retrieval.entries import OWNERS, ROWS, Entries
from recbole_raserec.retrieval.index_state import ARRAYS, State
from recbole_raserec.stored_arrays import read_arrays, write_arrays

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
