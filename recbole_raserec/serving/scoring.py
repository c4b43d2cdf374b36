"""From external ids to scores: what a question to a trained model becomes on its way to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Optional

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_raserec.data.dataset import POSITION
from recbole_raserec.errors import InputError
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.serving.inputs import as_ids, as_sequences
from recbole_raserec.serving.live import LiveMemory

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
