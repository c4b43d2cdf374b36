"""Items as text: the attributes of RecBole's ``.item`` file, flattened to ``key: value``, tokenised once."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.errors import ConfigError

#: Kinds of columns that are read as text where none are named; numbers are not.
TEXTUAL = ("token", "token_seq")


@dataclasses.dataclass
class ItemTexts:
    """A text for each item.

    Attributes:
        texts: [V], index 0 (padding) empty. missing: items without a text, which have their id in its place.
    """

    texts: list[str]
    missing: int


@dataclasses.dataclass
class ItemTokens:
    """Texts as token ids.

    Attributes:
        ids: int32 [V, T], padded with 0 on the right. lengths: int32 [V], at least 1, padding item included.
        cut: texts that were longer than T tokens.
    """

    ids: np.ndarray
    lengths: np.ndarray
    cut: int


def read_item_texts(
    path: Path, tokens: Sequence[str], fields: Optional[Sequence[str]] = None, separator: str = "\t",
    id_field: str = "item_id", encoding: str = "utf-8",
) -> ItemTexts:  # fmt: skip
    """Flatten the attributes of the items `tokens` (DARec: "key: value" text; the order is that of `fields`).

    The key is the column's name with spaces for underscores; empty values are left out. An item without a row or
    without values has its external id as its text. Without the file all have.

    Args:
        path: atomic item file. tokens: external ids [V]; index 0 is padding.
        fields: columns; None: all of the types token and token_seq but the id.

    Raises:
        ConfigError: a field of `fields` is not in the file.
    """
    found: dict[str, str] = {}
    if path.is_file():
        with open(path, encoding=encoding, newline="", errors="replace") as file:
            rows = csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
            header = [column.partition(":")[::2] for column in next(rows, [])]
            names = [name for name, _ in header]
            if fields is None:
                fields = [name for name, kind in header if kind in TEXTUAL and name != id_field]
            unknown = [name for name in fields if name not in names]
            if unknown:
                raise ConfigError(
                    [f"item_text_fields: {path} has no column {', '.join(unknown)}; it has {', '.join(names)}."]
                )
            if id_field in names:
                at = names.index(id_field)
                columns = [(name.replace("_", " "), names.index(name)) for name in fields]
                found = {row[at]: _flat(row, columns) for row in rows if len(row) > at}
    texts = [found.get(token) or token for token in tokens]
    texts[:1] = [""] * len(texts[:1])
    return ItemTexts(texts, sum(not found.get(token) for token in tokens[1:]))


def _flat(row: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    pairs = [(key, row[at].strip()) for key, at in columns if at < len(row)]
    return ", ".join(f"{key}: {value}" for key, value in pairs if value)


def tokenise(texts: Sequence[str], tokenizer: Callable[[list[str]], Sequence[Sequence[int]]], longest: int) -> Any:
    """Token ids of `texts` [V], cut to `longest` tokens; a text without tokens has the single id 0.

    Args:
        tokenizer: texts -> ids, without special tokens.
    """
    rows = tokenizer(list(texts))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.zeros((len(rows), longest), dtype=np.int32)
    for line, row in zip(ids, rows):
        line[: len(row)] = row[:longest]
    return ItemTokens(ids, np.clip(lengths, 1, longest).astype(np.int32), int((lengths > longest).sum()))
