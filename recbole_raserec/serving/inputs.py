"""Histories and events as people have them, lists, numpy, pandas or polars, as external ids; and results back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.errors import InputError, MissingExtraError

#: User, item, time.
Event = tuple[str, str, Optional[float]]


def as_device(name: Optional[str]) -> torch.device:
    """The device of that name, or an InputError; by default a GPU if there is one, else the CPU."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        some = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(
            f"device: {name} cannot be used here ({str(error).splitlines()[0]:.90}); name {some}."
        ) from None
    return found


@dataclasses.dataclass
class Recommendations:
    """Ranked items of N queries.

    Attributes:
        items: external ids, best first; shorter than k where no more were admissible.
        scores: the model's, float32, one array a query; of popularity where `popular`.
        labels: users, or the numbers of the queries.
        dropped: int [N], unknown items that were left out of each history.
        popular: bool [N], nothing known was left of the history, so that the most popular items are given.
    """

    items: list[list[str]]
    scores: list[np.ndarray]
    labels: list[Any]
    dropped: np.ndarray
    popular: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[list[str]]:
        return iter(self.items)

    def __getitem__(self, query: int) -> list[str]:
        return self.items[query]

    def to_numpy(self) -> tuple[np.ndarray, np.ndarray]:
        """Items object [N, k] and scores float32 [N, k], padded with None and NaN."""
        width = max(map(len, self.items), default=0)
        items = np.full((len(self), width), None, dtype=object)
        scores = np.full((len(self), width), np.nan, dtype=np.float32)
        for row, (found, values) in enumerate(zip(self.items, self.scores)):
            items[row, : len(found)], scores[row, : len(found)] = found, values
        return items, scores

    def columns(self) -> dict[str, Any]:
        """A row an item: query, rank (from 1), item, score, popular."""
        lengths = [len(found) for found in self.items]
        return {
            "query": [label for label, length in zip(self.labels, lengths) for _ in range(length)],
            "rank": [rank for length in lengths for rank in range(1, length + 1)],
            "item": [item for found in self.items for item in found],
            "score": np.concatenate([*self.scores, np.empty(0, np.float32)]),
            "popular": np.repeat(self.popular, lengths),
        }

    def to_pandas(self) -> Any:
        """`columns` as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.columns())

    def to_polars(self) -> Any:
        """`columns` as a polars DataFrame; a `MissingExtraError` where polars is not installed."""
        try:
            import polars as pl  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise MissingExtraError("frames", "polars", "the result was asked for as a polars DataFrame") from None
        return pl.DataFrame(self.columns())


def as_sequences(data: Any, names: Sequence[str]) -> tuple[list[list[str]], Optional[list[str]]]:
    """Histories as lists of external ids; and the users of a log, or None.

    Args:
        data: a list of lists of ids; a numpy array of them (2-D, or of objects); a pandas or polars Series of lists; or
            a pandas or polars DataFrame, a log.
        names: columns of a log: user, item and, to sort by, time.

    Raises:
        InputError: it is something else, or an id is neither text nor a whole number.
    """
    if _is_table(data):
        return _of_log(data, names)
    if hasattr(data, "to_list"):
        data = data.to_list()
    elif isinstance(data, np.ndarray):
        data = data.tolist()
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise InputError(f"sequences: {data!r:.80} is no list of histories; write [['item', ...], ...].")
    return [as_ids(row, "sequences", "a history") for row in data], None


def as_events(data: Any, names: Sequence[str]) -> list[Event]:
    """New interactions by external ids, see `Recommender.update`; `names`: a table's columns user, item and time."""
    if _is_table(data):
        data = zip(*_columns(data, names, "events"))
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        raise InputError("events: give a list of (user, item) or (user, item, time).")
    return [_event(event) for event in data]


