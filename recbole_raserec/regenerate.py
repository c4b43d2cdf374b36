"""Stage i as a resumable step: patterns, pairs, regenerator, generated patterns, and the set of what joins the data."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import torch
from recbole.utils import init_logger, init_seed

from recbole_raserec.allocator import keep_freed_memory
from recbole_raserec.config import Config
from recbole_raserec.configuration.options import ENCODERS, REGENERATION
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.regenerated import Regenerated, training_hash
from recbole_raserec.data.source import ensure_dataset
from recbole_raserec.data.splits import Splits
from recbole_raserec.distributed.group import current
from recbole_raserec.distributed.launch import layout_of
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError, MissingExtraError
from recbole_raserec.fileio import read_json, replacing, sha256, write_json
from recbole_raserec.fingerprint import fingerprint
from recbole_raserec.regeneration import report
from recbole_raserec.regeneration.combine import combine
from recbole_raserec.regeneration.files import write_benchmark
from recbole_raserec.regeneration.inference import generate
from recbole_raserec.regeneration.regenerator import Regenerator
from recbole_raserec.regeneration.sources import make_pairs, pieces, training_sequences
from recbole_raserec.regeneration.training import STATE, Schedule, fit
from recbole_raserec.stages import Trial, prepare_data, train_model
from recbole_raserec.stored_arrays import MANIFEST

REPORT = "report.json"

#: Raised when the same options and data would give another regenerated set than before.
REGENERATION_VERSION = 1

#: Options that the training of the regenerator does not depend on: sets that differ in them share one.
_INFERENCE = ("regen_gamma", "regen_temperature")


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


def regenerate(config: Any, trial: Optional[Trial] = None) -> RegeneratedData:
    """Stage i: regenerate the training set, continue an interrupted run, or reuse what one with the same options, data
    and seed left.

    Args:
        config: of a sequential model, with `regeneration` on.
        trial: given where the run is one of a search.

    Raises:
        ConfigError: `regen_heads` does not divide the vectors. DatasetError: no pattern is frequent.
        CheckpointError: a stored part is damaged or foreign.
    """
    given = config["regenerated_data"]
    made = current().from_first(lambda: _given(config, Path(given))) if given else _regenerate(config, trial)
    origin = {"patterns": "pattern", "generated": "generated"}.get(config["regen_rows"])
    if origin is None:
        return made
    mark = fingerprint({"only": origin}, made.fingerprint)
    return dataclasses.replace(made, data=made.data.only(origin), fingerprint=mark)


def _regenerate(config: Any, trial: Optional[Trial]) -> RegeneratedData:
    options = {name: config[name] for name in sorted(REGENERATION) if not name.startswith("regen_personal")}
    for name in ("regeneration", "regen_rows"):  # whether they are weighed, and which are taken, comes later
        del options[name]
    _check_heads(config)
    source = train_model(config.for_embeddings(), trial=trial) if config["regen_pretrained"] else None
    splits = _splits(config, source.splits if source is not None else prepare_data(config.for_embeddings()))
    parts = [splits.fingerprint, source.fingerprint if source is not None else ""]
    base = {
        **options,
        "seed": config["seed"],
        "longest": config["MAX_ITEM_LIST_LENGTH"],
        "version": REGENERATION_VERSION,
    }
    base["eval_args"] = config.training_options()["eval_args"]
    mark = fingerprint(base, *parts)
    directory = Path(config["checkpoint_dir"]) / f"regeneration-{config['dataset']}-{mark[:12]}"
    learned = fingerprint({name: value for name, value in base.items() if name not in _INFERENCE}, *parts)
    trained = Path(config["checkpoint_dir"]) / f"regenerator-{config['dataset']}-{learned[:12]}"
    users, items = splits.dataset.user_num, splits.dataset.item_num

    def make() -> RegeneratedData:
        if config["resume"] is not False and (directory / MANIFEST).exists() and (directory / REPORT).exists():
            getLogger().info(f"Regeneration: reusing {directory}")
            found, data = (
                read_json(directory / REPORT),
                Regenerated.load(directory, users, items, mark, splits.vocabulary()),
            )
            return RegeneratedData(data, directory, mark, found["seconds"], found)
        vectors = source.model.item_embedding.weight.detach()[:items] if source is not None else None
        return _run(config, splits, vectors, trained, directory, mark)

    return current().from_first(make)


def _splits(config: Any, plain: Splits) -> Splits:
    """What is mined: `plain`, the split of the log, or the model's own where that leaves interactions out."""
    model = config.for_backbone() if config["model"] == "RaSeRec" else config
    if model["model"] in ENCODERS and set(model["load_col"] or ()) <= {"inter"}:
        return plain
    own = prepare_data(model.without_regeneration())
    hashes = [training_hash(splits.train._dataset, splits.vocabulary()) for splits in (plain, own)]
    if hashes[0] == hashes[1]:
        return plain
    if config["regen_pretrained"]:
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


