"""Raw files into RecBole's atomic files: the command `recbole-raserec prepare`.

The file written is sorted by user, then time, equal times in the order of the input: RecBole alone, which rounds times
to 32 bits, takes the actions of two minutes for simultaneous, and leaves them in the order of the file.
"""

from __future__ import annotations

import codecs
import dataclasses
import math
import os
import re
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from recbole_raserec.data.preparation.atomic import write_inter
from recbole_raserec.data.preparation.readers import FORMATS, Options, read
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.storage import fingerprint, locked, raw_format, raw_stem, read_json, sha256, unwritable, write_json

#: In the folder of a data set that a run made of a file: of which content, by which options.
PREPARED = "prepared.json"
#: Options of a run that say how.
FILE_OPTIONS = ("user_col", "item_col", "rating_col", "time_col", "sep", "k_core", "drop_duplicates")


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was read, dropped and written (counts of interactions unless said otherwise)."""

    path: Path
    users: int
    items: int
    interactions: int
    read: int
    bad_lines: int
    first_bad: str
    repeated: int
    duplicates_dropped: int
    k_core: int
    k_core_dropped: int
    how: str  # what was taken for what, a line

    def text(self, following: bool = True) -> str:
        """For the terminal, ending with the command to run next unless it is being run."""
        folder, name = self.path.parent.parent, self.path.parent.name
        lines = [
            self.how,
            f"Wrote {self.path}",
            f"  users         {self.users:>12,}",
            f"  items         {self.items:>12,}",
        ]
        lines.append(f"  interactions  {self.interactions:>12,}   (read: {self.read:,})")
        if self.bad_lines:
            lines.append(f"  bad lines     {self.bad_lines:>12,}   left out; first: {self.first_bad}")
        if self.duplicates_dropped:
            lines.append(f"  duplicates    {self.duplicates_dropped:>12,}   left out (--drop_duplicates)")
        elif self.repeated:
            note = "kept: a user met an item again; --drop_duplicates keeps the first"
            lines.append(f"  repeated      {self.repeated:>12,}   {note}")
        if self.k_core > 1:
            lines.append(f"  {self.k_core}-core dropped {self.k_core_dropped:>12,}")
        if following:
            lines += ["Next:", f"  recbole-raserec run --model=RaSeRec --dataset={name} --data_path={folder}"]
        return "\n".join(lines)


def prepare(source: Any, **options: Any) -> Summary:
    """Convert one raw file or table into `output/name/name.inter`, written whole or not at all.

        prepare(frame, name="shop")  # into dataset/shop/shop.inter
        prepare("log.csv.gz", output="data", time_col="when", k_core=5)  # into data/log/log.inter

    Args:
        source: path of a file, or a pandas or polars DataFrame; or `Options`, which name it.
        options: fields of `Options`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the input cannot be used, too much of it is bad, nothing is left, or the result would overwrite.
        MissingExtraError: polars, which reads Parquet, is not installed.
    """
    chosen = _completed(source if isinstance(source, Options) else Options(source, **options))
    return _prepare(chosen, _checked_target(chosen))


def prepare_file(config: Any) -> None:
    """Prepare the file that a run names as its data set, unless this was done from the same content and options.

    Raises:
        ConfigError, DatasetError: as of `prepare`; or there is another data set of that name.
    """
    source, folder, name = Path(config["dataset_file"]), Path(config["data_path"]), config["dataset"]
    target, note = folder / f"{name}.inter", folder / PREPARED
    given = {option: config[option] for option in FILE_OPTIONS if config[option] is not None}
    chosen = Options(str(source), raw_format(source) or "ratings", str(folder.parent), name, **given, overwrite=True)
    _checked_target(chosen)
    elsewhere = "rename the file, or give another --data_path"
    if target.exists() and not note.is_file():
        raise DatasetError(f"{target.absolute()} exists and was not made of {source}; {elsewhere}.")
    with locked(folder, name):
        known = read_json(note) if note.is_file() else {}
        maker, now = known.get("source", str(source)), fingerprint(given, sha256(source))
        if known.get("fingerprint") == now and target.is_file():
            getLogger().info(f"{known['how']}; prepared before in {folder}")
            return
        if maker != str(source) and Path(maker).is_file():
            raise DatasetError(f"{target.absolute()} was made of {maker}, not of {source}; {elsewhere}.")
        write_json(note, {"source": str(source), "fingerprint": None})  # until the file is there
        try:
            summary = _prepare(chosen, target)
        except DatasetError as error:
            if not target.exists():
                note.unlink()
            hint = "`recbole-raserec prepare --help` has more options"
            raise DatasetError(f"{error}\n(of --dataset={source}; {hint})") from None
        write_json(note, {"source": str(source), "fingerprint": now, "options": given, "how": summary.how})
        getLogger().info(summary.text(following=False))


def _completed(options: Options) -> Options:
    """The options with the format and the name that the file's own name stands for."""
    if not isinstance(options.input, (str, os.PathLike)):
        return options
    form = (raw_format(options.input) or "ratings") if options.format == "auto" else options.format
    return dataclasses.replace(options, format=form, name=options.name or raw_stem(options.input))


