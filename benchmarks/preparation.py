"""From an atomic file to loaders: a real data set, and a generated log of ten million interactions."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Case, config_of, recbole_loaders

#: The generated log: users, interactions of each on average, items.
BIG, BIG_MEAN, BIG_ITEMS = 1_000_000, 10, 200_000
#: The peer prepares one in so many users.
SHARE = 50


def our_preparation(data_path: str) -> dict[str, Any]:
    """amazon-beauty through this package."""
    from recbole_raserec.data.splits import prepare_data

    config = config_of("SASRec", data_path)
    started = time.perf_counter()
    splits = prepare_data(config)
    return {"seconds": time.perf_counter() - started, "note": _note(splits.train), "first": _first(splits.train)}


def recbole_preparation(data_path: str) -> dict[str, Any]:
    """amazon-beauty through RecBole."""
    config = config_of("SASRec", data_path)
    started = time.perf_counter()
    train, _, _ = recbole_loaders(config)
    return {"seconds": time.perf_counter() - started, "note": _note(train), "first": _first(train)}


def _note(train: Any) -> str:
    return f"{len(train._dataset)} training windows ready"


def _first(train: Any) -> list[int]:
    """A few numbers that depend on every window of the training part."""
    feat = train._dataset.inter_feat
    columns = [feat[name].numpy() for name in ("user_id", "item_id", "item_length")]
    place = np.arange(1, len(columns[0]) + 1)
    return [int((column * place % 1_000_003).sum()) for column in columns]


def same_windows(ours: dict[str, Any], peer: dict[str, Any]) -> str:
    """Both sides prepared the same windows in the same order."""
    assert ours["first"] == peer["first"]
    return "the same windows in the same order (user, target and length of each)"


def generate(users: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, item and time of a log with a geometric number of interactions a user, some items far more popular."""
    rng = np.random.default_rng(0)
    counts = 5 + rng.geometric(1 / (BIG_MEAN - 4), users) - 1
    user = np.repeat(np.arange(users), counts)
    item = (BIG_ITEMS * rng.random(len(user)) ** 2).astype(np.int64)
    return user, item, rng.integers(1_000_000_000, 1_016_000_000, len(user))


def write_big_log(directory: Path, users: int) -> Path:
    """:func:`generate` as an atomic file."""
    user, item, stamp = generate(users)
    path = directory / "big" / "big.inter"
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for start in range(0, len(user), 500_000):
            part = slice(start, start + 500_000)
            rows = zip(user[part].tolist(), item[part].tolist(), stamp[part].tolist())
            file.write("".join(f"u{u}\ti{i}\t{t}\n" for u, i, t in rows))
    return path


def big_ours(_: str) -> dict[str, Any]:
    """Ten million interactions to loaders, and the first training batch."""
    from recbole_raserec.data.splits import prepare_data

    with tempfile.TemporaryDirectory() as folder:
        size = os.path.getsize(write_big_log(Path(folder), BIG))
        config = config_of("SASRec", folder, "big", **_FILTER)
        started = time.perf_counter()
        train = prepare_data(config).train
        batch = next(iter(train))
        seconds = time.perf_counter() - started
    interactions = len(train._dataset.store)
    note = (
        f"{interactions} interactions ({size >> 20} MiB), {len(train._dataset)} windows, a batch of {len(batch)} made"
    )
    return {"seconds": seconds, "note": note}


def big_recbole(_: str) -> dict[str, Any]:
    """RecBole on one in :data:`SHARE` of the users; time scaled, memory as it is."""
    with tempfile.TemporaryDirectory() as folder:
        write_big_log(Path(folder), BIG // SHARE)
        config = config_of("SASRec", folder, "big", **_FILTER)
        started = time.perf_counter()
        train, _, _ = recbole_loaders(config)
        next(iter(train))
        seconds = (time.perf_counter() - started) * SHARE
    note = f"one in {SHARE} of the users, time scaled by {SHARE}; the peak is that of the {SHARE}th part"
    return {"seconds": seconds, "note": note}


_FILTER = {"user_inter_num_interval": "[5,inf)", "item_inter_num_interval": "[2,inf)"}

CASES = {
    "data-prep": Case(
        "amazon-beauty: atomic file to loaders, ready to train", our_preparation, recbole_preparation, same_windows
    ),
    "big-log": Case("a generated log of 10 M interactions: atomic file to the first batch", big_ours, big_recbole),
}
