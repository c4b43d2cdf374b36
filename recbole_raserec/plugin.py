"""What RecBole's own functions do with our models: their data, their trainers, their checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from recbole.data import create_dataset
from recbole.trainer import Trainer
from recbole.utils import get_local_time

from recbole_raserec.compat import load_checkpoint as load_pickled
from recbole_raserec.config import RETRIEVAL_MODEL, Config, evaluation_problems, saved_config, selection_protocol
from recbole_raserec.data import prepare_data
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import evaluate
from recbole_raserec.recommendation import train_model
from recbole_raserec.retrieval import TRAINING_BUFFERS, fine_tune
from recbole_raserec.serving import load_checkpoint
from recbole_raserec.storage import dense_tensors, fingerprint, read_manifest
from recbole_raserec.training import Outcome, ResumableTrainer


def data_preparation(config: Config, dataset: Any) -> tuple[Any, Any, Any]:
    """The loaders of RecBole's `data_preparation`, for RaSeRec those of its backbone.

    Raises:
        ConfigError: with `regeneration`, which is a stage of its own.
    """
    if config["regeneration"]:
        problem = f"regeneration: {config['regeneration']} is a stage of its own, which RecBole's functions do not run"
        raise ConfigError([f"{problem}; call recbole_raserec.run_recbole_raserec, or leave it out"])
    inner = config.for_backbone() if config["model"] == RETRIEVAL_MODEL else config
    splits = prepare_data(inner, dataset=dataset)
    splits.train.splits, splits.valid.seen, splits.test.seen = splits, splits.seen["valid"], splits.seen["test"]
    return splits.train, splits.valid, splits.test


def load_data_and_model(directory: Any) -> tuple[Any, ...]:
    """What RecBole's function of that name returns, from a checkpoint directory of this package."""
    config = saved_config(read_manifest(directory))
    dataset = create_dataset(config)
    loaders = data_preparation(config, dataset)
    return config, load_checkpoint(directory, config["device"]).model, dataset, *loaders


class ModelTrainer(ResumableTrainer):
    """RecBole's Trainer for a model of this package: it trains and evaluates as our runner, and saves as RecBole.

    Where the items to rank are sampled, or a metric needs more than ranks, the evaluation is RecBole's.
    """

    def __init__(self, config: Config, model: Any):
        folder = Path(config["checkpoint_dir"])
        super().__init__(config, model, folder, self._figures, selection_protocol(config), resume=False)
        self.saved_model_file = str(folder / f"{config['model']}-{get_local_time()}.pth")

    def _figures(self, model: Any, data: Any, progress: bool = False) -> dict[str, Any]:
        seen = getattr(data, "seen", None)
        if seen is None or evaluation_problems(self.config):
            return {self._protocol: Trainer.evaluate(self, data, load_best_model=False, show_progress=progress)}
        return evaluate(model, data, self.config, seen, progress)

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: Any = None, show_progress: bool = False
    ) -> Any:
        """As RecBole's; the figures are those of the protocol that stops the training."""
        if not eval_data:
            return None
        if load_best_model:
            state = load_pickled(model_file or self.saved_model_file, self.device)
            self.model.load_state_dict(state["state_dict"])
            self.model.load_other_parameter(state.get("other_parameter"))
        return OrderedDict(self._figures(self.model.eval(), eval_data, show_progress)[self._protocol])

    def fit(
        self, train_data: Any, valid_data: Any = None, verbose: bool = True, saved: bool = True,
        show_progress: bool = False, callback_fn: Any = None,
    ) -> Any:  # fmt: skip
        result = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
        if not saved and self._average is not None:
            self._average._swap()  # what was validated is what is evaluated next
        return result

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        with self._averaged():
            Trainer._save_checkpoint(self, epoch, verbose, **kwargs)

    def save_state(self, epoch: int) -> None:
        """Nothing: RecBole's checkpoint holds what a training continues from."""

    def resume_checkpoint(self, resume_file: Any) -> None:
        """As RecBole's."""
        Trainer.resume_checkpoint(self, resume_file)


class RaSeRecTrainer(ModelTrainer):
    """RecBole's Trainer for RaSeRec: `fit` trains the backbone, builds the memory and trains the module.

    Finished stages of the same options, data and seed in `checkpoint_dir` are reused, as our runner does.
    """

    def fit(
        self, train_data: Any, valid_data: Any = None, verbose: bool = True, saved: bool = True,
        show_progress: bool = False, callback_fn: Any = None,
    ) -> Any:  # fmt: skip
        """As RecBole's. A model that was given its backbone keeps it.

        Raises:
            ConfigError: the loader is not that of `data_preparation`.
        """
        splits = getattr(train_data, "splits", None)
        if splits is None:
            raise ConfigError(["train_data: RaSeRec trains on whole histories; use RecBole's data_preparation"])
        splits = dataclasses.replace(splits, train=train_data, valid=valid_data or splits.valid)
        config, inner = self.config, self.config.for_backbone()
        if self.model.makes_backbone:
            base = train_model(inner, config["backbone_checkpoint"], splits=splits)
        else:
            base = _given(self.model.backbone.model, inner, splits)
        outcome = fine_tune(config, base)
        vars(self.model).update(vars(outcome.model))
        for name in TRAINING_BUFFERS:
            self.model._buffers.pop(name, None)
        self._average = None
        digits, found = config["metric_decimal_place"], outcome.metrics["valid"][self._protocol]
        self.best_valid_result = {name: round(value, digits) for name, value in found.items()}
        self.best_valid_score = self.best_valid_result[self.valid_metric]
        for epoch, value in outcome.curve.get("valid", []) if callback_fn else []:
            callback_fn(epoch, value)
        if saved:
            self._save_checkpoint(self.epochs - 1, verbose)
        return self.best_valid_score, self.best_valid_result

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        model, self.optimizer = self.model, self._build_optimizer()  # of the module that was trained
        model.other_parameter_name = ["memory"]
        try:
            Trainer._save_checkpoint(self, epoch, verbose, **kwargs)
        finally:
            del model.other_parameter_name


def _given(model: Any, config: Config, splits: Any) -> Outcome:
    """A backbone that came with its weights, as the outcome of stage ii."""
    digest = hashlib.sha256()
    for name, values in dense_tensors(model.state_dict()).items():
        digest.update(name.encode() + values.detach().cpu().contiguous().numpy().tobytes())
    mark = fingerprint(config.training_options(), splits.fingerprint, digest.hexdigest())
    return Outcome(config["model"], model, splits, {}, 0.0, Path(os.devnull), mark)


def trainer_of(name: str) -> type:
    """The trainer of the model of that name."""
    return RaSeRecTrainer if name == RETRIEVAL_MODEL else ModelTrainer
