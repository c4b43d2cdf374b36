"""A regenerated data set as RecBole's atomic files, in the form that RecBole alone loads (`benchmark_filename`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml
from tqdm import tqdm

from recbole_raserec.data import ORIGINS, Regenerated, Splits, joined
from recbole_raserec.errors import DatasetError
from recbole_raserec.storage import replacing

#: User of the mined patterns' rows.
NOBODY = "[pattern]"

_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\torigin:token\n"
_ROWS = 4096


def write_benchmark(splits: Splits, data: Regenerated, directory: Path, name: str, desc: Optional[str] = None) -> Path:
    """Write ``<directory>/<name>/<name>.{train,valid,test}.inter`` and ``<name>.yaml``, the options that read them.

    One row a window: the last items before the target, the target, where it comes from. RecBole loads them with
    ``--config_files=<name>.yaml`` and without this package.

    Args:
        splits: of the original data. data: what joins the training split. desc: show progress bars with this label.

    Returns:
        the folder.

    Raises:
        DatasetError: an item's id holds a space, which separates the items of a list.
    """
    folder = Path(directory) / name
    tokens = splits.vocabulary()
    check_ids(tokens)
    users = np.array([NOBODY, *tokens["users"][1:]], dtype=object)
    items = np.array(tokens["items"], dtype=object)
    train = joined(splits.train._dataset, data)
    parts = {"train": train, "valid": splits.valid._dataset, "test": splits.test._dataset}
    for part_name, part in parts.items():
        label = f"{desc} {part_name}" if desc is not None else None
        _write(part, data if part_name == "train" else None, users, items, folder / f"{name}.{part_name}.inter", label)
    options = {
        "benchmark_filename": list(parts), "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
        "MAX_ITEM_LIST_LENGTH": int(train.max_item_list_len), "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    }  # fmt: skip
    with replacing(folder / f"{name}.yaml") as file:
        file.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    return folder


def check_ids(vocabulary: dict[str, list[str]]) -> None:
    """Refuse ids that the files cannot hold.

    Raises:
        DatasetError: there is one.
    """
    spaced = [token for token in vocabulary["items"][1:] if " " in token]
    if spaced:
        raise DatasetError(
            f"the item id {spaced[0]!r} holds a space, which separates the items of a list in RecBole's files; "
            "rename it."
        )


def _write(part: Any, data: Optional[Regenerated], users: Any, items: Any, path: Path, desc: Optional[str]) -> None:
    rows, positions, targets = part.windows()
    owner = part.inter_feat[part.uid_field].numpy()
    origin = np.zeros(len(rows), dtype=np.int64)
    if data is not None:
        extra = rows >= part.original.store.n_users
        origin[extra] = data.origin[rows[extra] - part.original.store.n_users]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(_HEADER)
        for start in tqdm(range(0, len(rows), _ROWS), desc=desc, disable=desc is None, dynamic_ncols=True):
            block = slice(start, start + _ROWS)
            windows, lengths = part.store.windows(rows[block], positions[block], part.max_item_list_len)
            words = zip(
                users[owner[block]], items[windows].tolist(), lengths.tolist(), items[targets[block]], origin[block]
            )
            file.writelines(
                f"{user}\t{' '.join(window[:length])}\t{target}\t{ORIGINS[source]}\n"
                for user, window, length, target, source in words
            )
