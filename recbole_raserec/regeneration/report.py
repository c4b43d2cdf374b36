"""A regenerated data set: where it lies, what it contains (figures, text, plot), and its rows as RecBole's files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import yaml
from tqdm import tqdm

from recbole_raserec.config import Config
from recbole_raserec.data import ORIGINS, Regenerated, Splits, joined
from recbole_raserec.errors import DatasetError, MissingExtraError
from recbole_raserec.evaluation import plot_bars, plot_beside
from recbole_raserec.regeneration.pairs import Sequences
from recbole_raserec.storage import ARRAYS, locked, read_json, replacing, write_json

REPORT = "report.json"
EXAMPLES = 5  # of each origin in the report
PATTERN_USER = "[pattern]"  # of the mined patterns' rows in files

_HEADER = "user_id:token\titem_id_list:token_seq\titem_id:token\torigin:token\n"
_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class RegeneratedData:
    """A finished stage i.

    Attributes:
        data: what joins the training split.
        directory: where it lies.
        fingerprint: of what its content rests on.
        seconds: it took, over all its runs.
        report: see `describe`.
    """

    data: Regenerated
    directory: Path
    fingerprint: str
    seconds: float
    report: dict[str, Any]


def stored(config: Config, splits: Splits, directory: Path, mark: str) -> Optional[RegeneratedData]:
    """What a run with the same fingerprint `mark` left in `directory`; None if nothing, or with `resume: false`."""
    if config["resume"] is False or not (directory / ARRAYS).exists() or not (directory / REPORT).exists():
        return None
    getLogger().info(f"Regeneration: reusing {directory}")
    users, items = splits.dataset.user_num, splits.dataset.item_num
    data, found = Regenerated.load(directory, users, items, mark, splits.vocabulary()), read_json(directory / REPORT)
    return RegeneratedData(data, directory, mark, found["seconds"], found)


def stored_or_made(
    make: Callable[[], RegeneratedData], name: str, config: Config, splits: Splits, mark: str, *folders: Path
) -> RegeneratedData:
    """What is `stored` in the first of `folders`, or what `make` makes while no other run works in any of them."""
    found = stored(config, splits, folders[0], mark)
    if found is not None:
        return found
    with contextlib.ExitStack() as held:
        for folder in folders:
            held.enter_context(locked(folder, name))
        return stored(config, splits, folders[0], mark) or make()


def describe(original: Sequences, extra: Regenerated, tokens: Sequence[str]) -> dict[str, Any]:
    """Sizes by origin, lengths, popularity of the targets, transitions, examples; ready for JSON.

    Args:
        original: the training sequences.
        extra: what joins them.
        tokens: external item ids [V].
    """
    n_items = len(tokens)
    sets: dict[str, Any] = {ORIGINS[0]: original, **{name: extra.only(name) for name in ORIGINS[1:]}}
    known = _transitions(original, n_items)
    counted = [np.bincount(each.items[inner_rows(each.offsets)], minlength=n_items)[1:] for each in sets.values()]
    report: dict[str, Any] = {"items": n_items - 1, "origins": {}}
    for name, each in sets.items():
        moves, lengths = _transitions(each, n_items), np.diff(each.offsets)
        report["origins"][name] = {
            "sequences": len(lengths),
            "items": len(each.items),
            "targets": int(np.maximum(lengths - 1, 0).sum()),
            "lengths": np.bincount(np.minimum(lengths, 50), minlength=51).tolist(),
            "transitions": len(moves),
            "new_transitions": int((~np.isin(moves, known)).sum()),
            "examples": [
                [str(tokens[item]) for item in each.items[each.offsets[row] : each.offsets[row + 1]]]
                for row in np.unique(np.linspace(0, max(len(lengths) - 1, 0), EXAMPLES).astype(int))
                if len(lengths)
            ],
        }
    report["popularity"] = {"before": _shares(counted[0]), "after": _shares(sum(counted[1:], counted[0]))}
    return report


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Write the report as text, plot (if matplotlib is installed) and, last, JSON."""
    with replacing(directory / "report.txt") as part:
        part.write_text(text(report) + "\n", encoding="utf-8")
    with contextlib.suppress(MissingExtraError):
        draw(report, directory / "report.png")
    write_json(directory / REPORT, report)


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'origin':<12}{'sequences':>12}{'targets':>12}{'mean length':>13}{'new transitions':>17}"]
    for name, found in report["origins"].items():
        mean = found["items"] / max(found["sequences"], 1)
        lines.append(
            f"{name:<12}{found['sequences']:>12}{found['targets']:>12}{mean:>13.2f}{found['new_transitions']:>17}"
        )
    shares = report["popularity"]
    lines += ["", "share of the targets among the most popular tenths of the items, before and after:"]
    lines += ["  " + " ".join(f"{value:6.1%}" for value in shares[when]) for when in ("before", "after")]
    for name in ORIGINS[1:]:
        examples = report["origins"][name]["examples"]
        lines += ["", f"{name}, for example:", *("  " + " -> ".join(example) for example in examples)]
    return "\n".join(lines)


def draw(report: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Lengths by origin, and the targets' popularity before and after.

    Raises:
        MissingExtraError: there is no matplotlib.
    """
    origins, popularity = report["origins"].items(), report["popularity"].items()
    sizes = {name: {length: [found["lengths"][length]] for length in range(1, 16)} for name, found in origins}
    shares = {when: {str(tenth): [value] for tenth, value in enumerate(values, 1)} for when, values in popularity}
    plot_bars(path, {"lengths (up to 15)": sizes}, "items of a sequence", "sequences")
    label = "tenth of the items, most popular first"
    plot_bars(plot_beside(path, "_popularity"), {"popularity": shares}, label, "share of the targets")


def inner_rows(offsets: np.ndarray) -> np.ndarray:
    """Rows of items that are not the first of their sequence."""
    return np.setdiff1d(np.arange(offsets[-1]), offsets[:-1])


def _transitions(each: Any, n_items: int) -> np.ndarray:
    """Distinct (item, next item), as one number each."""
    later = inner_rows(each.offsets)
    return np.unique(each.items[later - 1] * np.int64(n_items) + each.items[later])


def _shares(counts: np.ndarray) -> list[float]:
    """Share of the total in each tenth of the items, most counted first."""
    total = max(int(counts.sum()), 1)
    return [float(part.sum() / total) for part in np.array_split(np.sort(counts)[::-1], 10)]


def write_benchmark(splits: Splits, data: Regenerated, directory: Path, name: str, desc: Optional[str] = None) -> Path:
    """Write `NAME/NAME.{train,valid,test}.inter` into `directory`, and `NAME/NAME.yaml`, the options that read them.

    One row a window: the last items before the target, the target, where it comes from. RecBole loads them with
    `--config_files=NAME.yaml` (`benchmark_filename`) and without this package.

    Args:
        splits: of the original data.
        data: what joins the training split.
        directory: of data sets.
        name: of the new one.
        desc: label of the progress bars.

    Returns:
        the folder.

    Raises:
        DatasetError: an item's id holds a space, which separates the items of a list.
    """
    folder, tokens = Path(directory) / name, splits.vocabulary()
    check_ids(tokens)
    users = np.array([PATTERN_USER, *tokens["users"][1:]], dtype=object)
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


def check_ids(vocabulary: Mapping[str, Sequence[str]]) -> None:
    """Raise DatasetError for ids that the files cannot hold."""
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
