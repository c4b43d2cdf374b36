"""The model whose vectors DARec is given (option `collaborative`): found or trained, and its weights taken over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

from recbole_raserec.data.splits import Splits
from recbole_raserec.errors import ConfigError
from recbole_raserec.foreign import check_same_split
from recbole_raserec.recommendation.trainer import BEST, load_weights
from recbole_raserec.registry import MODELS, get_model
from recbole_raserec.serving.checkpoint import MANIFEST, read_manifest, read_weights


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
        if named not in collaborators():
            raise ConfigError(
                [
                    f"collaborative: {named} is neither a checkpoint directory nor one of "
                    f"{', '.join(collaborators())}; name one."
                ]
            )
        directory = train(config.for_collaborator())
    manifest = read_manifest(directory)
    config["collaborative_options"] = {**manifest["options"], "model": manifest["model"]}
    return directory, manifest


def collaborators() -> list[str]:
    """Models of this package that give a user vector for each place of a history."""
    return [name for name in MODELS if name != "DARec" and hasattr(get_model(name), "encode_positions")]


def take_collaborator(config: Any, model: Any, splits: Splits, directory: Path, manifest: dict[str, Any]) -> None:
    """Put the weights of the collaborative model where the model keeps its own.

    Raises:
        CheckpointError: it was trained on other data, or on another split of them.
    """
    check_same_split("collaborative", directory, manifest, config, splits)
    load_weights(model.collaborator.model, read_weights(directory, manifest), directory / BEST)
