"""Items as text: the attributes of RecBole's `.item` file, flattened to `key: value`, tokenised once."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.config import Config
from recbole_raserec.data import pad_lists
from recbole_raserec.errors import ConfigError

#: Kinds of columns that are read as text where none are named; numbers are not.
TEXTUAL = ("token", "token_seq")


@dataclasses.dataclass
class ItemTokens:
    """Texts as token ids.

    Attributes:
        ids: int32 [V, T], padded with 0 on the right.
        lengths: int32 [V], at least 1, padding item included.
        cut: texts that were longer than T tokens.
    """

    ids: np.ndarray
    lengths: np.ndarray
    cut: int


def item_tokens(config: Config, dataset: Any, tokenizer: Any) -> ItemTokens:
    """The items' texts as tokens, with a line in the log.

    They are kept with the data set: both the loader and the model read it.

    Args:
        config: of DARec.
        dataset: RecBole's.
        tokenizer: of `transformers`.
    """
    kept = getattr(dataset, "item_text_tokens", None)
    if kept is not None:
        return kept
    path, longest = Path(config["data_path"]) / f"{config['dataset']}.item", config["item_text_length"]
    names = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    separator = config["field_separator"] or "\t"
    texts = read_item_texts(path, names, config["item_text_fields"], separator, dataset.iid_field)
    found = tokenise(texts, lambda rows: tokenizer(rows, add_special_tokens=False)["input_ids"], longest)
    missing = sum(text == name for text, name in zip(texts[1:], names[1:]))
    getLogger().info(
        f"Item texts: {len(names) - 1} items, {missing} without a text (their id is read instead), "
        f"{found.lengths[1:].mean():.1f} tokens each, {found.cut} cut at {longest}"
    )
    dataset.item_text_tokens = found
    return found


def read_item_texts(
    path: Path, tokens: Sequence[str], fields: Optional[Sequence[str]] = None, separator: str = "\t",
    id_field: str = "item_id",
) -> list[str]:  # fmt: skip
    """Flatten the attributes of items to texts (DARec: "key: value", in the order of `fields`).

    The key is the column's name with spaces for underscores; empty values are left out. An item without a row or
    without values has its external id as its text. Without the file all have.

    Args:
        path: atomic item file.
        tokens: external ids [V]; index 0 is padding.
        fields: columns; None: all of the types token and token_seq but the id.
        separator: between columns.
        id_field: the column of the external ids.

    Returns:
        [V], index 0 empty.

    Raises:
        ConfigError: a field of `fields` is not in the file.
    """
    found: dict[str, str] = {}
    if path.is_file():
        with open(path, encoding="utf-8", newline="", errors="replace") as file:
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
    return ["", *(found.get(token) or token for token in tokens[1:])]


def _flat(row: Sequence[str], columns: Sequence[tuple[str, int]]) -> str:
    pairs = [(key, row[at].strip()) for key, at in columns if at < len(row)]
    return ", ".join(f"{key}: {value}" for key, value in pairs if value)


def tokenise(
    texts: Sequence[str], tokenizer: Callable[[list[str]], Sequence[Sequence[int]]], longest: int
) -> ItemTokens:
    """Texts as token ids; a text without tokens has the single id 0.

    Args:
        texts: [V].
        tokenizer: texts -> ids, without special tokens.
        longest: T, where texts are cut.
    """
    ids, lengths = pad_lists(tokenizer(list(texts)), longest)
    return ItemTokens(
        ids.astype(np.int32), np.clip(lengths, 1, longest).astype(np.int32), int((lengths > longest).sum())
    )
