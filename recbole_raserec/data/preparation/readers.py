"""Raw recommendation files into interactions.

Tables (format `ratings`) are read by pandas in chunks. It counts rows, not lines: a second pass over the file, made
only when something is wrong, finds the line. Two formats are read by hand: `sequences`, whose lines differ in length,
and `amazon`, because `pandas.read_json` turns integer ids beside a missing one into floats, and names no line when one
is no JSON.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import datetime
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_raserec.data.preparation.atomic import MISSING, Log, fits
from recbole_raserec.errors import DatasetError

FORMATS = ("sequences", "ratings", "amazon")
ROLES = ("user", "item", "rating", "time")
SEPARATORS = ("::", "\t", ",", ";", "|")
NONE = "none"
#: Column names recognised in a header, in the order of preference, lower case and without RecBole's ":type".
KNOWN = {
    "user": ("user_id", "userid", "user", "uid", "reviewerid", "reviewer_id", "visitorid", "customer_id"),
    "item": (
        "item_id", "itemid", "item", "iid", "parent_asin", "asin", "movieid", "movie_id", "product_id", "productid",
    ),
    "rating": ("rating", "overall", "ratings", "score", "stars", "review/score"),
    "time": ("timestamp", "time", "unixreviewtime", "unix_time", "unixtime", "review/time", "date", "datetime"),
}  # fmt: skip
#: Keys of a review: the files of 2014 and 2018, then those of 2023 (times in milliseconds, kept as they are).
AMAZON_KEYS = {
    "user": ("reviewerID", "user_id"),
    "item": ("parent_asin", "asin"),
    "rating": ("overall", "rating"),
    "time": ("unixReviewTime", "timestamp"),
}
_NO_NUMBER = "rating or time is missing or not a number"
_UNWRITABLE = "RecBole's tab-separated files cannot hold it. Replace it, or check --format."
_MARK = "\x1f"
_ROWS = 1 << 17  # records between two steps of the progress bar

#: Line, user, item, rating (None: none), time. Without a user the line is no record, and the item is the reason.
Record = tuple[int, Optional[str], str, Any, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `recbole-raserec prepare`, by their names on the command line.

    Attributes:
        input: the raw file, plain or gzip.
        format: "sequences": one user a line, `user item item ...`; the time is the position in the user's history,
            which a later line of the user continues. "ratings": one interaction a line. "amazon": one JSON a line.
        output: directory of the data sets (`data_path` of a run).
        name: name of the data set.
        user_col: The user's column, by name or by position from 1 (amazon: key). None: found by its name in the header;
            without a header it is the first, and item, rating and time are the next.
        item_col: the same of the item.
        rating_col: the same of the rating; "none": there is no such column.
        time_col: the same of the time; "none": the order of the lines is the order in time.
        sep: Separator, one or more characters. None: any white space (sequences), the first of `:: tab , ; |` in the
            first line (ratings).
        header: whether the first line names the columns; None: it does if its time column is no time.
        k_core: keep the k-core only, after `drop_duplicates`; 0 or 1: everything.
        drop_duplicates: keep only the first interaction of a user with an item.
        overwrite: replace an existing file.
        max_bad: largest tolerated share of bad lines.
        encoding: of the input.
    """

    input: str
    format: str
    output: str
    name: str
    user_col: Optional[str] = None
    item_col: Optional[str] = None
    rating_col: Optional[str] = None
    time_col: Optional[str] = None
    sep: Optional[str] = None
    header: Optional[bool] = None
    k_core: int = 0
    drop_duplicates: bool = False
    overwrite: bool = False
    max_bad: float = 0.01
    encoding: str = "utf-8"

    @property
    def columns(self) -> dict[str, str]:
        """The columns chosen, by role."""
        chosen = {role: getattr(self, f"{role}_col") for role in ROLES}
        return {role: value for role, value in chosen.items() if value is not None}


