"""DR4SR+ as a step of its own: the weight of each regenerated row for a target model."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.utils import init_seed
from tqdm import tqdm

from recbole_raserec.configuration.options import REGENERATION
from recbole_raserec.data.dataset import SEQUENCE
from recbole_raserec.data.loader import BucketLoader
from recbole_raserec.data.regenerated import Regenerated, joined
from recbole_raserec.fileio import read_json, write_json
from recbole_raserec.fingerprint import fingerprint
from recbole_raserec.regenerated_set import REPORT, RegeneratedData
from recbole_raserec.regeneration.personaliser import Bilevel, Personaliser, learn
from recbole_raserec.stages import Outcome
from recbole_raserec.stored_arrays import MANIFEST

#: Rows scored at a time.
_ROWS = 4096


def personalise(config: Any, made: RegeneratedData, base: Outcome) -> RegeneratedData:
    """Learn what each regenerated row is worth to the configured model, or reuse what a former run found.

    Args:
        config: of the target model, one of this package's. made: stage i.
        base: that model, trained on the original data.

    Returns:
        the same sequences with weights in [0, 1].
    """
    options = {name: config[name] for name in sorted(REGENERATION)}
    mark = fingerprint({**options, "seed": config["seed"]}, made.fingerprint, base.fingerprint)
    directory = Path(config["checkpoint_dir"]) / f"personalised-{config['dataset']}-{mark[:12]}"
    train, vocabulary = base.splits.train._dataset, base.splits.vocabulary()
    if config["resume"] is not False and (directory / MANIFEST).exists() and (directory / REPORT).exists():
        getLogger().info(f"Personalised weights: reusing {directory}")
        found = read_json(directory / REPORT)
        data = Regenerated.load(directory, train.user_num, train.item_num, mark, vocabulary)
        return RegeneratedData(data, directory, mark, found["seconds"], found)
    init_seed(config["seed"], config["reproducibility"])
    started = time.perf_counter()
    rows = made.data.with_ids_of(vocabulary)
    both = joined(train, rows)
    model = copy.deepcopy(base.model)
    scorer = Personaliser(model.item_vectors().shape[1]).to(config["device"])
    inner, outer = (BucketLoader(config, data, None, shuffle=True) for data in (both, train))
    plan = Bilevel(
        steps=config["regen_personal_epochs"] * len(inner), every=config["regen_personal_every"],
        terms=config["regen_personal_terms"], rate=config["regen_personal_rate"],
        learning_rate=config["regen_personal_learning_rate"], model_rate=config["learning_rate"],
    )  # fmt: skip
    n_users, device = train.store.n_users, config["device"]
    losses: list[float] = []
    with tqdm(total=plan.steps, desc="Personalise", disable=not config["show_progress"], dynamic_ncols=True) as bar:

        def batches(loader: BucketLoader, counted: bool) -> Iterator[Any]:
            while True:
                for batch in loader:
                    bar.update(int(counted))
                    yield batch.to(device)

        learn(
            model, scorer, batches(inner, True), batches(outer, False), plan,
            lambda batch: batch[SEQUENCE] >= n_users, losses.append,
        )  # fmt: skip
    weights = _weights(model, scorer, both, rows, device)
    data = dataclasses.replace(rows, weights=weights)
    seconds = made.seconds + time.perf_counter() - started
    tail = losses[len(losses) // 2 :]
    found = {**made.report, "seconds": seconds, "weights": {
        "outer_loss": float(np.mean(tail)) if tail else None,
        "deciles": np.quantile(weights, np.linspace(0, 1, 11)).tolist(),
        "mean_by_origin": {
            str(origin): float(weights[np.repeat(data.origin == origin, np.diff(data.offsets))].mean())
            for origin in np.unique(data.origin)
        },
    }}  # fmt: skip
    data.save(directory, mark)
    write_json(directory / REPORT, found)
    getLogger().info(f"Personalised weights: {directory}, deciles {np.round(found['weights']['deciles'], 3).tolist()}")
    return RegeneratedData(data, directory, mark, seconds, found)


@torch.no_grad()
def _weights(model: Any, scorer: Personaliser, both: Any, data: Regenerated, device: Any) -> np.ndarray:
    """Score of each item as a target, float32 [N]; 1 for the first of a sequence, which is none."""
    model.eval()
    weights = np.ones(len(data.items), dtype=np.float32)
    owner = np.repeat(np.arange(len(data)), np.diff(data.offsets))
    place = np.flatnonzero(np.arange(len(data.items)) > data.offsets[owner])
    first = len(both) - len(place)  # the regenerated rows come last, in the order of the items
    for start in range(0, len(place), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(place)))
        h, _ = model.encode_batch(both[first + rows].to(device))
        weights[place[rows]] = scorer.score(h).cpu().numpy()
    return weights
