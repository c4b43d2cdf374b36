"""Stage ii: train a backbone, or any model of RecBole, on the data set or on the regenerated one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from recbole.utils import init_seed

from recbole_raserec.config import Config, get_model, model_versions
from recbole_raserec.data import Splits, check_same_split, prepare_data, training_hash
from recbole_raserec.errors import CheckpointError, DatasetError
from recbole_raserec.evaluation import evaluate
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.darec import find_collaborative_model
from recbole_raserec.storage import BEST, fingerprint, load_weights, read_manifest, read_weights
from recbole_raserec.training import DECIMALS, Outcome, Trial, evaluate_test, run_stage


def train_model(
    config: Config, checkpoint: Optional[str] = None, regenerated: Any = None, trial: Optional[Trial] = None,
    backbone: bool = False, splits: Optional[Splits] = None,
) -> Outcome:  # fmt: skip
    """Stage ii: train the configured model, continue its training, or reuse what a run with the same fingerprint left.

    Args:
        config: the model's configuration.
        checkpoint: checkpoint directory whose weights are used instead of training.
        regenerated: of stage i (`RegeneratedData`); it joins the training split.
        trial: given where the run is one of a search.
        backbone: refuse a model that cannot be one before it is trained.
        splits: the data, where they are prepared already.

    Raises:
        ConfigError: it cannot be a backbone.
        CheckpointError: `checkpoint`, or that of the collaborative model, belongs to another model or data set, or is
            damaged.
        DatasetError: `regenerated` was made from another training split.
    """
    collaborative = None
    if config["collaborative"] and checkpoint:  # the checkpoint holds its own
        config["collaborative_options"] = read_manifest(checkpoint)["options"].get("collaborative_options")
    elif config["collaborative"]:
        collaborative = find_collaborative_model(config, lambda other: train_model(other).directory)
    splits = splits or prepare_data(config, None if regenerated is None else regenerated.data)
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
    if backbone:
        wrap_backbone(model, config, splits.dataset)
    options = config.training_options()
    if checkpoint:
        return _from_checkpoint(config, splits, model, Path(checkpoint), trial)
    parts = [] if regenerated is None else [regenerated.fingerprint]
    parts += model_versions(config["model"])
    if collaborative is not None:
        directory, manifest = collaborative
        check_same_split("collaborative", directory, manifest, config, splits)
        load_weights(model.collaborator.model, read_weights(directory, manifest), directory / BEST)
        parts += [manifest["fingerprint"]]
    parts += model.fingerprint_parts() if hasattr(model, "fingerprint_parts") else []
    mark = fingerprint(options, splits.fingerprint, *parts)
    return run_stage(config, splits, model, splits.train, mark, {"options": config.explain()}, trial=trial)


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
