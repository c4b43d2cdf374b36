"""Items as text: the attributes of RecBole's `.item` file, flattened to `key: value`, tokenised once."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.config import Config
from recbole_raserec.data import pad_lists
from recbole_raserec.errors import ConfigError

#: Kinds of columns that are read as text where none are named; numbers are not.
TEXTUAL = ("token", "token_seq")


def item_tokens(config: Config | Mapping[str, Any], dataset: Any, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The items' texts as token ids, cut to T = `item_text_length`, with a line in the log.

    They are kept with the data set: both the loader and the model read it.

    Returns:
        ids int32 [V, T], padded with 0 on the right; lengths int32 [V], at least 1: a text without tokens has the id 0.
    """
    kept = getattr(dataset, "item_text_tokens", None)
    if kept is not None:
        return kept
    path, longest = Path(config["data_path"]) / f"{config['dataset']}.item", config["item_text_length"]
    names = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    separator = config["field_separator"] or "\t"
    texts = read_item_texts(path, names, config["item_text_fields"], separator, dataset.iid_field)
    missing = sum(text == name for text, name in zip(texts[1:], names[1:]))
    ids, lengths = pad_lists(tokenizer(texts, add_special_tokens=False)["input_ids"], longest)
    cut, lengths = int((lengths > longest).sum()), np.clip(lengths, 1, longest)
    getLogger().info(
        f"Item texts: {len(names) - 1} items, {missing} without a text (their id is read instead), "
        f"{lengths[1:].mean():.1f} tokens each, {cut} cut at {longest}"
    )
    dataset.item_text_tokens = ids.astype(np.int32), lengths.astype(np.int32)
    return dataset.item_text_tokens


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
                lacking = f"{path} has no column {', '.join(unknown)}"
                raise ConfigError([f"item_text_fields: {lacking}; it has {', '.join(names)}."])
            if id_field in names:
                at = names.index(id_field)
                columns = [(name.replace("_", " "), names.index(name)) for name in fields]
                for row in (row for row in rows if len(row) > at):
                    pairs = [(key, row[place].strip()) for key, place in columns if place < len(row)]
                    found[row[at]] = ", ".join(f"{key}: {value}" for key, value in pairs if value)
    return ["", *(found.get(token) or token for token in tokens[1:])]
