"""Stage i as a resumable step: patterns, pairs, regenerator, generated patterns, and the set of what joins the data."""

from __future__ import annotations

import dataclasses
import time
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import torch
from recbole.utils import init_logger, init_seed

from recbole_raserec.allocator import keep_freed_memory
from recbole_raserec.config import Config
from recbole_raserec.configuration.options import REGENERATION
from recbole_raserec.configuration.stage_options import MINING, trains_regenerator
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.source import ensure_dataset
from recbole_raserec.data.splits import Splits
from recbole_raserec.distributed.group import current
from recbole_raserec.distributed.launch import layout_of
from recbole_raserec.errors import ConfigError, DatasetError
from recbole_raserec.file_locks import one_at_a_time
from recbole_raserec.fingerprint import fingerprint
from recbole_raserec.regenerated_set import (
    RegeneratedData,
    directory_of,
    finished,
    given_set,
    keep,
    mined_splits,
    waiting,
    write_report,
)  # fmt: skip
from recbole_raserec.regeneration import report
from recbole_raserec.regeneration.combine import combine
from recbole_raserec.regeneration.files import check_ids, write_benchmark
from recbole_raserec.regeneration.inference import generate
from recbole_raserec.regeneration.settings import build, check_heads, schedule
from recbole_raserec.regeneration.sources import Sequences, make_pairs, mine, pieces, training_sequences
from recbole_raserec.regeneration.training import STATE, fit
from recbole_raserec.stages import Trial, prepare_data, train_model

#: Raised when the same options and data would give another regenerated set than before.
REGENERATION_VERSION = 1

#: Options that the training of the regenerator does not depend on: sets that differ in them share one.
_INFERENCE = ("regen_gamma", "regen_temperature")


def regenerate(config: Any, trial: Optional[Trial] = None) -> RegeneratedData:
    """Stage i: regenerate the training set, continue an interrupted run, or reuse what one with the same options, data
    and seed left. With `regen_rows: patterns` patterns are mined and nothing is trained.

    Args:
        config: of a sequential model, with `regeneration` on.
        trial: given where the run is one of a search.

    Raises:
        ConfigError: `regen_heads` does not divide the vectors. DatasetError: no pattern is frequent, or there
            are no rows of the wanted origin.
        CheckpointError: a stored part is damaged or foreign.
    """
    given = config["regenerated_data"]
    origin = {"patterns": "pattern", "generated": "generated"}.get(config["regen_rows"])
    if origin == "pattern" and not given:
        return _mine(config)
    made = current().from_first(lambda: given_set(config, Path(given))) if given else _regenerate(config, trial)
    if origin is None:
        return made
    mark, data = fingerprint({"only": origin}, made.fingerprint), made.data.only(origin)
    if not len(data):
        raise DatasetError(
            f"regen_rows: {config['regen_rows']} are wanted, but {made.directory} holds none; write both."
        )
    return dataclasses.replace(made, data=data, fingerprint=mark)


def _mine(config: Any) -> RegeneratedData:
    """Mined patterns alone: neither a regenerator nor the SASRec it starts from is needed, and no seed matters."""
    splits = mined_splits(config, prepare_data(config.for_embeddings()), pretrained=False)
    base = {name: config[name] for name in MINING}
    base.update(version=REGENERATION_VERSION, eval_args=config.training_options()["eval_args"], rows="patterns")
    mark = fingerprint(base, splits.fingerprint)
    directory = directory_of(config, mark)

    def make() -> RegeneratedData:
        started, whole = time.perf_counter(), training_sequences(_histories(splits))
        patterns = mine(
            whole, config["regen_span"], config["regen_min_support"], config["regen_pattern_length"],
            "" if config["show_progress"] else None,
        )  # fmt: skip
        nothing = np.zeros((len(whole), 0, 1), dtype=np.int64)  # K = 0 conditions
        data = combine(whole, whole, patterns, nothing)
        if not len(data):
            raise _no_pattern(config, whole, len(patterns))
        directory.mkdir(parents=True, exist_ok=True)
        return keep(config, splits, whole, data, directory, mark, started, {"patterns_mined": len(patterns)}, MINING)

    return current().from_first(lambda: _alone(make, config, splits, directory, mark, directory))


def _regenerate(config: Any, trial: Optional[Trial]) -> RegeneratedData:
    options = {name: config[name] for name in sorted(REGENERATION) if not name.startswith("regen_personal")}
    for name in ("regeneration", "regen_rows"):  # whether they are weighed, and which are taken, comes later
        del options[name]
    check_heads(config)
    source = train_model(config.for_embeddings(), trial=trial) if config["regen_pretrained"] else None
    plain = source.splits if source is not None else prepare_data(config.for_embeddings())
    splits = mined_splits(config, plain, config["regen_pretrained"])
    parts = [splits.fingerprint, source.fingerprint if source is not None else ""]
    base = {
        **options,
        "seed": config["seed"],
        "longest": config["MAX_ITEM_LIST_LENGTH"],
        "version": REGENERATION_VERSION,
    }
    base["eval_args"] = config.training_options()["eval_args"]
    mark = fingerprint(base, *parts)
    directory = directory_of(config, mark)
    learned = fingerprint({name: value for name, value in base.items() if name not in _INFERENCE}, *parts)
    trained = Path(config["checkpoint_dir"]) / f"regenerator-{config['dataset']}-{learned[:12]}"

    def make() -> RegeneratedData:
        items = splits.dataset.item_num
        vectors = source.model.item_embedding.weight.detach()[:items] if source is not None else None
        return _run(config, splits, vectors, trained, directory, mark)

    # several sets share the regenerator
    return current().from_first(lambda: _alone(make, config, splits, directory, mark, trained))


