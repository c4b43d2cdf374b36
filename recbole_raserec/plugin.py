"""What RecBole's own functions do with our models: their data, their trainers, their checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from recbole.data import create_dataset
from recbole.trainer import Trainer
from recbole.utils import get_local_time, get_trainer, init_logger, init_seed

from recbole_raserec.compat import load_checkpoint as load_pickled
from recbole_raserec.config import (
    RECBOLE,
    RETRIEVAL_MODEL,
    Config,
    check_run,
    evaluation_problems,
    get_model,
    saved_config,
    selection_protocol,
    short_name,
)
from recbole_raserec.data import prepare_data
from recbole_raserec.distributed import layout_of
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import evaluate
from recbole_raserec.kernels import keep_freed_memory
from recbole_raserec.quick_start import run_stages
from recbole_raserec.recommendation import train_model
from recbole_raserec.retrieval import TRAINING_BUFFERS, fine_tune
from recbole_raserec.serving import load_checkpoint
from recbole_raserec.storage import dense_tensors, fingerprint, read_manifest
from recbole_raserec.training import Outcome, ResumableTrainer


def data_preparation(config: Config, dataset: Any) -> tuple[Any, Any, Any]:
    """The loaders of RecBole's `data_preparation`; for RaSeRec those of its backbone.

    Raises:
        ConfigError: the options ask for what cannot be run, or for several processes.
    """
    if (size := layout_of(config.final_config_dict).size) > 1:
        problem = f"nproc: {size} processes are started by recbole_raserec alone"
        raise ConfigError([f"{problem}; write recbole-raserec run --nproc={size}, or leave it out"])
    if _in_stages(config) or not evaluation_problems(config):  # otherwise RecBole evaluates
        check_run(config)
    keep_freed_memory()
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    inner = config.for_backbone() if config["model"] == RETRIEVAL_MODEL else config
    splits = prepare_data(inner, dataset=dataset)
    splits.settle(config, inner)
    splits.train.splits, splits.valid.seen, splits.test.seen = splits, splits.seen["valid"], splits.seen["test"]
    return splits.train, splits.valid, splits.test


def load_data_and_model(directory: Any) -> tuple[Any, ...]:
    """What RecBole's function of that name returns, from a checkpoint directory of this package."""
    config = saved_config(read_manifest(directory))
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    dataset = create_dataset(config)
    loaders = data_preparation(config, dataset)
    return config, load_checkpoint(directory, config["device"]).model, dataset, *loaders


def _in_stages(config: Config) -> bool:
    """Whether the training of the model is more than its own epochs."""
    return bool(config["model"] == RETRIEVAL_MODEL or config["regeneration"])


class ModelTrainer(ResumableTrainer):
    """RecBole's Trainer for a model of this package: it trains and evaluates as our runner, and saves as RecBole.

    With RaSeRec and `regeneration` `fit` runs the stages of our runner: finished ones of the same
    options, data and seed in `checkpoint_dir` are reused, and the model becomes that of the last stage. Where our
    evaluation refuses the options, or the loader is not that of `data_preparation`, the evaluation is RecBole's.
    """

    def __init__(self, config: Config, model: Any):
        folder = Path(config["checkpoint_dir"])
        super().__init__(config, model, folder, self._figures, selection_protocol(config), resume=False)
        self.saved_model_file = str(folder / f"{short_name(config['model'])}-{get_local_time()}.pth")
        if config["model"] == RETRIEVAL_MODEL:
            model.other_parameter_name = ["memory", "transitions"]  # for RecBole's checkpoints

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
        """As RecBole's. A RaSeRec that was given its backbone keeps it.

        Raises:
            ConfigError: the stages need the loader of `data_preparation`, or another backbone.
        """
        if not _in_stages(self.config):
            result = super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)
            if not saved and self._average is not None:
                self._average._swap()  # what was validated is what is evaluated next
            return result
        outcome = self._run_stages(train_data, valid_data)
        self.model.__dict__.update(vars(outcome.model))
        for name in TRAINING_BUFFERS:
            self.model._buffers.pop(name, None)
        self._average, self.optimizer = None, self._build_optimizer()
        digits, found = self.config["metric_decimal_place"], outcome.metrics["valid"][self._protocol]
        self.best_valid_result = {name: round(value, digits) for name, value in found.items()}
        self.best_valid_score = self.best_valid_result[self.valid_metric]
        for epoch, value in outcome.curve.get("valid", []) if callback_fn else []:
            callback_fn(epoch, value)
        if saved:
            self._save_checkpoint(self.epochs - 1, verbose)
        return self.best_valid_score, self.best_valid_result

    def _run_stages(self, train_data: Any, valid_data: Any) -> Outcome:
        """The last of the stages of the run."""
        config, splits = self.config, getattr(train_data, "splits", None)
        retrieval = config["model"] == RETRIEVAL_MODEL
        given = retrieval and not self.model.makes_backbone
        if config["regeneration"]:
            if given:
                problem = f"regeneration: {config['regeneration']} trains backbones of its own"
                raise ConfigError([f"{problem}; make RaSeRec(config, dataset) without one, or leave it out"])
            return list(run_stages(config)[0].values())[-1]
        if splits is None:
            raise ConfigError([f"train_data: {config['model']} is trained in stages; use RecBole's data_preparation"])
        splits = dataclasses.replace(splits, train=train_data, valid=valid_data or splits.valid)
        inner = config.for_backbone() if retrieval else config
        if given:
            base = _given(self.model.backbone.model, inner, splits)
        else:
            base = train_model(inner, config["backbone_checkpoint"], backbone=retrieval, splits=splits)
        return fine_tune(config, base) if retrieval else base

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        with self._averaged():
            Trainer._save_checkpoint(self, epoch, verbose, **kwargs)

    def save_state(self, epoch: int) -> None:
        """Nothing: RecBole's checkpoint holds what a training continues from."""

    def resume_checkpoint(self, resume_file: Any) -> None:
        """As RecBole's."""
        Trainer.resume_checkpoint(self, resume_file)


def _given(model: Any, config: Config, splits: Any) -> Outcome:
    """A backbone that came with its weights, as the outcome of stage ii."""
    digest = hashlib.sha256()
    for name, values in dense_tensors(model.state_dict()).items():
        digest.update(name.encode() + values.detach().cpu().contiguous().numpy().tobytes())
    mark = fingerprint(config.training_options(), splits.fingerprint, digest.hexdigest())
    return Outcome(config["model"], model, splits, {}, 0.0, Path(os.devnull), mark)


@functools.cache
def trainer_of(name: str) -> type:
    """The trainer of the model of that name."""
    kind = get_trainer(get_model(name).type, RECBOLE)  # RecBole's for this type of model
    return ModelTrainer if kind is Trainer else type(f"Model{kind.__name__}", (ModelTrainer, kind), {})
