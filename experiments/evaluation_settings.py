"""Evaluation settings of RecBole's users: the figures of this package against those of RecBole's Trainer.evaluate.

    python experiments/evaluation_settings.py --data_path=DIR --dataset=ml-100k

Twenty-four settings: a general model (BPR) and a sequential one (SASRec of this package) by four modes of the items
that are ranked by three groups of metrics. Random weights, the test split. Both evaluate the same model on the same loader;
the table has the largest difference between two figures of eight digits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from recbole_raserec import compat

compat.apply()

from recbole_raserec.config import Config, get_model  # noqa: E402
from recbole_raserec.data import prepare_data  # noqa: E402
from recbole_raserec.evaluation import evaluate  # noqa: E402


class Setting(NamedTuple):
    """What is evaluated, on which items, by what."""

    model: str
    mode: dict[str, str]
    metrics: tuple[str, ...]


MODES = (
    {"valid": "full", "test": "full"}, {"valid": "full", "test": "uni100"}, {"valid": "pop100", "test": "pop100"},
    {"valid": "uni50", "test": "pop100"},
)  # fmt: skip
METRICS = (
    ("Recall", "NDCG", "MRR", "Hit", "Precision", "MAP", "GAUC"),
    ("ItemCoverage", "GiniIndex", "ShannonEntropy"),
    ("AveragePopularity", "TailPercentage"),
)
SETTINGS = [Setting(*parts) for parts in itertools.product(("BPR", "SASRec"), MODES, METRICS)]


def name_of(setting: Setting) -> str:
    """In one line."""
    modes = "/".join(dict.fromkeys(setting.mode.values()))
    return f"{setting.model}, {modes}: {', '.join(setting.metrics)}"


def prepared(setting: Setting, data_path: Path, dataset: str) -> tuple[Any, Any, Any]:
    """Configuration, model with random weights, splits."""
    options = {
        "data_path": str(data_path), "metrics": list(setting.metrics), "topk": [5, 10], "metric_decimal_place": 8,
        "eval_args": {"mode": dict(setting.mode)}, "use_gpu": False, "show_progress": False, "state": "ERROR",
        "valid_metric": setting.metrics[0] + "@10",
    }  # fmt: skip
    config = Config(setting.model, dataset, config_dict=options, argv=[])
    splits = prepare_data(config)
    torch.manual_seed(7)
    model = get_model(setting.model)(config, splits.train._dataset)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return config, model, splits


def measure(setting: Setting, data_path: Path, dataset: str) -> dict[str, Any]:
    """The figures of both, and the largest difference."""
    from recbole.trainer import Trainer

    config, model, splits = prepared(setting, data_path, dataset)
    found = evaluate(model, splits.test, config, splits.seen["test"])
    protocol = "sampled" if "sampled" in found else "seen_kept" if setting.model == "SASRec" else "seen_removed"
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(splits.train)
    theirs = {name: float(value) for name, value in trainer.evaluate(splits.test, load_best_model=False).items()}
    ours = found[protocol]
    largest = max(abs(ours[name] - theirs[name]) for name in theirs)
    return {"setting": name_of(setting), "protocol": protocol, "ours": ours, "recbole": theirs, "difference": largest}


def main() -> None:
    """Measure all, write JSON and a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, default=Path("dataset"))
    parser.add_argument("--dataset", default="planted")
    parser.add_argument("--output", type=Path, default=Path("results/evaluation_settings.json"))
    args = parser.parse_args()
    rows = [measure(setting, args.data_path, args.dataset) for setting in SETTINGS]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"dataset": args.dataset, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    command = f"python experiments/evaluation_settings.py --data_path=DIR --dataset={args.dataset}"
    lines = [
        f"# Evaluation settings on {args.dataset}: this package against RecBole", "", f"`{command}`", "",
        "Random weights, the test split, figures of eight digits; what each setting is, is in the script.", "",
        "| setting | protocol | figures | largest difference |", "|---|---|---:|---:|",
    ]  # fmt: skip
    lines += [f"| {r['setting']} | {r['protocol']} | {len(r['ours'])} | {r['difference']:g} |" for r in rows]
    args.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[6:]))


if __name__ == "__main__":
    main()
