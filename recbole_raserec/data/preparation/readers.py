"""Raw recommendation files into interactions.

Tables (format `ratings`) are read by pandas in chunks. It counts rows, not lines: a second pass over the file, made
only when something is wrong, finds the line. Some formats are read by hand: `sequences`, whose lines differ in length,
and `json` and `amazon`, because `pandas.read_json` turns integer ids beside a missing one into floats, and names no
line when one is no JSON. Parquet is read by polars.
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
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_raserec.data.preparation.atomic import MISSING, Log, fits
from recbole_raserec.errors import DatasetError, MissingExtraError

FORMATS = ("auto", "sequences", "ratings", "json", "parquet", "amazon")
ROLES = ("user", "item", "rating", "time")
SEPARATORS = ("::", "\t", ",", ";", "|")
NONE = "none"
#: Names of columns, by role in the order of preference; which of two on one line is meant is not known. Lower case,
#: letters and digits alone, without RecBole's ":type": `userId`, `user_id` and `User ID` are one name.
KNOWN: dict[str, tuple[str, ...]] = {
    "user": (
        "userid", "user uid", "reviewerid visitorid customerid customer clientid memberid accountid buyerid profileid",
        "sessionid session",
    ),
    "item": (
        "itemid", "item iid", "parentasin",
        "asin movieid movie productid product sku stockcode bookid isbn songid trackid artistid articleid newsid "
        "videoid gameid businessid recipeid",
    ),
    "rating": ("rating", "ratings overall stars starrating score reviewscore reviewrating"),
    "time": (
        "timestamp", "unixreviewtime unixtime unixtimestamp ts", "time datetime date eventtime createdat", "reviewtime",
        "reviewdate eventdate day",
    ),
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
        input: the raw file, plain or gzip; or a pandas or polars DataFrame, whose columns have names.
        format: "sequences": one user a line, `user item item ...`; the time is the position in the user's history,
            which a later line of the user continues. "ratings": one interaction a line. "json": one object a line.
            "parquet". "amazon": reviews of all years. "auto": by the end of the file's name.
        output: directory of the data sets (`data_path` of a run).
        name: name of the data set; empty: that of the file.
        user_col: The user's column, by name or by position from 1 (amazon: key). None: found by its name, see `KNOWN`;
            without a header it is the first, and item, rating and time are the next.
        item_col: as `user_col`.
        rating_col: as `user_col`; "none": there is no such column.
        time_col: as `user_col`; "none": the order of the lines is the order in time.
        sep: Separator, one or more characters. None: any white space (sequences), the first of `:: tab , ; |` in the
            first line (ratings).
        header: whether the first line names the columns; None: it does if its time column is no time.
        k_core: keep the k-core only, after `drop_duplicates`; 0 or 1: everything.
        drop_duplicates: keep only the first interaction of a user with an item.
        overwrite: replace an existing file.
        max_bad: largest tolerated share of bad lines.
        encoding: of the input.
    """

    input: Any
    format: str = "auto"
    output: str = "dataset"
    name: str = ""
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


@dataclasses.dataclass
class Read:
    """A raw file that was read.

    Attributes:
        log: its interactions in the order of the file.
        lines: lines (rows) that are not blank.
        bad: those of them that are no interaction.
        first_bad: line and reason of the first of these; empty if there is none.
        how: what was taken for what, a line.
    """

    log: Log
    lines: int
    bad: int
    first_bad: str
    how: str


