"""DARec's parts one by one: what does each addition change?

    python experiments/darec.py --data_path=DIR [--dataset=amazon-toys-games] [--seeds 2020 2021]

Rows: SASRec, with texts or without; DARec without adapters; as it is; with each task; with what its language model
reads in the history; with the adapter sizes that a search chose (`--adapters=FILE`, the best.yaml of `recbole-raserec
tune`) and with uniform ones of as many parameters; RaSeRec over DARec. Test targets are grouped by their count in the
training split: fewer than five interactions are cold. Writes results/darec_<dataset>.json and the page (.md) beside
it; a row that is there is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np
import torch
from grid import Results, cells, mean
from trained import Trained

from recbole_raserec.config import Config, read_yaml
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.recommendation import train_model
from recbole_raserec.retrieval.stage import fine_tune

#: Fewer training interactions than these make an item cold.
COLD = 5

#: Groups of test targets; they are shown where each has at least so many.
GROUPS, SHOWN = ("cold", "warm"), 20

#: Options that say how long a run learns.
BUDGET = ("epochs", "stopping_step", "text_items")

SASREC = ("--model=SASRec", "--training=packed")
DAREC = ("--model=DARec",)
SEARCHED, UNIFORM = "adapters by search", "uniform adapters, as many parameters"
ROWS: dict[str, Sequence[str]] = {
    "SASRec": SASREC,
    "SASRec, text": (*SASREC, "--item_vectors=both", "--item_text_size=256", "--weight_averaging=0.999"),
    "DARec without adapters": (*DAREC, "--text_items=0"),
    "DARec": DAREC,
    "+ semantic alignment": (*DAREC, "--align_weight=0.1"),
    "+ hard samples": (*DAREC, "--hard_weight=0.1"),
    "+ history by items": (*DAREC, "--history=items"),
    "+ history by items, context masking": (*DAREC, "--history=items", "--context_mask=dual"),
    SEARCHED: DAREC,
    UNIFORM: DAREC,
    "RaSeRec over DARec": ("--model=RaSeRec", "--backbone=DARec"),
}


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """{"all" | "cold" | "warm": {"targets", "test": {protocol: metrics}}}, validation figures, seconds, parameters."""
    argv = [*options, f"--dataset={args.dataset}", f"--data_path={args.data_path}", f"--seed={seed}"]
    argv += [f"--checkpoint_dir={args.checkpoint_dir}"]
    known = Config(argv=argv)._known_keys()
    # SASRec does not know DARec's options
    argv += [f"--{text}" for text in args.options if known is None or text.partition("=")[0] in known]
    config = Config(argv=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    ensure_dataset(config)
    retrieval = config["model"] == "RaSeRec"
    base = train_model(config.for_backbone() if retrieval else config)
    ours = fine_tune(config, base) if retrieval else base
    trained = Trained(config, base, ours)
    train, test = base.splits.train._dataset, trained.test
    users, positions, _ = train.windows()
    counts = np.bincount(train.store.until(users, positions)[0], minlength=train.store.n_items)
    targets = test.windows()[2]
    ranks = trained.ranks(ours.model)
    groups = {
        "all": np.ones(len(targets), dtype=bool), "cold": counts[targets] < COLD, "warm": counts[targets] >= COLD
    }  # fmt: skip
    record: dict[str, Any] = {
        name: {"targets": int(rows.sum()), "test": trained.metrics(ranks, rows) if rows.any() else None}
        for name, rows in groups.items()
    }
    trained_weights = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    return {
        **record, "valid": ours.metrics["valid"], "seconds": base.seconds, "parameters": trained_weights,
        "options": {name: config[name] for name in BUDGET if config[name] is not None},
    }  # fmt: skip


def page(dataset: str, results: Results) -> str:
    """The tables."""
    lines = [
        "# DARec, part by part",
        "",
        f"`experiments/darec.py`, {dataset}: leave-one-out, full ranking, test split.",
        "R@10 / N@10, mean over the seeds, standard deviation in brackets. Budget: so many epochs at most, early",
        "stopping on validation NDCG@10; texts: items whose text a step reads with gradient (`text_items`).",
        "",
        f"| row | {' | '.join(p.replace('_', ' ') for p in PROTOCOLS)} | seeds | minutes | epochs | texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, runs in results.items():
        if runs:
            records = list(runs.values())
            minutes = mean((record["seconds"] / 60 for record in records), 1)
            figures = " | ".join(cells(record["all"]["test"] for record in records))
            budget = records[0]["options"]
            lines.append(
                f"| {label} | {figures} | {', '.join(runs)} | {minutes} | {budget['epochs']} | "
                f"{budget.get('text_items', '-')} |"
            )
    counts = {name: record[name]["targets"] for runs in results.values() for record in runs.values() for name in GROUPS}
    if min(counts.values(), default=0) < SHOWN:
        return "\n".join(lines) + "\n"
    lines += ["", f"Targets with fewer than {COLD} training interactions (cold), and the others", ""]
    lines += ["| row | group | targets | " + " | ".join(p.replace("_", " ") for p in PROTOCOLS) + " |"]
    lines += ["|---|---|---|---|---|"]
    for label, runs in results.items():
        for group in GROUPS:
            records = [record[group] for record in runs.values() if record[group]["test"]]
            if records:
                figures = " | ".join(cells(record["test"] for record in records))
                lines.append(f"| {label} | {group} | {records[0]['targets']} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing; write figures and page."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--adapters", type=Path, help="file of a search for adapter sizes; without it its rows are left out"
    )
    given, rest = own.parse_known_args()
    sys.argv[1:] = rest
    rows = dict(ROWS)
    if given.adapters is None:
        del rows[SEARCHED], rows[UNIFORM]
    else:
        pairs = [tuple(pair) for pair in read_yaml(given.adapters)["adapter_sizes"]]
        rows[SEARCHED] = (*DAREC, f"--adapter_sizes={[list(pair) for pair in pairs]}")
        uniform = max(1, round(sum(map(sum, pairs)) / (2 * len(pairs))))
        rows[UNIFORM] = (*DAREC, f"--adapter_sizes={uniform}")
    grid.main(__doc__, rows, "darec", page, "amazon-toys-games", measure, given=vars(given))


if __name__ == "__main__":
    main()
