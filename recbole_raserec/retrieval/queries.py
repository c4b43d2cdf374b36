"""The windows of a split, encoded and searched once, then looked up; and what becomes a memory of them.

Memories are every (prefix, next item) of the training split, mined patterns, or generated sequences: one builder each.
Exact neighbours are kept on disk: a run that differs only in what is made of them (alpha, the head, a smaller K) reads
them instead of searching again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor

from recbole_raserec.config import Config
from recbole_raserec.data import PackedWindows, Patterns, SequenceDataset, SequenceStore, mine_patterns, pad_rows
from recbole_raserec.distributed import current
from recbole_raserec.errors import CheckpointError
from recbole_raserec.recommendation import Backbone, batches_by_length, encode_in_batches
from recbole_raserec.retrieval.index import resolve_kind
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.storage import read_tensors, write_tensors

SHARED = 1 << 11  # positions per batch of a model that encodes all prefixes of a history in one pass
KEEP = 12  # searches kept on disk; the one that was not used for longest goes first
SEARCH_VERSION = 1  # raised when the same search would find something else than before


@dataclasses.dataclass
class Queries:
    """The windows of one split with their vectors and, once searched, their neighbours.

    Attributes:
        ids: int64 [N, K], set by `search`; 0 where there is no neighbour.
        mask: bool [N, K], set by `search`; True where there is one.
    """

    users: np.ndarray  # int64 [N], whose history a window is of
    positions: np.ndarray  # int64 [N], which item of it is to be predicted
    targets: np.ndarray  # int64 [N], that item
    times: Optional[np.ndarray]  # float64 [N]
    h: Tensor  # float32 [N, H], the backbone's encoding of what precedes
    longest: int = 0  # items a window has at most
    ids: Optional[Tensor] = None
    mask: Optional[Tensor] = None

    def __post_init__(self) -> None:
        self._width = int(self.positions.max()) + 1 if len(self.positions) else 1
        codes = self.users * self._width + self.positions
        self._order = np.argsort(codes, kind="stable")
        self._codes = codes[self._order]

    def __len__(self) -> int:
        return len(self.users)

    def search(
        self, memory: MemoryBank, top_k: int, desc: Optional[str] = None, kept: Optional[Path] = None
    ) -> None:  # fmt: skip
        """Find the admissible neighbours of every window; what a search finds before it is killed is in `kept`."""
        group, rows = current(), len(self)
        own = group.every(rows)
        times = None if self.times is None else self.times[own]
        found = memory.search(self.h[own], top_k, self.users[own], self.positions[own], desc, times, kept)
        ids, mask = torch.from_numpy(np.maximum(found.ids, 0)), torch.from_numpy(found.mask)
        self.ids = group.joined_rows(ids, own, rows).to(self.h.device)
        self.mask = group.joined_rows(mask, own, rows).to(self.h.device)

    def find(self, users: Tensor, positions: Tensor, top_k: int) -> Optional[tuple[Tensor, Tensor, Tensor]]:
        """h [B, H], ids [B, K] and mask [B, K] of the given windows, or None when one of them is not here."""
        if self.ids is None or self.mask is None or not len(self):
            return None
        users_, positions_ = users.cpu().numpy(), positions.cpu().numpy()
        codes = users_ * self._width + positions_
        slots = np.minimum(np.searchsorted(self._codes, codes), len(self) - 1)
        if (self._codes[slots] != codes).any() or (positions_ >= self._width).any():
            return None
        rows = torch.from_numpy(self._order[slots]).to(self.h.device)
        return self.h[rows], self.ids[rows, :top_k], self.mask[rows, :top_k]


def encode_split(backbone: Backbone, dataset: SequenceDataset, device: Any, desc: Optional[str] = None) -> Queries:
    """Every window of a split, in its row order, encoded on `device`, without neighbours; `desc` labels a bar."""
    users, positions, targets = dataset.windows()
    store, longest, group = dataset.store, dataset.max_item_list_len, current()
    own = group.every(len(users))
    h = encode_windows(backbone, store, users[own], positions[own], longest, device, desc)
    h = group.joined_rows(h, own, len(users))
    times = None if store.times is None else store.times[store.offsets[users] + positions]
    return Queries(users, positions, targets, times, h, longest)


def encode_windows(
    backbone: Backbone, store: SequenceStore, users: np.ndarray, positions: np.ndarray, longest: int, device: Any,
    desc: Optional[str] = None, owners: Optional[np.ndarray] = None,
) -> Tensor:  # fmt: skip
    """The backbone's vectors [N, H] of windows: up to `longest` items of the store's rows `users` before `positions`.

    The backbone is told the users `owners` [N], where they are not the rows.
    """
    if (
        isinstance(backbone, Backbone)
        and getattr(backbone.model, "shares_prefixes", False)
        and len(users) > len(np.unique(users))
    ):
        return _encode_shared(backbone, store, users, positions, longest, device, desc)
    lengths = np.minimum(positions, longest)
    starts, owners = store.offsets[users] + positions - lengths, users if owners is None else owners
    return _encode_runs(backbone, store.items, starts, lengths, owners, longest, device, desc)


def _encode_runs(
    backbone: Backbone, items: np.ndarray, starts: np.ndarray, lengths: np.ndarray, users: np.ndarray, longest: int,
    device: Any, desc: Optional[str] = None,
) -> Tensor:  # fmt: skip
    """The backbone's vectors [N, H] of runs of the flat array `items`."""
    width = None if backbone.trims else longest

    def encode(rows: np.ndarray) -> Tensor:
        item_seq = pad_rows(items, starts[rows], lengths[rows], width)
        return backbone.encode(*(torch.from_numpy(x).to(device) for x in (item_seq, lengths[rows], users[rows])))

    out = torch.empty(len(lengths), backbone.hidden_size, device=device)
    return encode_in_batches(backbone, encode, batches_by_length(lengths), out, desc)


