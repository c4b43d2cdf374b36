"""A trained model in use: recommendations for any history, from a checkpoint directory alone.

    from recbole_raserec import Recommender

    recommender = Recommender.load("saved/RaSeRec-ml-100k-...")
    recommender.recommend([["50", "172", "181"]], k=10)

Works for every sequential model that a run has trained. All ids that go in and come out are external ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_raserec.data import POSITION, Catalogue, Histories
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.evaluation import scores
from recbole_raserec.recommendation import Backbone, ItemTable, wrap_backbone
from recbole_raserec.retrieval import RaSeRec
from recbole_raserec.serving.explain import Explanation, explain
from recbole_raserec.serving.inputs import Recommendations, as_events, as_id, as_ids, as_items, as_sequences
from recbole_raserec.serving.journal import lock_directory
from recbole_raserec.serving.live import Checkpoint, LiveMemory, Update, load_checkpoint
from recbole_raserec.storage import read_manifest

SCORE_BYTES = 64 << 20  # of scores held at a time

Ids = Optional[Iterable[Any]]


@dataclasses.dataclass
class Query:
    """N histories by internal ids; `labels` and `dropped` are those of the `Recommendations`."""

    rows: list[np.ndarray]  # known items of each history, oldest first, int64
    users: np.ndarray  # int64 [N]; 0 where the user is unknown
    labels: list[Any]
    dropped: np.ndarray  # int64 [N]


class Recommender:
    """A trained sequential model in use; `load` makes one of a checkpoint directory.

    Calls from several threads are safe, during updates too.

    Attributes:
        items: external ids of the items by internal ones, [V]; the first is that of the padding.
        titles: their names for people [V], or None where the data set had none.
        users: external ids of the users by internal ones; the first is that of the padding.
        longest: the model reads the last that many items of a history.
        live: users, histories and memory, and their changes.
    """

    def __init__(self, checkpoint: Checkpoint, catalogue: Catalogue, directory: Union[str, Path]):
        model, manifest = checkpoint.model, checkpoint.manifest
        if not isinstance(model, SequentialRecommender):
            what = f"{directory} holds a {type(model).__name__}, which reads no histories"
            raise CheckpointError(f"{what}; recommendations for a history need a sequential model.")
        if hasattr(model, "NEG_ITEM_SEQ"):
            what = f"{directory} holds a {type(model).__name__}, which reads sampled negative items beside a history"
            raise CheckpointError(f"{what}, also where it scores; it cannot recommend for a history alone.")
        self.model, self.options, self.catalogue = model, checkpoint.options, catalogue
        self.name, self.dataset, self.fingerprint = manifest["model"], manifest.get("dataset"), manifest["fingerprint"]
        self.live = LiveMemory(checkpoint, catalogue, Path(directory))
        self.items, self.titles, self.users = checkpoint.vocabulary.items, catalogue.titles, self.live.users
        self.longest, self.device = checkpoint.longest, torch.device(self.options["device"])
        self._checkpoint, self._number = checkpoint, checkpoint.vocabulary.numbers
        self._fields = model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.USER_ID
        self._names = [self.options[name] for name in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]

    @classmethod
    def load(cls, directory: Union[str, Path], device: Optional[str] = None, journal: bool = False) -> Recommender:
        """Load a finished run, with what `save` added to it since.

        Args:
            directory: checkpoint directory, named by the run's last line.
            device: default: a GPU if there is one.
            journal: keep a journal of updates in it: they survive a crash, and what one holds is taken up. One process
                at a time may do so.

        Raises:
            CheckpointError: a part is missing, damaged or of another run, the model reads no histories, or another
                process keeps the journal.
        """
        directory = Path(directory)
        if journal:
            read_manifest(directory)  # no lock is left in a directory that is no checkpoint
        # Before anything is read: what another process saves meanwhile would be missing here, and in the next save.
        held = lock_directory(directory) if journal else None
        try:
            checkpoint = load_checkpoint(directory, device)
            catalogue = Catalogue.load(checkpoint.parts, len(checkpoint.users), checkpoint.vocabulary.item_num)
            found = cls(checkpoint, catalogue, directory)
            if held is not None:
                found.live.keep_journal(held)
        except BaseException:
            if held is not None:
                held.release()
            raise
        return found

    def recommend(
        self, sequences: Any = None, k: int = 10, exclude_seen: bool = True, candidates: Ids = None,
        exclude: Ids = None, users: Ids = None, strict: bool = False,
    ) -> Recommendations:  # fmt: skip
        """The k best items for each history.

        Args:
            sequences: histories, oldest item first, of any length (the model reads the last MAX_ITEM_LIST_LENGTH), see
                `as_sequences`; None: the stored ones of `users`.
            k: items wanted, at least 1.
            exclude_seen: leave the items of the whole given history out.
            candidates: rank only these items; unknown ones change nothing.
            exclude: leave these out; unknown ones change nothing.
            users: one a history: external ids of users. Memories of their own that lie at or behind the end of the
                history are not used. Unknown ones are users without memories.
            strict: an unknown item in a history is an error; otherwise it is dropped, and counted in the result.

        Returns:
            fewer than k items where fewer are admissible. A history of which nothing is known gets the most popular
            items, marked in `popular`.

        Raises:
            InputError: the question does not make sense.
        """
        k, query = _positive("k", k), self._query(sequences, users, strict)
        allowed = None if candidates is None else self._known_items(candidates, "candidates")
        barred = self._known_items(() if exclude is None else exclude, "exclude")
        items: list[list[str]] = []
        values: list[np.ndarray] = []
        for start, scored in self._scored(query):
            admitted = scored
            if allowed is not None:
                admitted = torch.full_like(scored, -torch.inf)
                admitted[:, allowed] = scored[:, allowed]
            admitted[:, np.append(0, barred)] = -torch.inf
            if exclude_seen:
                seen = query.rows[start : start + len(scored)]
                owners = np.repeat(np.arange(len(seen)), [len(row) for row in seen])
                admitted[owners, np.concatenate(seen)] = -torch.inf
            found = self._best(admitted, k)
            items += found[0]
            values += found[1]
        popular = np.array([not len(row) for row in query.rows], dtype=bool)
        return Recommendations(items, values, query.labels, query.dropped, popular)

    def score(
        self, sequences: Any = None, candidates: Ids = None, users: Ids = None, strict: bool = False
    ) -> np.ndarray:
        """The scores by which `recommend` ranks, float32 [N, C]; the other arguments are those of it.

        Args:
            candidates: external ids of the items to score, C of them; None: all in the order of `items` without the
                padding, its first.

        Raises:
            InputError: also: a candidate is unknown.
        """
        query = self._query(sequences, users, strict)
        chosen: Any = slice(1, None)
        if candidates is not None:
            chosen = self._known_items(candidates, "candidates", strict=True)
        parts = [scored[:, chosen].cpu().numpy() for _, scored in self._scored(query)]
        width = len(self.items) - 1 if candidates is None else len(chosen)
        return np.concatenate([np.empty((0, width), np.float32), *parts])

    @torch.no_grad()
    def encode(self, sequences: Any = None, users: Ids = None, strict: bool = False) -> np.ndarray:
        """User vectors as they enter the dot product with the items', float32 [N, H], zeros for an empty history.

        Arguments are those of `recommend`.

        Raises:
            InputError: also: the model does not score by a dot product.
        """
        query = self._query(sequences, users, strict)
        vectors: Any = None
        for _, _, filled in self._blocks(query):
            if not len(filled):
                continue
            with self.live.lock.read():
                interaction = self._interaction(query, filled)
                if isinstance(self.model, RaSeRec):
                    h, *found = self.model.retrieved(interaction)
                    part = self.model.augment(h, *found) if self.model.augments else self.model.own(h)
                else:
                    part = self.backbone.encode(*(interaction[name] for name in self._fields))
            if vectors is None:
                vectors = np.zeros((len(query.rows), part.shape[1]), np.float32)
            vectors[filled] = part.cpu().numpy()
        return np.empty((len(query.rows), 0), np.float32) if vectors is None else vectors

    @torch.no_grad()
    def similar_items(self, items: Iterable[Any], k: int = 10) -> Recommendations:
        """The k items whose vectors have the largest cosine with each of the N `items`: N rows, labelled by `items`.

        Args:
            items: external ids.
            k: items wanted for each, at least 1.

        Raises:
            InputError: an item is unknown, or the model has no item vectors.
        """
        k, numbers = _positive("k", k), self._known_items(items, "items", strict=True)
        with self.live.lock.read():
            vectors = torch.nn.functional.normalize(self.backbone.item_vectors(), dim=1)
            cosine = vectors[numbers] @ vectors.T
        cosine[:, 0] = -torch.inf
        cosine[torch.arange(len(numbers)), numbers] = -torch.inf
        none = np.zeros(len(numbers), dtype=np.int64)
        return Recommendations(*self._best(cosine, k), [self.items[n] for n in numbers], none, none.astype(bool))

    def explain(self, sequence: Any = None, k: int = 5, user: Any = None, strict: bool = False) -> Explanation:
        """Why these k items: the memories that were retrieved, and what they add to each item's score.

        Args:
            sequence: one history of external ids; None: the stored one of `user`.
            k: items wanted, at least 1.
            user: whose history it is, if that is known.
            strict: as of `recommend`.

        Raises:
            InputError: the question does not make sense, nothing is known of the history, or the model has no memory.
        """
        k = _positive("k", k)
        query = self._query(None if sequence is None else [sequence], None if user is None else [user], strict)
        if not len(query.rows[0]):
            raise InputError("sequence: nothing is known of this history, so there is nothing to explain.")
        if not isinstance(self.model, RaSeRec):
            raise InputError(f"{self.name} has no memory to explain by; explanations need a RaSeRec checkpoint.")
        with self.live.lock.read():
            return explain(self, query, self._interaction(query, np.array([0])), k)

    @property
    def histories(self) -> Histories:
        """What the users did; an `InputError` where the checkpoint does not know."""
        return self.live.histories

    def stored(self, users: Iterable[str]) -> list[np.ndarray]:
        """Stored histories of users by external ids: an array int64 [n] of internal item ids each, oldest first."""
        return [self.histories.of(number).astype(np.int64) for number in self.live.numbers_of(users)]

    @property
    def n_users(self) -> int:
        """Users that are known: those of the training and of updates, without the forgotten ones."""
        return len(self.live.numbers)

    @property
    def unsaved(self) -> int:
        """Journaled changes since the last `save` into the checkpoint directory."""
        return self.live.unsaved

    def update(self, events: Any, strict: bool = False) -> Update:
        """Take up new interactions: they end their users' histories and join the memory; the next call uses them.

        Args:
            events: (user, item) or (user, item, time) each, in the order they happened; mappings with these keys; or a
                pandas or polars DataFrame with the log's columns. Users may be new, items may not.
            strict: an unknown item is an error, and nothing is taken up; otherwise it is dropped, and counted.

        Raises:
            InputError: an event is none of these.
        """
        listed = as_events(events, self._names)
        unknown = [item for _, item, _ in listed if item not in self._number]
        if unknown and strict:
            raise InputError(_unknown("events", unknown))
        done = self.live.update([event for event in listed if event[1] in self._number])
        return dataclasses.replace(done, dropped=len(unknown))

    def add_items(self, items: Any) -> int:
        """Take up items without any interaction; from then on they are known, and recommended by what their texts say.

        Nothing is trained: their texts are read as those of the other items were, and stand for vectors of their own.

        Args:
            items: a pandas or polars DataFrame, or a list of mappings, with the columns of the data set's item file
                that the model reads.

        Returns:
            the number of items.

        Raises:
            InputError: a column is missing, an item is known or given twice, or the model does not read texts.
        """
        features = self.catalogue.features
        inner = self.model.backbone.model if isinstance(self.model, RaSeRec) else self.model
        if features is None or not isinstance(getattr(inner, "item_embedding", None), ItemTable):
            raise InputError(f"{self.name} ranks items by what it learned of each; train it with item_vectors: both.")
        columns = list(dict.fromkeys([self._names[1], *features.columns, *features.attributes]))
        rows = as_items(items, columns)
        self.live.add_items(rows)
        self.__dict__.pop("backbone", None)  # it knows the number of items
        return len(rows)

    def forget(self, user: Any) -> int:
        """Forget a known user: id, history and memories, in files with the next `save`; the number of memories."""
        return self.live.forget(as_id(user, "user"))

    def save(self, directory: Union[str, Path, None] = None) -> Path:
        """Write users, histories and memory into the checkpoint and empty its journal, or all into `directory`."""
        target = Path(directory) if directory is not None else self.live.directory
        self.live.save(target)
        return target

    def close(self) -> None:
        """Close the journal, and let another process have the directory."""
        self.live.close()

    def _query(self, sequences: Any, users: Ids, strict: bool) -> Query:
        given = None if users is None else as_ids(users, "users", "a list of users")
        if sequences is None:
            if given is None:
                raise InputError("sequences: nothing is given; give histories, or `users` whose stored ones to use.")
            rows = self.stored(given)
            return Query(rows, self.live.numbers_of(given), given, np.zeros(len(rows), np.int64))
        texts, named = as_sequences(sequences, self._names)
        given = named if given is None else given
        if given is not None and len(given) != len(texts):
            raise InputError(f"users: {len(given)} for {len(texts)} histories; give one each.")
        numbers = [[self._number.get(item, 0) for item in row] for row in texts]
        rows = [np.array([n for n in row if n], dtype=np.int64) for row in numbers]
        dropped = np.array([len(row) - len(kept) for row, kept in zip(texts, rows)], dtype=np.int64)
        if strict and dropped.any():
            row = int(np.flatnonzero(dropped)[0])
            unknown = [item for item, n in zip(texts[row], numbers[row]) if not n]
            raise InputError(
                f"sequences: history {row} has {len(unknown)} unknown items, such as {unknown[0]!r:.80}; leave "
                "them out, or pass strict=False, which drops and counts them."
            )
        owners = np.zeros(len(rows), np.int64) if given is None else self.live.numbers_of(given)
        return Query(rows, owners, list(range(len(rows))) if given is None else given, dropped)

    def _known_items(self, items: Iterable[Any], name: str, strict: bool = False) -> np.ndarray:
        texts = as_ids(items, name)
        numbers = [self._number.get(text, 0) for text in texts]
        if strict and not all(numbers):
            raise InputError(_unknown(name, [text for text in texts if text not in self._number]))
        return np.array([number for number in numbers if number], dtype=np.int64)

    def _blocks(self, query: Query) -> Iterable[tuple[int, int, np.ndarray]]:
        """Queries start..stop that are scored together, and which of them have a history."""
        # An update waits for a block, and new readers wait for the update: so blocks are short.
        rows = max(1, min(256, SCORE_BYTES // (4 * len(self.items))))
        for start in range(0, len(query.rows), rows):
            stop = min(start + rows, len(query.rows))
            yield start, stop, np.array([n for n in range(start, stop) if len(query.rows[n])], dtype=np.int64)

    @torch.no_grad()
    def _scored(self, query: Query) -> Iterable[tuple[int, torch.Tensor]]:
        """Each block's first query, and its scores [n, V]: popularity where there is no history."""
        for start, stop, filled in self._blocks(query):
            found = torch.empty(0)
            if len(filled):
                with self.live.lock.read():
                    found = self._all_scores(self._interaction(query, filled))
            if len(filled) < stop - start:
                counts = torch.from_numpy(self.catalogue.counts).float().to(self.device)
                known, found = found, counts.repeat(stop - start, 1)
                if len(filled):
                    found[torch.from_numpy(filled - start)] = known
            yield start, found

    def _interaction(self, query: Query, numbers: np.ndarray) -> Interaction:
        """What RecBole's models read, for the queries `numbers`, none of them empty."""
        rows, users = [query.rows[n] for n in numbers], query.users[numbers]
        if not isinstance(self.model, RaSeRec):  # which looks at both its backbone's users and the memory's
            users = np.where(users < self._checkpoint.vocabulary.user_num, users, 0)
        batch = self._checkpoint.batch(rows, users)
        positions = torch.tensor([len(row) for row in rows], device=batch[0].device)
        return Interaction({**dict(zip(self._fields, batch)), POSITION: positions})

    def _all_scores(self, interaction: Interaction) -> torch.Tensor:
        """[B, V] of the model."""
        if hasattr(self.model, "full_sort_vectors"):
            return scores(*self.model.full_sort_vectors(interaction))
        rows, item = len(interaction), self._names[1]
        interaction.update(Interaction({item: torch.ones(rows, dtype=torch.int64, device=self.device)}))  # some read it
        try:
            return self.model.full_sort_predict(interaction).reshape(rows, -1)[:, : len(self.items)]
        except NotImplementedError:  # a user vector depends on the candidate: one pair of them at a time
            numbers, found = torch.arange(len(self.items), device=self.device), []
            for row in range(rows):
                for part in numbers.split(1024):
                    pairs = interaction[row : row + 1].repeat_interleave(len(part))
                    pairs.update(Interaction({item: part}))
                    found.append(self.model.predict(pairs).reshape(-1))
            return torch.cat(found).view(rows, -1)

    def _best(self, found: torch.Tensor, k: int) -> tuple[list[list[str]], list[np.ndarray]]:
        """The k best items of each row [B, V] and their scores, without those of minus infinity."""
        best = found.topk(min(k, found.shape[1]), dim=1)
        counts = best.values.isfinite().sum(dim=1).tolist()
        values = [row[:count].astype(np.float32) for row, count in zip(best.values.cpu().numpy(), counts)]
        rows = zip(best.indices.cpu().numpy(), counts)
        return [[self.items[number] for number in row[:count]] for row, count in rows], values

    @cached_property
    def backbone(self) -> Backbone:
        """The model as user vectors times item vectors; an `InputError` where it has none."""
        if isinstance(self.model, RaSeRec):
            return self.model.backbone
        try:
            return wrap_backbone(self.model, self.options, self._checkpoint.vocabulary)
        except ValueError as error:
            raise InputError(f"{self.name} has no user and item vectors to give: {error}") from None


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name}: {value!r:.80} is no number of items; it must be a whole number from 1 on.")
    return int(value)


def _unknown(name: str, items: list[str]) -> str:
    return f"{name}: {items[0]!r:.80} is no item of this model ({len(items)} unknown in all)."
