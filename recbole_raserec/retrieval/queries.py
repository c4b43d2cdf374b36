"""Windows of a split, encoded and searched once, then looked up."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from tqdm import tqdm

from recbole_raserec.data import PackedWindows, SequenceDataset, SequenceStore
from recbole_raserec.distributed import current
from recbole_raserec.errors import CheckpointError
from recbole_raserec.retrieval.entries import OWNERS
from recbole_raserec.retrieval.index import resolve_kind
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.storage import read_tensors, write_tensors

#: Position tokens per encoding batch.
TOKENS = 1 << 16

#: Positions per batch of a model that encodes all prefixes of a history in one pass.
SHARED = 1 << 11


@dataclasses.dataclass
class Queries:
    """The windows of one split with their vectors and, once searched, their neighbours.

    Attributes:
        users, positions, targets: int64 [N]; which item of whose history is to be predicted. times: float64 [N] or
        None.
        h: float32 [N, H], the backbone's encoding of what precedes.
        longest: items a window has at most.
        ids, mask: int64 and bool [N, K], set by :meth:`search`; missing neighbours have id 0 and mask False.
    """

    users: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    times: Optional[np.ndarray]
    h: torch.Tensor
    longest: int = 0
    ids: Optional[torch.Tensor] = None
    mask: Optional[torch.Tensor] = None

    def __post_init__(self) -> None:
        self._width = int(self.positions.max()) + 1 if len(self.positions) else 1
        codes = self.users * self._width + self.positions
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> Queries:
        """Some of the windows, without neighbours."""
        times = None if self.times is None else self.times[rows]
        h = self.h[torch.from_numpy(rows).to(self.h.device)]
        return Queries(self.users[rows], self.positions[rows], self.targets[rows], times, h, self.longest)

    def search(self, memory: Any, top_k: int, desc: Optional[str] = None) -> None:
        """Find the admissible neighbours of every window."""
        group, rows = current(), len(self)
        own = group.every(rows)
        times = None if self.times is None else self.times[own]
        found = memory.search(self.h[own].cpu().numpy(), top_k, self.users[own], self.positions[own], desc, times)
        ids, mask = torch.from_numpy(np.maximum(found.ids, 0)), torch.from_numpy(found.mask)
        self.ids = group.joined_rows(ids, own, rows).to(self.h.device)
        self.mask = group.joined_rows(mask, own, rows).to(self.h.device)

    def find(self, users: torch.Tensor, positions: torch.Tensor) -> Optional[torch.Tensor]:
        """Rows that hold the given windows, int64 [B], or None when one of them is not here."""
        if self.ids is None or not len(self):
            return None
        users_, positions_ = users.cpu().numpy(), positions.cpu().numpy()
        codes = users_ * self._width + positions_
        slots = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        if (self._codes[slots] != codes).any() or (positions_ >= self._width).any():
            return None
        return torch.from_numpy(self._order[slots])

    def rows(self, rows: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [B, H], ids [B, K] and mask [B, K] of the given rows."""
        assert self.ids is not None
        assert self.mask is not None
        rows = rows.to(self.h.device)
        return self.h[rows], self.ids[rows, :top_k], self.mask[rows, :top_k]


def encode_split(backbone: Any, dataset: SequenceDataset, device: Any, desc: Optional[str] = None) -> Queries:
    """Encode every window of a split, in batches of like length; the backbone is put into evaluation mode for it.

    Returns:
        queries without neighbours, in the split's row order.
    """
    users, positions, targets = dataset.windows()
    store, longest = dataset.store, dataset.max_item_list_len
    group = current()
    own = group.every(len(users))
    h = encode_windows(backbone, store, users[own], positions[own], longest, device, desc)
    h = group.joined_rows(h, own, len(users))
    times = None if store.times is None else store.times[store.offsets[users] + positions]
    return Queries(users, positions, targets, times, h, longest)


@torch.no_grad()
def encode_windows(
    backbone: Any, store: SequenceStore, users: np.ndarray, positions: np.ndarray, longest: int, device: Any,
    desc: Optional[str] = None, owners: Optional[np.ndarray] = None,
) -> torch.Tensor:  # fmt: skip
    """The backbone's vectors [N, H] of the last `longest` items before `positions` [N] in the rows `users` [N] of a
    store, in batches of like length; `owners` [N]: the users the backbone is told, where they are not the rows."""
    if getattr(getattr(backbone, "model", None), "shares_prefixes", False) and len(users) > len(np.unique(users)):
        return _encode_shared(backbone, store, users, positions, longest, device, desc)
    owners = users if owners is None else owners
    h = torch.empty(len(users), backbone.hidden_size, device=device)
    was_training = backbone.training
    backbone.eval()
    lengths = np.minimum(positions, longest)
    order = np.argsort(lengths, kind="stable")
    with tqdm(total=len(order), desc=desc, disable=desc is None, unit="windows", dynamic_ncols=True) as bar:
        start = 0
        while start < len(order):
            size = max(1, TOKENS // max(int(lengths[order[min(start + 4096, len(order)) - 1]]), 1))
            part = order[start : start + min(size, 4096)]
            width = None if backbone.trims else longest
            rows, window_lengths = store.window_rows(users[part], positions[part], longest, width)
            item_seq = store.items[np.maximum(rows, 0)]
            item_seq[rows < 0] = 0
            h[torch.from_numpy(part).to(device)] = backbone.encode(
                torch.from_numpy(item_seq).to(device),
                torch.from_numpy(window_lengths).to(device),
                torch.from_numpy(owners[part]).to(device),
            )
            start += len(part)
            bar.update(len(part))
    backbone.train(was_training)
    return h


def _encode_shared(
    backbone: Any, store: SequenceStore, users: np.ndarray, positions: np.ndarray, longest: int, device: Any,
    desc: Optional[str],
) -> torch.Tensor:  # fmt: skip
    """:func:`encode_windows` for a model with dear passes, one of which gives the vectors after every item.

    The windows are those of packed training: of a history longer than `longest` a vector rests on the last
    ``longest // 2`` to `longest` items instead of exactly `longest`.
    """
    windows = PackedWindows(store, users, positions, longest)
    h = torch.empty(len(users), backbone.hidden_size, device=device)
    was_training = backbone.training
    backbone.eval()
    order = np.argsort(windows.length, kind="stable")
    parts = np.array_split(order, max(1, -(-int(windows.length.sum()) // SHARED)))
    with tqdm(total=len(users), desc=desc, disable=desc is None, unit="windows", dynamic_ncols=True) as bar:
        for part in parts:
            start, length = store.offsets[windows.user[part]] + windows.start[part], windows.length[part]
            columns = np.arange(int(length.max(initial=0)))
            inside = columns < length[:, None]
            item_seq = np.where(inside, store.items[np.where(inside, start[:, None] + columns, 0)], 0)
            found = backbone.model.encode_positions(
                torch.from_numpy(item_seq).to(device), torch.from_numpy(length).to(device)
            )  # [W, L, H]
            sizes = np.diff(windows.offsets)[part]
            rows = np.concatenate([np.arange(a, a + n) for a, n in zip(windows.offsets[part], sizes)])
            line = torch.from_numpy(np.repeat(np.arange(len(part)), sizes)).to(device)
            column = torch.from_numpy(windows.column[rows]).to(device)
            h[torch.from_numpy(windows.row[rows]).to(device)] = found[line, column]
            bar.update(len(rows))
    backbone.train(was_training)
    return h


# Exact neighbours on disk: a run that differs only in what is made of them (alpha, beta, the head, a smaller K) reads
# them instead of searching again.


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
