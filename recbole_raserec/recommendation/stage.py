"""Stage ii: train a backbone, or any model of RecBole, on the data set or on the regenerated one."""

from __future__ import annotations

from logging import getLogger
from pathlib import Path
from typing import Any, Optional

from recbole.utils import init_seed

from recbole_raserec.compat import read_recbole_checkpoint
from recbole_raserec.config import SEEN_KEPT, Config, get_model, model_versions
from recbole_raserec.data import Splits, check_same_options, check_same_split, prepare_data, training_hash
from recbole_raserec.errors import CheckpointError, DatasetError
from recbole_raserec.evaluation import evaluate
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.storage import BEST, dense_tensors, fingerprint, load_weights, read_manifest, read_weights, sha256
from recbole_raserec.training import DECIMALS, Hooks, Outcome, Trial, evaluate_test, run_stage


def train_model(
    config: Config, checkpoint: Optional[str] = None, regenerated: Any = None, trial: Optional[Trial] = None,
    backbone: bool = False, stage: str = "recommendation", splits: Optional[Splits] = None,
) -> Outcome:  # fmt: skip
    """Stage ii: train the configured model, continue its training, or reuse what a run with the same fingerprint left.

    Args:
        config: the model's configuration.
        checkpoint: checkpoint directory, or `.pth` of RecBole, whose weights are used instead of training.
        regenerated: of stage i (`RegeneratedData`); it joins the training split.
        trial: given where the run is one of a search.
        backbone: refuse a model that cannot be one before it is trained.
        stage: first part of the names of its figures in trackers.
        splits: the data, where they are prepared already.

    Raises:
        ConfigError: it cannot be a backbone.
        CheckpointError: `checkpoint` belongs to another model or data set, or is damaged.
        DatasetError: `regenerated` was made from another training split.
    """
    splits = splits or prepare_data(config, None if regenerated is None else regenerated.data)
    if regenerated is not None and regenerated.data.training is not None:
        own = splits.train._dataset.original
        if training_hash(own, splits.vocabulary()) != regenerated.data.training:
            raise DatasetError(
                f"regeneration: {config['model']} reads another training split than the patterns were mined "
                "from: users or items without features are dropped from its log. "
                "Set filter_inter_by_user_or_item: false, or complete the feature files."
            )
    splits.settle(config)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, splits.train._dataset).to(config["device"])
    if backbone:
        wrap_backbone(model, config, splits.dataset)
    options = config.training_options()
    if checkpoint and Path(checkpoint).is_file():
        return _from_recbole(config, splits, model, Path(checkpoint), trial, stage)
    if checkpoint:
        return _from_checkpoint(config, splits, model, Path(checkpoint), trial)
    parts = [] if regenerated is None else [regenerated.fingerprint]
    parts += model_versions(config["model"])
    parts += model.fingerprint_parts() if hasattr(model, "fingerprint_parts") else []
    mark = fingerprint(options, splits.fingerprint, *parts)
    return run_stage(config, splits, model, splits.train, mark, {"options": config.explain()}, trial=trial, stage=stage)


class _AsItIs(Hooks):
    trains = False


def _from_recbole(
    config: Config, splits: Splits, model: Any, path: Path, trial: Optional[Trial], stage: str
) -> Outcome:  # fmt: skip
    """The weights in a `.pth` of RecBole's Trainer, evaluated on this run's data and kept as a checkpoint of ours."""
    tensors, theirs, score = read_recbole_checkpoint(path)
    check_same_options("backbone_checkpoint", path, theirs, config)
    own = {name: list(value.shape) for name, value in dense_tensors(model.state_dict()).items()}
    found = {name: list(value.shape) for name, value in dense_tensors(tensors).items()}
    wrong = [
        f"{name} {found.get(name)} (here {own.get(name)})" for name in own | found if found.get(name) != own.get(name)
    ]
    if wrong:
        remedy = "use its sizes, and the data set and the filters that it was trained with"
        raise CheckpointError(f"backbone_checkpoint: {path} has {', '.join(wrong[:5])}; {remedy}.")
    load_weights(model, dense_tensors(tensors), path)
    mark = fingerprint(config.training_options(), splits.fingerprint, sha256(path))
    manifest = {"options": config.explain(), "weights_from": str(path.absolute())}
    outcome = run_stage(config, splits, model, splits.train, mark, manifest, _AsItIs(), trial, stage)
    here = outcome.metrics["valid"][SEEN_KEPT].get(str(config["valid_metric"]).lower())
    if theirs.get("valid_metric") == config["valid_metric"] and None not in (score, here) and abs(score - here) > 0.001:
        before = f"its run validated {config['valid_metric']} {score:.4f}"
        getLogger().warning(f"{path}: {before}, here it is {here:.4f}: were the data the same?")
    return outcome


def _from_checkpoint(config: Config, splits: Splits, model: Any, directory: Path, trial: Optional[Trial]) -> Outcome:
    """The weights of another run's checkpoint, evaluated on this run's data."""
    manifest = read_manifest(directory)
    if manifest["model"] != config["model"]:
        raise CheckpointError(
            f"backbone_checkpoint: {directory} holds a {manifest['model']}, but the backbone is {config['model']}; "
            f"set --backbone={manifest['model']} or name another directory."
        )
    check_same_split("backbone_checkpoint", directory, manifest, config, splits)
    load_weights(model, read_weights(directory, manifest), directory / BEST)
    model.eval()
    metrics = {"valid": evaluate(model, splits.valid, config, splits.seen["valid"], decimals=DECIMALS)}
    ranks = None
    if trial is None:
        ranks, metrics["test"] = evaluate_test(model, splits, config)
    seconds, mark, curve = float(manifest.get("seconds", 0.0)), manifest["fingerprint"], manifest.get("curve", {})
    return Outcome(config["model"], model, splits, metrics, seconds, directory, mark, ranks, curve)
