"""A trained model in use: recommendations for any history, from a checkpoint directory alone.

    from recbole_raserec import Recommender

    recommender = Recommender.load("saved/RaSeRec-ml-100k-...")
    recommender.recommend([["50", "172", "181"]], k=10)

Works for RaSeRec, SASRec, DuoRec and RecBole's sequential models trained through the runner. All ids that go in and
come out are external ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_raserec.config import trims
from recbole_raserec.data import POSITION, Catalogue
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.recommendation import wrap_backbone
from recbole_raserec.retrieval import RaSeRec
from recbole_raserec.serving.explain import Explanation, explain
from recbole_raserec.serving.inputs import Recommendations, as_ids, as_sequences
from recbole_raserec.serving.live import NAME as JOURNAL
from recbole_raserec.serving.live import DirectoryLock, LiveMemory
from recbole_raserec.serving.loading import Checkpoint, load_checkpoint
from recbole_raserec.storage import read_manifest

# From external ids to scores: what a question to a trained model becomes on its way to the model.


#: Bytes of scores held at a time.
SCORE_BYTES = 64 << 20

Ids = Optional[Iterable[Any]]


@dataclasses.dataclass
class Query:
    """N histories by internal ids.

    Attributes:
        rows: known items of each history, oldest first, int. users: int64 [N], 0: unknown. labels: for the caller.
        dropped: int64 [N], unknown items left out.
    """

    rows: list[np.ndarray]
    users: np.ndarray
    labels: list[Any]
    dropped: np.ndarray


class TrainedModel(LiveMemory):
    """The questions of a :class:`~recbole_raserec.serving.recommender.Recommender`, by internal ids and as tensors."""

    name: str
    _names: list[str]

    def _query(self, sequences: Any, users: Ids, strict: bool) -> Query:
        given = None if users is None else as_ids(users, "users", "a list of users")
        if sequences is None:
            if given is None:
                raise InputError("sequences: nothing is given; give histories, or `users` whose stored ones to use.")
            rows, labels = self.stored(given), list(given)
            return Query(rows, self._user_numbers(given), labels, np.zeros(len(rows), np.int64))
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
        owners = np.zeros(len(rows), np.int64) if given is None else self._user_numbers(given)
        return Query(rows, owners, list(given) if given is not None else list(range(len(rows))), dropped)

    def _known_items(self, items: Iterable[Any], name: str, strict: bool = False) -> np.ndarray:
        texts = as_ids(items, name)
        if strict:
            unknown = [text for text in texts if text not in self._number]
            if unknown:
                raise InputError(
                    f"{name}: {unknown[0]!r:.80} is no item of this model ({len(unknown)} unknown in all)."
                )
        return np.array([self._number[text] for text in texts if text in self._number], dtype=np.int64)

    def _blocks(self, query: Query) -> Iterable[tuple[int, int, np.ndarray]]:
        """Queries start..stop that are scored together, and which of them have a history."""
        rows = max(1, min(1024, SCORE_BYTES // (4 * len(self.items))))
        for start in range(0, len(query.rows), rows):
            stop = min(start + rows, len(query.rows))
            yield start, stop, np.array([n for n in range(start, stop) if len(query.rows[n])], dtype=np.int64)

    @torch.no_grad()
    def _scored(self, query: Query) -> Iterable[tuple[int, torch.Tensor]]:
        """Scores [n, V] of blocks of queries, popularity where there is no history; and the block's first query."""
        for start, stop, filled in self._blocks(query):
            scores = torch.empty(0)
            if len(filled):
                with self._lock.read():
                    scores = self._all_scores(self._interaction(query, filled))
            if len(filled) < stop - start:
                counts = torch.from_numpy(self.catalogue.counts).float().to(self.device)
                found, scores = scores, counts.repeat(stop - start, 1)
                if len(filled):
                    scores[torch.from_numpy(filled - start)] = found
            yield start, scores

    def _interaction(self, query: Query, numbers: np.ndarray) -> Interaction:
        """What RecBole's models read, for the queries `numbers`, none of them empty."""
        rows = [query.rows[n][-self.longest :] for n in numbers]
        width = max(map(len, rows)) if self._trims else self.longest
        item_seq = np.zeros((len(rows), width), dtype=np.int64)
        for line, row in zip(item_seq, rows):
            line[: len(row)] = row
        users = query.users[numbers]
        if not isinstance(self.model, RaSeRec):  # which looks at both its backbone's users and the memory's
            users = np.where(users < self._trained_users, users, 0)
        fields = {
            self.model.USER_ID: users, self.model.ITEM_SEQ: item_seq,
            self.model.ITEM_SEQ_LEN: np.array([len(row) for row in rows]),
            POSITION: np.array([len(query.rows[n]) for n in numbers]),
        }  # fmt: skip
        return Interaction({name: torch.from_numpy(values) for name, values in fields.items()}).to(self.device)

    def _all_scores(self, interaction: Interaction) -> torch.Tensor:
        """[B, V] of the model."""
        if hasattr(self.model, "full_sort_vectors"):
            h, vectors, bias = self.model.full_sort_vectors(interaction)
            scores = h @ vectors.t()
            return scores if bias is None else scores + bias
        return self.model.full_sort_predict(interaction).reshape(len(interaction), -1)[:, : len(self.items)]

    def _backbone(self) -> Any:
        if isinstance(self.model, RaSeRec):
            return self.model.backbone
        if self._wrapped is None:
            tokens = {self._names[0]: self._trained_users, self._names[1]: len(self.items)}
            try:
                self._wrapped = wrap_backbone(self.model, self.options, _Sizes(tokens))
            except ValueError as error:
                raise InputError(f"{self.name} has no user and item vectors to give: {error}") from None
        return self._wrapped

    def _user_vectors(self, interaction: Interaction) -> torch.Tensor:
        if isinstance(self.model, RaSeRec):
            return self.model.augment(*self.model.retrieved(interaction))
        names = self.model.ITEM_SEQ, self.model.ITEM_SEQ_LEN, self.model.USER_ID
        return self._backbone().encode(*(interaction[name] for name in names))

    def _item_vectors(self) -> torch.Tensor:
        return self._backbone().item_vectors()


