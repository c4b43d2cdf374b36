"""A stage that trains a model: resumable, one run at a time in its directory, and at its end a checkpoint there."""

from __future__ import annotations

import contextlib
import dataclasses
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

from recbole_raserec.config import Config, get_trainer_class, selection_protocol, short_name
from recbole_raserec.data import Features, Splits, catalogue_of
from recbole_raserec.distributed import current
from recbole_raserec.errors import CheckpointError, DatasetError
from recbole_raserec.evaluation import Ranks, collect_ranks, evaluate, metrics_by_protocol
from recbole_raserec.storage import MANIFEST, locked, read_manifest, write_checkpoint
from recbole_raserec.training.tracking import tracker_of
from recbole_raserec.training.trainer import resumable

#: Digits of the figures in reports and results; early stopping compares RecBole's `metric_decimal_place`.
DECIMALS = 6


@dataclasses.dataclass
class Outcome:
    """A finished stage.

    Attributes:
        name: of the model.
        model: with its best weights, in evaluation mode.
        splits: the data it was trained on.
        metrics: phase -> protocol -> metric -> value; of a trial those of "valid" alone.
        seconds: training time over all its runs.
        directory: its checkpoint.
        fingerprint: of options, data and all else that it rests on.
        ranks: of the test targets, which its test metrics are made of; None of a trial.
        curve: of its training (`ResumableTrainer.curve`); empty where it was not kept.
    """

    name: str
    model: Any
    splits: Splits
    metrics: dict[str, dict[str, dict[str, float]]]
    seconds: float
    directory: Path
    fingerprint: str
    ranks: Optional[Ranks] = None
    curve: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Learned numbers of the model; what a memory stores does not count."""
        return sum(values.numel() for values in self.model.parameters())


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a search over options: its stages are trained and validated, never tested; a later run continues them.

    Attributes:
        after_epoch: called after each validated epoch of the last stage with its number, from 0, and its value of the
            metric that stops it early; an error it raises ends the run.
        top_k: neighbours to search for where the option `top_k` asks for fewer, so that other trials find theirs.
    """

    after_epoch: Optional[Callable[[int, float], None]] = None
    top_k: int = 0

    def unwatched(self) -> Trial:
        """The same for a stage that is not the last."""
        return dataclasses.replace(self, after_epoch=None)


class Hooks:
    """What a stage does around the training of its model; this one does nothing."""

    trains = True  # whether there is anything to train

    def before_epoch(self, epoch: int) -> None:
        """Called before each training epoch with its number, from 0."""

    def before_evaluation(self) -> None:
        """Called before the model is validated."""

    def after_training(self, validate: Callable[[], float], metric: str) -> bool:
        """Called once with the best weights in the model; returns whether it changed them, so that they are kept again.

        Args:
            validate: value of the `metric` that stops a training early, on the validation split.
            metric: its name.
        """
        return False

    def before_test(self) -> None:
        """Called after the last validation and before the test."""


def evaluate_test(model: Any, splits: Splits, config: Config) -> tuple[Ranks, dict[str, dict[str, float]]]:
    """Ranks of the test targets, and the metrics made of them by protocol."""
    ranks = collect_ranks(model, splits.test, config, splits.seen["test"])
    return ranks, metrics_by_protocol(ranks, config, decimals=DECIMALS)


def run_stage(
    config: Config, splits: Splits, model: Any, train_data: Any, mark: str, manifest: dict[str, Any],
    hooks: Optional[Hooks] = None, trial: Optional[Trial] = None, stage: str = "recommendation",
) -> Outcome:  # fmt: skip
    """Train to the end (or reuse a finished run), evaluate the best weights, complete the checkpoint.

    Of several runs with the same options, data and seed one trains at a time: the others wait and reuse what it left.

    Args:
        config: of the stage.
        splits: data set and its splits.
        model: to be trained.
        train_data: loader of the training split.
        mark: fingerprint of the stage.
        manifest: what the checkpoint's manifest says beside the figures.
        hooks: what happens around the training.
        trial: given where the run is one of a search.
        stage: first part of the names of its figures.

    Raises:
        CheckpointError: the directory holds another run, or a damaged state.
        DatasetError: the processes of a group read different data or options.
    """
    group, hooks = current(), hooks or Hooks()
    name, protocol = config["model"], selection_protocol(config)
    directory = Path(config["checkpoint_dir"]) / f"{short_name(name)}-{config['dataset']}-{mark[:12]}"
    if not group.agreed(mark):
        differ = f"world_size: {group.size} processes read different data or options"
        raise DatasetError(f"{differ}; give all machines the same.")
    resume = config["resume"] is not False

    def finished() -> Optional[dict[str, Any]]:
        return read_manifest(directory) if resume and (directory / MANIFEST).exists() else None

    def validate(model: Any, data: Any) -> Any:
        hooks.before_evaluation()
        return evaluate(model, data, config, splits.seen["valid"])

    def value() -> float:
        return evaluate(model, splits.valid, config, splits.seen["valid"])[protocol][trainer.valid_metric]

    done = group.from_first(finished)
    with contextlib.ExitStack() as held:
        if done is None:
            group.from_first(lambda: held.enter_context(locked(directory, short_name(name))))
            done = group.from_first(finished)
        if done is not None:
            held.close()
            if done["fingerprint"] != mark:
                raise CheckpointError(f"{directory} holds another run; move it away or set `checkpoint_dir`.")
            getLogger().info(f"{name}: reusing the finished run in {directory}")
        kind = resumable(get_trainer_class(config))
        trainer = kind(config, model, directory, validate, protocol, resume, hooks.before_epoch, stage)
        if not hooks.trains:
            if done is None:
                trainer.keep()
        elif done is None or trainer.start_epoch == 0:
            watch = trial.after_epoch if trial is not None else None
            trainer.fit(train_data, splits.valid, show_progress=config["show_progress"], callback_fn=watch)
        trainer.load_best()
        model.eval()
        hooks.before_evaluation()
        if done is None and hooks.after_training(value, trainer.valid_metric):
            trainer.keep()
        metrics = {"valid": evaluate(model, splits.valid, config, splits.seen["valid"], decimals=DECIMALS)}
        tracker_of(config).log_metrics(stage, "best", metrics["valid"])
        if trial is not None:
            return Outcome(name, model, splits, metrics, trainer.seconds, directory, mark)
        hooks.before_test()
        ranks, metrics["test"] = evaluate_test(model, splits, config)
        tracker_of(config).log_metrics(stage, "test", metrics["test"])
        curve = trainer.curve if done is None else done.get("curve", {})
        outcome = Outcome(name, model, splits, metrics, trainer.seconds, directory, mark, ranks, curve)
        if done is None and group.first:
            full = {"model": name, "dataset": config["dataset"], "fingerprint": mark, "data": splits.fingerprint}
            full.update(manifest, metrics=metrics, seconds=trainer.seconds, curve=curve)
            known = catalogue_of(splits, config)
            write_checkpoint(
                directory, full, splits.vocabulary(), getattr(model, "memory", None), known, Features.of(splits.dataset)
            )
    return outcome
