"""Evaluation settings of RecBole's users: the figures of this package against those of RecBole's Trainer.evaluate.

    python experiments/evaluation_settings.py --data_path=DIR --dataset=ml-100k

Twenty-four settings: a general model (BPR) and a sequential one (SASRec of this package), four modes of the items that
are ranked, three groups of metrics. The weights are random. Both evaluate the same model on the same loaders, of the
validation and of the test; the table has the largest difference between two figures of eight digits.
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
    """What is evaluated, which items are ranked in validation and test, and the metrics."""

    model: str
    modes: tuple[str, str]
    metrics: tuple[str, ...]


MODES = (("full", "full"), ("full", "uni100"), ("pop100", "pop100"), ("uni50", "pop100"))
METRICS = (
    ("Recall", "NDCG", "MRR", "Hit", "Precision", "MAP", "GAUC"),
    ("ItemCoverage", "GiniIndex", "ShannonEntropy"),
    ("AveragePopularity", "TailPercentage"),
)
SETTINGS = [Setting(*parts) for parts in itertools.product(("BPR", "SASRec"), MODES, METRICS)]


def name_of(setting: Setting) -> str:
    """In one line."""
    return f"{setting.model}, {'/'.join(setting.modes)}: {', '.join(setting.metrics)}"


def prepared(setting: Setting, data_path: Path, dataset: str) -> tuple[Any, Any, Any]:
    """Configuration, model with random weights, splits."""
    options = {
        "data_path": str(data_path), "metrics": list(setting.metrics), "topk": [5, 10], "metric_decimal_place": 8,
        "eval_args": {"mode": dict(zip(("valid", "test"), setting.modes))}, "use_gpu": False, "show_progress": False,
        "state": "ERROR", "valid_metric": setting.metrics[0] + "@10",
    }  # fmt: skip
    if setting.model == "SASRec":  # small: RecBole encodes a history again for each of its items
        options.update(MAX_ITEM_LIST_LENGTH=20, hidden_size=16, inner_size=16)
    config = Config(setting.model, dataset, config_dict=options, argv=[])
    splits = prepare_data(config)
    torch.manual_seed(7)
    model = get_model(setting.model)(config, splits.train._dataset)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return config, model, splits


def measure(setting: Setting, data_path: Path, dataset: str) -> dict[str, Any]:
    """The figures of both by phase, and the largest difference."""
    from recbole.trainer import Trainer

    config, model, splits = prepared(setting, data_path, dataset)
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(splits.train)
    row: dict[str, Any] = {"setting": name_of(setting), "phases": {}, "difference": 0.0}
    for phase, mode, data in zip(("valid", "test"), setting.modes, (splits.valid, splits.test)):
        protocol = "sampled" if mode != "full" else "seen_kept" if setting.model == "SASRec" else "seen_removed"
        ours = evaluate(model, data, config, splits.seen[phase])[protocol]
        theirs = {name: float(value) for name, value in trainer.evaluate(data, load_best_model=False).items()}
        if ours.keys() != theirs.keys():
            raise RuntimeError(f"{row['setting']}: {sorted(ours)} against {sorted(theirs)}")
        row["phases"][phase] = {"protocol": protocol, "ours": ours, "recbole": theirs}
        row["difference"] = max(row["difference"], *(abs(ours[name] - theirs[name]) for name in theirs))
    return row


def main() -> None:
    """Measure all, write JSON and a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", type=Path, default=Path("dataset"))
    parser.add_argument("--dataset", default="planted")
    parser.add_argument("--output", type=Path, help="default: results/evaluation_settings_DATASET.json")
    args = parser.parse_args()
    output = args.output or Path(f"results/evaluation_settings_{args.dataset}.json")
    rows = []
    for number, setting in enumerate(SETTINGS, start=1):
        rows.append(measure(setting, args.data_path, args.dataset))
        print(f"{number}/{len(SETTINGS)} {rows[-1]['setting']}: {rows[-1]['difference']:g}", flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"dataset": args.dataset, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# Evaluation settings on {args.dataset}: this package against RecBole", "",
        "Each setting is a model, the items that are ranked in validation and test, and metrics (at 5 and 10). The",
        "same model, with random weights, is evaluated by this package and by RecBole's `Trainer.evaluate` on both",
        "splits; figures have eight digits. [docs/protocols.md](../docs/protocols.md) explains the protocols, and the",
        f"figures are in [{output.name}]({output.name}).", "",
        f"    python experiments/evaluation_settings.py --data_path=DIR --dataset={args.dataset}", "",
        "| setting | protocols | figures | largest difference |", "|---|---|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        protocols = ", ".join(dict.fromkeys(part["protocol"] for part in row["phases"].values()))
        count = sum(len(part["ours"]) for part in row["phases"].values())
        lines.append(f"| {row['setting']} | {protocols} | {count} | {row['difference']:g} |")
    output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