class _Sizes:
    """Numbers of users and items by field."""

    def __init__(self, sizes: dict[str, int]):
        self.num = sizes.__getitem__


class Recommender(TrainedModel):
    """A trained sequential model in use; :meth:`load` makes one of a checkpoint directory.

    All ids that go in and come out are external ones. Calls from several threads are safe, during updates too.

    Args:
        checkpoint: a reloaded checkpoint.
        catalogue: its items and histories.
        directory: where the checkpoint lies.

    Attributes:
        items: external ids of the items by internal ones, [V]; the first is that of the padding.
        titles: their names for people [V], or None where the data set had none.
        users: external ids of the users by internal ones; the first is that of the padding.
        longest: the model reads the last that many items of a history.
    """

    def __init__(self, checkpoint: Checkpoint, catalogue: Catalogue, directory: Path):
        model = checkpoint.model
        if not isinstance(model, SequentialRecommender):
            raise CheckpointError(
                f"{directory} holds a {type(model).__name__}, which reads no histories; recommendations for a history "
                "need a sequential model."
            )
        super().__init__(directory, checkpoint.users, catalogue, checkpoint.applied)
        self.model, self.options = model, checkpoint.options
        self.name, self.dataset = checkpoint.manifest["model"], checkpoint.manifest.get("dataset")
        self.fingerprint = checkpoint.manifest["fingerprint"]
        self.device = torch.device(self.options["device"])
        self.items: list[str] = checkpoint.vocabulary.tokens[model.ITEM_ID]
        self.titles = catalogue.titles
        self.longest = int(self.options["MAX_ITEM_LIST_LENGTH"])
        self._number = {token: number for number, token in enumerate(self.items) if number}
        self._trained_users = len(checkpoint.vocabulary.tokens[model.USER_ID])
        self._trims = model.backbone.trims if isinstance(model, RaSeRec) else trims(model)
        self._names = [self.options[name] for name in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]

    @classmethod
    def load(cls, directory: Union[str, Path], device: Optional[str] = None, journal: bool = False) -> Recommender:
        """Load a finished run, with what :meth:`save` added to it since.

        Args:
            directory: checkpoint directory, named by the run's last line. device: default: a GPU if there is one.
            journal: keep a journal of updates in it: they survive a crash, and what one holds is taken up. One process
                at a time may do so.

        Raises:
            CheckpointError: a part is missing, damaged or foreign, the model reads no histories, or another process
                keeps the journal.
        """
        if journal:
            read_manifest(directory)  # no lock is left in a directory that is no checkpoint
        # Before anything is read: what another process saves meanwhile would be missing here, and in the next save.
        held = DirectoryLock(Path(directory)) if journal else None
        try:
            checkpoint = load_checkpoint(directory, device)
            catalogue = Catalogue.load(checkpoint.parts, len(checkpoint.users), checkpoint.vocabulary.item_num)
            found = cls(checkpoint, catalogue, Path(directory))
            if journal:
                found.keep_journal(Path(directory) / JOURNAL)
        except BaseException:
            if held is not None:
                held.release()
            raise
        found._held = held
        return found

    # -- what people ask --------------------------------------------------------------------------------------------

    def recommend(
        self, sequences: Any = None, k: int = 10, exclude_seen: bool = True, candidates: Ids = None,
        exclude: Ids = None, users: Ids = None, strict: bool = False,
    ) -> Recommendations:  # fmt: skip
        """The k best items for each history.

        Args:
            sequences: histories, oldest item first, of any length (the model reads the last MAX_ITEM_LIST_LENGTH), see
                :func:`~recbole_raserec.serving.inputs.as_sequences`; None: the stored ones of `users`.
            k: items wanted, at least 1.
            exclude_seen: leave the items of the whole given history out.
            candidates: rank only these items. exclude: leave these out. Unknown ones among both change nothing.
            users: one a history: external ids of users. Memories of their own that lie at or behind the end of the
                history are not used. Unknown ones are users without memories.
            strict: an unknown item in a history is an error; otherwise it is dropped, and counted in the result.

        Returns:
            fewer than k items where fewer are admissible. A history of which nothing is known gets the most popular
            items, marked in `popular`.

        Raises:
            InputError: the question does not make sense.
        """
        k = _positive("k", k)
        query = self._query(sequences, users, strict)
        allowed = None if candidates is None else self._known_items(candidates, "candidates")
        barred = self._known_items(exclude, "exclude") if exclude is not None else np.empty(0, np.int64)
        items: list[list[str]] = []
        values: list[np.ndarray] = []
        for start, scores in self._scored(query):
            admitted = scores
            if allowed is not None:
                admitted = torch.full_like(scores, -torch.inf)
                admitted[:, allowed] = scores[:, allowed]
            admitted[:, 0] = -torch.inf
            admitted[:, barred] = -torch.inf
            if exclude_seen:
                seen = query.rows[start : start + len(scores)]
                owners = np.repeat(np.arange(len(seen)), [len(row) for row in seen])
                admitted[owners, np.concatenate(seen)] = -torch.inf
            best, place = admitted.topk(min(k, admitted.shape[1]), dim=1)
            for found, numbers in zip(best.cpu().numpy(), place.cpu().numpy()):
                count = int(np.isfinite(found).sum())
                items.append([self.items[number] for number in numbers[:count]])
                values.append(found[:count].astype(np.float32))
        popular = np.array([not len(row) for row in query.rows], dtype=bool)
        return Recommendations(items, values, query.labels, query.dropped, popular)

    def score(
        self, sequences: Any = None, candidates: Ids = None, users: Ids = None, strict: bool = False
    ) -> np.ndarray:
        """The scores by which :meth:`recommend` ranks.

        Args:
            sequences, users, strict: as of :meth:`recommend`.
            candidates: external ids of the items to score, C of them; None: all in the order of :attr:`items` without
                the padding, its first.

        Returns:
            float32 [N, C].

        Raises:
            InputError: also: a candidate is unknown.
        """
        query = self._query(sequences, users, strict)
        numbers: Any = slice(1, None)
        if candidates is not None:
            numbers = self._known_items(candidates, "candidates", strict=True)
        parts = [scores[:, numbers].cpu().numpy() for _, scores in self._scored(query)]
        width = len(self.items) - 1 if candidates is None else len(numbers)
        return np.concatenate([np.empty((0, width), np.float32), *parts])

    @torch.no_grad()
    def encode(self, sequences: Any = None, users: Ids = None, strict: bool = False) -> np.ndarray:
        """User vectors as they enter the dot product with the items'.

        Args:
            sequences, users, strict: as of :meth:`recommend`.

        Returns:
            float32 [N, H], zeros for an empty history.

        Raises:
            InputError: also: the model does not score by a dot product.
        """
        query = self._query(sequences, users, strict)
        vectors: Any = None
        for _, _, filled in self._blocks(query):
            if not len(filled):
                continue
            with self._lock.read():
                part = self._user_vectors(self._interaction(query, filled))
            if vectors is None:
                vectors = np.zeros((len(query.rows), part.shape[1]), np.float32)
            vectors[filled] = part.cpu().numpy()
        return np.empty((len(query.rows), 0), np.float32) if vectors is None else vectors

    @torch.no_grad()
    def similar_items(self, items: Iterable[Any], k: int = 10) -> Recommendations:
        """The k items whose vectors have the largest cosine with each of `items`.

        Args:
            items: external ids, N of them.
            k: items wanted for each, at least 1.

        Returns:
            N rows; the scores are the cosines, the labels `items`.

        Raises:
            InputError: an item is unknown, or the model has no item vectors.
        """
        k, numbers = _positive("k", k), self._known_items(items, "items", strict=True)
        with self._lock.read():
            vectors = torch.nn.functional.normalize(self._item_vectors(), dim=1)
            cosine = vectors[numbers] @ vectors.t()
        cosine[:, 0] = -torch.inf
        cosine[torch.arange(len(numbers)), numbers] = -torch.inf
        best, place = cosine.topk(min(k, max(len(self.items) - 2, 1)), dim=1)
        keep = [np.isfinite(row) for row in best.cpu().numpy()]
        found = [[self.items[n] for n in row[ok]] for row, ok in zip(place.cpu().numpy(), keep)]
        values = [row[ok] for row, ok in zip(best.cpu().numpy(), keep)]
        none = np.zeros(len(numbers), dtype=np.int64)
        return Recommendations(found, values, [self.items[n] for n in numbers], none, none.astype(bool))

    def explain(self, sequence: Any = None, k: int = 5, user: Any = None, strict: bool = False) -> Explanation:
        """Why these k items: the memories that were retrieved, and what they add to each item's score.

        Args:
            sequence: one history of external ids; None: the stored one of `user`. k, strict: as of :meth:`recommend`.
            user: whose history it is, if that is known.

        Raises:
            InputError: the question does not make sense, nothing is known of the history, or the model has no memory.
        """
        k = _positive("k", k)
        query = self._query(None if sequence is None else [sequence], None if user is None else [user], strict)
        if not len(query.rows[0]):
            raise InputError("sequence: nothing is known of this history, so there is nothing to explain.")
        if not isinstance(self.model, RaSeRec):
            raise InputError(f"{self.name} has no memory to explain by; explanations need a RaSeRec checkpoint.")
        with self._lock.read():
            return explain(self, query, self._interaction(query, np.array([0])), k)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name}: {value!r:.80} is no number of items; it must be a whole number from 1 on.")
    return int(value)