def read(options: Options) -> Read:
    """Read a raw file.

    Raises:
        DatasetError: The file cannot be read, a column cannot be found, a quote is never closed, or an atomic file
            cannot hold a user or item.
        MissingExtraError: polars, which reads Parquet, is not installed.
    """
    found, refused, table, by_row = _Found(), False, options.format == "ratings", False
    source = options.input if isinstance(options.input, (str, os.PathLike)) else "the DataFrame"
    try:
        with contextlib.ExitStack() as stack:
            if source is not options.input or options.format == "parquet":
                advance, by_row = (lambda: None), True
                data = _parquet(options.input) if source is options.input else options.input
                frames = _frame(data, options, found)
            else:
                stream, advance = stack.enter_context(_opened(options))
                if table:
                    frames = _tables(stream, options, found)
                elif options.format == "sequences":
                    frames = _frames(_sequences(stream, options))
                else:
                    frames = _frames(_json(stream, options, found))
            try:
                for frame in frames:
                    found.add(frame)
                    advance()
            except _Refused as error:
                found.first, refused = error.args, True
        first = found.first
        if first and table and not by_row:
            with _opened(options) as (stream, _):
                first = _line_of(first[0], stream, options), first[1]
        where = f"{'row' if by_row else 'line'} {first[0]}: {first[1]}" if first else ""
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
    columns = ", ".join(f"{role} = {name}" for role, name in found.columns.items())
    how = f"Read {source} as {options.format if source is options.input else 'a table'}{found.form}"
    how += (f": {columns}" if columns else "") + (" (dates, as seconds since 1970 UTC)" if found.dates else "")
    return Read(Log(*log, *tokens), good + found.bad, found.bad, where, how)


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
        self.columns: dict[str, Any] = {}  # by role, where there are columns
        self.form, self.dates = "", False

    def add(self, frame: pd.DataFrame) -> None:
        """Take the interactions of a frame whose columns are those of `Record`."""
        ratings, times = _numbers(frame["rating"], float), _numbers(frame["time"], float)
        if len(unread := np.flatnonzero(np.isnan(times))):
            times[unread] = _numbers(frame["time"].iloc[unread], parse_time)
            self.dates |= bool(np.isfinite(times[unread]).any())
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
            numbers = (known.setdefault(name.strip(), len(known)) for name in names)
            ids.append(np.fromiter(numbers, dtype=np.int32)[codes])
        self.parts.append((lines[kept], *ids, ratings[kept], times[kept]))


def _unfit(kind: str, token: str) -> str:
    """Why an atomic file cannot hold a token; empty if it can."""
    if token in MISSING:
        return f"the {kind} is {token!r}, which RecBole reads as missing"
    if "\ufffd" in token:
        return f"the {kind} {token!r} is not in the encoding of the file (--encoding)"
    fault = "has a tab, a line break or another control character, or begins with a quote"
    return "" if fits(token) else f"the {kind} {token[:80]!r} {fault}; {_UNWRITABLE}"


def _frames(records: Iterator[Record]) -> Iterator[pd.DataFrame]:
    while batch := list(itertools.islice(records, _ROWS)):
        yield pd.DataFrame(batch, columns=["line", *ROLES])


def _sequences(stream: _Text, options: Options) -> Iterator[Record]:
    sep, positions = options.sep, dict[str, int]()
    for number, line in enumerate(stream, start=1):
        fields = line.split() if sep is None else [field.strip() for field in line.rstrip("\r\n").split(sep)]
        if not fields or fields == [""]:
            continue
        user, *items = fields
        if not items or "" in fields:
            yield number, None, "expected a user followed by at least one item", None, None
            continue
        start = positions.get(user, 0)
        positions[user] = start + len(items)
        yield from ((number, user, item, None, position) for position, item in enumerate(items, start=start))


def _json(stream: _Text, options: Options, found: _Found) -> Iterator[Record]:
    keys = {**AMAZON_KEYS, **{role: (key,) for role, key in options.columns.items() if key}}
    if options.format == "json":
        keys = _keys(stream, options)
        found.columns = {role: key for role, (key, *_) in keys.items()}
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        review = _object(line)
        if not isinstance(review, dict):
            yield number, None, "not a JSON object", None, None
            continue
        values: dict[str, Any] = {} if "time" in keys else {"time": number}
        for role in keys:
            value = next((review[key] for key in keys[role] if review.get(key) is not None), "")
            values[role] = None if value == "" or isinstance(value, (dict, list, bool)) else str(value)
        missing = [" / ".join(keys[role]) for role in keys if values[role] is None and role != "rating"]
        if missing:
            yield number, None, f"no usable {', '.join(missing)}", None, None
        else:
            yield number, values["user"], values["item"], values.get("rating"), values["time"]


