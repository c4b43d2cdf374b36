"""A checkpoint in use: reloaded without its data set; its users, histories and memory change, and are saved.

A change is in the journal, on the disk, before it takes effect; a save writes all of it into the checkpoint, as a
whole, and empties the journal. So a process that is killed at any moment loses nothing that was acknowledged.

By hand: `ReadWriteLock`, because the standard library has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from filelock import BaseFileLock
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType
from torch.overrides import TorchFunctionMode

from recbole_raserec.config import RETRIEVAL_MODEL, get_model, refused, trims
from recbole_raserec.data import Catalogue, Features, Histories, ItemFeatures, pad_lists, read_features, title_column
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.recommendation import batches_by_length, encode_in_batches, wrap_backbone
from recbole_raserec.retrieval import TRAINING_BUFFERS, MemoryBank, RaSeRec
from recbole_raserec.serving.inputs import Event, as_device
from recbole_raserec.serving.journal import Journal, read_journal
from recbole_raserec.storage import (
    BEST,
    FEATURES,
    HISTORIES,
    MEMORY,
    check_files,
    live_parts,
    load_weights,
    read_ids,
    read_manifest,
    read_weights,
    remove_unused,
    save_parts,
    trained_files,
)

BATCH = 512  # prefixes encoded together
FORGOTTEN = ""  # what the id of a forgotten user is replaced by


class Options(dict):
    """Options as RecBole's models read them: `options["key"]` is None where the key is missing."""

    def __missing__(self, key: str) -> None:
        return None


class Vocabulary:
    """Stands in for a data set where a model asks how many users and items there are, and for what `features` hold.

    Args:
        options: names of the id fields.
        users: external ids by internal ones; the first is that of the padding.
        items: the same.
        features: what the model reads beside sequences.
        item_features: how items are described, where the model reads that.

    Attributes:
        numbers: internal ids of the items by external ones.
        trained_items: number of items that the model was trained with, padding included.
    """

    def __init__(
        self, options: Mapping[str, Any], users: list[str], items: list[str], features: Optional[Features] = None,
        item_features: Optional[ItemFeatures] = None,
    ):  # fmt: skip
        self.uid_field, self.iid_field = options["USER_ID_FIELD"], options["ITEM_ID_FIELD"]
        self.users, self.items, self.item_features = users, items, item_features
        self.user_num, self.item_num, self.trained_items = len(users), len(items), len(items)
        self.numbers = {token: number for number, token in enumerate(items) if number}
        self.inter_feat = {self.iid_field: torch.empty(0, dtype=torch.int64)}  # no training rows here
        self.config, self._features, fields = options, features, features.fields if features else {}
        longest = int(options["MAX_ITEM_LIST_LENGTH"])
        lists = {f"{name}{options['LIST_SUFFIX']}": longest for name in (self.iid_field, *fields)}
        self.field2seqlen = {**lists, **{name: length for name, (_, _, length) in fields.items()}}
        kinds = {self.uid_field: FeatureType.TOKEN, self.iid_field: FeatureType.TOKEN}
        self.field2type = {**kinds, **{name: FeatureType(kind) for name, (kind, _, _) in fields.items()}}

    def append(self, items: list[str]) -> None:
        """Add items behind the others."""
        self.numbers.update({token: number for number, token in enumerate(items, start=self.item_num)})
        self.items += items
        self.item_num += len(items)

    def num(self, field: str) -> int:
        """Number of ids of a field, padding included; of a field of numbers their length."""
        own = {self.uid_field: self.user_num, self.iid_field: self.item_num}
        return own[field] if field in own or self._features is None else self._features.fields[field][1]

    def get_item_feature(self) -> Interaction:
        """Attributes of all items."""
        known = self._features.items if self._features is not None else None
        return Interaction(known if known is not None else {self.iid_field: torch.arange(self.item_num)})

    def get_user_feature(self) -> Interaction:
        """The users' ids; a ValueError where the model was trained with more, which a checkpoint does not hold."""
        if self._features is not None and self._features.personal:
            names = ", ".join(self._features.personal)
            raise ValueError(f"it reads attributes of users ({names}), which are personal and not kept; unload them")
        return Interaction({self.uid_field: torch.arange(self.user_num)})

    def get_preload_weight(self, field: str) -> np.ndarray:
        """Pre-trained vectors of a field."""
        return ({} if self._features is None else self._features.weights)[field]


