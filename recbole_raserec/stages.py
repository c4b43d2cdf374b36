"""The stages of the pipeline as resumable steps that leave a checkpoint directory each."""

from __future__ import annotations

import copy
import dataclasses
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

from recbole.data.dataloader import TrainDataLoader
from recbole.utils import ModelType, init_seed

from recbole_raserec.collaborator import find_collaborator, take_collaborator
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.loader import BucketLoader, RowLoader
from recbole_raserec.data.regenerated import regenerated_class, training_hash
from recbole_raserec.data.splits import Splits, prepare
from recbole_raserec.distributed.group import current
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.evaluation.protocols import (
    SEEN_KEPT,
    SEEN_REMOVED,
    Ranks,
    collect_ranks,
    evaluate,
    metrics_by_protocol,
)
from recbole_raserec.fingerprint import fingerprint, version_of
from recbole_raserec.foreign import check_same_split
from recbole_raserec.recommendation.backbone import trims, wrap_backbone
from recbole_raserec.recommendation.trainer import BEST, load_weights, resumable
from recbole_raserec.registry import get_dataset_class, get_model, get_trainer_class
from recbole_raserec.retrieval.cache import NeighbourCache
from recbole_raserec.retrieval.keeper import MemoryKeeper
from recbole_raserec.retrieval.knn import KNNRaSeRec, raserec_class, tune
from recbole_raserec.serving.catalogue import catalogue_of
from recbole_raserec.serving.checkpoint import MANIFEST, read_manifest, read_weights, write_checkpoint

#: Digits of the figures in reports and results; early stopping compares RecBole's `metric_decimal_place`.
DECIMALS = 6


@dataclasses.dataclass
class Outcome:
    """A finished stage.

    Attributes:
        name: model name. model: with its best weights, in evaluation mode. splits: the data it was trained on.
        metrics: phase -> protocol -> metric -> value; of a trial those of "valid" alone.
        seconds: training time over all its runs.
        directory: its checkpoint. ranks: of the test targets, which its test metrics are made of; None of a trial.
        curve: of its training (:attr:`ResumableTrainer.curve`); empty where it was not kept.
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
        """Learned numbers of the model; what the memory stores is none."""
        return sum(values.numel() for values in self.model.parameters())


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that a search over options makes: its stages are trained and validated, and never tested.

    What such a stage leaves is what a run killed before its test leaves: one with the same options goes on from there,
    and none takes it for finished.

    Attributes:
        after_epoch: called after each validated epoch of the last stage with its number, from 0, and its value of the
            metric that stops it early; what it raises ends the run.
        top_k: neighbours to search for where the option `top_k` asks for fewer, so that the other trials find theirs.
    """

    after_epoch: Optional[Callable[[int, float], None]] = None
    top_k: int = 0

    def unwatched(self) -> Trial:
        """The same for a stage that is not the last."""
        return dataclasses.replace(self, after_epoch=None)


def train_model(
    config: Any, checkpoint: Optional[str] = None, regenerated: Any = None, trial: Optional[Trial] = None
) -> Outcome:
    """Stage ii: train the configured model, continue its training, or reuse what a run with the same fingerprint left.

    Args:
        config: the model's configuration.
        checkpoint: checkpoint directory whose weights are used instead of training.
        regenerated: of stage i (:class:`~recbole_raserec.regenerate.RegeneratedData`); it joins the training split.
        trial: given where the run is one of a search.

    Raises:
        CheckpointError: `checkpoint` belongs to another model or data set, or is damaged.
    """
    collaborator = None
    if config["collaborative"] and checkpoint:  # the checkpoint holds its own
        config["collaborative_options"] = read_manifest(checkpoint)["options"].get("collaborative_options")
    elif config["collaborative"]:
        collaborator = find_collaborator(config, lambda other: train_model(other).directory)
    splits = prepare_data(config, None if regenerated is None else regenerated.data)
    if regenerated is not None and regenerated.data.training is not None:
        own = splits.train._dataset.original
        if training_hash(own, splits.vocabulary()) != regenerated.data.training:
            raise DatasetError(
                f"regeneration: {config['model']} reads another training split than the patterns were mined "
                "from: users or items without features are dropped from its log. "
                "Set filter_inter_by_user_or_item: false, or complete the feature files."
            )
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, splits.train._dataset).to(config["device"])
    options = config.training_options()
    if collaborator is not None and not checkpoint:
        take_collaborator(config, model, splits, *collaborator)
    if checkpoint:
        return _from_checkpoint(config, splits, model, Path(checkpoint), trial)
    parts = [] if regenerated is None else [regenerated.fingerprint]
    parts += version_of(config["model"])
    parts += [collaborator[1]["fingerprint"]] if collaborator is not None else []
    parts += model.fingerprint_parts() if hasattr(model, "fingerprint_parts") else []
    mark = fingerprint(options, splits.fingerprint, *parts)
    directory = _directory(config, mark)
    manifest = {"options": config.explain()}
    return _run(config, splits, model, splits.train, directory, mark, manifest, trial=trial)


