"""What the benchmarks share: a case, its configuration, a timed epoch."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable
from typing import Any, Callable

#: A side: data path -> {"seconds": float, "note": str, ...}; further keys go into the record as they are.
Side = Callable[[str], "dict[str, Any]"]

#: Batch size of both sides; RecBole's default, 2048, is half as fast an epoch here and no better a model.
BATCH = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """One benchmark: the `work` both sides do, the two sides, and what must agree between them.

    Attributes:
        check: (ours, peer) -> what was found equal, one sentence; raises AssertionError where it is not.
    """

    work: str
    ours: Side
    peer: Side
    check: Callable[[dict[str, Any], dict[str, Any]], str] | None = None


def config_of(model: str, data_path: str, dataset: str = "amazon-beauty", **options: Any) -> Any:
    """The package's configuration of `model`, quiet, with checkpoints in a temporary directory."""
    from recbole_raserec.config.config import Config

    base = {"data_path": data_path, "show_progress": False, "state": "ERROR", "checkpoint_dir": tempfile.mkdtemp()}
    return Config(model, dataset, config_dict={**base, **options}, argv=[])


def recbole_loaders(config: Any) -> tuple[Any, Any, Any]:
    """RecBole's own data set and loaders: train, validation, test."""
    from recbole.data import create_dataset, data_preparation

    return data_preparation(config, create_dataset(config))


def timed_epoch(net: Any, optimizer: Any, batches: Iterable[Any], limit: int = 0) -> float:
    """Seconds of one epoch after three warm-up steps; of `limit` batches when given."""

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
