"""Exact neighbours on disk: a run that differs only in what is made of them (alpha, beta, the head, a smaller K) reads
them instead of searching again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.distributed.group import current
from recbole_raserec.errors import CheckpointError
from recbole_raserec.fileio import read_tensors, write_tensors
from recbole_raserec.retrieval.choice import resolve_kind
from recbole_raserec.retrieval.entries import OWNERS
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import Queries

#: Searches kept; the one that was not used for longest goes first.
KEEP = 12

#: Raised when the same search would find something else than before.
SEARCH_VERSION = 1


class NeighbourCache:
    """Searches of a directory, under the hash of everything they rest on: queries, entries, what bars which.

    The best K of an exact search are the first of its best K' > K, so a search for more serves one for fewer.
    Approximate indexes are not cached: theirs are not, and they are fast.

    Args:
        directory: made when something is stored. keep: searches kept in it.
        least: neighbours of a search that is made, where fewer are asked for; later ones for up to that many find it.
    """

    def __init__(self, directory: Path, keep: int = KEEP, least: int = 0):
        self.directory, self.keep, self.least = Path(directory), keep, least

    def search(self, queries: Queries, memory: MemoryBank, top_k: int, desc: Optional[str] = None) -> None:
        """What :meth:`Queries.search` does, looked up where it can be."""
        if resolve_kind(memory.index, len(memory)) != "flat":
            queries.search(memory, top_k, desc)
            return
        group = current()
        mark = _hash(queries, memory)
        found = group.from_first(lambda: self._read(mark, len(queries), len(memory), top_k))
        if found is not None:
            device = queries.h.device
            queries.ids = found.clamp(min=0).to(device)
            queries.mask = (found >= 0).to(device)
            return
        searched = max(top_k, self.least)
        queries.search(memory, searched, desc)
        assert queries.ids is not None
        assert queries.mask is not None
        ids = torch.where(queries.mask, queries.ids, -1).to(torch.int32).cpu()
        if group.first:
            write_tensors(self.directory / f"{mark}-{searched}.safetensors", {"ids": ids}, _digest(ids))
            self._prune()
        queries.ids, queries.mask = queries.ids[:, :top_k].contiguous(), queries.mask[:, :top_k].contiguous()

    def _read(self, mark: str, rows: int, entries: int, top_k: int) -> Optional[torch.Tensor]:
        """Ids [rows, top_k], -1 where there is none; None: not here."""
        for path in sorted(self.directory.glob(f"{mark}-*.safetensors")):
            stored = path.stem.rpartition("-")[2]
            if not stored.isdecimal() or int(stored) < top_k:
                continue
            try:
                tensors, digest = read_tensors(path)
            except CheckpointError as error:
                getLogger().warning(f"{error} It is searched again.")
                continue
            ids = tensors.get("ids")
            fits = ids is not None and ids.dtype == torch.int32 and ids.shape == (rows, int(stored))
            if (
                ids is None
                or not fits
                or digest != _digest(ids)
                or not -1 <= int(ids.min()) <= int(ids.max()) < entries
            ):
                getLogger().warning(f"{path} does not hold these neighbours. They are searched again.")
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return ids[:, :top_k].long()
        return None

    def _prune(self) -> None:
        with contextlib.suppress(OSError):  # another run may prune too
            stored = sorted(self.directory.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
            for path in stored[: -self.keep]:
                path.unlink()


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().data).hexdigest()


def _hash(queries: Queries, memory: MemoryBank) -> str:
    digest = hashlib.sha256()
    settings = [SEARCH_VERSION, memory.similarity, memory.retrieve_by, memory.scope, memory.min_support]
    digest.update(json.dumps(settings).encode())

    def add(name: str, values: Any) -> None:
        digest.update(name.encode())
        if values is not None:
            values = np.ascontiguousarray(values)
            digest.update(f"{values.dtype.str}{values.shape}".encode())
            digest.update(values.data)

    for name in ("users", "positions", "times"):
        add(name, getattr(queries, name))
    add("h", queries.h.cpu().numpy())
    for name in ("keys", "users", "positions", "times", "support", "gone"):
        add(f"memory {name}", getattr(memory, name))
    if memory.retrieve_by == "target":
        add("targets", memory.targets)
        add("target vectors", memory.target_vectors)
    for name in OWNERS:
        add(name, memory.owners[name])
    return digest.hexdigest()[:32]