def as_items(data: Any, columns: Sequence[str]) -> list[dict[str, str]]:
    """Items as text by column, see `Recommender.add_items`; the first of `columns` has their ids."""
    rows = data.to_dicts() if hasattr(data, "to_dicts") else data.to_dict("records") if _is_table(data) else data
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise InputError("items: give a table, or a list of mappings from columns to values.")
    found = []
    for row in rows:
        given = {str(name).partition(":")[0]: value for name, value in row.items()} if isinstance(row, Mapping) else {}
        if missing := [name for name in columns if name not in given]:
            lacking, there = " and no ".join(missing), ", ".join(given) or "no columns"
            raise InputError(f"items: there is no {lacking} ({there}); an item of this model has {', '.join(columns)}.")
        empty = {name: value is None or value != value for name, value in given.items()}
        named = as_id(None if empty[columns[0]] else given[columns[0]], "items")
        texts = {name: "" if empty[name] else str(value) for name, value in given.items()}
        found.append({**texts, columns[0]: named})
    return found


def as_ids(row: Any, name: str, what: str = "a list of ids") -> list[str]:
    """One list of external ids as text; errors call it `name` and `what` it should be."""
    listed = getattr(row, "tolist", None) or getattr(row, "to_list", None)
    row = listed() if listed else row
    if isinstance(row, (str, bytes, dict)) or not isinstance(row, Iterable):
        raise InputError(f"{name}: {row!r:.80} is not {what}; it must be a list of item ids.")
    return [as_id(value, name) for value in row]


def as_id(value: Any, name: str) -> str:
    """One external id as text: text stays, whole numbers are written out."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        try:
            return str(value)
        except ValueError:  # Python writes out at most 4,300 digits
            raise InputError(f"{name}: an id is a number of too many digits; give it as text.") from None
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))  # what pandas makes of whole numbers beside a missing one
    raise InputError(f"{name}: {value!r:.80} is no id; ids are text or whole numbers.")


def _is_table(data: Any) -> bool:
    return hasattr(data, "columns") and hasattr(data, "to_dict")


def _columns(table: Any, names: Sequence[str], what: str) -> list[list[Any]]:
    """The columns `names` of a DataFrame, of which the last, the time, may be missing."""
    user, item, time = names
    missing = [name for name in (user, item) if name not in table.columns]
    if missing:
        raise InputError(
            f"{what}: the table has no column {' and no column '.join(missing)} (it has "
            f"{', '.join(map(str, table.columns))}); rename its columns to {user}, {item} and, where known, {time}."
        )
    return [table[name].to_list() for name in names if name in table.columns]


def _of_log(table: Any, names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The histories of a log, sorted by time where it has one, and their users."""
    columns, time = _columns(table, names, "sequences"), names[2]
    users, items = ([as_id(value, name) for value in column] for name, column in zip(names[:2], columns))
    order: Any = range(len(users))
    if len(columns) == 3:
        times = np.asarray(columns[2], dtype=object)
        if any(value is None or value != value for value in times):
            raise InputError(f"{time}: a value is missing; give all or drop the column.")
        try:
            order = np.argsort(times, kind="stable").tolist()
        except TypeError:
            raise InputError(f"{time}: values cannot be compared; give numbers or dates, none missing.") from None
    found: dict[str, list[str]] = {name: [] for name in users}
    for row in order:
        found[users[row]].append(items[row])
    return list(found.values()), list(found)


def _event(event: Any) -> Event:
    if isinstance(event, Mapping):
        event = [event.get("user"), event.get("item"), event.get("time")]
    if isinstance(event, (str, bytes)) or not isinstance(event, Sequence) or not 2 <= len(event) <= 3:
        raise InputError(f"events: {event!r:.80} is no (user, item) or (user, item, time).")
    time = event[2] if len(event) == 3 else None
    if time is not None:
        if isinstance(time, bool) or not isinstance(time, (int, float, np.number)):
            raise InputError(f"events: the time {time!r:.80} is no number.")
        try:
            time = float(time)
        except OverflowError:  # of a whole number of hundreds of digits
            time = math.inf
        if not math.isfinite(time):
            raise InputError(f"events: the time {time!r} is not finite.")
    user = as_id(event[0], "events")
    if not user:  # which is what the id of a forgotten user is replaced by
        raise InputError("events: the id of a user is empty.")
    try:
        user.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: neither journal nor checkpoint could hold it
        raise InputError(f"events: {user!r:.80} is no id; it cannot be written as UTF-8.") from None
    return user, as_id(event[1], "events"), time
