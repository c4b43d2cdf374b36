"""Raw files into RecBole's atomic files: the command `recbole-raserec prepare`.

The file written is sorted by user, then time, equal times in the order of the input. This matters: RecBole holds times
as 32-bit floats, in which Unix seconds of today are multiples of 128, so that a user's actions within two minutes look
simultaneous to it. Its sort (`numpy.argsort(kind="stable")`) leaves such rows in the order of the file, which is the
true one. (With `rm_dup_inter` set, RecBole first sorts by a sort that is not stable; drop duplicates here instead.)
"""

from __future__ import annotations

import codecs
import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from recbole_raserec.data.preparation.atomic import write_inter
from recbole_raserec.data.preparation.readers import FORMATS, Options, read
from recbole_raserec.errors import ConfigError, DatasetError


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

    def text(self) -> str:
        """For the terminal, ending with the command to run next."""
        folder, name = self.path.parent.parent, self.path.parent.name
        lines = [f"Wrote {self.path}", f"  users         {self.users:>12,}", f"  items         {self.items:>12,}"]
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
        lines += ["Next:", f"  recbole-raserec run --model=RaSeRec --dataset={name} --data_path={folder}"]
        return "\n".join(lines)


def prepare(options: Options) -> Summary:
    """Convert one raw file into `output/name/name.inter`, written whole or not at all.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the input cannot be used, too much of it is bad, nothing is left, or the result would overwrite.
    """
    target = _checked_target(options)
    source = options.input
    log, lines, bad, first_bad = read(options)
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
    log = log.take(np.flatnonzero(k_core(log.users, log.items, options.k_core)))
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
    )  # fmt: skip


def _checked_target(options: Options) -> Path:
    """Path of the file to write, once the options make sense."""
    problems = []
    name, form = options.name, options.format
    if form not in FORMATS:
        problems.append(f"--format={form}: choose one of {', '.join(FORMATS)}.")
    if not re.fullmatch(r"\w[\w.+-]*", name):
        problems.append(f"--name={name}: use letters, digits, '_', '-', '.', '+'; it names a directory and a file.")
    if name == "ml-100k":
        problems.append("--name=ml-100k: RecBole always reads its own copy under that name; choose another.")
    if options.k_core < 0:
        problems.append(f"--k_core={options.k_core}: give 0 (no filter) or a positive number.")
    if not 0 <= options.max_bad <= 1:
        problems.append(f"--max_bad={options.max_bad}: give a share between 0 and 1.")
    if options.sep == "":
        problems.append("--sep= is empty: give a separator, or leave the option out to have it found.")
    if form == "amazon" and options.sep:
        problems.append(f"--sep={options.sep}: JSON lines have no separator; leave it out.")
    if form != "ratings" and options.header is not None:
        problems.append(f"--header / --no_header: the format {form} has no header; leave it out.")
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
    if not Path(options.input).is_file():
        what = "is a directory, not a file" if Path(options.input).is_dir() else "does not exist"
        raise DatasetError(f"--input={options.input} {what} (looked at {Path(options.input).absolute()}).")
    target = Path(options.output) / name / f"{name}.inter"
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
        The rows kept, bool [N]; all False when there is no k-core.
    """
    rows = np.arange(len(users))
    while k > 1 and len(rows):
        by_user, by_item = users[rows], items[rows]
        frequent = (np.bincount(by_user)[by_user] >= k) & (np.bincount(by_item)[by_item] >= k)
        if frequent.all():
            break
        rows = rows[frequent]
    mask = np.zeros(len(users), dtype=bool)
    mask[rows] = True
    return mask