class Reading(NamedTuple):
    """What a raw file holds.

    Attributes:
        log: the interactions in the order of the file.
        lines: number of lines that are not blank.
        bad: how many of them are no interaction.
        first_bad: line and reason of the first of these; empty if there is none.
    """

    log: Log
    lines: int
    bad: int
    first_bad: str


def read(options: Options) -> Reading:
    """Read a raw file.

    Raises:
        DatasetError: The file cannot be read, a column cannot be found, a quote is never closed, or an atomic file
            cannot hold a user or item.
    """
    source, found, refused = options.input, _Found(), False
    try:
        with _opened(options) as (stream, advance):
            if options.format == "ratings":
                frames = _tables(stream, options)
            else:
                frames = _frames((_sequences if options.format == "sequences" else _amazon)(stream, options))
            try:
                for frame in frames:
                    found.add(frame)
                    advance()
            except _Refused as error:
                found.first, refused = error.args, True
        first = found.first
        if first and options.format == "ratings":
            with _opened(options) as (stream, _):
                first = _line_of(first[0], stream, options), first[1]
        where = f"line {first[0]}: {first[1]}" if first else ""
        if refused:
            raise DatasetError(where)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{source} is a damaged gzip file ({error}): fetch it again.") from None
    except OSError as error:
        raise DatasetError(f"{source} cannot be read: {error}.") from None
    except DatasetError as error:
        raise DatasetError(f"{source}: {error}") from None
    lines, *log = (np.concatenate(part) for part in zip(*found.parts))
    tokens = (np.array(list(known), dtype=object) for known in found.known.values())
    good = int(np.count_nonzero(np.diff(lines, prepend=-1)))  # sequences: many interactions a line
    return Reading(Log(*log, *tokens), good + found.bad, found.bad, where)


class _Text(io.TextIOWrapper):
    """Text as pandas can read it: a separator of several bytes, `long_sep`, as `_MARK`; NUL, which would end a field,
    as U+FFFD, which stands for what is not in the encoding."""

    long_sep = ""

    def read(self, size: Optional[int] = -1, /) -> str:
        text = super().read(size)
        if self.long_sep:
            text += self.readline()  # whole lines, so that no separator is cut
            text = text.replace(_MARK, "\ufffd").replace(self.long_sep, _MARK)
        return text.replace("\x00", "\ufffd")


@contextlib.contextmanager
def _opened(options: Options) -> Iterator[tuple[_Text, Callable[[], Any]]]:
    """The text of a plain or gzip file, and a function that moves the progress bar to where the reading is."""
    encoding = "utf-8-sig" if codecs.lookup(options.encoding).name == "utf-8" else options.encoding
    with open(options.input, "rb") as raw, contextlib.ExitStack() as stack:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        data: Any = stack.enter_context(gzip.GzipFile(fileobj=raw)) if compressed else raw
        text = stack.enter_context(_Text(data, encoding, errors="replace", newline=""))
        size, label = os.fstat(raw.fileno()).st_size, f"Reading {Path(options.input).name}"
        bar = stack.enter_context(tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, delay=1))
        yield text, lambda: bar.update(raw.tell() - bar.n)


class _Refused(Exception):
    """Line (of a table: row) and reason for which the whole file is refused."""


