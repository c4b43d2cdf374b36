"""SASRec and DuoRec in both training forms, several seeds: does `packed` cost quality?

    python experiments/training_forms.py --data_path=DIR [--dataset=ml-100k]

runs each (model, form, seed) through the runner with the shipped defaults and writes
results/training_forms_<dataset>.json, the figures, and the table beside it (.md). A run that is already in the file is
not repeated; one that was interrupted is taken up by the runner (--checkpoint_dir).
"""

from __future__ import annotations

import statistics

import grid
from grid import Results, cells, mean

#: The rows of the table: label, options.
RUNS: dict[str, tuple[str, ...]] = {
    "SASRec prefix": ("--model=SASRec", "--training=prefix"),
    "SASRec packed": ("--model=SASRec", "--training=packed"),
    "SASRec packed, 4 copies": ("--model=SASRec", "--training=packed", "--packed_copies=4"),
    "DuoRec prefix": ("--model=DuoRec", "--training=prefix"),
    "DuoRec packed, 4 copies": ("--model=DuoRec", "--training=packed", "--packed_copies=4"),
}


def page(dataset: str, results: Results) -> str:
    """Mean (and standard deviation) over the seeds of each row."""
    lines = [
        "# Training forms",
        "",
        f"`python experiments/training_forms.py --data_path=DIR --dataset={dataset}`: leave-one-out, full ranking,",
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
    grid.main(__doc__, RUNS, "training_forms", page)


if __name__ == "__main__":
    main()
