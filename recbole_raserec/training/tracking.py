"""Where the figures of a run go while it goes on: TensorBoard, and Weights & Biases and MLflow where an option asks.

A figure's name is `stage/phase/protocol/metric`, for example `retrieval/test/seen_removed/ndcg@10`. Phases: `valid`,
after each epoch; `best`, the validation of the weights that were kept; `test`. `stage/phase/metric`, without protocol,
is by the one that stops the training. Losses are `stage/train/loss`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Optional

from recbole.utils import get_local_time

from recbole_raserec.config import selection_protocol, short_name
from recbole_raserec.distributed import current
from recbole_raserec.storage import plain

_OPEN: ContextVar[Optional[Tracker]] = ContextVar("tracker", default=None)


class Board:
    """TensorBoard: a folder of its own for each run below `log_tensorboard/`."""

    def __init__(self, config: Any, name: str):
        from torch.utils.tensorboard import SummaryWriter  # loads much

        folder, number = config.log_folder / "log_tensorboard", 1
        while (path := folder / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        self.writer = SummaryWriter(str(path))

    def log(self, stage: str, figures: Mapping[str, float], step: Optional[int]) -> None:
        """Figures of an epoch; those of the whole training, with no step, stand at 0."""
        for key, value in figures.items():
            self.writer.add_scalar(f"{stage}/{key}", value, step or 0)

    def close(self, failed: bool) -> None:
        """No more figures come."""
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb: the one that goes on already, or a new one. Figures of the whole training are its summary."""

    def __init__(self, config: Any, name: str):
        import wandb

        self._own, self._stages = wandb.run is None, set[str]()
        if self._own:
            config.log_folder.mkdir(parents=True, exist_ok=True)
            project, folder = config["wandb_project"], str(config.log_folder)
            wandb.init(project=project, name=name, config=config.explain(), dir=folder)
        self._run: Any = wandb.run

    def log(self, stage: str, figures: Mapping[str, float], step: Optional[int]) -> None:
        """See `Board.log`."""
        named = {f"{stage}/{key}": value for key, value in figures.items()}
        if step is None:
            self._run.summary.update(named)
            return
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/epoch")
        self._run.log({f"{stage}/epoch": step, **named})

    def close(self, failed: bool) -> None:
        """See `Board.close`."""
        if self._own:
            self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow: the one that goes on already, or a new one. Its names have no @: `ndcg_at_10`."""

    def __init__(self, config: Any, name: str):
        import mlflow

        self._mlflow, self._own = mlflow, mlflow.active_run() is None
        if self._own:
            if not os.environ.get("MLFLOW_TRACKING_URI") and not mlflow.is_tracking_uri_set():
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones ask whether files are meant
                mlflow.set_tracking_uri((config.log_folder / "mlruns").absolute().as_uri())
            mlflow.start_run(run_name=name)
            given = {"model": config["model"], "dataset": config["dataset"], "seed": config["seed"]}
            given.update(config.external_config_dict)
            mlflow.log_params({key: plain(value) for key, value in [*given.items()][:100]})  # a batch has no more

    def log(self, stage: str, figures: Mapping[str, float], step: Optional[int]) -> None:
        """See `Board.log`."""
        named = {f"{stage}/{key}".replace("@", "_at_"): value for key, value in figures.items()}
        self._mlflow.log_metrics(named, step=step or 0)

    def close(self, failed: bool) -> None:
        """See `Board.close`."""
        if self._own:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Tracker:
    """All places that a run's options name, in a group of processes the first one's alone."""

    def __init__(self, config: Any):
        self._config, self._opened = config, list[Any]()

    def log(self, stage: str, figures: Mapping[str, float], step: Optional[int] = None) -> None:
        """Log figures of an epoch, its number being the `step`, or of the whole training."""
        self.open()
        for place in self._opened:
            place.log(stage, figures, step)

    def open(self) -> None:
        """Open all places, which may take seconds."""
        if current().first and not self._opened:
            name = f"{short_name(self._config['model'])}-{self._config['dataset']}-{get_local_time()}"
            kinds = {WeightsAndBiases: "log_wandb", MLflow: "log_mlflow"}
            wanted = [Board, *(kind for kind, option in kinds.items() if self._config[option])]
            self._opened = [kind(self._config, name) for kind in wanted]

    def log_metrics(
        self, stage: str, phase: str, metrics: Mapping[str, Mapping[str, float]], step: Optional[int] = None
    ) -> None:
        """Log the figures of a phase under each protocol."""
        deciding = metrics.get(selection_protocol(self._config), {})
        figures = {f"{phase}/{key}": value for key, value in deciding.items()}
        figures.update({f"{phase}/{name}/{key}": value for name, of in metrics.items() for key, value in of.items()})
        self.log(stage, figures, step)

    def add_scalar(self, *_: Any) -> None:
        """RecBole's Trainer calls it; what it says is logged under other names."""

    def add_hparams(self, options: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """RecBole's Trainer calls it at the end of a training, for TensorBoard's table of options."""
        if current().first and self._opened:
            self._opened[0].writer.add_hparams(options, figures)

    def let_go(self) -> None:
        """Close all places unless they are those of a run that goes on."""
        if _OPEN.get() is not self:
            self.close()

    def close(self, failed: bool = False) -> None:
        """Close all places; with another figure they would be opened again."""
        opened, self._opened = self._opened, []
        for place in opened:
            place.close(failed)


@contextlib.contextmanager
def tracked(config: Any) -> Iterator[None]:
    """What is trained inside is one run for the trackers."""
    tracker = Tracker(config)
    token = _OPEN.set(tracker)
    try:
        tracker.open()
        yield
    except BaseException:
        tracker.close(failed=True)
        raise
    finally:
        _OPEN.reset(token)
        tracker.close()


def tracker_of(config: Any) -> Tracker:
    """That of the run that goes on, or one for a training on its own."""
    return _OPEN.get() or Tracker(config)
