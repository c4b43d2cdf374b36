"""SASRec and DuoRec in both training forms, several seeds: does `packed` cost quality?

    python experiments/training_forms.py --data_path=DIR [--dataset=ml-100k]

runs each (model, form, seed) through the runner with the shipped defaults and writes
results/training_forms_<dataset>.json, the figures, and the table beside it (.md). A run that is already in the file is
not repeated; one that was interrupted is taken up by the runner (--checkpoint_dir).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.fileio import read_json, replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
METRICS = ("recall@10", "ndcg@10")

#: The rows of the table: label, options.
RUNS: dict[str, tuple[str, ...]] = {
    "SASRec prefix": ("--model=SASRec", "--training=prefix"),
    "SASRec packed": ("--model=SASRec", "--training=packed"),
    "SASRec packed, 4 copies": ("--model=SASRec", "--training=packed", "--packed_copies=4"),
    "DuoRec prefix": ("--model=DuoRec", "--training=prefix"),
    "DuoRec packed, 4 copies": ("--model=DuoRec", "--training=packed", "--packed_copies=4"),
}


def run(label: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One training through the runner, in a process of its own: its result record, reduced."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "r.json"
        command = [sys.executable, str(ROOT / "run_recbole_raserec.py"), *RUNS[label], f"--seed={seed}"]
        command += [f"--dataset={args.dataset}", f"--data_path={args.data_path}", f"--result_file={result}"]
        command += [f"--checkpoint_dir={args.checkpoint_dir}"]
        command += [f"--threads={args.threads}"] if args.threads else []
        subprocess.run(command, check=True)
        record = read_json(result)
    metrics = record["metrics"]["base"]
    return {
        "valid": {protocol: metrics["valid"][protocol] for protocol in PROTOCOLS},
        "test": {protocol: metrics["test"][protocol] for protocol in PROTOCOLS},
        "seconds": record["seconds"]["recommendation"],
        "versions": record["versions"],
    }


def table(dataset: str, results: dict[str, dict[str, Any]]) -> str:
    """The page: mean (and standard deviation) over the seeds of each row."""
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
        if not runs:
            continue
        records = list(runs.values())
        valid = _mean(record["valid"]["seen_kept"]["ndcg@10"] for record in records)
        cells = [
            " / ".join(_mean(record["test"][protocol][metric] for record in records) for metric in METRICS)
            for protocol in PROTOCOLS
        ]
        minutes = statistics.mean(record["seconds"] for record in records) / 60
        seeds = ", ".join(runs)
        lines.append(f"| {label} | {seeds} | {valid} | {cells[0]} | {cells[1]} | {minutes:.0f} |")
    return "\n".join(lines) + "\n"


def _mean(values: Iterable[float]) -> str:
    values = list(values)
    spread = f" ({statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def main() -> None:
    """Run what is missing, write figures and table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--checkpoint_dir", default="saved")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    parser.add_argument("--rows", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run (0: the library's choice)")
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    args.output = args.output or ROOT / "results" / f"training_forms_{args.dataset}.json"
    results: dict[str, dict[str, Any]] = {label: {} for label in RUNS}
    if args.output.exists():
        for label, runs in read_json(args.output)["rows"].items():
            results.setdefault(label, {}).update(runs)
    for seed in args.seeds:
        for label in args.rows:
            if str(seed) in results[label]:
                continue
            results[label][str(seed)] = run(label, seed, args)
            made_by = f"python experiments/training_forms.py --data_path=DIR --dataset={args.dataset}"
            write_json(args.output, {"command": made_by, "rows": results})
            with replacing(args.output.with_suffix(".md")) as part:
                Path(part).write_text(table(args.dataset, results), encoding="utf-8")


if __name__ == "__main__":
    main()
