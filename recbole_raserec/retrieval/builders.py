"""What becomes a memory: every <prefix, next item> of the training split, mined patterns, or both."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.data import Patterns, SequenceDataset, mine_patterns
from recbole_raserec.retrieval.queries import Queries, encode_windows

#: Values of the option `memory`.
KINDS = ("pairs", "patterns", "both")

#: Patterns encoded at a time.
BATCH = 4096


@dataclasses.dataclass
class Rows:
    """Entries without their keys; see :meth:`MemoryBank.add` for the columns."""

    targets: np.ndarray
    users: np.ndarray
    positions: np.ndarray
    times: Optional[np.ndarray]
    support: Optional[np.ndarray] = None
    owners: Optional[tuple[np.ndarray, np.ndarray, np.ndarray]] = None


class PairBuilder:
    """``memory: pairs``: every <prefix, target> of the training split; its key is the encoding of the prefix.

    Args:
        queries: the split's windows, encoded.
        min_length, max_length: items of the prefix (before it is cut to the model's longest); None: any.
        thin: leave out a pair whose key has a cosine of at least this with a kept pair of the same target; 0: none.
    """

    def __init__(self, queries: Queries, min_length: int = 1, max_length: Optional[int] = None, thin: float = 0.0):
        keep = queries.positions >= min_length
        if max_length is not None:
            keep &= queries.positions <= max_length
        self._chosen = np.flatnonzero(keep)
        if thin:
            chosen = torch.from_numpy(self._chosen).to(queries.h.device)
            kept = thinned(queries.h[chosen].cpu().numpy(), queries.targets[self._chosen], thin)
            self._chosen = self._chosen[kept]
        taken = queries.take(self._chosen)
        self.rows = Rows(taken.targets, taken.users, taken.positions, taken.times)

    def keys(self, backbone: Any, queries: Queries) -> torch.Tensor:
        """The keys [N, H] under the backbone that encoded `queries`."""
        return queries.h[torch.from_numpy(self._chosen).to(queries.h.device)]


class PatternBuilder:
    """``memory: patterns``: frequent patterns as <pattern without its last item, last item>.

    Mined from the training split alone; a pattern's time is that at which `min_support` histories held it.

    Args:
        train: the training split.
        span, min_support: alpha and beta of :func:`mine_patterns`.
        min_length, max_length: items of the pattern without its last; None: any.
        desc: show a progress bar with this label.
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
        self.patterns: Patterns = mine_patterns(
            items, offsets, span, min_support, least, longest, desc=desc, occurrences=True
        )
        assert self.patterns.occurrences is not None
        owners = self.patterns.occurrences
        times = None
        if store.times is not None:
            times = _when_frequent(owners, store.times[store.offsets[owners[1]] + owners[2]], min_support)
        size, lengths = len(self.patterns), self.patterns.lengths()
        targets = self.patterns.items[self.patterns.offsets[1:] - 1] if size else np.zeros(0, dtype=np.int64)
        self.rows = Rows(targets, np.full(size, -1), lengths - 1, times, self.patterns.support, owners)

    @torch.no_grad()
    def keys(self, backbone: Any, queries: Queries) -> torch.Tensor:
        """The keys [N, H]: the backbone's encodings of the patterns without their last items."""
        device, size = queries.h.device, len(self.patterns)
        found = torch.empty(size, backbone.hidden_size, device=device)
        was_training = backbone.training
        backbone.eval()
        lengths = self.rows.positions  # ascending: patterns come by length
        width = None if backbone.trims else queries.longest
        for start in range(0, size, BATCH):
            part = np.arange(start, min(start + BATCH, size))
            columns = np.arange(int(lengths[part].max()) if width is None else width)
            place = self.patterns.offsets[part][:, None] + columns
            inside = columns < lengths[part][:, None]
            item_seq = np.where(inside, self.patterns.items[np.where(inside, place, 0)], 0)
            found[start : start + len(part)] = backbone.encode(
                torch.from_numpy(item_seq).to(device), torch.from_numpy(lengths[part]).to(device),
                torch.zeros(len(part), dtype=torch.int64, device=device),
            )  # fmt: skip
        backbone.train(was_training)
        return found


class RegeneratedBuilder:
    """``memory_regenerated: true``: <prefix, next item> of the sequences that regeneration generated.

    A generated sequence was written from all of its user's training history: it stands at that history's last place,
    so that the guard bars it from every training query of the user; its time is that of the latest training row. Mined
    patterns come by `memory: patterns`.

    Args:
        joined: the training split with regenerated rows.
        min_length, max_length: items of the prefix; None: any.
    """

    def __init__(self, joined: SequenceDataset, min_length: int = 1, max_length: Optional[int] = None):
        store, feat = joined.store, joined.inter_feat
        rows, positions, targets = joined.windows()
        users = feat[joined.uid_field].numpy()
        last = np.zeros(store.n_users, dtype=np.int64)
        own_users, own_positions, _ = joined.original.windows()
        np.maximum.at(last, own_users, own_positions)
        keep = (rows != users) & (users > 0) & (positions >= min_length)
        if max_length is not None:
            keep &= positions <= max_length
        self._store, self._longest = store, joined.max_item_list_len
        self._windows = rows[keep], positions[keep]
        users = users[keep]
        times = None
        if store.times is not None:  # what was generated rests on all training data
            times = np.full(len(users), store.times[store.offsets[own_users] + own_positions].max(initial=-np.inf))
        self.rows = Rows(targets[keep], users, last[users], times)

    def keys(self, backbone: Any, queries: Queries) -> torch.Tensor:
        """The keys [N, H]: the backbone's encodings of the prefixes."""
        device = queries.h.device
        return encode_windows(backbone, self._store, *self._windows, self._longest, device, owners=self.rows.users)


def _when_frequent(
    owners: tuple[np.ndarray, np.ndarray, np.ndarray], times: np.ndarray, min_support: int
) -> np.ndarray:
    """The `min_support`-th earliest time of each pattern; `owners` ascend by pattern."""
    order = np.lexsort((times, owners[0]))
    first = np.searchsorted(owners[0], np.arange(owners[0].max(initial=-1) + 1))
    return times[order][first + min_support - 1]


def thinned(keys: np.ndarray, targets: np.ndarray, cosine: float) -> np.ndarray:
    """Rows to keep, ascending: none is nearer than `cosine` to an earlier one of the same target.

    Args:
        keys: [N, H]. targets: [N]. cosine: in (0, 1].
    """
    unit = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)
    order = np.argsort(targets, kind="stable")
    kept = np.ones(len(keys), dtype=bool)
    for group in np.split(order, np.flatnonzero(np.diff(targets[order])) + 1):
        near = np.triu(unit[group] @ unit[group].T >= cosine - 1e-6, 1)
        for row in np.flatnonzero(near.any(axis=1)):
            if kept[group[row]]:
                kept[group[near[row]]] = False
    return np.flatnonzero(kept)
