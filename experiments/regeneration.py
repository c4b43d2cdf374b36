"""What regeneration is worth: base against regenerated training data, for several models, gammas and seeds.

    python experiments/regeneration.py --data_path=DIR [--dataset=amazon-beauty] [--rows "SASRec, gamma 0.1"]

runs each model with and without `regeneration: true` (shipped defaults, early stopping on validation NDCG@10), and
writes results/regeneration_<dataset>.json and the table (.md). Regenerator and item vectors are shared by the runs of a
seed.
"""

from __future__ import annotations

import statistics

import grid
from grid import Results, cells, mean

from recbole_raserec.evaluation.protocols import PROTOCOLS

GAMMAS = (0.0, 0.1, 1.0)
ROWS: dict[str, tuple[str, ...]] = {}
for _model in ("SASRec", "GRU4Rec"):
    _common = (f"--model={_model}", "--regeneration=true", "--show_progress=False")
    for _gamma in GAMMAS:
        ROWS[f"{_model}, gamma {_gamma:g}"] = (*_common, f"--regen_gamma={_gamma:g}")
    ROWS[f"{_model}, mined patterns alone"] = (*_common, "--regen_rows=patterns")
    if _model == "SASRec":
        ROWS["SASRec, gamma 0.1, personalised"] = (f"--model={_model}", "--regeneration=personalised", *_common[2:])


def page(dataset: str, results: Results) -> str:
    """Base and regenerated side by side."""
    lines = [
        "# Regenerated training data",
        "",
        f"`experiments/regeneration.py`, {dataset}: leave-one-out, full ranking,",
        "other options as shipped, early stopping on validation NDCG@10 (seen kept). Mean over the seeds, standard",
        "deviation in brackets; R@10 / N@10 on the test; improvement of the mean R@10 and N@10 over the model's base.",
        "",
        "| | seeds | validation N@10 | test, seen kept | seen removed | improvement, kept | removed |",
        "|---|---|---|---|---|---|---|",
    ]
    shown = set()
    for label, runs in results.items():
        if not runs:
            continue
        model, records = label.split(",")[0], list(runs.values())
        if (model, tuple(runs)) not in shown:
            shown.add((model, tuple(runs)))
            base = [record["base"] for record in records]
            valid = mean(record["valid"]["seen_kept"]["ndcg@10"] for record in base)
            lines.append(
                f"| {model} | {', '.join(runs)} | {valid} | {' | '.join(cells(r['test'] for r in base))} | | |"
            )
        valid = mean(record["valid"]["seen_kept"]["ndcg@10"] for record in records)
        gains = []
        for protocol in PROTOCOLS:
            pairs = []
            for metric in ("recall@10", "ndcg@10"):
                after = statistics.mean(record["test"][protocol][metric] for record in records)
                before = statistics.mean(record["base"]["test"][protocol][metric] for record in records)
                pairs.append(f"{100 * (after / before - 1):+.1f} %" if before else "-")
            gains.append(" / ".join(pairs))
        test = " | ".join(cells(record["test"] for record in records))
        lines.append(f"| {label} | {', '.join(runs)} | {valid} | {test} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing; write figures and table."""
    grid.main(__doc__, ROWS, "regeneration", page)


if __name__ == "__main__":
    main()