class _Found:
    """What was read so far: interactions by internal ids, given in the order of appearance, and what is none."""

    def __init__(self) -> None:
        self.known: dict[str, dict[str, int]] = {"user": {}, "item": {}}
        kinds = (np.int64, np.int32, np.int32, np.float64, np.float64)
        self.parts = [tuple(np.zeros(0, kind) for kind in kinds)]  # line, user, item, rating, time
        self.bad = 0
        self.first: Any = None

    def add(self, frame: pd.DataFrame) -> None:
        """Take the interactions of a frame whose columns are those of `Record`."""
        ratings, times = _numbers(frame["rating"], float), _numbers(frame["time"], parse_time)
        fine = np.isfinite(times) & (np.isfinite(ratings) | frame["rating"].isna().to_numpy())
        reasons = np.where(fine, "", _NO_NUMBER).astype(object)
        reasons = np.where(frame["user"].isna(), frame["item"], reasons)
        for kind, known in self.known.items():
            codes, names = pd.factorize(frame[kind])
            unfit = ["" if name.strip() in known else _unfit(kind, name.strip()) for name in names]
            if any(unfit):
                reasons = np.where(reasons == "", np.array([*unfit, ""], dtype=object)[codes], reasons)
        wrong = np.flatnonzero(reasons != "")
        lines = frame["line"].to_numpy()
        if len(wrong):
            row = next((row for row in wrong if reasons[row].endswith(_UNWRITABLE)), None)
            if row is not None:
                raise _Refused(int(lines[row]), reasons[row])
            reason, given = reasons[wrong[0]], frame[["rating", "time"]].iloc[wrong[0]].dropna()
            if reason == _NO_NUMBER:
                reason = f"{reason}: {', '.join(map(repr, given))}"[:200]
            self.first = self.first or (int(lines[wrong[0]]), reason)
            self.bad += len(wrong)
        kept, ids = np.flatnonzero(reasons == ""), []
        for kind, known in self.known.items():
            codes, names = pd.factorize(frame[kind].iloc[kept])
            numbers = [known.setdefault(name.strip(), len(known)) for name in names]
            ids.append(np.array(numbers, dtype=np.int32)[codes])
        self.parts.append((lines[kept], *ids, ratings[kept], times[kept]))


def _unfit(kind: str, token: str) -> str:
    """Why an atomic file cannot hold a token; empty if it can."""
    if token in MISSING:
        return f"the {kind} is {token!r}, which RecBole reads as missing"
    if "\ufffd" in token:
        return f"the {kind} {token!r} is not in the encoding of the file (--encoding)"
    if fits(token):
        return ""
    fault = "has a tab, a line break or another control character, or begins with a quote"
    return f"the {kind} {token[:80]!r} {fault}; {_UNWRITABLE}"


def _frames(records: Iterator[Record]) -> Iterator[pd.DataFrame]:
    while batch := list(itertools.islice(records, _ROWS)):
        yield pd.DataFrame(batch, columns=["line", *ROLES])


def _sequences(stream: _Text, options: Options) -> Iterator[Record]:
    sep, positions = options.sep, dict[str, int]()
    for number, line in enumerate(stream, start=1):
        fields = line.split() if sep is None else [field.strip() for field in line.rstrip("\r\n").split(sep)]
        if not fields or fields == [""]:
            continue
        if len(fields) < 2 or "" in fields:
            yield number, None, "expected a user followed by at least one item", None, None
            continue
        user, start = fields[0], positions.get(fields[0], 0)
        positions[user] = start + len(fields) - 1
        for position, item in enumerate(fields[1:], start=start):
            yield number, user, item, None, position


def _amazon(stream: _Text, options: Options) -> Iterator[Record]:
    columns = options.columns
    keys = {role: (columns[role],) if columns.get(role) else AMAZON_KEYS[role] for role in ROLES}
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            review = json.loads(line)
        except (ValueError, RecursionError):
            review = None
        if not isinstance(review, dict):
            yield number, None, "not a JSON object", None, None
            continue
        found: dict[str, Any] = {}
        for role in ROLES:
            value = next((review[key] for key in keys[role] if review.get(key) is not None), "")
            found[role] = None if value == "" or isinstance(value, (dict, list, bool)) else str(value)
        missing = [" / ".join(keys[role]) for role in ROLES if found[role] is None and role != "rating"]
        if missing:
            yield number, None, f"no usable {', '.join(missing)}", None, None
        else:
            yield number, found["user"], found["item"], found["rating"], found["time"]