@dataclasses.dataclass
class Checkpoint:
    """A reloaded checkpoint: the model in evaluation mode with its weights and memory, its options, its ids.

    Attributes:
        vocabulary: users the model was trained with, and all items.
        users: all user ids, those of later updates too.
        applied: number of the last journaled change that the saved parts hold.
        parts: directory of ids and memory.
    """

    model: Any
    options: Options
    vocabulary: Vocabulary
    manifest: dict[str, Any]
    users: list[str]
    applied: int
    parts: Path

    @cached_property
    def longest(self) -> int:
        """The model reads the last that many items of a history."""
        return int(self.options["MAX_ITEM_LIST_LENGTH"])

    def batch(self, histories: Sequence[Sequence[int]], users: np.ndarray) -> tuple[torch.Tensor, ...]:
        """item_seq [B, L], item_seq_len [B] and users [B], on the model's device, of histories, none of them empty."""
        model, longest = self.model, self.longest
        cut = model.backbone.trims if isinstance(model, RaSeRec) else trims(model)
        batch = *pad_lists([row[-longest:] for row in histories], None if cut else longest), users
        return tuple(torch.from_numpy(part).to(self.options["device"]) for part in batch)


def load_checkpoint(directory: Union[str, Path], device: Optional[str] = None) -> Checkpoint:
    """Reload a finished run without its data set.

    Args:
        directory: as named by the run's last line.
        device: for the weights; the default is a GPU if there is one, else the CPU.

    Raises:
        CheckpointError: a part is missing, damaged, or of another run; or the model reads more of the data set than
            the number of its users and items, so that it cannot be rebuilt without it.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    if manifest["version"] == 1:
        getLogger().info(f"{directory} is of version 0.1.0, without checksums of ids and options; a save adds them")
    target = as_device(device)
    name, options, ids = manifest["model"], Options(manifest["options"], device=target), read_ids(directory)
    inner = Options(manifest.get("backbone_options", {}), device=target)
    parts, users, items, applied = live_parts(directory, manifest)
    described, added = read_features(parts), ids["items"][len(ids["items"]) if items is None else items :]
    features = Features.load(directory / FEATURES) if FEATURES in trained_files(directory, manifest) else None
    memory: Any = None
    try:
        retrieval = name == RETRIEVAL_MODEL
        classes = {key: get_model(key) for key in (name, *([inner["model"]] if retrieval else ()))}
        if wrong := [*refused(options, classes), *(refused(inner, classes) if retrieval else ())]:
            raise ValueError("; ".join(wrong))
        vocabulary = Vocabulary(options, ids["users"][:users], ids["items"][:items], features, described)
        if retrieval:
            memory = MemoryBank.load(parts / MEMORY, manifest["fingerprint"])
        kept = sum(entry["bytes"] for entry in trained_files(directory, manifest).values())
        ours = all(found.__module__.partition(".")[0] in ("recbole", "recbole_raserec") for found in classes.values())
        alone = ours and not any(getattr(found, "reads_files", False) for found in classes.values())  # beside it
        room = _Room(8 * kept + (1 << 27)) if alone else contextlib.nullcontext()
        with room:
            model = classes[inner["model"] if retrieval else name](inner if retrieval else options, vocabulary)
        if retrieval:
            backbone = wrap_backbone(model, inner, vocabulary)  # which tries it, on batches of its own
            with room:
                model = RaSeRec(options, vocabulary, backbone)
    except ImportError as error:
        raise CheckpointError(f"{directory} holds a model that is not installed here: {error}.") from None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: {name} cannot be rebuilt from its checkpoint alone ({error!r}).") from None
    if len(added) != (0 if described is None else len(described.text)):
        raise CheckpointError(f"{parts} does not describe each item that was added to {directory}; it is damaged.")
    weights = read_weights(directory, manifest).items()
    load_weights(model, {key: value for key, value in weights if key not in TRAINING_BUFFERS}, directory / BEST)
    if described is not None and added:
        add_items(model, described)
        vocabulary.append(added)
    if isinstance(model, RaSeRec):
        try:
            model.use_memory(memory)
            if model.transitions is not None:
                _observe_all(model, Histories.load(parts / HISTORIES, len(ids["users"]), vocabulary.item_num))
        except ValueError as error:
            raise CheckpointError(f"{parts / MEMORY} does not belong to this model: {error}") from None
    return Checkpoint(model.to(target).eval(), options, vocabulary, manifest, ids["users"], applied, parts)


class _Room(TorchFunctionMode):
    """Raises a ValueError before tensors take more than `left` bytes together: sizes that cannot be the model's."""

    def __init__(self, left: int):
        super().__init__()
        self.left = left

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "clone"):
            sizes = args[0] if args and isinstance(args[0], (list, tuple)) else (*args, *kwargs.get("size", ()))
            sizes = args[0].shape if name == "clone" else sizes
            sizes = [max(1, int(abs(size))) for size in sizes if isinstance(size, (int, float))]
            size = 8 * (max(sizes, default=0) if name == "arange" else math.prod(sizes))
            self.left -= max(size, 1 << 15)  # of many small ones, what Python needs for their modules
            if self.left < 0:
                raise ValueError("its options ask for more than its weights are")
        return func(*args, **kwargs)


