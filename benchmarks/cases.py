"""What is timed: for each name our side and RecBole's, both returning (seconds, note)."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from typing import Any, Callable

Side = Callable[[str], "tuple[float, str]"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One benchmark: the `work` both sides do, and the two sides."""

    work: str
    ours: Side
    peer: Side


def _config(model: str, data_path: str, dataset: str = "amazon-beauty", **options: Any) -> Any:
    from recbole_raserec.config import Config

    base = {"data_path": data_path, "show_progress": False, "state": "ERROR", "checkpoint_dir": tempfile.mkdtemp()}
    return Config(model, dataset, config_dict={**base, **options}, argv=[])


def _our_epoch(model: str, training: str) -> Side:
    def run(data_path: str) -> tuple[float, str]:
        import torch

        from recbole_raserec.allocator import keep_freed_memory
        from recbole_raserec.registry import get_model
        from recbole_raserec.stages import prepare_data

        keep_freed_memory()
        config = _config(model, data_path, training=training)
        splits = prepare_data(config)
        net = get_model(model)(config, splits.dataset)
        net.train()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        return _timed_epoch(
            net, optimizer, splits.train
        ), f"whole epoch, {training}, batch {config['train_batch_size']}"

    return run


def _timed_epoch(net: Any, optimizer: Any, batches: Any, limit: int = 0) -> float:
    """Seconds of one epoch after a few warm-up steps; of `limit` batches when given."""

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        net.calculate_loss(batch).backward()
        optimizer.step()

    for number, batch in enumerate(batches):
        step(batch)
        if number == 2:
            break
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        step(batch)
        if limit and number + 1 == limit:
            break
    return time.perf_counter() - started


def _recbole_epoch(model: str, batches: int) -> Side:
    """RecBole's own data set, loader and model; what ``Trainer._train_epoch`` does for each batch."""

    def run(data_path: str) -> tuple[float, str]:
        import torch
        from recbole.data import create_dataset, data_preparation
        from recbole.utils import get_model

        config = _config(model, data_path, train_batch_size=512)
        train, _, _ = data_preparation(config, create_dataset(config))
        net = get_model(model)(config, train._dataset)
        net.train()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        seconds = _timed_epoch(net, optimizer, train, batches) * len(train) / batches
        return seconds, f"{batches} of {len(train)} batches of 512, scaled to the epoch"

    return run


def _our_preparation(data_path: str) -> tuple[float, str]:
    from recbole_raserec.stages import prepare_data

    config = _config("SASRec", data_path)
    started = time.perf_counter()
    splits = prepare_data(config)
    return time.perf_counter() - started, f"{len(splits.train._dataset)} training windows ready"


def _recbole_preparation(data_path: str) -> tuple[float, str]:
    from recbole.data import create_dataset, data_preparation

    config = _config("SASRec", data_path)
    started = time.perf_counter()
    train, _, _ = data_preparation(config, create_dataset(config))
    return time.perf_counter() - started, f"{len(train._dataset)} training windows ready"


def _our_ranking(data_path: str) -> tuple[float, str]:
    from recbole_raserec.allocator import keep_freed_memory
    from recbole_raserec.evaluation.protocols import evaluate
    from recbole_raserec.stages import prepare_data

    keep_freed_memory()
    config = _config("SASRec", data_path)
    splits = prepare_data(config)
    net = _random_model(config, splits.dataset)
    started = time.perf_counter()
    result = evaluate(net, splits.test, config, splits.seen["test"], decimals=8)
    note = ", ".join(f"{name} NDCG@10 {values['ndcg@10']:.8f}" for name, values in result.items())
    return time.perf_counter() - started, note


def _recbole_ranking(data_path: str) -> tuple[float, str]:
    from recbole.data import create_dataset, data_preparation
    from recbole.trainer import Trainer

    config = _config("SASRec", data_path, metric_decimal_place=8)
    _, _, test = data_preparation(config, create_dataset(config))
    net = _random_model(config, test._dataset)
    trainer = Trainer(config, net)
    started = time.perf_counter()
    result = trainer.evaluate(test, load_best_model=False)
    seconds = time.perf_counter() - started
    return 2 * seconds, f"seen_kept NDCG@10 {result['ndcg@10']:.8f}; one protocol timed, doubled for two"


def _random_model(config: Any, dataset: Any) -> Any:
    """The same random SASRec on both sides."""
    import torch
    from recbole.model.sequential_recommender.sasrec import SASRec

    torch.manual_seed(0)
    return SASRec(config, dataset)


CASES = {
    "sasrec-epoch": Case(
        "amazon-beauty, SASRec, one training epoch: packed against RecBole",
        _our_epoch("SASRec", "packed"),
        _recbole_epoch("SASRec", 12),
    ),
    "sasrec-prefix": Case(
        "amazon-beauty, SASRec, one training epoch: one window per target against RecBole",
        _our_epoch("SASRec", "prefix"),
        _recbole_epoch("SASRec", 12),
    ),
    "data-prep": Case("amazon-beauty: atomic file to loaders, ready to train", _our_preparation, _recbole_preparation),
    "full-ranking": Case(
        "amazon-beauty: rank the test target of every user among all items, both protocols",
        _our_ranking,
        _recbole_ranking,
    ),
}
