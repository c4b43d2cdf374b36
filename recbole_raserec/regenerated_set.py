"""A finished stage i: what joins the training split, where it lies and how it came about."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

from recbole_raserec.configuration.options import ENCODERS, REGENERATION
from recbole_raserec.data.regenerated import Regenerated, training_hash
from recbole_raserec.data.splits import Splits
from recbole_raserec.errors import CheckpointError, ConfigError, MissingExtraError
from recbole_raserec.fileio import read_json, replacing, sha256, write_json
from recbole_raserec.fingerprint import fingerprint
from recbole_raserec.regeneration import report
from recbole_raserec.regeneration.sources import Sequences
from recbole_raserec.stages import prepare_data
from recbole_raserec.stored_arrays import MANIFEST

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class RegeneratedData:
    """A finished stage i.

    Attributes:
        data: what joins the training split. directory: where it lies. fingerprint: of its content's origin.
        seconds: it took, over all its runs. report: see :func:`recbole_raserec.regeneration.report.describe`.
    """

    data: Regenerated
    directory: Path
    fingerprint: str
    seconds: float
    report: dict[str, Any]


def mined_splits(config: Any, plain: Splits, pretrained: bool) -> Splits:
    """What is mined: `plain`, the split of the log, or the model's own where that leaves interactions out.

    Raises:
        ConfigError: it is the model's own, and item vectors `pretrained` on the other are wanted.
    """
    model = config.for_backbone() if config["model"] == "RaSeRec" else config
    if model["model"] in ENCODERS and set(model["load_col"] or ()) <= {"inter"}:
        return plain
    own = prepare_data(model.without_regeneration())
    hashes = [training_hash(splits.train._dataset, splits.vocabulary()) for splits in (plain, own)]
    if hashes[0] == hashes[1]:
        return plain
    if pretrained:
        left_out = len(plain.train._dataset) - len(own.train._dataset)
        raise ConfigError(
            [
                f"regen_pretrained: true: {model['model']} leaves {left_out} of the training targets out (they have no "
                "features, no entity), so that its split is another than that of the SASRec whose item vectors the "
                "regenerator would start from; they may have seen what this model holds out. Set regen_pretrained: "
                "false, or complete the files."
            ]
        )
    return own


def directory_of(config: Any, mark: str) -> Path:
    """Where the set of fingerprint `mark` lies."""
    return Path(config["checkpoint_dir"]) / f"regeneration-{config['dataset']}-{mark[:12]}"


def waiting(directory: Path) -> Callable[[], None]:
    """Says that another run makes what this one needs."""
    return lambda: getLogger().info(f"Regeneration: another run is making {directory}; waiting for it")


def finished(config: Any, splits: Splits, directory: Path, mark: str) -> Optional[RegeneratedData]:
    """What a run with the same options left."""
    if config["resume"] is False or not (directory / MANIFEST).exists() or not (directory / REPORT).exists():
        return None
    getLogger().info(f"Regeneration: reusing {directory}")
    users, items = splits.dataset.user_num, splits.dataset.item_num
    found = read_json(directory / REPORT)
    data = Regenerated.load(directory, users, items, mark, splits.vocabulary())
    return RegeneratedData(data, directory, mark, found["seconds"], found)


def given_set(config: Any, directory: Path) -> RegeneratedData:
    """A set that was made before, named by the user."""
    splits = mined_splits(config, prepare_data(config.for_embeddings()), pretrained=False)
    users, items, vocabulary = splits.dataset.user_num, splits.dataset.item_num, splits.vocabulary()
    try:
        data = Regenerated.load(directory, users, items, vocabulary=vocabulary)
        if data.training != training_hash(splits.train._dataset, vocabulary):
            raise CheckpointError(
                f"{directory} was made from another training split; its rows could hold what is tested."
            )
        data = dataclasses.replace(data, weights=None)  # they belong to a model
        found = read_json(directory / REPORT)
    except CheckpointError as error:
        raise CheckpointError(f"regenerated_data: {error}") from None
    mark = fingerprint({"regenerated": [sha256(path) for path in sorted(directory.glob("*.npy"))]}, splits.fingerprint)
    return RegeneratedData(data, directory, mark, float(found.get("seconds", 0.0)), found)


def keep(
    config: Any, splits: Splits, whole: Sequences, data: Regenerated, directory: Path, mark: str, started: float,
    more: dict[str, Any], options: Iterable[str] = REGENERATION,
) -> RegeneratedData:  # fmt: skip
    """Write a set and its report, which names `options` and in which `more` joins.

    Args:
        started: a time of ``perf_counter``.
    """
    train, vocabulary = splits.train._dataset, splits.vocabulary()
    data = dataclasses.replace(data, vocabulary=vocabulary, training=training_hash(train, vocabulary))
    found = {
        **report.describe(whole, data, train.item_num, vocabulary["items"]), "dataset": config["dataset"],
        "options": {name: config[name] for name in sorted(options)}, **more,
    }  # fmt: skip
    found["seconds"] = seconds = time.perf_counter() - started
    data.save(directory, mark)
    write_report(directory, found)
    getLogger().info(f"Regenerated data: {directory}\n{report.text(found)}")
    return RegeneratedData(data, directory, mark, seconds, found)


def write_report(directory: Path, found: dict[str, Any]) -> None:
    """The report as text, plot (where matplotlib is there) and, last, JSON."""
    with replacing(directory / "report.txt") as part:
        part.write_text(report.text(found) + "\n", encoding="utf-8")
    with contextlib.suppress(MissingExtraError):
        report.draw(found, directory / "report.png")
    write_json(directory / REPORT, found)
