"""The package's models in both training forms, several seeds, and RecBole's own training: what do the forms cost?

    python experiments/training_forms.py --data_path=DIR [--dataset=ml-100k]

runs each (model, form, seed) through the runner with the shipped defaults and writes
results/training_forms_<dataset>.json, the figures, and the table beside it (.md). A run that is already in the file is
not repeated; one that was interrupted is taken up by the runner (--checkpoint_dir). The row of RecBole's own training
is its data set, loader, SASRec and Trainer under the same hyper-parameters; only the state of an unfinished run is kept
this package's way. It takes hours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
from grid import Results, cells, mean

#: The rows of the table: label, options.
RUNS: dict[str, tuple[str, ...]] = {
    "SASRec prefix": ("--model=SASRec", "--training=prefix"),
    "SASRec packed": ("--model=SASRec", "--training=packed"),
    "SASRec packed, 4 copies": ("--model=SASRec", "--training=packed", "--packed_copies=4"),
    "SASRec packed, averaged": ("--model=SASRec", "--training=packed", "--weight_averaging=0.999"),
    "GRU4Rec prefix": ("--model=GRU4Rec", "--training=prefix"),
    "GRU4Rec packed": ("--model=GRU4Rec", "--training=packed"),
    "BSARec packed": ("--model=BSARec", "--training=packed"),
    "DuoRec prefix": ("--model=DuoRec", "--training=prefix"),
    "DuoRec packed, contrast of a quarter": ("--model=DuoRec", "--training=packed", "--contrast_share=0.25"),
    "DuoRec packed, 4 copies": ("--model=DuoRec", "--training=packed", "--packed_copies=4"),
}
#: The row that none of this package's loaders, models or kernels takes part in.
RECBOLE = "SASRec, RecBole's own training"


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row's figures for one seed."""
    return grid.run(options, seed, args) if options else recbole(seed, args)


def recbole(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train with RecBole alone to early stopping; both protocols from this package's evaluation."""
    import torch
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender.sasrec import SASRec
    from recbole.utils import init_seed

    from recbole_raserec.config.config import Config
    from recbole_raserec.data.preparation.download import ensure_dataset
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.evaluation.protocols import SEEN_KEPT, evaluate
    from recbole_raserec.kernels.allocator import keep_freed_memory
    from recbole_raserec.training.trainer import ResumableTrainer

    argv = [f"--dataset={args.dataset}", f"--seed={seed}", f"--data_path={args.data_path}", "--training=prefix"]
    argv += [f"--checkpoint_dir={args.checkpoint_dir}", *(f"--{option}" for option in args.options)]
    argv += [f"--threads={args.threads}"] if args.threads else []
    config = Config("SASRec", argv=argv)
    keep_freed_memory()  # without it RecBole's steps pay for fresh pages and take twice as long; same numbers
    if args.threads:
        torch.set_num_threads(args.threads)
    ensure_dataset(config)
    splits = prepare_data(config)
    init_seed(seed, config["reproducibility"])
    train, _, _ = data_preparation(config, create_dataset(config))
    model = SASRec(config, train._dataset)
    folder = Path(args.checkpoint_dir) / f"recbole-SASRec-{args.dataset}-{seed}"

    def validate(model: Any, data: Any) -> dict[str, dict[str, float]]:
        found = evaluate(model, data, config, splits.seen["valid"])
        print(time.strftime("%H:%M:%S"), f"RecBole, seed {seed}:", found[SEEN_KEPT], flush=True)
        return found

    trainer = ResumableTrainer(config, model, folder, validate, SEEN_KEPT)
    trainer.fit(train, splits.valid, show_progress=config["show_progress"])
    trainer.load_best()
    record: dict[str, Any] = {
        phase: evaluate(model, data, config, splits.seen[phase], decimals=6)
        for phase, data in (("valid", splits.valid), ("test", splits.test))
    }
    return {**record, "seconds": {"recommendation": trainer.seconds}}


def page(dataset: str, results: Results) -> str:
    """Mean (and standard deviation) over the seeds of each row."""
    lines = [
        "# Training forms",
        "",
        f"`experiments/training_forms.py`, {dataset}: leave-one-out, full ranking,",
        "shipped defaults, early stopping on validation NDCG@10 (seen items kept). Mean over the seeds, standard",
        "deviation in brackets; R@10 / N@10 on the test targets.",
        "",
        "| | seeds | validation N@10 | test, seen kept | test, seen removed | minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    for label, runs in results.items():
        if runs:
            records = list(runs.values())
            valid = mean(record["valid"]["seen_kept"]["ndcg@10"] for record in records)
            kept, removed = cells(record["test"] for record in records)
            minutes = statistics.mean(record["seconds"]["recommendation"] for record in records) / 60
            lines.append(f"| {label} | {', '.join(runs)} | {valid} | {kept} | {removed} | {minutes:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, write figures and table after each run."""
    grid.main(__doc__, {**RUNS, RECBOLE: ()}, "training_forms", page, make=measure)


if __name__ == "__main__":
    main()
