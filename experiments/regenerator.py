"""Does the regenerator learn, do pretrained item vectors help, and do its conditions differ?

    python experiments/regenerator.py --data_path=DIR [--dataset=ml-100k]

trains the regenerator with the shipped defaults, from SASRec's item vectors and from scratch, and measures on held-out
sequences what a pair costs: under the regenerator (conditions equally likely), under a unigram model of the patterns,
and under copying a random subsequence; both baselines choose among the sequence's unused items too and know how long
patterns are. Then it generates patterns and counts how many of the conditions' patterns differ. Writes
results/regenerator_<dataset>.json and the page (.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np
from grid import Results, mean

from recbole_raserec.config.config import Config
from recbole_raserec.data.preparation.download import ensure_dataset
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.regeneration.inference import generate
from recbole_raserec.regeneration.pairs import Pairs, make_pairs, pieces, training_sequences
from recbole_raserec.regeneration.regenerator import BEST, build, held_out_loss, schedule_of, split
from recbole_raserec.regeneration.stage import regenerate
from recbole_raserec.storage.files import read_tensors

ROWS = {"from SASRec's item vectors": ("--regen_pretrained=True",), "from scratch": ("--regen_pretrained=False",)}
GAMMAS = (0.0, 0.1, 1.0)
#: Sequences whose patterns are compared between conditions.
SAMPLE = 2000


def measure(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Costs of a held-out pair in nats, and how the conditions differ."""
    argv = ["--model=SASRec", "--regeneration=True", *options, f"--dataset={args.dataset}", f"--seed={seed}"]
    argv += [f"--data_path={args.data_path}", f"--checkpoint_dir={args.checkpoint_dir}"]
    config = Config(argv=[*argv, *(f"--{option}" for option in args.options)])
    ensure_dataset(config)
    made = regenerate(config)
    train = prepare_data(config.without_regeneration()).train._dataset
    whole = training_sequences(train)
    read = pieces(whole, config["MAX_ITEM_LIST_LENGTH"])
    pairs = make_pairs(
        read, whole, config["regen_span"], config["regen_min_support"], config["regen_pattern_length"],
        config["regen_pairs"], config["seed"],
    )  # fmt: skip
    weights = read_tensors(Path(made.directory).parent / made.report["regenerator"] / BEST)[0]
    model = build(config, train.store.n_items, weights["items.weight"][: train.store.n_items])
    model.load_state_dict(weights)
    model.eval()
    plan = schedule_of(config)
    learn, held = split(pairs, plan.held_out, plan.seed)
    record: dict[str, Any] = {
        "regenerator": held_out_loss(model, pairs, held), **baselines(pairs, learn, held, train.store.n_items),
        "epochs": len(made.report["training"]["epochs"]), "seconds": made.seconds, "pairs": len(pairs),
    }  # fmt: skip
    sample = np.unique(np.linspace(0, len(read) - 1, SAMPLE).astype(np.int64))
    for gamma in GAMMAS:
        found = generate(model, read, gamma)[sample]
        record[f"gamma {gamma:g}"] = diversity(found)
    return record


def baselines(pairs: Pairs, learn: np.ndarray, held: np.ndarray, n_items: int) -> dict[str, float]:
    """Mean cost of a pair of the `held` sequences under what the others' patterns tell."""
    known = [pairs.patterns[p] for row in learn for p in pairs.pattern[pairs.offsets[row] : pairs.offsets[row + 1]]]
    counts = np.bincount(np.concatenate([np.asarray(pattern) for pattern in known]), minlength=n_items) + 1.0
    lengths = np.bincount([len(pattern) for pattern in known], minlength=8).astype(float)
    going = lengths[::-1].cumsum()[::-1]  # patterns of at least so many items
    ends = {n: (lengths[n] + 1) / (going[n] + 2) if n >= 2 else 0.0 for n in range(8)}
    unigram = copying = total = 0.0
    for row in held:
        source = list(dict.fromkeys(pairs.sequences.items[slice(*pairs.sequences.offsets[row : row + 2])].tolist()))
        for number in range(pairs.offsets[row], pairs.offsets[row + 1]):
            pattern = pairs.patterns[pairs.pattern[number]]
            unigram -= _cost(pattern, source, ends, lambda item, place: counts[item])
            copying -= _cost(pattern, source, ends, lambda item, place: 1.0 if place >= 0 else 1e-3)
            total += 1
    return {"unigram": unigram / total, "copy": copying / total}


def _cost(pattern: Sequence[int], source: list[int], ends: dict[int, float], weight: Any) -> float:
    """Log-probability; `weight` of (item, places behind the last chosen one, negative before it)."""
    place = {item: number for number, item in enumerate(source)}
    total, last, used = 0.0, -1, set()
    for step, item in enumerate(pattern):
        left = [other for other in source if other not in used]
        weights = {other: weight(other, place[other] - last) for other in left}
        total += math.log(1 - ends[step]) + math.log(weights[item] / sum(weights.values()))
        used.add(item)
        last = place[item]
    return total + (math.log(ends[len(pattern)]) if len(used) < len(source) else 0.0)


def diversity(found: np.ndarray) -> dict[str, float]:
    """Of patterns [S, K, L]: share of pairs of conditions that differ, distinct patterns a sequence, mean length."""
    ways = found.shape[1]
    different = [(found[:, a] != found[:, b]).any(1).mean() for a in range(ways) for b in range(a)]
    distinct = np.mean([len({row.tobytes() for row in patterns}) for patterns in found])
    return {
        "different": float(np.mean(different)) if different else 0.0,
        "distinct": float(distinct),
        "length": float((found > 0).sum(2).mean()),
    }


def page(dataset: str, results: Results) -> str:
    """The tables."""
    lines = [
        "# The regenerator",
        "",
        f"`experiments/regenerator.py`, {dataset}: shipped defaults; mean over",
        "the seeds, standard deviation in brackets. Cost of a pair of a held-out sequence in nats, end included.",
        "",
        "| | seeds | regenerator | unigram | copy a random subsequence | epochs | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    filled = {label: list(runs.values()) for label, runs in results.items() if runs}
    for label, records in filled.items():
        costs = [mean((r[name] for r in records), 3) for name in ("regenerator", "unigram", "copy")]
        rest = [mean((r["epochs"] for r in records), 0), mean((r["seconds"] / 60 for r in records), 1)]
        lines.append(f"| {label} | {', '.join(results[label])} | {' | '.join([*costs, *rest])} |")
    lines += ["", "Greedy patterns of a sequence under the conditions:", ""]
    lines += ["| | gamma | differing pairs of conditions | distinct patterns | mean length |", "|---|---|---|---|---|"]
    for label, records in filled.items():
        for gamma in GAMMAS:
            measured = [r[f"gamma {gamma:g}"] for r in records]
            cells = [mean((r[name] for r in measured), 2) for name in ("different", "distinct", "length")]
            lines.append(f"| {label} | {gamma:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing; write figures and page."""
    grid.main(__doc__, ROWS, "regenerator", page, "ml-100k", measure)


if __name__ == "__main__":
    main()