def _encode_shared(
    backbone: Backbone, store: SequenceStore, users: np.ndarray, positions: np.ndarray, longest: int, device: Any,
    desc: Optional[str],
) -> Tensor:  # fmt: skip
    """`encode_windows` for a model with costly passes, one of which gives the vectors after every item.

    The windows are those of packed training: of a history longer than `longest` a vector rests on the last
    `longest // 2` to `longest` items instead of exactly `longest`.
    """
    windows = PackedWindows(store, users, positions, longest)
    column = np.empty_like(windows.column)  # of each row in its window
    column[windows.row] = windows.column
    order = np.argsort(windows.length, kind="stable")
    parts = np.array_split(order, max(1, -(-int(windows.length.sum()) // SHARED)))
    bounds = windows.offsets
    batches = [np.concatenate([windows.row[a:b] for a, b in zip(bounds[part], bounds[part + 1])]) for part in parts]
    left = iter(parts)

    def encode(rows: np.ndarray) -> Tensor:
        part = next(left)  # the windows of these rows
        starts, length = store.offsets[windows.user[part]] + windows.start[part], windows.length[part]
        item_seq = torch.from_numpy(pad_rows(store.items, starts, length)).to(device)
        found = backbone.model.encode_positions(item_seq)  # [W, L, H]
        line = torch.from_numpy(np.repeat(np.arange(len(part)), np.diff(bounds)[part])).to(device)
        return found[line, torch.from_numpy(column[rows]).to(device)]

    out = torch.empty(len(users), backbone.hidden_size, device=device)
    return encode_in_batches(backbone, encode, batches, out, desc)


class Rows(NamedTuple):
    """Entries without their keys; see `MemoryBank.add` for the columns."""

    targets: np.ndarray
    users: np.ndarray
    positions: np.ndarray
    times: Optional[np.ndarray]
    support: Optional[np.ndarray] = None
    owners: Optional[tuple[np.ndarray, np.ndarray, np.ndarray]] = None


class PairBuilder:
    """`memory: pairs`: every (prefix, target) of the training split; its key is the encoding of the prefix.

    Args:
        queries: the split's windows, encoded.
        min_length: items of the prefix (before it is cut to the model's longest).
        max_length: the same; None: any.
        thin: leave out a pair whose key has a cosine of at least this with a kept pair of the same target; 0: none.
    """

    def __init__(self, queries: Queries, min_length: int = 1, max_length: Optional[int] = None, thin: float = 0.0):
        self._chosen = np.flatnonzero(_within(queries.positions, min_length, max_length))
        if thin:
            keys = self.keys(None, queries).cpu().numpy()
            self._chosen = self._chosen[thinned(keys, queries.targets[self._chosen], thin)]
        times = None if queries.times is None else queries.times[self._chosen]
        targets, users, positions = (x[self._chosen] for x in (queries.targets, queries.users, queries.positions))
        self.rows = Rows(targets, users, positions, times)

    def keys(self, backbone: Optional[Backbone], queries: Queries) -> Tensor:
        """The keys [N, H], under the backbone that encoded `queries`."""
        return queries.h[torch.from_numpy(self._chosen).to(queries.h.device)]


class PatternBuilder:
    """`memory: patterns`: frequent patterns as (pattern without its last item, last item).

    Mined from the training split alone; a pattern's time is that at which `min_support` histories held it.

    Args:
        train: the training split.
        span: alpha of `mine_patterns`.
        min_support: beta of `mine_patterns`.
        min_length: items of the pattern without its last.
        max_length: the same; None: any.
        desc: label of a progress bar.
    """

    def __init__(
        self, train: SequenceDataset, span: int, min_support: int, min_length: int = 1,
        max_length: Optional[int] = None, desc: Optional[str] = None,
    ):  # fmt: skip
        users, positions, _ = train.windows()
        store = train.store
        items, offsets = store.until(users, positions)
        longest = span if max_length is None else min(span, max_length + 1)
        least = min(min_length + 1, longest)
        mined: Patterns = mine_patterns(items, offsets, span, min_support, least, longest, desc=desc, occurrences=True)
        assert mined.occurrences is not None
        self.patterns, owners = mined, mined.occurrences
        times = None
        if store.times is not None:
            times = _when_frequent(owners[0], store.times[store.offsets[owners[1]] + owners[2]], min_support)
        targets = mined.items[mined.offsets[1:] - 1] if len(mined) else np.zeros(0, dtype=np.int64)
        self.rows = Rows(targets, np.full(len(mined), -1), mined.lengths() - 1, times, mined.support, owners)

    def keys(self, backbone: Backbone, queries: Queries) -> Tensor:
        """The keys [N, H]: the backbone's encodings of the patterns without their last items."""
        items, starts, lengths = self.patterns.items, self.patterns.offsets[:-1], self.rows.positions
        users = np.zeros(len(lengths), dtype=np.int64)
        return _encode_runs(backbone, items, starts, lengths, users, queries.longest, queries.h.device)


class RegeneratedBuilder:
    """`memory_regenerated: true`: (prefix, next item) of the sequences that regeneration generated.

    A generated sequence was written from all of its user's training history: it stands at that history's last place,
    so that the guard bars it from every training query of the user; its time is that of the latest training row. Mined
    patterns come by `memory: patterns`.

    Args:
        joined: the training split with regenerated rows.
        min_length: items of the prefix.
        max_length: items of the prefix; None: any.
    """

    def __init__(self, joined: SequenceDataset, min_length: int = 1, max_length: Optional[int] = None):
        store, feat = joined.store, joined.inter_feat
        rows, positions, targets = joined.windows()
        users = feat[joined.uid_field].numpy()
        last = np.zeros(store.n_users, dtype=np.int64)
        own_users, own_positions, _ = joined.original.windows()
        np.maximum.at(last, own_users, own_positions)
        keep = (rows != users) & (users > 0) & _within(positions, min_length, max_length)
        self._store, self._longest = store, joined.max_item_list_len
        self._windows = rows[keep], positions[keep]
        users = users[keep]
        times = None
        if store.times is not None:  # what was generated rests on all training data
            times = np.full(len(users), store.times[store.offsets[own_users] + own_positions].max(initial=-np.inf))
        self.rows = Rows(targets[keep], users, last[users], times)

    def keys(self, backbone: Backbone, queries: Queries) -> Tensor:
        """The keys [N, H]: the backbone's encodings of the prefixes."""
        device = queries.h.device
        return encode_windows(backbone, self._store, *self._windows, self._longest, device, owners=self.rows.users)


Builder = Union[PairBuilder, PatternBuilder, RegeneratedBuilder]


def builders_of(
    config: Union[Config, Mapping[str, Any]], train: SequenceDataset, queries: Queries,
    joined: Optional[SequenceDataset], progress: bool,
) -> list[Builder]:  # fmt: skip
    """One for each kind of memory that the options ask for; `joined`: the training split with regenerated rows."""
    found: list[Builder] = []
    kind, bounds = config["memory"], (config["memory_min_length"], config["memory_max_length"])
    if kind in ("pairs", "both"):
        found.append(PairBuilder(queries, *bounds, float(config["memory_thin"] or 0)))
    if kind in ("patterns", "both"):
        span, support, desc = config["memory_span"], config["memory_min_support"], "Mine patterns" if progress else None
        found.append(PatternBuilder(train, span, support, *bounds, desc))
    if joined is not None:
        found.append(RegeneratedBuilder(joined, *bounds))
    return found


def _within(positions: np.ndarray, min_length: int, max_length: Optional[int]) -> np.ndarray:
    """Which prefixes are of an allowed length, bool [N]."""
    return (positions >= min_length) & (positions <= (np.inf if max_length is None else max_length))


def _when_frequent(patterns: np.ndarray, times: np.ndarray, min_support: int) -> np.ndarray:
    """The `min_support`-th earliest of the times [M] of each pattern; `patterns` [M] ascend."""
    order = np.lexsort((times, patterns))
    first = np.searchsorted(patterns, np.arange(patterns.max(initial=-1) + 1))
    return times[order][first + min_support - 1]


def thinned(keys: np.ndarray, targets: np.ndarray, cosine: float) -> np.ndarray:
    """Rows to keep of keys [N, H], ascending: none is nearer than `cosine` to an earlier one of the same target [N]."""
    unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
    order = np.argsort(targets, kind="stable")
    kept = np.ones(len(keys), dtype=bool)
    for group in np.split(order, np.flatnonzero(np.diff(targets[order])) + 1):
        near = np.triu(unit[group] @ unit[group].T >= cosine - 1e-6, 1)
        for row in np.flatnonzero(near.any(axis=1)):
            if kept[group[row]]:
                kept[group[near[row]]] = False
    return np.flatnonzero(kept)


class NeighbourCache:
    """Searches of a directory, under the hash of everything they rest on: queries, entries, what bars which.

    The best K of an exact search are the first of its best K' > K, so a search for more serves one for fewer.
    Approximate indexes are not cached: theirs are not, and they are fast. A search that is killed goes on where it was.

    Args:
        directory: made when something is stored.
        keep: searches kept in it.
        least: neighbours that are searched where fewer are asked for, so that later searches find them.
    """

    def __init__(self, directory: Path, keep: int = KEEP, least: int = 0):
        self.directory, self.keep, self.least = Path(directory), keep, least

    def search(self, queries: Queries, memory: MemoryBank, top_k: int, desc: Optional[str] = None) -> None:
        """What `Queries.search` does, looked up where it can be."""
        if resolve_kind(memory.index, len(memory)) != "flat":
            queries.search(memory, top_k, desc)
            return
        group, mark = current(), _hash(queries, memory)
        found = group.from_first(lambda: self._read(mark, len(queries), len(memory), top_k))
        if found is not None:
            queries.ids, queries.mask = found.clamp(min=0).to(queries.h.device), (found >= 0).to(queries.h.device)
            return
        searched = max(top_k, self.least)
        kept = self.directory / f"{mark}-{searched}.{group.rank}of{group.size}.partial"
        queries.search(memory, searched, desc, kept)
        assert queries.ids is not None
        assert queries.mask is not None
        ids = torch.where(queries.mask, queries.ids, -1).to(torch.int32).cpu()
        if group.first:
            write_tensors(self.directory / f"{mark}-{searched}.safetensors", {"ids": ids})
            self._prune()
        kept.unlink(missing_ok=True)
        queries.ids, queries.mask = queries.ids[:, :top_k].contiguous(), queries.mask[:, :top_k].contiguous()

    def _read(self, mark: str, rows: int, entries: int, top_k: int) -> Optional[Tensor]:
        """Ids [rows, top_k], -1 where there is none; None: not here."""
        for path in sorted(self.directory.glob(f"{mark}-*.safetensors")):
            stored = path.stem.rpartition("-")[2]
            if not stored.isdecimal() or int(stored) < top_k:
                continue
            try:
                ids = read_tensors(path)[0].get("ids")
            except CheckpointError as error:
                getLogger().warning(f"{error} It is searched again.")
                continue
            whole = ids is not None and ids.dtype == torch.int32 and ids.shape == (rows, int(stored))
            if ids is None or not whole or ids.min() < -1 or ids.max() >= entries:
                getLogger().warning(f"{path} does not hold these neighbours. They are searched again.")
                continue
            with contextlib.suppress(OSError):
                os.utime(path)
            return ids[:, :top_k].long()
        return None

    def _prune(self) -> None:
        with contextlib.suppress(OSError):  # another run may prune too
            for pattern in ("*.safetensors", "*.partial"):
                stored = sorted(self.directory.glob(pattern), key=lambda path: path.stat().st_mtime)
                for path in stored[: -self.keep]:
                    path.unlink()


def _hash(queries: Queries, memory: MemoryBank) -> str:
    digest = hashlib.sha256()
    settings = [SEARCH_VERSION, memory.similarity, memory.retrieve_by, memory.scope, memory.min_support]
    settings += [memory.text_size, memory.text_weight] if memory.text_size else []
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
    for name, values in memory.owners.items():
        add(name, values)
    return digest.hexdigest()[:32]
