"""Regenerated sequences, and how they join a training split; validation, test and ids stay as they are."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.dataset import POSITION, SEQUENCE, WEIGHT, Rows, SequenceDataset
from recbole_raserec.data.sequences import SequenceStore, pad_rows
from recbole_raserec.errors import CheckpointError, DatasetError
from recbole_raserec.storage import read_arrays, write_arrays

#: Where a sequence comes from.
ORIGINS = ("original", "pattern", "generated")

_KIND, _VERSION = "regenerated sequences", 1
_ARRAYS = {"items": "<i8", "offsets": "<i8", "users": "<i8", "origin": "|u1"}
_WEIGHTS = {"weights": "<f4"}


@dataclasses.dataclass(frozen=True)
class Regenerated:
    """Sequences that join the original ones.

    Attributes:
        items: the sequences one after the other, int64 [N].
        offsets: sequence s is `items[offsets[s]:offsets[s + 1]]`; int64 [S + 1].
        users: whose sequence a generated one was written for, 0 for a mined pattern; int64 [S].
        origin: index into `ORIGINS`, uint8 [S].
        weights: of each item as a target in the loss, float32 [N], or None.
        vocabulary: external ids behind `users` and `items` ("users", "items"), or None; its hash is stored.
        training: hash of the training split it was made from, see `training_hash`; stored.
    """

    items: np.ndarray
    offsets: np.ndarray
    users: np.ndarray
    origin: np.ndarray
    weights: Optional[np.ndarray] = None
    vocabulary: Optional[dict[str, list[str]]] = None
    training: Optional[str] = None

    def __len__(self) -> int:
        return len(self.users)

    def save(self, directory: Path, fingerprint: str) -> None:
        """Store in `directory`, atomically."""
        arrays = {name: getattr(self, name) for name in (*_ARRAYS, *_WEIGHTS) if getattr(self, name) is not None}
        meta = {"fingerprint": fingerprint, "training": self.training, "ids": _ids_hash(self.vocabulary)}
        write_arrays(Path(directory), _KIND, _VERSION, arrays, meta)

    @classmethod
    def load(
        cls, directory: Path, n_users: int, n_items: int, fingerprint: Optional[str] = None,
        vocabulary: Optional[dict[str, list[str]]] = None,
    ) -> Regenerated:  # fmt: skip
        """Read what `save` wrote; `vocabulary`, if given, must be the one it was written with.

        Raises:
            CheckpointError: It is missing, damaged, no such file, of another fingerprint, or of other users and items.
        """
        path = Path(directory)
        arrays, meta = read_arrays(path, _KIND, _VERSION, _ARRAYS, optional=_WEIGHTS)
        meta = meta if isinstance(meta, dict) else {}
        if fingerprint is not None and meta.get("fingerprint") != fingerprint:
            raise CheckpointError(f"{path} was made from other data or options; name another directory, or delete it.")
        parts: dict[str, Any] = {name: np.array(values) for name, values in arrays.items()}
        found = cls(**parts, training=meta.get("training"), vocabulary=vocabulary)
        alike = vocabulary is None or meta.get("ids") == _ids_hash(vocabulary)
        if not alike or not found._fits(n_users, n_items):
            raise CheckpointError(
                f"{path} does not hold sequences of this data set's users and items; name another, or delete it."
            )
        return found

    def only(self, origin: str) -> Regenerated:
        """The sequences of one origin."""
        return self._kept(self.origin == ORIGINS.index(origin))

    def with_ids_of(self, vocabulary: dict[str, list[str]]) -> Regenerated:
        """The same sequences in the numbering of another data set of the same log.

        A model that reads item features numbers items in another order than one that does not. Sequences with an item
        which the other data set does not have are left out; a user it does not have becomes 0.
        """
        if self.vocabulary is None or self.vocabulary == vocabulary:
            return self
        number = {name: {token: i for i, token in enumerate(tokens)} for name, tokens in vocabulary.items()}
        maps = {
            name: np.array([number[name].get(token, 0) for token in tokens], dtype=np.int64)
            for name, tokens in self.vocabulary.items()
        }
        items = maps["items"][self.items]
        fine = np.ones(len(self), dtype=bool)
        fine[np.repeat(np.arange(len(self)), np.diff(self.offsets))[items == 0]] = False
        renumbered = {"items": items, "users": maps["users"][self.users], "vocabulary": vocabulary}
        return dataclasses.replace(self, **renumbered)._kept(fine)

    def _kept(self, fine: np.ndarray) -> Regenerated:
        """The sequences with a True in `fine` [S]."""
        lengths = np.diff(self.offsets)
        inside = np.repeat(fine, lengths)
        return dataclasses.replace(
            self, items=self.items[inside], offsets=np.concatenate([[0], np.cumsum(lengths[fine])]),
            users=self.users[fine], origin=self.origin[fine],
            weights=None if self.weights is None else self.weights[inside],
        )  # fmt: skip

    def _fits(self, n_users: int, n_items: int) -> bool:
        """Whether the arrays describe sequences of so many users and items."""
        size, offsets = len(self), self.offsets
        if offsets.shape != (size + 1,) or self.origin.shape != (size,) or self.items.ndim != 1:
            return False
        if offsets[0] != 0 or offsets[-1] != len(self.items) or (np.diff(offsets) < 1).any():
            return False
        if size and not (self.users.min() >= 0 and self.users.max() < n_users and self.origin.max() < len(ORIGINS)):
            return False
        if size and not (self.items.min() > 0 and self.items.max() < n_items):
            return False
        return self.weights is None or (
            self.weights.shape == self.items.shape and bool(np.isfinite(self.weights).all())
        )


def training_hash(train: Any, vocabulary: dict[str, list[str]]) -> str:
    """Hash of the (user, target) rows of a training split, by external ids, whatever their order."""
    feat = train.inter_feat
    ids = {"users": feat[train.uid_field].numpy(), "items": feat[train.iid_field].numpy()}
    tokens = {name: np.array(vocabulary[name])[values] for name, values in ids.items()}
    order = np.lexsort((tokens["items"], tokens["users"]))
    digest = hashlib.sha256()
    for name in ("users", "items"):
        digest.update("\x00".join(tokens[name][order].tolist()).encode())
    return digest.hexdigest()


def _ids_hash(vocabulary: Optional[dict[str, list[str]]]) -> Optional[str]:
    return None if vocabulary is None else hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def joined(train: Any, extra: Regenerated) -> Any:
    """A copy of a sequential training split with the windows of `extra` as further rows; its `original` is the split.

    Every prefix of a regenerated sequence is a row, as of an original one. It belongs to the user it was written for
    (mined patterns: to the padding user 0), so that models with user vectors find one; its window stands in the store
    behind those of the users, under the column `SEQUENCE`. Fields other than user and item are 0, the time is the
    position.

    Raises:
        DatasetError: the split was read ready-made from benchmark files.
    """
    if not isinstance(train, SequenceDataset):
        return _densely_joined(train, extra)
    if not train.is_lazy:
        raise DatasetError("regeneration: benchmark files have no histories to regenerate; use an interaction log.")
    part, store, feat = copy.copy(train), train.store, train.inter_feat
    lengths = np.diff(extra.offsets)
    owner = np.repeat(np.arange(len(extra)), lengths)
    position = np.arange(len(extra.items)) - extra.offsets[owner]
    times = None if store.times is None else np.concatenate([store.times, position])
    part.store = SequenceStore(
        np.concatenate([store.users(), store.n_users + owner]), np.concatenate([store.items, extra.items]),
        store.n_users + len(extra), store.n_items, times,
    )  # fmt: skip
    known = {train.uid_field: extra.users[owner], train.iid_field: extra.items, train.time_field: position}
    known[train.label_field] = np.ones(len(owner))  # where the log has labels: these are likes
    part._log = _grown(train._log, known, len(owner))
    rows = position > 0
    sequence = {SEQUENCE: store.n_users + owner, POSITION: position}
    sequence[train.item_list_length_field] = np.minimum(position, train.max_item_list_len)
    known = {name: values[rows] for name, values in {**known, **sequence}.items()}
    columns = dict(feat.interaction)
    columns[SEQUENCE] = columns[train.uid_field]
    if extra.weights is not None:  # their mean over the split is 1: the loss is their sum over the rows of a batch
        weights = extra.weights[rows].astype(np.float64)
        scale = (len(feat) + len(weights)) / (len(feat) + weights.sum())
        columns[WEIGHT] = torch.full((len(feat),), scale, dtype=torch.float32)
        known[WEIGHT] = weights * scale
    part.inter_feat = Rows(_grown(columns, known, int(rows.sum())), part)
    part.original = train
    return part


def _densely_joined(train: Any, extra: Regenerated) -> Any:
    """The same for a data set of RecBole with windows as dense tensors (DIEN's): rows of the same columns.

    A list column of items other than the history (DIEN's negatives) holds random items.
    """
    part, feat = copy.copy(train), train.inter_feat
    lengths, longest = np.diff(extra.offsets), train.max_item_list_len
    owner = np.repeat(np.arange(len(extra)), lengths)
    position = np.arange(len(extra.items)) - extra.offsets[owner]
    rows = np.flatnonzero(position)
    kept = np.minimum(position[rows], longest)
    known = {
        train.uid_field: extra.users[owner][rows], train.iid_field: extra.items[rows],
        train.item_list_length_field: kept, train.item_id_list_field: pad_rows(extra.items, rows - kept, kept, longest),
    }  # fmt: skip
    known[train.label_field] = np.ones(len(rows))
    negatives = getattr(train, "neg_item_list_field", None)
    if negatives in feat.interaction:
        drawn = np.random.default_rng(train.config["seed"]).integers(1, train.item_num, (len(rows), longest))
        known[negatives] = np.where(np.arange(longest) < kept[:, None], drawn, 0)
    part.inter_feat = _grown(feat.interaction, known, len(rows))
    part.original = train
    return part


def _grown(columns: Any, known: dict[Any, np.ndarray], size: int) -> Interaction:
    """Columns with `size` more rows: the known ones, and 0 elsewhere."""
    grown = {}
    for name in columns:
        values = columns[name]
        if name in known:
            more = torch.from_numpy(np.ascontiguousarray(known[name])).to(values.dtype)
        else:
            more = values.new_zeros((size, *values.shape[1:]))
        grown[name] = torch.cat([values, more])
    return Interaction(grown)
