"""What a checkpoint knows beyond its weights: how popular each item is, what it is called, how its text is read, what
every user did, and what the model reads of the data set beside sequences (`Features`).

Histories end before the test targets, as the test itself sees them; what was held out can be brought in by an update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.config import Config
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.item_text import ItemFeatures
from recbole_raserec.errors import CheckpointError
from recbole_raserec.storage import (
    HISTORIES,
    ITEM_TEXT,
    ITEMS,
    part_of,
    read_arrays,
    read_json,
    read_tensors,
    write_arrays,
    write_json,
    write_tensors,
)

_KIND, _VERSION = "user histories", 1
_ARRAYS = {"offsets": "<i8", "items": "<i4"}


class Histories:
    """Items of each user in the order of time, by internal ids; they grow and are forgotten while a checkpoint serves.

    User u has `items[offsets[u]:offsets[u + 1]]`; `offsets` are int64 [U + 1], `items` int [N].
    """

    def __init__(self, offsets: np.ndarray, items: np.ndarray):
        self._offsets, self._items, self._users = offsets, items, len(offsets) - 1
        self._changed: dict[int, np.ndarray] = {}  # replaced as a whole: a reader keeps what it holds

    def __len__(self) -> int:
        """User ids in use, that of the padding included."""
        return self._users

    def of(self, user: int) -> np.ndarray:
        """A user's items, oldest first, int [n]; empty for one that nothing is known of."""
        if user in self._changed:
            return self._changed[user]
        known = 0 <= user < len(self._offsets) - 1
        return self._items[self._offsets[user] : self._offsets[user + 1]] if known else np.empty(0, np.int32)

    def append(self, user: int, items: np.ndarray) -> None:
        """Add items to the end of a user's history; a new user's number is the next one."""
        self._changed[user] = np.concatenate([self.of(user), np.asarray(items, dtype=np.int32)])
        self._users = max(self._users, user + 1)

    def forget(self, user: int) -> None:
        """Empty a user's history."""
        self._changed[user] = np.empty(0, np.int32)
        self._users = max(self._users, user + 1)

    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All items int32 [N], user after user, and where each user's begin and end, int64 [U + 1]."""
        rows = [self.of(user) for user in range(len(self))]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return np.concatenate([*rows, np.empty(0, np.int32)]).astype(np.int32), offsets

    def save(self, directory: Path) -> None:
        """Write all of it, atomically, into `directory`."""
        items, offsets = self.flat()
        write_arrays(directory, _KIND, _VERSION, {"offsets": offsets, "items": items}, {})

    @classmethod
    def load(cls, directory: Path, n_users: int, n_items: int) -> Histories:
        """Read what `save` wrote; a `CheckpointError` where it is missing, damaged, or of other users or items."""
        arrays, _ = read_arrays(directory, _KIND, _VERSION, _ARRAYS)
        offsets, items = arrays["offsets"], arrays["items"]
        sound = len(offsets) >= 1 and offsets[0] == 0 and offsets[-1] == len(items) and (np.diff(offsets) >= 0).all()
        if not sound or len(offsets) - 1 > n_users or (len(items) and not 0 < items.min() <= items.max() < n_items):
            raise CheckpointError(f"{directory} does not hold histories of this checkpoint's users and items.")
        return cls(offsets, items)


@dataclasses.dataclass
class Catalogue:
    """Items and histories.

    Attributes:
        counts: int64 [V], interactions of each item in the histories.
        titles: [V], names for people; None where the data set has none.
        histories: None where the data set does not keep them (benchmark files).
        features: how items are described, and those that were added later; None of a model that does not read that.
    """

    counts: np.ndarray
    titles: Optional[list[str]]
    histories: Optional[Histories]
    features: Optional[ItemFeatures] = None

    def append(self, titles: list[str], features: ItemFeatures) -> None:
        """Add items without any interaction."""
        assert self.features is not None
        self.counts = np.append(self.counts, np.zeros(len(titles), self.counts.dtype))
        if self.titles is not None:
            self.titles += titles
        self.features = self.features.joined(features)

    def save(self, directory: Path) -> None:
        """Write it into a checkpoint directory."""
        write_json(directory / ITEMS, {"counts": self.counts.tolist(), "titles": self.titles})
        if self.histories is not None:
            self.histories.save(directory / HISTORIES)
        if self.features is not None:
            self.features.save(directory / ITEM_TEXT)

    @classmethod
    def load(cls, directory: Path, n_users: int, n_items: int) -> Catalogue:
        """Read it, or raise a `CheckpointError`; a checkpoint of before there was one: no counts, titles, histories."""
        path = directory / ITEMS
        if not path.is_file():
            return cls(np.zeros(n_items, np.int64), None, None)
        found = read_json(path)
        found = found if isinstance(found, dict) else {}
        counts, titles = found.get("counts"), found.get("titles")
        sound = isinstance(counts, list) and all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        named = titles is None or (isinstance(titles, list) and all(isinstance(title, str) for title in titles))
        if not sound or not named or len(counts or ()) != n_items or (titles is not None and len(titles) != n_items):
            raise CheckpointError(f"{path} does not describe this checkpoint's items; it is damaged or of another one.")
        kept = directory / HISTORIES
        histories = Histories.load(kept, n_users, n_items) if kept.is_dir() else None
        return cls(np.array(counts, dtype=np.int64), titles, histories, read_features(directory))


