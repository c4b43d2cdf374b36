"""Full ranking of the test targets under both protocols."""

from __future__ import annotations

import resource
import time
from typing import Any

from benchmarks.common import Case, config_of, recbole_loaders

DIGITS = 8


def ours(data_path: str) -> dict[str, Any]:
    """Both protocols in one pass."""
    from recbole_raserec.data.splits import prepare_data
    from recbole_raserec.evaluation.protocols import evaluate
    from recbole_raserec.kernels.allocator import keep_freed_memory
    from recbole_raserec.recommendation.sasrec import SASRec

    keep_freed_memory()
    config = config_of("SASRec", data_path)
    splits = prepare_data(config)
    net = _random(SASRec, config, splits.dataset)
    before = _peak()
    started = time.perf_counter()
    result = evaluate(net, splits.test, config, splits.seen["test"], decimals=DIGITS)
    seconds = time.perf_counter() - started
    note = f"both protocols; the peak grew by {_peak() - before:.0f} MiB (eval_memory_mb: {config['eval_memory_mb']})"
    return {"seconds": seconds, "note": note, "metrics": result}


def recbole(data_path: str) -> dict[str, Any]:
    """RecBole's evaluation, once with its sequential loader (seen kept); removed would be a second, like run."""
    from recbole.model.sequential_recommender.sasrec import SASRec
    from recbole.trainer import Trainer

    config = config_of("SASRec", data_path, metric_decimal_place=DIGITS)
    _, _, test = recbole_loaders(config)
    trainer = Trainer(config, _random(SASRec, config, test._dataset))
    before = _peak()
    started = time.perf_counter()
    result = trainer.evaluate(test, load_best_model=False)
    seconds = time.perf_counter() - started
    note = f"one protocol timed, doubled for two; the peak grew by {_peak() - before:.0f} MiB"
    return {"seconds": 2 * seconds, "note": note, "metrics": {"seen_kept": dict(result)}}


def _random(kind: Any, config: Any, dataset: Any) -> Any:
    """The same random weights on both sides, spread out so that scores do not tie."""
    import torch

    torch.manual_seed(0)
    net = kind(config, dataset)
    with torch.no_grad():
        net.item_embedding.weight.mul_(25)
    return net


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def same_values(a: dict[str, Any], b: dict[str, Any]) -> str:
    """RecBole's metrics, to the last digit it prints (four by default); the rest is rounding of the scores."""
    ours_kept, theirs = a["metrics"]["seen_kept"], b["metrics"]["seen_kept"]
    apart = max(abs(ours_kept[name] - value) for name, value in theirs.items())
    assert all(round(ours_kept[name], 4) == round(value, 4) for name, value in theirs.items()), (ours_kept, theirs)
    return f"{len(theirs)} metrics (seen kept) equal to 4 digits, at most {apart:.1e} apart"


CASES = {
    "full-ranking": Case(
        "amazon-beauty: rank the test target of every user among all items, both protocols", ours, recbole, same_values
    ),
}
