"""Items without any interaction: taken out of the data, then given to the trained model by their texts alone.

    python experiments/added_items.py --data_path=DIR [--dataset=amazon-toys-games] [--seeds 2020]

A copy of the data set is made, in ``data`` below --checkpoint_dir, without all interactions of 500 items that are
drawn at random among the test targets' items. A model with text learns from what is left, and
`Recommender.add_items` gives it the 500 back. Then it ranks all items for every test target of the whole data set,
from the user's whole history, in which added items may stand. Beside it: the same model trained on all of the data.
Writes results/added_items_<dataset>.json and the page (.md) beside it; a run that is there is not done again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np
import torch
from grid import Results, cells

from recbole_raserec import Recommender
from recbole_raserec.config import Config
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.recommendation import train_model
from recbole_raserec.storage import replacing

#: Items taken out, and the seed of the draw.
ITEMS, DRAW = 500, 0
BLOCK = 512  # histories scored together
TEXT = ("--model=SASRec", "--training=packed", "--weight_averaging=0.999", "--item_vectors=both")
ROWS: dict[str, Sequence[str]] = {
    "SASRec, text": TEXT,
    "SASRec, text, own vectors dropped": (*TEXT, "--item_id_dropout=0.2"),
}


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header, without types, and rows of an atomic file."""
    with path.open(encoding="utf-8", newline="") as lines:
        header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [column.partition(":")[0] for column in header], rows


def make_copy(config: Config, taken: Sequence[str], copies: Path) -> str:
    """Write the copy without the items `taken` below `copies` unless it is there; its name."""
    source, name = ensure_dataset(config), f"{config['dataset']}-without-{len(taken)}"
    target = copies / name / f"{name}.inter"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".item").write_bytes(source.with_suffix(".item").read_bytes())
        header, rows = read(source)
        at, gone = header.index(config["ITEM_ID_FIELD"]), set(taken)
        first = source.read_text(encoding="utf-8").split("\n", 1)[0]
        with replacing(target) as part:
            lines = [first, *("\t".join(row) for row in rows if row[at] not in gone)]
            Path(part).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def ranks(recommender: Recommender, histories: list[list[str]], targets: list[str]) -> dict[str, np.ndarray]:
    """Rank of each target among all items, those of the history kept or removed: int64 [N] each."""
    found: dict[str, list[np.ndarray]] = {"seen_kept": [], "seen_removed": []}
    number = recommender._number
    for start in range(0, len(targets), BLOCK):
        rows = histories[start : start + BLOCK]
        scores = torch.from_numpy(recommender.score(rows))  # [b, V - 1]
        at = torch.tensor([number[target] - 1 for target in targets[start : start + BLOCK]])
        own = scores.gather(1, at[:, None])
        found["seen_kept"].append((scores > own).sum(dim=1).numpy() + 1)
        for row, history in enumerate(rows):
            seen = [number[item] - 1 for item in set(history) if item in number and number[item] - 1 != int(at[row])]
            scores[row, seen] = -torch.inf
        found["seen_removed"].append((scores > own).sum(dim=1).numpy() + 1)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def figures(found: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, dict[str, float]]:
    """R@10 and N@10 of some of the targets, by protocol."""
    inside = {name: values[rows] for name, values in found.items()}
    return {
        name: {
            "recall@10": float((values <= 10).mean()),
            "ndcg@10": float(np.where(values <= 10, 1 / np.log2(values + 1), 0).mean()),
        }
        for name, values in inside.items()
    }


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """{"full" | "added": {"taken" | "others" | "all": {"targets", "test"}}}."""
    common = [*options, f"--seed={seed}", f"--checkpoint_dir={args.checkpoint_dir}"]
    common += [f"--{text}" for text in args.options]
    config = Config(argv=[*common, f"--dataset={args.dataset}", f"--data_path={args.data_path}"])
    if args.threads:
        torch.set_num_threads(args.threads)
    ensure_dataset(config)
    full = train_model(config)
    split, names = full.splits.test._dataset, full.splits.vocabulary()["items"]
    users, positions, targets = split.windows()
    starts = split.store.offsets[users]
    histories = [[names[item] for item in split.store.items[a : a + n]] for a, n in zip(starts, positions)]
    rng = np.random.default_rng(DRAW)
    taken = rng.choice(np.unique(targets), size=min(ITEMS, len(names) // 10), replace=False)
    copies = Path(args.checkpoint_dir) / "data"
    copy = make_copy(config, [names[item] for item in taken], copies)
    files = grid.ROOT / "properties" / "dataset" / f"{args.dataset}.yaml"
    everyone = ["--user_inter_num_interval=[0,inf)", "--item_inter_num_interval=[0,inf)"]
    everyone += [f"--config_files={files}"] if files.is_file() else []
    less = train_model(Config(argv=[*common, *everyone, f"--dataset={copy}", f"--data_path={copies}"]))
    recommender = Recommender.load(less.directory, "cpu")
    header, rows = read(copies / copy / f"{copy}.item")
    described = [dict(zip(header, row)) for row in rows]
    at, gone = config["ITEM_ID_FIELD"], {names[item] for item in taken}
    recommender.add_items([row for row in described if row[at] in gone])
    where = np.isin(targets, taken)
    groups = {"taken": where, "others": ~where, "all": np.ones_like(where)}
    record: dict[str, Any] = {"items": len(recommender.items) - 1}
    named = [names[item] for item in targets]
    for name, one in (("full", Recommender.load(full.directory, "cpu")), ("added", recommender)):
        found = ranks(one, histories, named)
        record[name] = {
            group: {"targets": int(rows.sum()), "test": figures(found, rows)} for group, rows in groups.items()
        }
    return {**record, "seconds": full.seconds + less.seconds, "valid": full.metrics["valid"]}


def page(dataset: str, results: Results) -> str:
    """The table."""
    lines = [
        "# Added items",
        "",
        f"`experiments/added_items.py`, {dataset}: {ITEMS} items are taken out of the data, and given to the trained",
        "model by their texts alone (`Recommender.add_items`). Leave-one-out, full ranking, test split; R@10 / N@10,",
        "mean over the seeds, standard deviation in brackets. At random R@10 is 10 / items.",
        "",
        "| row | trained on | targets | number | seen kept | seen removed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, runs in results.items():
        records = list(runs.values())
        for name, words in (("full", "all items"), ("added", "without them")) if records else ():
            for group in ("taken", "others", "all"):
                parts = [record[name][group] for record in records]
                shown = " | ".join(cells(part["test"] for part in parts))
                lines.append(f"| {label} | {words} | {group} | {parts[0]['targets']} | {shown} | {', '.join(runs)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing; write figures and page."""
    grid.main(__doc__, ROWS, "added_items", page, "amazon-toys-games", measure)


if __name__ == "__main__":
    main()