def _prepare(options: Options, target: Path) -> Summary:
    source = options.input if isinstance(options.input, (str, os.PathLike)) else "The DataFrame"
    found = read(options)
    log, lines, bad, first_bad = found.log, found.lines, found.bad, found.first_bad
    if not len(log.users):
        why = f"{bad:,} bad lines; first: {first_bad}" if bad else "it is empty"
        raise DatasetError(f"{source} holds no interaction in the format {options.format} ({why}).")
    if bad > options.max_bad * lines:
        what = f"{bad:,} of {lines:,} lines are no interactions in the format {options.format} (first: {first_bad})"
        remedy = f"tolerate such lines with --max_bad={math.ceil(1000 * bad / lines) / 1000}"
        raise DatasetError(f"{source}: {what}. Check --format, --sep and the columns, or {remedy}.")
    total = len(log.users)
    log = log.take(np.lexsort((log.times, log.users)))  # stable: equal times keep the order of the input
    pairs = log.users.astype(np.int64) * len(log.item_tokens) + log.items
    earliest = np.unique(pairs, return_index=True)[1]
    if options.drop_duplicates:
        log = log.take(np.sort(earliest))
    unfiltered = len(log.users)
    log = log.take(k_core(log.users, log.items, options.k_core))
    if not len(log.users):
        raise DatasetError(f"--k_core={options.k_core} leaves none of the {unfiltered:,} interactions: choose less.")
    try:
        write_inter(log, target)
    except OSError as error:
        raise DatasetError(f"{target.absolute()} cannot be written: {error}.") from None
    kept, users, items = len(log.users), len(np.unique(log.users)), len(np.unique(log.items))
    return Summary(
        target, users, items, kept, read=total, bad_lines=bad, first_bad=first_bad, repeated=total - len(earliest),
        duplicates_dropped=total - unfiltered, k_core=options.k_core, k_core_dropped=unfiltered - kept,
        how=found.how,
    )  # fmt: skip


def name_problems(name: str) -> list[str]:
    """What is wrong with the name of a data set to write."""
    if not name:
        return ["--name is not given: name the data set."]
    if not re.fullmatch(r"\w[\w.+-]*", name):
        return [f"--name={name}: use letters, digits, '_', '-', '.', '+'; it names a directory and a file."]
    if name == "ml-100k":
        return [
            "--name=ml-100k: RecBole always reads its own copy under that name; choose another (of a file: rename it)."
        ]
    return []


def _checked_target(options: Options) -> Path:
    """Path of the file to write, once the options make sense."""
    name, form = options.name, options.format
    no_header = form not in ("ratings", "auto") and options.header is not None
    from_file = isinstance(options.input, (str, os.PathLike))
    checks = [
        (form not in FORMATS, f"--format={form}: choose one of {', '.join(FORMATS)}."),
        (options.k_core < 0, f"--k_core={options.k_core}: give 0 (no filter) or a positive number."),
        (not 0 <= options.max_bad <= 1, f"--max_bad={options.max_bad}: give a share between 0 and 1."),
        (options.sep == "", "--sep= is empty: give a separator, or leave the option out to have it found."),
        (
            form in ("amazon", "json") and options.sep,
            f"--sep={options.sep}: JSON lines have no separator; leave it out.",
        ),
        (no_header, f"--header / --no_header: the format {form} has no header; leave it out."),
    ]
    problems = [problem for wrong, problem in checks if wrong] + name_problems(name)
    for role, value in options.columns.items():
        if form == "sequences":
            problems.append(f"--{role}_col={value}: the format sequences has no columns; leave it out.")
        elif value == "":
            problems.append(f"--{role}_col= is empty: give a name or a position.")
    try:
        codecs.lookup(options.encoding)
    except LookupError:
        problems.append(f"--encoding={options.encoding}: no such encoding; for example utf-8 or latin-1.")
    if problems:
        raise ConfigError(problems)
    if from_file and not Path(options.input).is_file():
        what = "is a directory, not a file" if Path(options.input).is_dir() else "does not exist"
        raise DatasetError(f"--input={options.input} {what} (looked at {Path(options.input).absolute()}).")
    target = Path(options.output) / name / f"{name}.inter"
    if problems := unwritable("--output", target):
        raise DatasetError(problems[0])
    if target.exists() and not options.overwrite:
        raise DatasetError(f"{target.absolute()} exists: give --overwrite to replace it, or another --name.")
    return target


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k-core: the largest part of the log in which every user and every item has at least `k` rows.

    Removing a rare item can make a user rare, and so on; the passes are repeated until one removes nothing. The result
    does not depend on the order of the rows. Cost: O(N) a pass, and each pass sees only what the last one left.

    Args:
        users: ids from 0, int [N].
        items: ids from 0, int [N].
        k: smallest number of rows; 0 and 1 keep everything.

    Returns:
        Ascending row numbers; none where there is no k-core.
    """
    rows = np.arange(len(users))
    while k > 1 and len(rows):
        by_user, by_item = users[rows], items[rows]
        frequent = (np.bincount(by_user)[by_user] >= k) & (np.bincount(by_item)[by_item] >= k)
        if frequent.all():
            break
        rows = rows[frequent]
    return rows
