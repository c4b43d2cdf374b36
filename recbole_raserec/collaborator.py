"""The model whose vectors DARec is given (option `collaborative`): found or trained, and its weights taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from recbole_raserec.data.splits import Splits
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.recommendation.trainer import BEST, load_weights
from recbole_raserec.registry import MODELS
from recbole_raserec.serving.checkpoint import MANIFEST, read_ids, read_manifest, read_weights


def find_collaborator(config: Any, train: Callable[[Any], Path]) -> tuple[Path, dict[str, Any]]:
    """Directory and manifest of the model; its options are put into `config`.

    Args:
        config: of DARec. train: gives the checkpoint of a model that is named instead of a directory.

    Raises:
        ConfigError: there is no such directory or model.
    """
    named = config["collaborative"]
    directory = Path(named)
    if not (directory / MANIFEST).is_file():
        if named not in MODELS:
            raise ConfigError(
                [f"collaborative: {named} is neither a checkpoint directory nor a model of this package; name for example SASRec."]
            )
        directory = train(config.for_collaborator())
    manifest = read_manifest(directory)
    config["collaborative_options"] = {**manifest["options"], "model": manifest["model"]}
    return directory, manifest


def take_collaborator(model: Any, splits: Splits, directory: Path, manifest: dict[str, Any]) -> None:
    """Put the weights of the collaborative model where the model keeps its own.

    Raises:
        CheckpointError: it was trained on other data.
    """
    if read_ids(directory) != splits.vocabulary():
        raise CheckpointError(
            f"collaborative: {directory} was trained on other users or items than this data set has; name another."
        )
    load_weights(model.collaborator.model, read_weights(directory, manifest), directory / BEST)
