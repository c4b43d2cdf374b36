"""RecBole's atomic interaction files (`.inter`): what a token may be, writing one, and checking one.

Such a file is tab-separated text. Its first line names the columns and their types, `user_id:token`, `item_id:token`,
`rating:float`, `timestamp:float`.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_raserec.errors import DatasetError
from recbole_raserec.storage import replacing

TYPES = ("token", "float", "token_seq", "float_seq")
#: Tokens that RecBole (through pandas) reads as a missing value; it then drops the interaction without a word.
MISSING = frozenset({"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"})
MISSING |= {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ROWS = 1 << 18  # rows written at once
_HEAD = 1 << 16  # bytes read to check a file


@dataclasses.dataclass
class Log:
    """Interactions by internal ids (from 0), one array entry a row."""

    users: np.ndarray  # int [N]
    items: np.ndarray  # int [N]
    ratings: np.ndarray  # float [N], nan where there is none
    times: np.ndarray  # float [N]
    user_tokens: np.ndarray  # external id of each internal user
    item_tokens: np.ndarray  # external id of each internal item

    def take(self, rows: np.ndarray) -> Log:
        """The rows numbered `rows`, in that order."""
        columns = (self.users[rows], self.items[rows], self.ratings[rows], self.times[rows])
        return Log(*columns, self.user_tokens, self.item_tokens)


def fits(token: str) -> bool:
    """Whether RecBole reads `token` back as it was written (missing values apart, see `MISSING`)."""
    return not (_CONTROL.search(token) or token.startswith('"'))


def write_inter(log: Log, target: Path) -> None:
    """Write `log` in its order, atomically; ratings only where there are any."""
    columns = {"user_id:token": log.users, "item_id:token": log.items}
    if not np.isnan(log.ratings).all():
        columns["rating:float"] = _compact(log.ratings)
    columns["timestamp:float"] = _compact(log.times)
    with replacing(target) as part, open(part, "w", encoding="utf-8", newline="") as file:
        file.write("\t".join(columns) + "\n")
        for start in tqdm(range(0, len(log.users), _ROWS), desc=f"Writing {target.name}", disable=None, delay=1):
            block = {name: values[start : start + _ROWS] for name, values in columns.items()}
            block["user_id:token"] = log.user_tokens[block["user_id:token"]]
            block["item_id:token"] = log.item_tokens[block["item_id:token"]]
            form: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE, "lineterminator": "\n"}
            pd.DataFrame(block).to_csv(file, header=False, index=False, **form)


def _compact(values: np.ndarray) -> np.ndarray:
    """Whole numbers as int64, so that they are written without `.0`."""
    whole = np.isfinite(values).all() and (values == np.floor(values)).all() and (np.abs(values) < 2**53).all()
    return values.astype(np.int64) if whole else values


def check_inter(path: Path, required: dict[str, str], separator: str = "\t", encoding: str = "utf-8") -> None:
    """Look at the beginning of an atomic file before RecBole reads all of it.

    Args:
        required: type by name of the columns the run needs, `{"user_id": "token", ...}`.
        separator: between columns (RecBole's option `field_separator`).

    Raises:
        DatasetError: it is empty, no text, has no header or no interactions, or lacks a required column.
    """
    where = path.absolute()
    wanted = separator.join(f"{name}:{kind}" for name, kind in required.items())
    convert = "`recbole-raserec prepare --help` tells how to make one from raw data"
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise DatasetError(f"{where} cannot be read: {error}.") from None
    if not head.strip():
        raise DatasetError(f"{where} is empty: expected the header {wanted!r} and interactions; {convert}.")
    if head.startswith(b"\x1f\x8b") or head.startswith(b"PK\x03\x04"):
        raise DatasetError(f"{where} is a compressed file: unpack it (gunzip, unzip) under this name.")
    try:
        # A character cut by the end of the block is no fault of the file: look at whole lines only.
        text = (head if len(head) < _HEAD else head[: head.rfind(b"\n") + 1] or head).decode(encoding)
        if "\x00" in text:
            raise ValueError("it holds NUL characters")
    except (ValueError, LookupError) as error:
        raise DatasetError(f"{where} is not a text file in the encoding {encoding} ({error}); {convert}.") from None
    if text.startswith("\ufeff"):
        raise DatasetError(f"{where} begins with a byte order mark: save it as plain {encoding}, without one.")
    lines = text.replace("\r\n", "\n").split("\n")
    names = lines[0].split(separator)
    columns = dict(name.rsplit(":", 1) for name in names if name.count(":") == 1)
    if len(columns) < len(names) or not set(columns.values()) <= set(TYPES):
        raise DatasetError(
            f"{where} has no RecBole header: its first line is {lines[0][:120]!r}, expected tab-separated name:type, "
            f"type one of {', '.join(TYPES)}, such as {wanted!r}. Add that line, or use the converter: {convert}."
        )
    lacking = [f"{name}:{kind}" for name, kind in required.items() if columns.get(name) != kind]
    if lacking:
        raise DatasetError(
            f"{where} lacks the column(s) {', '.join(lacking)}; its header has {', '.join(names)}. Correct the header, "
            "or name the columns with USER_ID_FIELD, ITEM_ID_FIELD and TIME_FIELD."
        )
    if not "".join(lines[1:]):
        raise DatasetError(f"{where} has a header but no interactions; {convert}.")
