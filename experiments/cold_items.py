"""Cold items: where hardly anyone has shown what goes with an item, does its text help?

    python experiments/cold_items.py --data_path=DIR [--dataset=ml-100k] [--seeds 2020 2021]

In ml-100k next to no test target has fewer than five training interactions. So a copy of the data set is made, in
``data`` below --checkpoint_dir, in which a fifth of the items, drawn at random, keep no more than four of their
training interactions each, from none to four with equal chance; all others stay, those of validation and test too.
SASRec, with texts (docs/item_text.md) or without, and DARec learn from what is left. Writes
results/cold_items_<dataset>.json and the page (.md) beside it; a run that is there is not done again.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import darec
import grid
import numpy as np
from grid import Results, cells, mean

from recbole_raserec.config.config import Config
from recbole_raserec.data.preparation.download import ensure_dataset
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.storage.files import replacing

#: Share of the items that lose interactions, the most that they keep, and the seed of the draw.
SHARE, KEPT, DRAW = 0.2, darec.COLD - 1, 0

SASREC = ("--model=SASRec", "--training=packed", "--weight_averaging=0.999")
TEXT = (*SASREC, "--item_vectors=both")
ROWS: dict[str, Sequence[str]] = {
    "SASRec": ("--model=SASRec",),
    "SASRec, packed": SASREC,
    "SASRec, text": (*SASREC, "--item_vectors=both"),
    "SASRec, text, rare items by text alone": (
        *SASREC,
        "--item_vectors=both",
        f"--item_id_min_interactions={darec.COLD}",
    ),
    "SASRec, text alone": (*SASREC, "--item_vectors=text"),
    "DARec": darec.DAREC,
    "DARec, rare items by text alone": (*darec.DAREC, f"--item_id_min_interactions={darec.COLD}"),
}


def interactions_to_cut(items: np.ndarray, n_items: int) -> np.ndarray:
    """Which training interactions go: bool [M]; `items` int64 [M]."""
    rng = np.random.default_rng(DRAW)
    counts = np.bincount(items, minlength=n_items)
    known = np.flatnonzero(counts > KEPT)
    chosen = rng.choice(known, size=round(SHARE * len(known)), replace=False)
    cut = np.isin(items, chosen)
    for item in chosen:
        cut[rng.choice(np.flatnonzero(items == item), size=rng.integers(0, KEPT + 1), replace=False)] = False
    return cut


def numbered(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """(user, item) in the order of time, and the how manieth of its kind each is."""
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for pair in pairs:
        found.append((*pair, counts[pair]))
        counts[pair] += 1
    return found


def make_copy(dataset: str, data_path: str, copies: Path) -> str:
    """Write the copy below `copies` unless it is there; its name."""
    name = f"{dataset}-cold"
    target = copies / name / f"{name}.inter"
    if target.exists():
        return name
    config = Config("SASRec", dataset, config_dict={"data_path": data_path}, argv=[])
    source = ensure_dataset(config)
    split = prepare_data(config).train._dataset
    where, positions, _ = split.windows()
    store, users = split.store, split.store.users()
    ends = np.diff(store.until(where, positions)[1])  # of each user's training interactions
    known = np.flatnonzero(np.arange(len(store)) - store.offsets[users] < ends[users])
    cut = interactions_to_cut(store.items[known], store.n_items)
    names_of = split.field2id_token
    user_field, item_field = config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]
    pairs = list(zip(names_of[user_field][users[known]], names_of[item_field][store.items[known]]))
    gone = {pair for pair, goes in zip(numbered(pairs), cut) if goes}
    target.parent.mkdir(parents=True, exist_ok=True)
    items_file = source.with_suffix(".item")
    if items_file.exists():
        target.with_suffix(".item").write_bytes(items_file.read_bytes())
    with source.open(encoding="utf-8", newline="") as lines, replacing(target) as part:
        header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.partition(":")[0] for column in header]
        user_at, item_at, time_at = (names.index(name) for name in (user_field, item_field, config["TIME_FIELD"]))
        users_of, items_of = set(names_of[user_field]), set(names_of[item_field])  # rare ones are left out already
        order = sorted(range(len(rows)), key=lambda number: float(rows[number][time_at]))
        keys = numbered([(rows[number][user_at], rows[number][item_at]) for number in order])
        left = {n for n, key in zip(order, keys) if key not in gone and key[0] in users_of and key[1] in items_of}
        kept = [row for number, row in enumerate(rows) if number in left]
        Path(part).write_text("\n".join("\t".join(row) for row in [header, *kept]) + "\n", encoding="utf-8")
    return name


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """As :func:`darec.measure`, on the copy."""
    copies = Path(args.checkpoint_dir) / "data"
    name = make_copy(args.dataset, args.data_path, copies)
    files = grid.ROOT / "properties" / "dataset" / f"{args.dataset}.yaml"
    copy = argparse.Namespace(**{**vars(args), "dataset": name, "data_path": str(copies)})
    everyone = ("--user_inter_num_interval=[0,inf)", "--item_inter_num_interval=[0,inf)")
    return darec.measure([*options, f"--config_files={files}", *everyone], seed, copy)


def page(dataset: str, results: Results) -> str:
    """The table."""
    lines = [
        "# Cold items",
        "",
        f"`experiments/cold_items.py`, {dataset}: a fifth of the items keep at most {KEPT} of their training",
        "interactions; leave-one-out, full ranking, test split. R@10 / N@10, mean over the seeds, standard deviation",
        "in brackets; texts: items whose text a step reads with gradient (`text_items`);",
        f"Cold: fewer than {darec.COLD} training interactions.",
        "",
        "| row | targets | number | seen kept | seen removed | seeds | minutes | epochs, at most | texts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, runs in results.items():
        records = list(runs.values())
        for group in ("cold", "warm", "all") if records else ():
            figures = " | ".join(cells(record[group]["test"] for record in records))
            minutes = mean((record["seconds"] / 60 for record in records), 1)
            budget = records[0]["options"]
            lines.append(
                f"| {label} | {group} | {records[0][group]['targets']} | {figures} | {', '.join(runs)} | {minutes} | "
                f"{budget['epochs']} | {budget.get('text_items', '-')} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing; write figures and page."""
    grid.main(__doc__, ROWS, "cold_items", page, "ml-100k", measure)


if __name__ == "__main__":
    main()