def fine_tune(config: Any, base: Outcome, trial: Optional[Trial] = None) -> Outcome:
    """Stage iii: build the memory from the training split, train the retrieval-augmented module, let the validation
    pairs join the memory, and evaluate on the test split.

    Args:
        config: configuration of the RaSeRec run.
        base: the trained backbone.
        trial: given where the run is one of a search.

    Raises:
        ConfigError: the backbone's score is not a dot product of user and item vectors.
    """
    splits = base.splits
    if not isinstance(splits.train._dataset, SequenceDataset) or not splits.train._dataset.is_lazy:
        raise ConfigError([f"backbone: {base.name} reads its own kind of data set; retrieval needs plain sequences."])
    init_seed(config["seed"], config["reproducibility"])
    backbone = wrap_backbone(base.model, config, splits.dataset)
    model = raserec_class(config)(config, splits.dataset, backbone).to(config["device"])
    train, valid, test = (data._dataset for data in (splits.train, splits.valid, splits.test))
    joined = train if train.original is not None else None  # with regenerated rows
    train = train if joined is None else joined.original
    searches = Path(config["checkpoint_dir"]) / "neighbours"
    cache = NeighbourCache(searches, least=trial.top_k if trial else 0) if config["cache_neighbours"] else None
    keeper = MemoryKeeper(model, train, valid, config, cache, joined if config["memory_regenerated"] else None)
    stage = _ram_config(config)
    windows = BucketLoader if backbone.trims else TrainDataLoader
    loader = (RowLoader if model.frozen else windows)(stage, train, splits.train._sampler, shuffle=True)
    mark = fingerprint(config.training_options(), splits.fingerprint, base.fingerprint, *version_of(config["model"]))
    manifest = {
        "options": config.explain(),
        "backbone": base.name,
        "backbone_options": {**config.for_backbone().explain(), **getattr(base.model, "extra_options", {})},
        "validation_in_memory": True,
    }
    init_seed(config["seed"], config["reproducibility"])
    return _run(stage, splits, model, loader, _directory(config, mark), mark, manifest, keeper, test, trial)


def selection_protocol(config: Any) -> str:
    """The protocol whose validation figures stop a training early and choose among trials."""
    if config["valid_protocol"] != "auto":
        return config["valid_protocol"]
    return SEEN_KEPT if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else SEEN_REMOVED


def prepare_data(config: Any, regenerated: Any = None) -> Splits:
    """Data set, loaders and seen items as the configured model needs them; `regenerated` joins the training split."""
    model_class = get_model(config["model"])
    same_target = getattr(model_class, "needs_same_target", None)
    packed = config["training"] == "packed" and hasattr(model_class, "encode_positions")
    if packed and config["loss_type"] != "CE":
        raise ConfigError(
            [
                f"training: packed predicts by cross entropy, and loss_type is {config['loss_type']}; set training: "
                "prefix, or loss_type: CE"
            ]
        )
    partners = same_target is not None and same_target(config)
    kind = get_dataset_class(config)
    if regenerated is not None:
        kind = regenerated_class(kind)
    costs = getattr(model_class, "token_costs", None)
    return prepare(config, kind, trims(model_class), partners, packed, regenerated, costs)


def _directory(config: Any, mark: str) -> Path:
    return Path(config["checkpoint_dir"]) / f"{config['model']}-{config['dataset']}-{mark[:12]}"