def _object(line: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _keys(stream: _Text, options: Options) -> dict[str, tuple[str, ...]]:
    """The key of each role, found among those of the first lines; the stream is at its beginning again."""
    head = list(itertools.islice(stream, 1000))
    if "".join(head).lstrip()[:1] == "[":
        raise DatasetError("it is one JSON list; write one object a line (JSON lines), or read it with pandas.")
    objects = [found for line in head if isinstance(found := _object(line), dict)]
    names = list(dict.fromkeys(key for each in objects for key in each))
    stream.seek(0)
    places = _positions(names, options.columns, True) if names else {}
    return {role: (names[place],) for role, place in places.items()}


def _parquet(path: Any) -> Any:
    try:
        import polars as pl  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingExtraError("frames", "polars", "it reads Parquet files") from None
    with open(path, "rb") as file:
        data: Any = path if file.read(2) != b"\x1f\x8b" else io.BytesIO(gzip.decompress(Path(path).read_bytes()))
    try:
        return pl.read_parquet(data)
    except pl.exceptions.PolarsError as error:
        raise DatasetError(f"it is no Parquet file ({str(error).partition(chr(10))[0]}).") from None


def _frame(table: Any, options: Options, found: _Found) -> Iterator[pd.DataFrame]:
    """The rows of a pandas or polars DataFrame, numbered from 1."""
    names = [str(name) for name in table.columns]
    places = _positions(names, options.columns, True)
    found.columns = {role: names[place] for role, place in places.items()}
    rows = np.arange(1, len(table) + 1)
    columns: dict[str, Any] = {"rating": None, "time": rows, "line": rows}
    for role, place in places.items():
        column = table[table.columns[place]]
        if not isinstance(column, pd.Series):  # of polars; its text of whole numbers is exact, also beside missing ones
            ids = role in ("user", "item") and not column.dtype.is_float()
            column = pd.Series((column.cast(str) if ids else column).to_numpy())
        columns[role] = (_ids if role in ("user", "item") else _values)(column)
    whole = pd.DataFrame(columns)
    yield from (whole.iloc[start : start + _ROWS] for start in range(0, len(whole), _ROWS))


def _ids(column: pd.Series) -> np.ndarray:
    """Ids as texts, empty where one is missing; 5.0 beside a missing one is 5."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(object).where(column.notna(), "").map(str).to_numpy()


def _values(column: pd.Series) -> np.ndarray:
    """Numbers as they are, times in seconds since 1970, anything else as text."""
    if pd.api.types.is_datetime64_any_dtype(column):
        since = pd.to_datetime(column, utc=True) - pd.Timestamp(0, tz="UTC")
        return since.dt.total_seconds().to_numpy()
    if pd.api.types.is_numeric_dtype(column):
        return column.astype("Float64").to_numpy(np.float64, na_value=np.nan)
    return column.map(str, na_action="ignore").to_numpy()


def _tables(stream: _Text, options: Options, found: _Found) -> Iterator[pd.DataFrame]:
    """The rows of a table; in the place of the line stands the number of the row, from 0."""
    sep, header, names = _form(stream, options)
    if not names:  # an empty file
        return
    columns = _positions(names, options.columns, header)
    found.columns = {role: names[place] if header else f"column {place + 1}" for role, place in columns.items()}
    found.form = f" (separator {sep!r}, {'a' if header else 'no'} header)"
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
    sep = {"tab": "\t", "\\t": "\t", "space": " "}.get(options.sep or "", options.sep)
    sep = sep or next((mark for mark in SEPARATORS if mark in first), ",")
    try:
        rows = _rows(itertools.chain([first], stream), sep) if len(sep) == 1 else [first.split(sep)]
        fields = next(iter(rows)) if first else []
    except csv.Error as error:
        raise DatasetError(f"the first line cannot be read: {error}.") from None
    names = [name.strip().split(":", 1)[0].strip() for name in fields]
    return sep, _looks_like_header(names, options.columns) if header is None else header, names


def _rows(lines: Iterable[str], sep: str) -> Any:
    """A reader of these lines, in which NUL, refused on Python 3.10, is what `_Text` makes of it."""
    return csv.reader((line.replace("\x00", "\ufffd") for line in lines), delimiter=sep)


def _line_of(row: int, stream: _Text, options: Options) -> int:
    """The line of a row of a table; of the last row for -1."""
    sep, header, _ = _form(stream, options)
    stream.seek(0)
    limit, line, lines = csv.field_size_limit(1 << 30), 1, []
    try:
        reader: Any = _rows(stream, sep) if len(sep) == 1 else None
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
    """A number as it stands, or an ISO date (`2014-07-23 10:00:00`; UTC unless it says) in seconds, or a ValueError."""
    with contextlib.suppress(ValueError):
        return float(text)
    date = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _looks_like_header(names: list[str], chosen: dict[str, str]) -> bool:
    """The first line names the columns when names are asked for or recognised, or when its time column is no time."""
    if any(value.lower() != NONE and not value.isdigit() for value in chosen.values()):
        return True
    if {_plain(name) for name in names} & {
        alias for tiers in KNOWN.values() for tier in tiers for alias in tier.split()
    }:
        return True
    time = chosen.get("time", "4" if len(names) >= 4 else NONE)
    if not time.isdigit() or not 1 <= int(time) <= len(names):
        return False
    with contextlib.suppress(ValueError):
        parse_time(names[int(time) - 1])
        return False
    return True


def _positions(names: list[str], chosen: dict[str, str], header: bool) -> dict[str, int]:
    """Position (from 0) of each column that there is, by its role."""
    listed = (
        f"the header names {', '.join(names)}"
        if header
        else f"{len(names)} columns and no header; the first line is {', '.join(names)[:120]}"
    )
    found: dict[str, int] = {}
    for role, value in chosen.items():
        if header and value in names:
            found[role] = names.index(value)
        elif value.isdigit() and 1 <= int(value) <= len(names):
            found[role] = int(value) - 1
        elif not (value.lower() == NONE and role in ("rating", "time")):
            raise DatasetError(f"--{role}_col={value}: no such column ({listed}); positions count from 1.")
    for place, role in enumerate(ROLES):
        if role in chosen:
            continue
        guess = place if len(names) >= len(ROLES) or place < 2 else None
        if header:
            guess = _guess(role, names, listed)
        if guess is not None and guess not in found.values():
            found[role] = guess
        elif role != "rating":
            remedy = f", or --{role}_col=none if the order of the lines is the order in time" if role == "time" else ""
            raise DatasetError(f"no {role} column ({listed}): give --{role}_col=NAME or =POSITION{remedy}.")
    if len(set(found.values())) < len(found):
        columns = ", ".join(f"{role}: {place + 1}" for role, place in found.items())
        options = ", ".join(f"--{role}_col" for role in ("user", "item", "time", "rating"))
        raise DatasetError(f"one column is used twice ({columns}): check {options}.")
    return found


def _plain(name: str) -> str:
    """A column's name as `KNOWN` has it."""
    return re.sub(r"[\W_]", "", name.lower())


def _guess(role: str, names: list[str], listed: str) -> Optional[int]:
    """The position of the column whose name says that it has this role; None if there is none."""
    for tier in KNOWN[role]:
        places = [place for place, name in enumerate(names) if _plain(name) in tier.split()]
        if len(places) > 1:
            both = " and ".join(names[place] for place in places)
            raise DatasetError(f"{both} may both be the {role} column ({listed}): choose one by --{role}_col=NAME.")
        if places:
            return places[0]
    return None
