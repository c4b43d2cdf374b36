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

from recbole_raserec.configuration.stage_options import regeneration_options
from recbole_raserec.data.dataset import SEQUENCE
from recbole_raserec.data.loader import BucketLoader
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.errors import CheckpointError
from recbole_raserec.fileio import read_json, read_tensors, write_json, write_tensors
from recbole_raserec.fingerprint import fingerprint
from recbole_raserec.regenerated_set import REPORT, RegeneratedData
from recbole_raserec.regeneration.personaliser import Bilevel, Learner, Personaliser
from recbole_raserec.stages import Outcome
from recbole_raserec.stored_arrays import MANIFEST

#: Raised when the same options and data would give other weights than before.
VERSION = 2

#: What a run that was killed goes on from.
STATE = "personaliser-state.safetensors"

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
    options = {name: config[name] for name in regeneration_options(config)}
    mark = fingerprint({**options, "seed": config["seed"], "version": VERSION}, made.fingerprint, base.fingerprint)
    directory = Path(config["checkpoint_dir"]) / f"personalised-{config['dataset']}-{mark[:12]}"
    train, vocabulary = base.splits.train._dataset, base.splits.vocabulary()
    if config["resume"] is not False and (directory / MANIFEST).exists() and (directory / REPORT).exists():
        getLogger().info(f"Personalised weights: reusing {directory}")
        found = read_json(directory / REPORT)
        data = Regenerated.load(directory, train.user_num, train.item_num, mark, vocabulary)
        return RegeneratedData(data, directory, mark, found["seconds"], found)
    started = time.perf_counter()
    rows = made.data.with_ids_of(vocabulary)
    both = joined(train, rows)
    model, scorer, losses, before = _learned(config, base.model, both, train, directory)
    weights, place = _weights(model, scorer, both, rows, config["device"])
    data = dataclasses.replace(rows, weights=weights)
    seconds = made.seconds + before + time.perf_counter() - started
    tail = losses[len(losses) // 2 :]
    origin = np.repeat(data.origin, np.diff(data.offsets))[place]
    found = {**made.report, "seconds": seconds, "weights": {
        "outer_loss": float(np.mean(tail)) if tail else None,
        "deciles": np.quantile(weights[place], np.linspace(0, 1, 11)).tolist(),
        "mean_by_origin": {
            ORIGINS[number]: float(weights[place][origin == number].mean()) for number in np.unique(origin)
        },
    }}  # fmt: skip
    data.save(directory, mark)
    write_json(directory / REPORT, found)
    (directory / STATE).unlink(missing_ok=True)
    getLogger().info(f"Personalised weights: {directory}, deciles {np.round(found['weights']['deciles'], 3).tolist()}")
    return RegeneratedData(data, directory, mark, seconds, found)


def _learned(
    config: Any, base: Any, both: Any, train: Any, directory: Path
) -> tuple[Any, Personaliser, list[float], float]:
    """Model, scorer, outer losses, and the seconds of former runs; after each pass the state lies in `directory`."""
    init_seed(config["seed"], config["reproducibility"])
    model, n_users, device = copy.deepcopy(base), train.store.n_users, config["device"]
    scorer = Personaliser(model.item_vectors().shape[1]).to(device)
    learner = Learner(model, scorer, Bilevel(
        every=config["regen_personal_every"], terms=config["regen_personal_terms"],
        rate=config["regen_personal_rate"], learning_rate=config["regen_personal_learning_rate"],
        model_rate=config["learning_rate"],
    ))  # fmt: skip
    loaders = [BucketLoader(config, data, None, shuffle=True) for data in (both, train)]
    passes, seconds = 0, 0.0
    losses: list[float] = []
    path = directory / STATE
    if config["resume"] is not False and path.exists():
        passes, losses, seconds = _resume(learner, path)
        getLogger().info(f"Personaliser: resuming after pass {passes - 1} from {directory}")
    started = time.perf_counter() - seconds
    for number in range(passes, config["regen_personal_epochs"]):
        torch.manual_seed(config["seed"] * 1_000_003 + number)  # a pass's noise depends on its number alone
        for which, loader in enumerate(loaders):
            loader.generator.manual_seed(config["seed"] * 1_000_003 + 2 * number + which)
        desc, hidden = f"Personalise {number:>3}", not config["show_progress"]
        inner = tqdm(loaders[0], desc=desc, disable=hidden, dynamic_ncols=True)
        learner.learn(
            (batch.to(device) for batch in inner), (batch.to(device) for batch in _endless(loaders[1])),
            lambda batch: batch[SEQUENCE] >= n_users, losses.append,
        )  # fmt: skip
        meta = {"passes": number + 1, "steps": learner.steps, "losses": losses}
        write_tensors(path, learner.tensors(), {**meta, "seconds": time.perf_counter() - started})
    return model, scorer, losses, seconds


def _endless(loader: BucketLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _resume(learner: Learner, path: Path) -> tuple[int, list[float], float]:
    """Passes done, outer losses and seconds so far."""
    try:
        tensors, meta = read_tensors(path)
        learner.load(tensors, int(meta["steps"]))
        return int(meta["passes"]), [float(loss) for loss in meta["losses"]], float(meta["seconds"])
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path} does not fit this run ({reason}); delete it to start anew.") from None


@torch.no_grad()
def _weights(
    model: Any, scorer: Personaliser, both: Any, data: Regenerated, device: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Score of each item as a target, float32 [N], and the places of the targets, int64 [T].

    The first of a sequence is none and has a 1.
    """
    model.eval()
    weights = np.ones(len(data.items), dtype=np.float32)
    owner = np.repeat(np.arange(len(data)), np.diff(data.offsets))
    place = np.flatnonzero(np.arange(len(data.items)) > data.offsets[owner])
    first = len(both) - len(place)  # the regenerated rows come last, in the order of the items
    for start in range(0, len(place), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(place)))
        h, _ = model.encode_batch(both[first + rows].to(device))
        weights[place[rows]] = scorer.score(h).cpu().numpy()
    return weights, place
