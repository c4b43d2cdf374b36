"""Raw recommendation files, read line by line into one record per interaction.

A reader is a generator over an open text stream. It yields :data:`Record` tuples, and a :class:`BadLine` for each piece
of the file it could not use; it raises ``DatasetError`` only for what makes the whole file unusable.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO, Union

from recbole_raserec.errors import DatasetError

#: user, item, rating (nan: none), time, number of the line.
Record = tuple[str, str, float, float, int]


class BadLine(NamedTuple):
    """A line that is no interaction."""

    line: int
    reason: str
    lines: int = 1


Records = Iterator[Union[Record, BadLine]]

#: Column names recognised in a header, in the order of preference, lower case and without RecBole's ":type".
KNOWN = {
    "user": ("user_id", "userid", "user", "uid", "reviewerid", "reviewer_id", "visitorid", "customer_id"),
    "item": (
        "item_id",
        "itemid",
        "item",
        "iid",
        "parent_asin",
        "asin",
        "movieid",
        "movie_id",
        "product_id",
        "productid",
    ),
    "rating": ("rating", "overall", "ratings", "score", "stars", "review/score"),
    "time": ("timestamp", "time", "unixreviewtime", "unix_time", "unixtime", "review/time", "date", "datetime"),
}
SEPARATORS = ("::", "\t", ",", ";", "|")
NONE = "none"
ROLES = ("user", "item", "rating", "time")


def read_sequences(stream: TextIO, sep: str | None = None) -> Records:
    """One user a line, ``user item item ...``; the time of an interaction is its position in the user's history.

    A user met again continues its history. `sep`: separator, None for any white space.
    """
    positions: dict[str, int] = {}
    for number, line in enumerate(stream, start=1):
        fields = line.split(sep) if sep is None else [field.strip() for field in line.rstrip("\r\n").split(sep)]
        if not fields or fields == [""]:
            continue
        if len(fields) < 2 or "" in fields:
            yield BadLine(number, "expected a user followed by at least one item")
            continue
        user, start = fields[0], positions.get(fields[0], 0)
        positions[user] = start + len(fields) - 1
        for place, item in enumerate(fields[1:], start=start):
            yield user, item, math.nan, float(place), number


def read_ratings(
    stream: TextIO,
    sep: str | None = None,
    columns: dict[str, str] | None = None,
    header: bool | None = None,
) -> Records:
    """A table of interactions, one a line.

    Args:
        stream: the text.
        sep: column separator, one or more characters; None: the first of ``:: tab , ; |`` in the first line.
        columns: for "user", "item", "rating", "time" a column's name or position (from 1); "none" for rating or time:
            there is no such column (the order of the lines then stands for the time). What is absent is found by its
            name in the header, and without a header is user, item, rating, time in columns 1 to 4.
        header: whether the first line names the columns; None: when its time column is no time.

    Raises:
        DatasetError: a column cannot be found.
    """
    chosen = {role: value for role, value in (columns or {}).items() if value is not None}
    first = stream.readline()
    if not first:
        return
    if not first.strip():
        raise DatasetError("the first line is blank: expected interactions, or the names of the columns.")
    sep = sep or next((mark for mark in SEPARATORS if mark in first), ",")
    rows = _split_rows(stream, sep, first)
    head = next(rows)
    names = head if isinstance(head, BadLine) else [_plain(name) for name in head[1]]
    if isinstance(names, BadLine):
        raise DatasetError(f"the first line cannot be read: {names.reason}.")
    if header is None:
        header = _looks_like_header(names, chosen)
    user, item, rating, time = _positions(names, chosen, header)
    if not header:
        yield _interaction(head[1], user, item, rating, time, 1)
    for row in rows:
        yield row if isinstance(row, BadLine) else _interaction(row[1], user, item, rating, time, row[0])


def read_amazon(stream: TextIO, columns: dict[str, str] | None = None) -> Records:
    """Amazon reviews, one JSON object a line.

    2014 and 2018 files: reviewerID, asin, overall, unixReviewTime. 2023 files: user_id, parent_asin (else asin),
    rating, timestamp (milliseconds, kept as they are). `columns` may name other keys, as in :func:`read_ratings`.
    """
    defaults = {
        "user": ("reviewerID", "user_id"),
        "item": ("parent_asin", "asin"),
        "rating": ("overall", "rating"),
        "time": ("unixReviewTime", "timestamp"),
    }
    chosen = columns or {}
    keys = {role: (chosen[role],) if chosen.get(role) else defaults[role] for role in ROLES}
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            review = json.loads(line)
        except (ValueError, RecursionError):
            yield BadLine(number, "not a JSON object")
            continue
        if not isinstance(review, dict):
            yield BadLine(number, "not a JSON object")
            continue
        fields = []
        for role in ROLES:
            value = next((review[key] for key in keys[role] if review.get(key) is not None), None)
            fields.append("" if value is None or isinstance(value, (dict, list, bool)) else str(value))
        missing = [" / ".join(keys[role]) for role, value in zip(ROLES, fields) if not value and role != "rating"]
        if missing:
            yield BadLine(number, f"no usable {', '.join(missing)}")
            continue
        yield _interaction(fields, 0, 1, 2 if fields[2] else None, 3, number)


def _split_rows(stream: TextIO, sep: str, first: str) -> Iterator[tuple[int, list[str]] | BadLine]:
    """(number of the line, fields) of each line that is not blank; CSV quotes count when `sep` is one character."""

    def lines() -> Iterator[str]:
        yield first
        yield from stream

    if len(sep) > 1:
        for number, line in enumerate(lines(), start=1):
            if line.strip():
                yield number, line.rstrip("\r\n").split(sep)
        return
    reader = csv.reader(lines(), delimiter=sep)
    while True:
        before = reader.line_num
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed swallows the lines after it: all of them are lost, and counted.
            yield BadLine(before + 1, f"broken CSV ({error})", max(1, reader.line_num - before))
            continue
        if fields:
            yield before + 1, fields


def _interaction(
    fields: Sequence[str], user: int, item: int, rating: int | None, time: int | None, line: int
) -> Record | BadLine:
    try:
        score = math.nan if rating is None else _finite(float(fields[rating]))
        moment = float(line) if time is None else parse_time(fields[time])
        return fields[user].strip(), fields[item].strip(), score, moment, line
    except IndexError:
        return BadLine(line, f"{len(fields)} column(s) only")
    except ValueError:
        shown = [fields[place] for place in (rating, time) if place is not None]
        return BadLine(line, f"rating or time is not a number: {', '.join(map(repr, shown))}"[:200])


def parse_time(text: str) -> float:
    """A number as it stands, or an ISO date (``2014-07-23``, ``2014-07-23 10:00:00``; UTC unless it says) in seconds.

    Raises:
        ValueError: neither.
    """
    try:
        value = float(text)
    except ValueError:
        date = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        value = (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()
    return _finite(value)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return value


def _plain(name: str) -> str:
    return name.strip().split(":", 1)[0].strip()


def _looks_like_header(names: list[str], chosen: dict[str, str]) -> bool:
    """The first line names the columns when names are asked for or recognised, or when its time column is no time."""
    if any(value.lower() != NONE and not value.isdigit() for value in chosen.values()):
        return True
    if {name.lower() for name in names} & {alias for aliases in KNOWN.values() for alias in aliases}:
        return True
    time = chosen.get("time", "4" if len(names) >= 4 else NONE)
    if not time.isdigit() or not 1 <= int(time) <= len(names):
        return False
    try:
        parse_time(names[int(time) - 1])
    except ValueError:
        return True
    return False


def _positions(names: list[str], chosen: dict[str, str], header: bool) -> tuple[int, int, int | None, int | None]:
    """Places (from 0) of user, item, rating and time; None where there is no such column."""
    listed = f"the header names {', '.join(names)}" if header else f"{len(names)} columns and no header"
    found: dict[str, int] = {}
    for role in ROLES:
        value = chosen.get(role)
        if value is not None and header and value in names:
            found[role] = names.index(value)
        elif value is not None and value.isdigit() and 1 <= int(value) <= len(names):
            found[role] = int(value) - 1
        elif value is not None and not (value.lower() == NONE and role in ("rating", "time")):
            raise DatasetError(f"--{role}_col={value}: no such column ({listed}); positions count from 1.")
    lower = [name.lower() for name in names]
    for place, role in enumerate(ROLES):
        if role in chosen:
            continue
        if header:
            guess = next((lower.index(alias) for alias in KNOWN[role] if alias in lower), None)
        else:
            guess = place if len(names) >= len(ROLES) or place < 2 else None
        if guess is not None and guess not in found.values():
            found[role] = guess
        elif role != "rating":
            remedy = f", or --{role}_col=none if the order of the lines is the order in time" if role == "time" else ""
            raise DatasetError(f"no {role} column ({listed}): give --{role}_col=NAME or =POSITION{remedy}.")
    if len(set(found.values())) < len(found):
        columns = ", ".join(f"{role}: {place + 1}" for role, place in found.items())
        raise DatasetError(
            f"one column is used twice ({columns}): check --user_col, --item_col, --time_col, --rating_col."
        )
    return found["user"], found["item"], found.get("rating"), found.get("time")
