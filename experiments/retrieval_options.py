"""Stage iii's options one at a time: K, alpha, builders, module, head, scope, index.

    python experiments/retrieval_options.py --data_path=DIR [--dataset=ml-100k] [--rows "K 5" "K 50"]

runs RaSeRec over SASRec with the shipped defaults and one option changed, several seeds, and writes
results/retrieval_options_<dataset>.json, the tables (.md), and the curves over K and alpha (.png). A run that is
already in the file is not repeated; backbone, and with a K up to the largest also the neighbours, are found again in
--checkpoint_dir.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grid
from grid import POSITIONS, Results, cells, mean

from recbole_raserec.evaluation import plots
from recbole_raserec.evaluation.protocols import PROTOCOLS

DEFAULT = "default"
TOP_K, ALPHA = (1, 5, 10, 20, 50, 100), (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
#: The values that `default` stands for.
DEFAULT_K, DEFAULT_ALPHA = 20, 0.5

#: {table: {label: options}}.
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Neighbours": {f"K {k}": (f"--top_k={k}",) for k in sorted(TOP_K, reverse=True) if k != DEFAULT_K},
    "Share of the user's own vector": {f"alpha {a:g}": (f"--alpha={a:g}",) for a in ALPHA if a != DEFAULT_ALPHA},
    "Memory": {
        "patterns": ("--memory=patterns",),
        "pairs and patterns": ("--memory=both",),
        "pairs and patterns, weighed by support": ("--memory=both", "--memory_frequency_weight=1"),
        "pairs, thinned at cosine .95": ("--memory_thin=0.95",),
    },
    "Module": {
        "single": ("--ram=single",),
        "dual, both channels alike": ("--beta=0.5",),
    },
    "Head": {
        "kNN, nothing trained": ("--head=knn",),
        "module and kNN": ("--head=both",),
    },
    "Retrieval": {
        "by target": ("--retrieve_by=target",),
        "inner product": ("--similarity=dot",),
        "ivf": ("--index=ivf",),
        "hnsw": ("--index=hnsw",),
        "ivfpq": ("--index=ivfpq",),
    },
    "Protocol": {"nothing later than the query": ("--memory_scope=past",)},
}
COMMON = ("--model=RaSeRec", "--backbone=SASRec", "--show_progress=False")
ROWS = {DEFAULT: COMMON}
for _group in TABLES.values():
    ROWS.update({label: (*COMMON, *options) for label, options in _group.items()})


def page(dataset: str, results: Results) -> str:
    """A table for each group of options."""
    lines = [
        "# Options of the retrieval stage",
        "",
        f"`experiments/retrieval_options.py`, {dataset}: RaSeRec over SASRec, shipped",
        "defaults (memory of pairs, K 20, alpha .5, dual, exact index) and one option changed; leave-one-out,",
        "full ranking. Mean over the seeds, standard deviation in brackets.",
        "Gain: of the test N@10 over the default's with the same seeds, seen kept / removed. Seconds of the module's",
        "training, on one of two busy cores.",
    ]
    base = [run["base"] for run in results.get(DEFAULT, {}).values()]
    for title, group in TABLES.items():
        if not any(results.get(label) for label in group):
            continue
        lines += ["", f"## {title}", ""]
        lines += ["| | seeds | validation N@10 | test R@10 / N@10, seen kept | seen removed | gain | module, s |"]
        lines.append("|---|---|---|---|---|---|---|")
        if base:
            valid = mean(record["valid"]["seen_kept"]["ndcg@10"] for record in base)
            test, seeds = " | ".join(cells(record["test"] for record in base)), ", ".join(results[DEFAULT])
            lines.append(f"| backbone alone | {seeds} | {valid} | {test} | | |")
        for label in (DEFAULT, *group):
            runs = results.get(label, {})
            if runs:
                records = list(runs.values())
                valid = mean(record["valid"]["seen_kept"]["ndcg@10"] for record in records)
                seconds = mean((record["seconds"]["retrieval"] for record in records), 0)
                test = " | ".join(cells(record["test"] for record in records))
                gain = "" if label == DEFAULT else _gain(results, label)
                lines.append(f"| {label} | {', '.join(runs)} | {valid} | {test} | {gain} | {seconds} |")
    return "\n".join(lines) + "\n"


def _gain(results: Results, label: str) -> str:
    """Of the mean test N@10 over the default's, seed by seed the same runs."""
    seeds = [seed for seed in results[label] if seed in results[DEFAULT]]
    parts = []
    for protocol in PROTOCOLS:
        ours, theirs = (
            sum(results[row][seed]["test"][protocol]["ndcg@10"] for seed in seeds) for row in (label, DEFAULT)
        )
        parts.append(f"{100 * (ours / theirs - 1):+.1f} %" if theirs else "-")
    return " / ".join(parts)


def draw(results: Results, path: Any) -> None:
    """Test NDCG@10 over K and over alpha, both protocols; of the seeds that all values have."""
    for name, values, default in (("K", TOP_K, DEFAULT_K), ("alpha", ALPHA, DEFAULT_ALPHA)):
        labels = {value: DEFAULT if value == default else f"{name} {value:g}" for value in values}
        labels = {value: label for value, label in labels.items() if results[label]}
        seeds = [seed for seed in results[DEFAULT] if all(seed in results[label] for label in labels.values())]
        panels, levels = {}, {}
        for protocol in PROTOCOLS:
            title = protocol.replace("_", " ")
            panels[title] = {
                "RaSeRec": {
                    value: [results[label][seed]["test"][protocol]["ndcg@10"] for seed in seeds]
                    for value, label in labels.items()
                }
            }
            base = [results[DEFAULT][seed]["base"]["test"][protocol]["ndcg@10"] for seed in seeds]
            levels[title] = {"SASRec": base}
        plots.plot_lines(plots.plot_beside(path, f"_{name}"), panels, name, "NDCG@10", levels, log=name == "K")


def main() -> None:
    """Run what is missing; write figures, tables and plots."""

    def left_out(dataset: str) -> Iterable[str]:  # no time line that users share
        return TABLES["Protocol"] if dataset in POSITIONS else ()

    results, path = grid.main(__doc__, ROWS, "retrieval_options", page, "ml-100k", left_out=left_out)
    if results[DEFAULT]:
        draw(results, path)


if __name__ == "__main__":
    main()
