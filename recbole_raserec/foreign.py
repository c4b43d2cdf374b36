"""Another run's checkpoint in this run: did it learn from what this run learns from, and from nothing held out?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_raserec.configuration.text import plain, shown
from recbole_raserec.data.splits import Splits
from recbole_raserec.errors import CheckpointError
from recbole_raserec.serving.checkpoint import read_ids


def check_same_split(option: str, directory: Path, manifest: Mapping[str, Any], config: Any, splits: Splits) -> None:
    """Refuse a checkpoint whose training split may hold what this run validates or tests on.

    Args:
        option: that named it. directory, manifest: its. config, splits: of this run.

    Raises:
        CheckpointError: users, items or the log behind them are others, or they were split in another way.
    """
    dataset = config["dataset"]
    if read_ids(directory) != splits.vocabulary():
        raise CheckpointError(
            f"{option}: {directory} was trained on other users or items than data set {dataset} has (data set, filters "
            "or order differ); train one on this data."
        )
    if manifest["data"] != splits.fingerprint:
        raise CheckpointError(
            f"{option}: {directory} was trained on other interactions of the same users and items than data set "
            f"{dataset} has; train one on this data."
        )
    theirs, ours = _split(manifest["options"]), _split(config)
    if theirs != ours:
        raise CheckpointError(
            f"{option}: {directory} was trained on another split of data set {dataset} (eval_args: {shown(theirs)}, "
            f"here {shown(ours)}), so it may have learned what is tested here; train one on this split."
        )


def _split(options: Any) -> dict[str, Any]:
    """What decides which interactions are trained on."""
    given = plain(options["eval_args"])
    return {name: given.get(name) for name in ("split", "order", "group_by")}