def add_items(model: Any, features: ItemFeatures) -> None:
    """Let a model rank more items, behind the others."""
    inner = model.backbone.model if isinstance(model, RaSeRec) else model
    device = next(inner.parameters()).device
    inner.add_items(*(torch.tensor(values, device=device) for values in (features.text, features.numbers)))
    if inner is not model:
        model.backbone.n_items = inner.n_items
        model.add_texts(features)


def _observe_all(model: RaSeRec, histories: Histories) -> None:
    """Count the transitions of all histories."""
    items, offsets = histories.flat()
    starts = np.repeat(offsets[:-1], np.diff(offsets))
    places = np.flatnonzero(np.arange(len(items)) > starts)
    model.observe(items, places, starts[places])


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did.

    Attributes:
        events: taken up.
        memories: added.
        new_users: seen for the first time.
        dropped: events of unknown items.
    """

    events: int
    memories: int
    new_users: int
    dropped: int


class ReadWriteLock:
    """Many readers or one writer; one that waits to write is let in before new readers. Not re-entrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = self._waiting = 0

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Hold it with other readers."""
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Hold it alone: with the condition's own lock, without which no reader enters."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._readers)
            self._waiting -= 1
            try:
                yield
            finally:
                self._condition.notify_all()


class LiveMemory:
    """Users, histories and memory of a checkpoint, and the changes of them.

    Readers hold `lock` together; a change holds it alone, and only for the moment in which it takes effect.

    Attributes:
        users: external ids by internal ones; "" where a user was forgotten.
        numbers: internal ids by external ones, of the users that are known.
        applied: number of the last journaled change that has taken effect.
    """

    def __init__(self, checkpoint: Checkpoint, catalogue: Catalogue, directory: Path):
        self.checkpoint, self.catalogue, self.directory = checkpoint, catalogue, directory
        self.users, self.applied = list(checkpoint.users), checkpoint.applied
        self.numbers = {name: number for number, name in enumerate(self.users) if number and name != FORGOTTEN}
        self.lock = ReadWriteLock()
        self._memory: Any = checkpoint.model.memory if isinstance(checkpoint.model, RaSeRec) else None
        self._changing = threading.Lock()
        self._saved = self.applied
        self._journal: Optional[Journal] = None
        self._closing = contextlib.ExitStack()

    @property
    def histories(self) -> Histories:
        """What the users did; an `InputError` where the checkpoint does not know."""
        if self.catalogue.histories is None:
            raise InputError(f"{self.directory} keeps no histories of users (benchmark files, or an older release).")
        return self.catalogue.histories

    @property
    def unsaved(self) -> int:
        """Changes that only the journal has."""
        return self.applied - self._saved

    @property
    def n_memories(self) -> int:
        """Memories that can be retrieved; 0 of a model without any."""
        return 0 if self._memory is None else self._memory.live

    def numbers_of(self, users: Iterable[str]) -> np.ndarray:
        """Internal ids int64 [N] of external ones; 0 where a user is unknown."""
        return np.array([self.numbers.get(user, 0) for user in users], dtype=np.int64)

    def keep_journal(self, lock: BaseFileLock) -> None:
        """Take up what the journal holds beyond the saved state; journal changes from now on. `close` frees `lock`."""
        self._journal = Journal(self.directory, self.checkpoint.manifest, self.applied)
        for close in (lock.release, self._journal.close):
            self._closing.callback(close)
        self._take_up(self._journal.records)
        remove_unused(self.directory, self.checkpoint.parts)

    def read_journal(self) -> None:
        """Take up what the journal holds beyond the saved state, and write nothing."""
        self._take_up(read_journal(self.directory, self.checkpoint.manifest, self.applied).records)
        self._saved = self.applied

    def _take_up(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            if record["n"] <= self.applied:
                continue
            try:
                if "forget" in record:
                    self._forget(record["forget"])
                elif "items" in record:
                    self._add_items(record["items"], self._described(record["items"]))
                else:
                    self._apply(record["events"])
            except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
                unfit = f"change {record['n']} of its journal is not for this checkpoint ({error!r})"
                raise CheckpointError(f"{self.directory}: {unfit}; restore both from a copy.") from None
            self.applied = record["n"]

    def update(self, events: Sequence[Event]) -> Update:
        """Take up new interactions of known items, see `Recommender.update`."""
        _ = self.histories  # asked before anything is written
        with self._changing:
            if events and self._journal is not None:
                self.applied = self._journal.append({"events": events})
            return self._apply(events)

    def add_items(self, items: Sequence[Mapping[str, str]]) -> None:
        """Take up items without any interaction, see `Recommender.add_items`; each by its columns, with the id."""
        vocabulary = self.checkpoint.vocabulary
        with self._changing:
            counts = Counter(item[vocabulary.iid_field] for item in items)
            known = [name for name, count in counts.items() if count > 1 or name in vocabulary.numbers]
            if known:
                raise InputError(
                    f"items: {known[0]!r:.80} is known already ({len(known)} in all); give new ones, once."
                )
            features = self._described(items)
            if self._journal is not None:
                self.applied = self._journal.append({"items": list(items)})
            self._add_items(items, features)

    def forget(self, user: str) -> int:
        """Forget a user by external id; the number of memories removed."""
        with self._changing:
            if user not in self.numbers:
                return 0
            if self._journal is not None:
                self.applied = self._journal.append({"forget": user})
            return self._forget(user)

    def save(self, target: Path) -> None:
        """See `Recommender.save`."""
        vocabulary = self.checkpoint.vocabulary
        with self._changing:
            ids, trained = (
                {"users": self.users, "items": vocabulary.items},
                (vocabulary.user_num, vocabulary.trained_items),
            )
            here = target.resolve() == self.directory.resolve()
            mark = self._journal.mark if here and self._journal is not None else None
            save_parts(self.directory, target, ids, self._memory, self.catalogue, trained, self.applied, mark)
            if here:
                self._saved = self.applied
                if self._journal is not None:
                    self._journal.clear()

    def close(self) -> None:
        """See `Recommender.close`."""
        self._closing.close()

    def _apply(self, events: Sequence[Event]) -> Update:
        histories, options, item_numbers = self.histories, self.checkpoint.options, self.checkpoint.vocabulary.numbers
        shortest, longest = options["memory_min_length"] or 1, options["memory_max_length"] or math.inf
        new: list[str] = []
        numbers: dict[str, int] = {}
        grown: dict[str, list[int]] = {}
        prefixes: list[list[int]] = []
        rows: list[tuple[int, int, int, float]] = []  # target, user, position, time
        for user, item, time in events:
            if user not in grown:
                number = self.numbers.get(user, len(self.users) + len(new))
                new += [user] if number >= len(self.users) else []
                numbers[user], grown[user] = number, histories.of(number).tolist()
            history, target = grown[user], item_numbers[item]
            if self._memory is not None and shortest <= len(history) <= longest:
                # No more of a prefix than is read: whole ones of a long history would take its length squared.
                prefixes.append(history[-self.checkpoint.longest :])
                rows.append((target, numbers[user], len(history), math.nan if time is None else time))
            history.append(target)
        targets, users, positions, times = map(np.array, zip(*rows)) if rows else [np.empty(0, np.int64)] * 4
        keys = self._keys(prefixes, users) if rows else None
        with self.lock.write():
            self.numbers.update({user: numbers[user] for user in new})
            self.users += new
            for user, items in grown.items():
                added = items[len(histories.of(numbers[user])) :]
                histories.append(numbers[user], np.array(added, dtype=np.int32))
                np.add.at(self.catalogue.counts, added, 1)
                self._observe(items, len(items) - len(added))
            if keys is not None:
                self._memory.add(keys, targets, users, positions, times)
        return Update(len(events), len(rows), len(new), 0)

    def _described(self, items: Sequence[Mapping[str, str]]) -> ItemFeatures:
        assert self.catalogue.features is not None
        return self.catalogue.features.of(items)

    def _add_items(self, items: Sequence[Mapping[str, str]], features: ItemFeatures) -> None:
        vocabulary = self.checkpoint.vocabulary
        names = [item[vocabulary.iid_field] for item in items]
        column = title_column(items[0]) if items else None
        titles = [(item[column] if column else "") or name for item, name in zip(items, names)]
        with self.lock.write():
            add_items(self.checkpoint.model, features)
            vocabulary.append(names)
            self.catalogue.append(titles, features)

    def _forget(self, user: str) -> int:
        number = self.numbers.get(user)
        if number is None:
            return 0
        with self.lock.write():
            removed = 0 if self._memory is None else self._memory.forget(number)
            if self.catalogue.histories is not None:
                np.subtract.at(self.catalogue.counts, self.histories.of(number), 1)
                self._observe(self.histories.of(number), 0, -1)
                self.histories.forget(number)
            self.users[number] = FORGOTTEN
            del self.numbers[user]
        return removed

    def _observe(self, history: Any, start: int, times: int = 1) -> None:
        """Count the transitions to the items of a history from `start` on; with `times` -1 take them out again."""
        places = np.arange(max(start, 1), len(history))
        if len(places) and isinstance(self.checkpoint.model, RaSeRec):
            self.checkpoint.model.observe(np.asarray(history), places, np.zeros_like(places), times)

    def _keys(self, prefixes: list[list[int]], users: np.ndarray) -> np.ndarray:
        """The backbone's vectors [N, H] of prefixes that are no longer than it reads."""
        found = self.checkpoint
        users = np.where(users < found.vocabulary.user_num, users, 0)

        def encode(rows: np.ndarray) -> torch.Tensor:
            return found.model.encode(*found.batch([prefixes[row] for row in rows], users[rows]))

        out = torch.empty(len(prefixes), found.model.memory.hidden_size)
        batches = batches_by_length(np.zeros(len(prefixes), dtype=np.int64), rows=BATCH)  # in the order of the events
        return encode_in_batches(found.model, encode, batches, out).numpy()
