"""RecBole's trainers, made safe to kill: the state after each epoch is on disk, whole, and free of pickle."""

from __future__ import annotations

import contextlib
import random
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
from recbole.trainer import Trainer
from recbole.trainer.trainer import PretrainTrainer
from recbole.utils import ModelType

from recbole_raserec.config import Config
from recbole_raserec.distributed import current
from recbole_raserec.errors import CheckpointError
from recbole_raserec.kernels import FreedMemory, multiplies_in_bfloat16
from recbole_raserec.storage import (
    BEST,
    STATE,
    dense_tensors,
    load_named,
    load_weights,
    named_tensors,
    part_of,
    read_tensors,
    write_tensors,
)
from recbole_raserec.training.data_parallel import SplitSteps
from recbole_raserec.training.tracking import tracker_of

#: The first averages reach back over a tenth of the steps so far, so that the initial weights soon count for nothing.
WARM_UP = 10


class WeightAverage:
    """Moving average of a model's weights: after each step `average <- decay average + (1 - decay) weights`.

    With a constant learning rate the weights scatter around the path they follow; the average is that path (Polyak and
    Juditsky 1992). The training itself is untouched: gradients are those at the last weights.

    Args:
        model: its parameters that require gradients are followed.
        decay: in (0, 1); the average reaches back over about `1 / (1 - decay)` steps, at first over fewer: `WARM_UP`.
    """

    def __init__(self, model: Any, decay: float):
        self.decay, self.steps = decay, 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (WARM_UP + self.steps))
        for name, weight in self._weights.items():
            self._average[name].lerp_(weight, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._average[name] = self._average[name], weight.data

    def tensors(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return self._average

    def restore(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """Continue from what `tensors` returned after `steps` steps; raises CheckpointError where it does not fit."""
        for name, average in self._average.items():
            if name not in tensors or tensors[name].shape != average.shape:
                raise CheckpointError(f"the average of {name} is missing or misshapen.")
            average.copy_(tensors[name])
        self.steps = steps


#: Evaluates a model on validation data: (model, data) -> {protocol: {metric: value}}.
Evaluate = Callable[[Any, Any], dict[str, dict[str, float]]]


class ResumableTrainer(Trainer):
    """RecBole's Trainer whose run lives in a directory and continues where it stopped.

    After each evaluated epoch `state.safetensors` holds weights, optimizer, random states, epoch and the counters of
    early stopping; `model.safetensors` the best weights so far. Both are replaced atomically, the best first, so that a
    kill at any moment repeats at most one epoch, with the same random numbers and thus the same result.

    With the option `weight_averaging` the moving average of the weights is validated and kept (`WeightAverage`). The
    processes of a group make the steps together (`SplitSteps`), and the first alone reads and writes.

    Args:
        config: of the model.
        model: to be trained.
        directory: where the run lives.
        evaluate: validation of both protocols in one pass; the values are RecBole's.
        protocol: the protocol whose `valid_metric` decides on early stopping.
        resume: continue a run found in `directory`; otherwise overwrite it.
        before_epoch: called with the epoch's number before it starts.
        stage: first part of the names of its figures (`training.tracking`).

    Raises:
        CheckpointError: `directory` holds a damaged state, or another run's.
    """

    clip_grad_norm: Any

    def __init__(
        self, config: Config, model: Any, directory: Path, evaluate: Evaluate, protocol: str, resume: bool = True,
        before_epoch: Optional[Callable[[int], None]] = None, stage: str = "training",
    ):  # fmt: skip
        asked, config["log_wandb"] = config["log_wandb"], False  # RecBole would open a run of its own
        super().__init__(config, model)
        config["log_wandb"], self._stage = asked, stage
        self.tensorboard = self._tracker = tracker_of(config)
        weakref.finalize(self, self._tracker.let_go)
        self._group = group = current()
        self.directory = Path(directory)
        if group.first:
            self.directory.mkdir(parents=True, exist_ok=True)
        self.saved_model_file = str(self.directory / BEST)
        self._evaluate, self._protocol, self._before_epoch = evaluate, protocol, before_epoch
        self.seconds, self._epoch_start = 0.0, time.perf_counter()
        self.valid_values: dict[int, float] = {}  # by epoch
        self._freed = FreedMemory()
        self._epoch, self._brief, self._said = 0, False, ""  # one line an epoch where there is no progress bar
        self._loader: Any = None
        self._resumed: Any = None  # tensors and meta of the state that the run continues from
        # Graph models cache embeddings there. Until this process has seen the best epoch, they are as constructed.
        self.best_other_parameter: Any = model.other_parameter()
        self._average: Optional[WeightAverage] = None
        if config["weight_averaging"]:
            average = self._average = WeightAverage(model, config["weight_averaging"])
            self.optimizer.register_step_post_hook(lambda *_: average.update())
        self._split: Optional[SplitSteps] = None
        if group.size > 1:
            self._split = SplitSteps(group, model, config["model"], self.optimizer, self.clip_grad_norm)
            self.clip_grad_norm = None
        there = resume and (self.directory / STATE).exists() and (self.directory / BEST).exists()
        if group.from_first(lambda: there):
            self.resume_checkpoint(self.directory / STATE)

    def _build_optimizer(self, **kwargs: Any) -> Any:
        params = list(kwargs.get("params", self.model.parameters()))
        kwargs["params"] = params = [p for p in params if p.requires_grad] or params
        rates = getattr(self.model, "learning_rates", None)  # of parameters that have one of their own
        if rates is not None:
            own = rates()
            kwargs["params"] = [{"params": [p for p in params if p not in own]}]
            kwargs["params"] += [{"params": [p], "lr": own[p]} for p in params if p in own]
        optimizer = super()._build_optimizer(**kwargs)
        if type(optimizer) is torch.optim.Adam and all(p.is_floating_point() for p in params):
            for group in optimizer.param_groups:  # one kernel instead of a dozen per parameter; same update
                group["fused"], group["foreach"] = True, False
        return optimizer

    def fit(
        self, train_data: Any, valid_data: Any = None, verbose: bool = True, saved: bool = True,
        show_progress: bool = False, callback_fn: Any = None,
    ) -> Any:  # fmt: skip
        """As RecBole's; an error of `callback_fn` ends the run as a kill would: a later run repeats the epoch, with the
        same value, and calls it again."""
        self._loader = train_data
        if self._resumed is not None:
            self._restore_random(*self._resumed)
            self._resumed = None
        else:
            self._group.seed_torch(self.config["seed"])
        self._group.send_weights(self.model)
        last = self.pretrain_epochs if self._pretrains else self.epochs
        if self.start_epoch > 0 and (self.start_epoch >= last or self.cur_step > self.stopping_step):
            return self.best_valid_score, self.best_valid_result

        def after_epoch(epoch: int, score: float) -> None:
            self.valid_values[epoch] = float(score)
            if callback_fn:
                callback_fn(epoch, score)
            self.save_state(epoch)

        self._brief = verbose and not show_progress and not self._pretrains
        self._epoch_start = time.perf_counter()
        result = super().fit(train_data, valid_data, verbose and not self._brief, saved, show_progress, after_epoch)
        if self._brief and self.valid_values:
            best = (max if self.valid_metric_bigger else min)(self.valid_values, key=lambda n: self.valid_values[n])
            self.logger.info(f"{self._stage}: best in epoch {best}, {self.valid_metric} {self.valid_values[best]:.4f}")
        if self._pretrains and last % self.save_step:
            self.save_pretrained_model(last - 1)  # RecBole keeps each `save_step`-th epoch only, perhaps none
        return result

    @property
    def curve(self) -> dict[str, Any]:
        """{"metric": validated, "valid": [[epoch, value], ...], "train_loss": [[epoch, loss], ...]} of all its runs."""
        pairs = {"valid": self.valid_values, "train_loss": self.train_loss_dict}
        named = {name: [[epoch, float(of[epoch])] for epoch in sorted(of)] for name, of in pairs.items()}
        return {"metric": self.valid_metric, **named}

    @property
    def _pretrains(self) -> bool:
        """A pre-training run (S3Rec, RaCT): nothing is validated, and the last weights are those of the next stage."""
        return isinstance(self, PretrainTrainer) and self.model.train_stage != "finetune"

    def save_pretrained_model(self, epoch: int, saved_model_file: Any = None) -> None:
        """Keep a pre-training epoch in the run's directory, the `pre_model_path` of the next stage, not in RecBole's
        `saved_model_file`."""
        self._save_checkpoint(epoch)
        self.save_state(epoch)

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        if self._before_epoch is not None:
            self._before_epoch(epoch_idx)
        if self._split is not None:
            loss_func = self._split.loss_of(loss_func or self.model.calculate_loss)
        started = time.perf_counter()
        with self._in_bfloat16():
            losses = super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)
        self._freed.bound()
        self._epoch, seconds = epoch_idx, time.perf_counter() - started
        parts = losses if isinstance(losses, tuple) else (losses,)
        figures = {"train/loss": sum(parts), **{f"train/loss{n}": part for n, part in enumerate(parts, 1)}}
        self._tracker.log(self._stage, figures if len(parts) > 1 else {"train/loss": parts[0]}, epoch_idx)
        text = " + ".join(f"{part:.{self.config['loss_decimal_place'] or 4}f}" for part in parts)
        self._said = f"{self._stage} epoch {epoch_idx} [{seconds:.2f} s]: loss {text}"
        if self._brief and (self.eval_step <= 0 or (epoch_idx + 1) % self.eval_step):
            self.logger.info(self._said)
        return losses

    @contextmanager
    def _in_bfloat16(self) -> Iterator[None]:
        """`enable_amp` means bfloat16 on a GPU that has it, as on a CPU: float16 would need `enable_scaler`."""
        chosen = self.enable_amp and not self.enable_scaler and multiplies_in_bfloat16(self.device)
        before = torch.get_autocast_dtype(self.device.type) if chosen else torch.bfloat16
        if chosen:
            torch.set_autocast_dtype(self.device.type, torch.bfloat16)
        try:
            yield
        finally:
            if chosen:
                torch.set_autocast_dtype(self.device.type, before)

    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
        with self._averaged():
            found = self._group.broadcast(self._evaluate(self.model, valid_data))
        self._tracker.log_metrics(self._stage, "valid", found, self._epoch)
        result = found[self._protocol]
        if self._brief:
            self.logger.info(f"{self._said}; " + ", ".join(f"{key} {value:g}" for key, value in result.items()))
        return result[self.valid_metric], result

    def _add_train_loss_to_tensorboard(self, *_: Any, **__: Any) -> None:
        """Each epoch's loss is logged where it is known, under the stage's name."""

    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        with self._averaged():
            self.keep(epoch, kwargs.get("saved_model_file"))
        self.best_other_parameter = self.model.other_parameter()
        if self.eval_step <= 0:
            self.save_state(epoch)

    def _averaged(self) -> Any:
        """A context in which the model has the weights that are validated and kept."""
        return contextlib.nullcontext() if self._average is None else self._average.applied()

    def keep(self, epoch: Optional[int] = None, path: Any = None) -> None:
        """Make the model's weights the best of the run."""
        meta = {"epoch": self.start_epoch if epoch is None else epoch, "model": self.config["model"]}
        self._write(path or self.saved_model_file, dense_tensors(self.model.state_dict()), meta)

    def _write(self, path: Any, tensors: dict[str, torch.Tensor], meta: Any) -> None:
        if self._group.first:
            write_tensors(path, tensors, meta)

    def load_best(self) -> None:
        """Put the best weights of the run into the model."""
        tensors, _ = self._group.from_first(lambda: read_tensors(self.saved_model_file))
        load_weights(self.model, tensors, self.saved_model_file)
        if self.best_other_parameter:
            self.model.load_other_parameter(self.best_other_parameter)

    def save_state(self, epoch: int) -> None:
        """Write what the next epoch needs."""
        parts = (self.model.other_parameter() or {}).values()
        whole = all(isinstance(part, (torch.Tensor, torch.nn.Module)) for part in parts)
        if self.config["MODEL_TYPE"] == ModelType.TRADITIONAL or not whole:
            return  # models with other parts (item similarity matrices) train in one go and start again
        started, self._epoch_start = self._epoch_start, time.perf_counter()
        self.seconds += self._epoch_start - started
        average, model = self._average, dense_tensors(self.model.state_dict())
        averages = {} if average is None else average.tensors()
        tensors = named_tensors(model=model, average=averages, optimizer=self.optimizer)
        name, keys, pos, has_gauss, cached = np.random.get_state()
        own = {"random.torch": torch.get_rng_state()}
        tensors["random.numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
        generator = getattr(self._loader, "generator", None)
        if generator is not None:
            tensors["random.loader"] = generator.get_state()
        if torch.cuda.is_available():
            own["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors.update(self._group.gathered(own))
        meta = {
            "model": self.config["model"], "epoch": epoch, "cur_step": self.cur_step, "seconds": self.seconds,
            "best_valid_score": float(self.best_valid_score),
            "best_valid_result": self.best_valid_result and dict(self.best_valid_result),
            "train_loss": {str(k): float(v) for k, v in self.train_loss_dict.items()},
            "valid_values": {str(k): v for k, v in self.valid_values.items()},
            "average_steps": None if average is None else average.steps,
            "numpy": [str(name), int(pos), int(has_gauss), float(cached)], "python": random.getstate(),
        }  # fmt: skip
        self._write(self.directory / STATE, tensors, meta)

    def resume_checkpoint(self, resume_file: Any) -> None:
        try:
            tensors, meta = self._group.from_first(lambda: read_tensors(resume_file))
            if meta["model"] != self.config["model"]:
                raise CheckpointError(f"{resume_file} belongs to model {meta['model']}, not to {self.config['model']}.")
            load_weights(self.model, part_of(tensors, "model"), resume_file)
            if self._average is not None:
                self._average.restore(part_of(tensors, "average"), int(meta["average_steps"]))
            load_named(tensors, optimizer=self.optimizer)
            self.start_epoch = int(meta["epoch"]) + 1
            self.cur_step = int(meta["cur_step"])
            self.best_valid_score = meta["best_valid_score"]
            self.best_valid_result = meta["best_valid_result"]
            self.train_loss_dict = {int(k): v for k, v in meta["train_loss"].items()}
            self.valid_values = {int(k): float(v) for k, v in meta.get("valid_values", {}).items()}
            self.seconds = float(meta["seconds"])
            self._resumed = tensors, meta
        except CheckpointError as error:
            raise CheckpointError(f"{error} Delete {self.directory} or pass --resume=false.") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            unfit = f"{resume_file} does not fit this run ({error!r})"
            raise CheckpointError(f"{unfit}; delete {self.directory} or pass --resume=false.") from None
        self.logger.info(f"Resuming {self.config['model']} after epoch {meta['epoch']} from {self.directory}")

    def _restore_random(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        torch.set_rng_state(tensors[self._group.own_name("random.torch")])
        name, pos, has_gauss, cached = meta["numpy"]
        np.random.set_state((name, tensors["random.numpy"].numpy().astype(np.uint32), pos, has_gauss, cached))
        version, internal, gauss = meta["python"]
        random.setstate((version, tuple(internal), gauss))
        if "random.loader" in tensors and getattr(self._loader, "generator", None) is not None:
            self._loader.generator.set_state(tensors["random.loader"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors[self._group.own_name("random.cuda")], self.device)


def resumable(trainer_class: type) -> type:
    """RecBole's `trainer_class` with the state of `ResumableTrainer`."""
    if trainer_class is Trainer:
        return ResumableTrainer
    return type(f"Resumable{trainer_class.__name__}", (ResumableTrainer, trainer_class), {})