def _tables(stream: _Text, options: Options) -> Iterator[pd.DataFrame]:
    """The rows of a table; in the place of the line stands the number of the row, from 0."""
    sep, header, names = _form(stream, options)
    if not names:  # an empty file
        return
    columns = _positions(names, options.columns, header)
    if not header:
        stream.seek(0)
    stream.long_sep = sep if len(sep.encode()) > 1 else ""
    chunks = pd.read_csv(
        stream, sep=_MARK if stream.long_sep else sep, header=None, names=range(len(names)),
        usecols=sorted(columns.values()), index_col=False,
        quoting=csv.QUOTE_MINIMAL if len(sep) == 1 else csv.QUOTE_NONE, dtype=object, na_filter=False, chunksize=_ROWS,
    )  # fmt: skip
    try:
        for chunk in chunks:
            frame: dict[str, Any] = {role: chunk[columns[role]] if role in columns else None for role in ROLES}
            order = {} if "time" in columns else {"time": chunk.index + 1 + header}
            yield pd.DataFrame({**frame, **order, "line": chunk.index})
    except pd.errors.ParserError:
        raise _Refused(-1, "a quote is opened here and never closed; close or remove it.") from None


def _form(stream: _Text, options: Options) -> tuple[str, bool, list[str]]:
    """Separator, whether the first line is a header, and its fields; the stream is left behind it."""
    first, header = stream.readline(), options.header
    if first and not first.strip():
        raise DatasetError("the first line is blank: expected interactions, or the names of the columns.")
    sep = options.sep or next((mark for mark in SEPARATORS if mark in first), ",")
    try:
        rows = csv.reader(itertools.chain([first], stream), delimiter=sep) if len(sep) == 1 else [first.split(sep)]
        fields = next(iter(rows)) if first else []
    except csv.Error as error:
        raise DatasetError(f"the first line cannot be read: {error}.") from None
    names = [name.strip().split(":", 1)[0].strip() for name in fields]
    return sep, _looks_like_header(names, options.columns) if header is None else header, names


def _line_of(row: int, stream: _Text, options: Options) -> int:
    """The line of a row of a table; of the last row for -1."""
    sep, header, _ = _form(stream, options)
    stream.seek(0)
    limit, line, lines = csv.field_size_limit(1 << 30), 1, []
    try:
        reader: Any = csv.reader(stream, delimiter=sep) if len(sep) == 1 else None
        for fields in reader or ([text] for text in stream):
            if len(fields) > 1 or "".join(fields).strip():  # pandas leaves out blank lines
                lines.append(line)
            line = reader.line_num + 1 if reader else line + 1
    finally:
        csv.field_size_limit(limit)
    return lines[row if row < 0 else row + header]


def _numbers(texts: pd.Series, parse: Callable[[str], float]) -> np.ndarray:
    """The numbers that texts stand for, float [N]; nan where `parse` finds none."""

    def parsed(text: Any) -> float:
        try:
            return parse(text)
        except (ValueError, TypeError):
            return np.nan

    try:
        return texts.to_numpy().astype(np.float64)
    except (ValueError, TypeError):
        return np.array([parsed(text) for text in texts])


def parse_time(text: str) -> float:
    """A number as it stands, or an ISO date (`2014-07-23`, `2014-07-23 10:00:00`; UTC unless it says) in seconds.

    Raises:
        ValueError: neither.
    """
    with contextlib.suppress(ValueError):
        return float(text)
    date = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()


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


def _positions(names: list[str], chosen: dict[str, str], header: bool) -> dict[str, int]:
    """Position (from 0) of each column that there is, by its role."""
    listed = f"the header names {', '.join(names)}" if header else f"{len(names)} columns and no header"
    found: dict[str, int] = {}
    for role, value in chosen.items():
        if header and value in names:
            found[role] = names.index(value)
        elif value.isdigit() and 1 <= int(value) <= len(names):
            found[role] = int(value) - 1
        elif not (value.lower() == NONE and role in ("rating", "time")):
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
    return found