def _alone(
    make: Callable[[], RegeneratedData], config: Any, splits: Splits, directory: Path, mark: str, shared: Path
) -> RegeneratedData:
    """The set that is there, or the one that `make` makes while no other run is at `shared`."""
    found = finished(config, splits, directory, mark)
    if found is not None:
        return found
    with one_at_a_time(shared, waiting(directory)):
        found = finished(config, splits, directory, mark)
        return found if found is not None else make()


def _run(config: Any, splits: Splits, vectors: Any, trained: Path, directory: Path, mark: str) -> RegeneratedData:
    started, progress, train = time.perf_counter(), bool(config["show_progress"]), _histories(splits)
    whole = training_sequences(train)
    read = pieces(whole, config["MAX_ITEM_LIST_LENGTH"])
    pairs = make_pairs(
        read, whole, config["regen_span"], config["regen_min_support"], config["regen_pattern_length"],
        config["regen_pairs"], config["seed"], "" if progress else None,
    )  # fmt: skip
    if not len(pairs):
        raise _no_pattern(config, whole, len(pairs.patterns))
    getLogger().info(f"regeneration: {len(pairs.patterns)} patterns, {len(pairs)} pairs of {len(read)} sequences")
    init_seed(config["seed"], config["reproducibility"])
    model = build(config, train.item_num, vectors).to(config["device"])
    for folder in (directory, trained):
        folder.mkdir(parents=True, exist_ok=True)
    prepared = time.perf_counter() - started
    if config["resume"] is False:
        (trained / STATE).unlink(missing_ok=True)
    history = fit(model, pairs, schedule(config), trained, progress)
    started = time.perf_counter()
    generated = generate(
        model, read, config["regen_gamma"], config["regen_temperature"], config["seed"],
        desc="Generate patterns" if progress else None, native_kernels=bool(config["native_kernels"]),
    )  # fmt: skip
    started -= prepared + sum(epoch["seconds"] for epoch in history["epochs"])
    return keep(config, splits, whole, combine(whole, read, pairs.patterns, generated), directory, mark, started, {
        "patterns_mined": len(pairs.patterns), "pairs": len(pairs), "training": history, "regenerator": trained.name,
        "seed": config["seed"],
    })  # fmt: skip


def _histories(splits: Splits) -> Any:
    """The training split, which must have histories."""
    train = splits.train._dataset
    if isinstance(train, SequenceDataset) and not train.is_lazy:
        raise DatasetError("regeneration: benchmark files have no histories to regenerate; use an interaction log.")
    return train


def _no_pattern(config: Any, whole: Sequences, patterns: int) -> DatasetError:
    if patterns:
        return DatasetError(
            f"regeneration: of {patterns} patterns of the {len(whole)} training sequences none can be used; each is a "
            "whole history, repeats an item, or does not fit into MAX_ITEM_LIST_LENGTH: "
            f"{config['MAX_ITEM_LIST_LENGTH']}; raise it, or raise regen_span."
        )
    return DatasetError(
        f"regeneration: no pattern within {config['regen_span']} items occurs in {config['regen_min_support']} of "
        f"the {len(whole)} training sequences; lower regen_min_support or raise regen_span."
    )


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
            model decides which options are known, and where it leaves interactions out (without features, say), the
            files hold its split.

    Returns:
        the folder.

    Raises:
        ConfigError, DatasetError, CheckpointError: as that function does.
    """
    keep_freed_memory()
    given = {**(config_dict or {}), "regeneration": True}
    config = Config(model or "SASRec", dataset, config_file_list, given, argv)
    _check_alone(config)
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    ensure_dataset(config)
    pretrained = trains_regenerator(config) and config["regen_pretrained"]
    splits = mined_splits(config, prepare_data(config.for_embeddings()), pretrained)
    vocabulary = splits.vocabulary()
    check_ids(vocabulary)
    made = regenerate(config)
    desc = "Write" if config["show_progress"] else None
    folder = write_benchmark(splits, made.data, output, name or f"{config['dataset']}-regenerated", desc)
    whole = training_sequences(splits.train._dataset)
    found = report.describe(whole, made.data, len(vocabulary["items"]), vocabulary["items"])
    write_report(folder, {**made.report, **found})
    return folder


def _check_alone(config: Any) -> None:
    """What stage i alone refuses before it reads any data."""
    problems = []
    if config["regeneration"] == "personalised":
        problems.append("regeneration: personalised weighs rows for one model, and files hold no weights; write true.")
    if config["benchmark_filename"]:
        problems.append("benchmark_filename: benchmark files have no histories to regenerate; leave it out.")
    processes = layout_of(config.final_config_dict).size
    if processes > 1:
        problems.append(f"nproc: {processes} processes share a training, but stage i is one's work; leave it out")
    if problems:
        raise ConfigError(problems)