def _run(
    config: Any, splits: Splits, model: Any, train_data: Any, directory: Path, mark: str, manifest: dict[str, Any],
    keeper: Optional[MemoryKeeper] = None, test: Any = None, trial: Optional[Trial] = None,
) -> Outcome:  # fmt: skip
    """Train to the end (or take up a finished run), evaluate the best weights, complete the checkpoint."""
    logger, group = getLogger(), current()
    name, protocol = config["model"], selection_protocol(config)
    if not group.agreed(mark):
        raise DatasetError(
            f"world_size: {group.size} processes read different data or options; give all machines the same."
        )

    def validate(model: Any, data: Any) -> Any:
        if keeper is not None:
            keeper.before_evaluation()
        return evaluate(model, data, config, splits.seen["valid"])

    resume = config["resume"] is not False
    before_epoch = keeper.before_epoch if keeper is not None else None
    trainer = resumable(get_trainer_class(config))(config, model, directory, validate, protocol, resume, before_epoch)
    done = group.from_first(lambda: read_manifest(directory) if resume and (directory / MANIFEST).exists() else None)
    finished = done is not None
    if done is not None:
        if done["fingerprint"] != mark:
            raise CheckpointError(f"{directory} holds another run; move it away or set `checkpoint_dir`.")
        logger.info(f"{name}: reusing the finished run in {directory}")
    untrained = keeper is not None and config["head"] == "knn"
    if untrained:
        if not finished:
            trainer.keep()
    elif not finished or trainer.start_epoch == 0:
        watch = trial.after_epoch if trial is not None else None
        trainer.fit(train_data, splits.valid, show_progress=config["show_progress"], callback_fn=watch)
    trainer.load_best()
    model.eval()
    if keeper is not None:
        keeper.before_evaluation()
    if isinstance(model, KNNRaSeRec) and not finished:

        def value() -> float:
            return evaluate(model, splits.valid, config, splits.seen["valid"])[protocol][trainer.valid_metric]

        best = tune(model, value, config["show_progress"])
        share, tau = float(model.knn_share), float(model.knn_tau)
        logger.info(f"kNN head: share {share:g}, tau {tau:g}, validation {trainer.valid_metric} {best:.4f}")
        trainer.keep()
    metrics = {"valid": evaluate(model, splits.valid, config, splits.seen["valid"], decimals=DECIMALS)}
    if trial is not None:
        return Outcome(name, model, splits, metrics, trainer.seconds, directory, mark)
    if keeper is not None:
        keeper.admit_validation(test)
    ranks = collect_ranks(model, splits.test, config, splits.seen["test"])
    metrics["test"] = metrics_by_protocol(ranks, config, decimals=DECIMALS)
    curve = trainer.curve if done is None else done.get("curve", {})
    outcome = Outcome(name, model, splits, metrics, trainer.seconds, directory, mark, ranks, curve)
    if not finished and group.first:
        full = {"model": name, "dataset": config["dataset"], "fingerprint": mark, "data": splits.fingerprint}
        full.update(manifest, metrics=metrics, seconds=trainer.seconds, curve=curve)
        known = catalogue_of(splits, config)
        write_checkpoint(directory, full, splits.vocabulary(), getattr(model, "memory", None), known)
    return outcome


def _from_checkpoint(config: Any, splits: Splits, model: Any, directory: Path, trial: Optional[Trial]) -> Outcome:
    """The weights of another run's checkpoint, evaluated on this run's data."""
    manifest = read_manifest(directory)
    if manifest["model"] != config["model"]:
        raise CheckpointError(
            f"backbone_checkpoint: {directory} holds a {manifest['model']}, but the backbone is {config['model']}; "
            f"set --backbone={manifest['model']} or name another directory."
        )
    check_same_split("backbone_checkpoint", directory, manifest, config, splits)
    weights = read_weights(directory, manifest)
    load_weights(model, weights, directory / BEST)
    model.eval()
    metrics = {"valid": evaluate(model, splits.valid, config, splits.seen["valid"], decimals=DECIMALS)}
    ranks = None
    if trial is None:
        ranks = collect_ranks(model, splits.test, config, splits.seen["test"])
        metrics["test"] = metrics_by_protocol(ranks, config, decimals=DECIMALS)
    seconds, mark, curve = float(manifest.get("seconds", 0.0)), manifest["fingerprint"], manifest.get("curve", {})
    return Outcome(config["model"], model, splits, metrics, seconds, directory, mark, ranks, curve)


def _ram_config(config: Any) -> Any:
    """The configuration under which the retrieval-augmented module trains: `ram_*` in place of the backbone's."""
    stage = copy.deepcopy(config)
    for name in ("learning_rate", "weight_averaging", "train_batch_size", "epochs", "stopping_step", "valid_metric"):
        stage[name] = config[f"ram_{name}"]
    return stage
