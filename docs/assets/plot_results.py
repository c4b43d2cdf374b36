"""Draw results.png, NDCG@10 of the pipeline's stages, from results/comparison_*.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
METRIC = "ndcg@10"
DATASETS = ("amazon-toys-games", "amazon-beauty")
PROTOCOLS = {"seen_kept": "seen items kept", "seen_removed": "seen items removed"}
BASES = ("SASRec", "DuoRec")
STAGES = {"backbone": "#b8c4de", "+ mined patterns (i)": "#7a8db8", "whole pipeline": "#2f4a8a"}


def stage(row: str) -> str | None:
    """Which bar a row of the comparison is."""
    if "head=knn" in row:
        return None
    if row.startswith("RaSeRec"):
        return "whole pipeline"
    return "+ mined patterns (i)" if "regeneration" in row else "backbone"


def main() -> None:
    """One panel for each data set and protocol, with standard deviations over the seeds."""
    figure, axes = pyplot.subplots(1, 4, figsize=(9.6, 2.9), sharey=True, layout="constrained")
    panels = [(dataset, protocol) for dataset in DATASETS for protocol in PROTOCOLS]
    for ax, (dataset, protocol) in zip(axes, panels):
        path = ROOT / "results" / f"comparison_{dataset}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["datasets"][dataset]["rows"]
        for number, base in enumerate(BASES):
            for row in rows:
                name = stage(row["model"])
                if base not in row["model"] or name is None:
                    continue
                figures = row["metrics"][protocol][METRIC]
                at = number + 0.27 * (list(STAGES).index(name) - 1)
                ax.bar(at, figures["mean"], 0.25, yerr=figures["std"], color=STAGES[name], label=name, capsize=2)
        ax.set_title(f"{dataset}\n{PROTOCOLS[protocol]}", fontsize=9)
        ax.set_xticks(range(len(BASES)), BASES, fontsize=9)
        ax.tick_params(axis="y", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("NDCG@10, test", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:3], labels[:3], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_name("results.png"), dpi=130)


if __name__ == "__main__":
    main()