def read_features(directory: Path) -> Optional[ItemFeatures]:
    """How the items of a checkpoint are described; None where its model does not read that."""
    return ItemFeatures.load(directory / ITEM_TEXT) if (directory / ITEM_TEXT).is_dir() else None


@dataclasses.dataclass
class Features:
    """The data set as a model sees it that reads attributes of items or pre-trained vectors.

    Attributes of users are not kept: they are personal, and would outlive a user who is forgotten.

    Attributes:
        fields: RecBole's type and size of each field, (type, number of values, length of a sequence).
        items: attributes of items by field, [V, ...]; None where the data set has none.
        weights: pre-trained vectors by field.
        personal: names of the attributes of users that were read.
    """

    fields: dict[str, tuple[str, int, Optional[int]]]
    items: Optional[dict[str, Any]]
    weights: dict[str, Any]
    personal: list[str]

    @classmethod
    def of(cls, dataset: Any) -> Optional[Features]:
        """Those of a data set of RecBole; None where it has sequences alone."""
        items, users, weights = dataset.item_feat, dataset.user_feat, dict(dataset._preloaded_weight)
        personal = [] if users is None else [name for name in users.interaction if name != dataset.uid_field]
        if items is None and not weights and not personal:
            return None
        known = {*(items.interaction if items is not None else ()), *weights}
        known |= {dataset.config[name] for name in ("ENTITY_ID_FIELD", "RELATION_ID_FIELD")}
        kinds, lengths = dataset.field2type, dataset.field2seqlen
        fields = {f: (kinds[f].value, int(dataset.num(f)), lengths[f]) for f in sorted(known) if f in kinds}
        return cls(fields, None if items is None else dict(items.interaction), weights, personal)

    def save(self, path: Path) -> None:
        """Write them as one file of tensors."""
        parts = {"items": self.items or {}, "weights": self.weights}
        tensors = {f"{part}.{f}": torch.as_tensor(x) for part, of in parts.items() for f, x in of.items()}
        write_tensors(
            path, tensors, {"fields": self.fields, "items": self.items is not None, "personal": self.personal}
        )

    @classmethod
    def load(cls, path: Path) -> Features:
        """Read what `save` wrote; a `CheckpointError` where it is damaged."""
        tensors, meta = read_tensors(path)
        if not isinstance(meta, dict) or not {"fields", "items", "personal"} <= set(meta):
            raise CheckpointError(f"{path} does not hold what a model reads; it is damaged or of another release.")
        fields = {name: (kind, count, length) for name, (kind, count, length) in meta["fields"].items()}
        weights = {name: value.numpy() for name, value in part_of(tensors, "weights").items()}
        return cls(fields, part_of(tensors, "items") if meta["items"] else None, weights, meta["personal"])


def catalogue_of(splits: Any, config: Config) -> Catalogue:
    """The catalogue of a prepared data set, its `Splits`."""
    dataset = splits.train._dataset
    features = getattr(dataset, "item_features", None)
    features = None if features is None else features.without_items()  # theirs are in the weights
    dataset = getattr(dataset, "original", None) or dataset  # regenerated rows are no user's history
    parts, tokens = [dataset, splits.valid._dataset, splits.test._dataset], splits.vocabulary()["items"]
    titles = read_titles(Path(config["data_path"]) / f"{config['dataset']}.item", tokens)
    if not all(isinstance(part, SequenceDataset) and part.is_lazy for part in parts):
        targets = dataset.inter_feat[dataset.iid_field].numpy()
        return Catalogue(np.bincount(targets, minlength=len(tokens)), titles, None, features)
    users, ends = zip(*(part.windows()[:2] for part in parts))
    users, positions = np.concatenate(users), np.concatenate([*ends[:2], ends[2] - 1])
    items, offsets = parts[-1].store.until(users, positions)
    histories = Histories(offsets, items.astype(np.int32))
    return Catalogue(np.bincount(items, minlength=len(tokens)), titles, histories, features)


def read_titles(path: Path, tokens: list[str]) -> Optional[list[str]]:
    """Names of the items `tokens` from an atomic item file; None without the file or a column of names.

    The column is that of `title_column`. An item that the file lacks has its id.
    """
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = (line.rstrip("\n").split("\t") for line in file)
        header = [column.split(":")[0].lower() for column in next(rows, [])]
        found = title_column(header)
        if found is None or "item_id" not in header:
            return None
        id_at, at = header.index("item_id"), header.index(found)
        names = {row[id_at]: row[at].strip() for row in rows if len(row) > max(id_at, at)}
    return [names.get(token) or token for token in tokens]


def title_column(columns: Iterable[str]) -> Optional[str]:
    """The column with the names of items for people: the first whose name contains `title`, else `name`."""
    return next((column for word in ("title", "name") for column in columns if word in column.lower()), None)