def _run(config: Any, splits: Splits, vectors: Any, trained: Path, directory: Path, mark: str) -> RegeneratedData:
    train = splits.train._dataset
    if isinstance(train, SequenceDataset) and not train.is_lazy:
        raise DatasetError("regeneration: benchmark files have no histories to regenerate; use an interaction log.")
    started, progress = time.perf_counter(), bool(config["show_progress"])
    whole = training_sequences(train)
    read = pieces(whole, config["MAX_ITEM_LIST_LENGTH"])
    pairs = make_pairs(
        read, whole, config["regen_span"], config["regen_min_support"], config["regen_pattern_length"],
        config["regen_pairs"], config["seed"], "" if progress else None,
    )  # fmt: skip
    if not len(pairs):
        raise DatasetError(
            f"regeneration: no pattern within {config['regen_span']} items occurs in {config['regen_min_support']} of "
            f"the {len(whole)} training sequences; lower regen_min_support or raise regen_span."
        )
    getLogger().info(f"regeneration: {len(pairs.patterns)} patterns, {len(pairs)} pairs of {len(read)} sequences")
    init_seed(config["seed"], config["reproducibility"])
    model = _build(config, train.item_num, vectors).to(config["device"])
    for folder in (directory, trained):
        folder.mkdir(parents=True, exist_ok=True)
    prepared = time.perf_counter() - started
    if config["resume"] is False:
        (trained / STATE).unlink(missing_ok=True)
    history = fit(model, pairs, _schedule(config), trained, progress)
    started = time.perf_counter()
    generated = generate(
        model, read, config["regen_gamma"], config["regen_temperature"], config["seed"],
        desc="Generate patterns" if progress else None, native_kernels=bool(config["native_kernels"]),
    )  # fmt: skip
    vocabulary = splits.vocabulary()
    data = combine(whole, read, pairs.patterns, generated)
    data = dataclasses.replace(data, vocabulary=vocabulary, training=training_hash(train, vocabulary))
    seconds = prepared + sum(epoch["seconds"] for epoch in history["epochs"]) + time.perf_counter() - started
    tokens = vocabulary["items"]
    found = {
        **report.describe(whole, data, train.item_num, tokens), "dataset": config["dataset"],
        "options": {name: config[name] for name in sorted(REGENERATION)}, "seed": config["seed"],
        "patterns_mined": len(pairs.patterns), "pairs": len(pairs), "training": history, "seconds": seconds,
        "regenerator": trained.name,
    }  # fmt: skip
    data.save(directory, mark)
    write_report(directory, found)
    getLogger().info(f"Regenerated data: {directory}\n{report.text(found)}")
    return RegeneratedData(data, directory, mark, seconds, found)


def regenerate_dataset(
    dataset: Optional[str], output: Path, name: Optional[str] = None, model: Optional[str] = None,
    config_file_list: Optional[list[str]] = None, config_dict: Optional[dict[str, Any]] = None,
    argv: Optional[list[str]] = None,
) -> Path:  # fmt: skip
    """Stage i alone: the regenerated data set as RecBole's atomic files, with the report beside them.

    Args:
        dataset: to regenerate. output: directory of data sets; the folder `name` of it is written.
        name: of the new data set; default: that of the old one and ``-regenerated``.
        model, config_file_list, config_dict, argv: as of :func:`recbole_raserec.quick_start.run_recbole_raserec`; the
            model decides nothing but which options are known.

    Returns:
        the folder.

    Raises:
        ConfigError, DatasetError, CheckpointError: as that function does.
    """
    keep_freed_memory()
    given = {**(config_dict or {}), "regeneration": True}
    config = Config(model or "SASRec", dataset, config_file_list, given, argv)
    processes = layout_of(config.final_config_dict).size
    if processes > 1:
        raise ConfigError([f"nproc: {processes} processes share a training, but stage i is one's work; leave it out"])
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    ensure_dataset(config)
    made = regenerate(config)
    splits = prepare_data(config.for_embeddings())
    data = made.data.with_ids_of(splits.vocabulary())
    desc = "Write" if config["show_progress"] else None
    folder = write_benchmark(splits, data, output, name or f"{config['dataset']}-regenerated", desc)
    write_report(folder, made.report)
    return folder


def write_report(directory: Path, found: dict[str, Any]) -> None:
    """The report as text, plot (where matplotlib is there) and, last, JSON."""
    with replacing(directory / "report.txt") as part:
        part.write_text(report.text(found) + "\n", encoding="utf-8")
    with contextlib.suppress(MissingExtraError):
        report.draw(found, directory / "report.png")
    write_json(directory / REPORT, found)


def _check_heads(config: Any) -> None:
    size = config.for_embeddings()["hidden_size"] if config["regen_pretrained"] else config["regen_hidden_size"]
    if size % config["regen_heads"]:
        raise ConfigError(
            [f"regen_heads: {config['regen_heads']} does not divide vectors of length {size}; choose for example 1."]
        )


def _build(config: Any, n_items: int, vectors: Any) -> Regenerator:
    size, heads = config["regen_hidden_size"] if vectors is None else vectors.shape[1], config["regen_heads"]
    model = Regenerator(
        n_items, size, heads, config["regen_layers"], config["regen_inner_size"], config["regen_dropout"],
        config["regen_conditions"], config["MAX_ITEM_LIST_LENGTH"], config["regen_pattern_length"],
    )  # fmt: skip
    if vectors is not None:
        model.use_item_vectors(vectors.to("cpu", torch.float32))
    return model


def _schedule(config: Any) -> Schedule:
    return Schedule(
        epochs=config["regen_epochs"],
        patience=config["regen_stopping_step"],
        learning_rate=config["regen_learning_rate"],
        batch_pairs=config["regen_batch_pairs"],
        held_out=config["regen_held_out"],
        entropy_weight=config["regen_entropy"],
        tau_decay=config["regen_tau_decay"],
        tau_least=config["regen_tau_least"],
        seed=config["seed"],
    )


def _given(config: Any, directory: Path) -> RegeneratedData:
    """A set that was made before, named by the user."""
    splits = prepare_data(config.for_embeddings())
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
