"""The study: what Optuna keeps in `study.db`, opened, continued, and asked for the next trial.

The storage is SQLite. A process can be killed at any moment of a write and the next one finds the last whole
transaction; Optuna's journal file would keep the half line and, for half a minute, the lock of the killed process. Its
advantage, network file systems, is none where one process writes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from recbole_raserec.errors import ConfigError, shown
from recbole_raserec.tuning.space import Space, optuna, rounded

STORAGE = "study.db"

SAMPLERS = ("tpe", "random", "grid", "gp")
PRUNERS = ("median", "halving", "none")

#: Draws at random before a sampler learns from what was found.
_STARTUP = 10


def pruner(name: str) -> Any:
    """Optuna's pruner of that name in `PRUNERS`."""
    if name == "median":  # ends none before five trials are complete, and leaves three epochs to each
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
    if name == "halving":  # of the trials that reach epoch 4, 8, 16, ... the better half continues
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=4, reduction_factor=2, min_early_stopping_rate=0)
    return optuna.pruners.NopPruner()


def sampler(name: str, seed: int, number: int, grid: list[dict[str, Any]]) -> Any:
    """The sampler of one trial. Its draws depend on the seed, the trial's number and the trials before, not on the
    process: a study that was interrupted continues as it would have.

    Args:
        name: of `SAMPLERS`.
        seed: of the search.
        number: of the trial, from 0.
        grid: the combinations, for "grid".
    """
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=_STARTUP)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=drawn, n_startup_trials=_STARTUP)
        base = optuna.samplers.RandomSampler(seed=drawn)
        if name == "grid":
            order = random.Random(seed).sample(range(len(grid)), len(grid))  # fewer trials spread over the grid
            return optuna.samplers.PartialFixedSampler(grid[order[number]], base)
        return base


def open_study(directory: Path, name: str, maximize: bool, identity: Mapping[str, Any], first: dict[str, Any]) -> Any:
    """The study of a directory, new or as it was left.

    Args:
        directory: that holds, or will hold, `STORAGE`.
        name: of the study.
        maximize: whether a larger value is better.
        identity: what makes its trials comparable, JSON-able.
        first: parameters of the first trial; none: they are drawn.

    Raises:
        ConfigError: the directory holds a study of something else, or the file is no study.
    """
    from sqlalchemy.exc import SQLAlchemyError

    path = (directory / STORAGE).resolve()
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{path}", study_name=name, load_if_exists=True,
            direction="maximize" if maximize else "minimize",
        )  # fmt: skip
        if "identity" not in study.user_attrs:
            if first:
                study.enqueue_trial(first, skip_if_exists=True)
            study.set_user_attr("identity", identity)
        found = study.user_attrs["identity"]
    except (optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        raise ConfigError([f"output: {path} cannot be opened as a study ({error}); name another directory"]) from error
    problems = _differences(found, identity)
    if problems:
        raise ConfigError([f"output: {directory} holds another study: {'; '.join(problems)}. Name another directory."])
    return study


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], within: str = "") -> list[str]:
    words = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            words += _differences(old, new, f" of {key}{within}")
        else:
            words.append(f"{key}{within} is {shown(old)} there and {shown(new)} here")
    return words[:5]


def finished(study: Any) -> list[Any]:
    """The trials that are over, in order: complete, pruned or failed."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def next_trial(study: Any, space: Space, kind: str, seed: int, grid: list[dict[str, Any]]) -> tuple[Any, dict]:
    """The trial that was interrupted, to be continued, or a new one; with the values of its parameters."""
    study.sampler = sampler(kind, seed, len(finished(study)), grid)
    running = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    # What the interrupted trial had drawn is in the storage and drawn no more; what it had not is drawn as it was.
    trial = optuna.trial.Trial(study, running[0]._trial_id) if running else study.ask()
    drawn = {name: trial._suggest(name, distribution) for name, distribution in space.items()}
    return trial, values_of(drawn, space)


def values_of(drawn: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The drawn values of a trial, as its run gets them."""
    return {name: rounded(space[name], drawn[name]) for name in space if name in drawn}


def best_first(study: Any) -> list[Any]:
    """The complete trials, the best first; of equal ones the earlier."""
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    complete = [trial for trial in finished(study) if trial.state == optuna.trial.TrialState.COMPLETE]
    return sorted(complete, key=lambda trial: (sign * trial.value, trial.number))


def importances(study: Any) -> Optional[dict[str, float]]:
    """The share of the value's variation that each parameter accounts for; None where too few trials are complete."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.importance.get_param_importances(study)
        except (ImportError, RuntimeError, ValueError):
            return None
    return {name: float(share) for name, share in found.items()} or None
