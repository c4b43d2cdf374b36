"""Stage i as a resumable step: patterns, pairs, regenerator, generated patterns, and the set of what joins the data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from recbole.utils import init_seed
from recbole.utils.logger import init_logger

from recbole_raserec.config import ENCODERS, MINING, REGENERATION, Config, trains_regenerator
from recbole_raserec.data import Regenerated, SequenceDataset, Splits, prepare_data, training_hash
from recbole_raserec.data.preparation import ensure_dataset, name_problems
from recbole_raserec.distributed import current, layout_of
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.kernels import keep_freed_memory
from recbole_raserec.recommendation import train_model
from recbole_raserec.regeneration import report
from recbole_raserec.regeneration.inference import combine, generate
from recbole_raserec.regeneration.pairs import Sequences, make_pairs, mine, pieces, training_sequences
from recbole_raserec.regeneration.regenerator import STATE, build, check_heads, fit, schedule_of
from recbole_raserec.regeneration.report import REPORT, RegeneratedData, stored_or_made
from recbole_raserec.storage import fingerprint, read_json, sha256, unwritable
from recbole_raserec.training import Trial, tracker_of

#: Raised when the same options and data would give another regenerated set than before.
REGENERATION_VERSION = 1

#: Options that the training of the regenerator does not depend on: sets that differ in them share one.
_INFERENCE = ("regen_gamma", "regen_temperature")


def regenerate(config: Config, trial: Optional[Trial] = None) -> RegeneratedData:
    """Stage i: regenerate the training set, continue an interrupted run, or reuse what one with the same options, data
    and seed left; of several one works at a time. With `regen_rows: patterns` patterns are mined, nothing is trained.

    Args:
        config: of a sequential model, with `regeneration` on.
        trial: given where the run is one of a search.

    Returns:
        the set; its rows are of the origin that `regen_rows` asks for.

    Raises:
        ConfigError: `regen_heads` does not divide the vectors.
        DatasetError: no pattern is frequent, or there are no rows of the wanted origin.
        CheckpointError: a stored part is damaged, or of another run.
    """
    given = config["regenerated_data"]
    origin = {"patterns": "pattern", "generated": "generated"}.get(config["regen_rows"])
    if origin == "pattern" and not given:
        return _mined(config)
    made = current().from_first(lambda: _given(config, Path(given))) if given else _generated(config, trial)
    if origin is None:
        return made
    data = made.data.only(origin)
    if not len(data):
        wanted = f"regen_rows: {config['regen_rows']} are wanted"
        raise DatasetError(f"{wanted}, but {made.directory} holds none; write both.")
    return dataclasses.replace(made, data=data, fingerprint=fingerprint({"only": origin}, made.fingerprint))


def mined_splits(config: Config, plain: Splits, pretrained: bool) -> Splits:
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
        raise ConfigError([
            f"regen_pretrained: true: {model['model']} leaves {left_out} of the training targets out (they have no "
            "features, no entity), so that its split is another than that of the SASRec whose item vectors the "
            "regenerator would start from; they may have seen what this model holds out. Set regen_pretrained: "
            "false, or complete the files."
        ])  # fmt: skip
    return own


def _given(config: Config, directory: Path) -> RegeneratedData:
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


def _mined(config: Config) -> RegeneratedData:
    """Mined patterns alone: neither a regenerator nor the SASRec it starts from is needed, and no seed matters."""
    splits = mined_splits(config, prepare_data(config.for_embeddings()), pretrained=False)
    base = {name: config[name] for name in MINING}
    base.update(version=REGENERATION_VERSION, eval_args=config.training_options()["eval_args"], rows="patterns")
    mark = fingerprint(base, splits.fingerprint)
    directory = _folder(config, "regeneration", mark)

    def make() -> RegeneratedData:
        started, whole = time.perf_counter(), training_sequences(_histories(splits))
        patterns = mine(whole, *_mining(config), "" if config["show_progress"] else None)
        nothing = np.zeros((len(whole), 0, 1), dtype=np.int64)  # K = 0 conditions
        data = combine(whole, whole, patterns, nothing)
        if not len(data):
            raise _no_pattern(config, whole, len(patterns))
        return _keep(config, splits, whole, data, directory, mark, started, {"patterns_mined": len(patterns)}, MINING)

    return current().from_first(lambda: stored_or_made(make, "Regeneration", config, splits, mark, directory))


def _generated(config: Config, trial: Optional[Trial]) -> RegeneratedData:
    """Mined patterns, and those that a trained regenerator writes."""
    check_heads(config)
    source = (
        train_model(config.for_embeddings(), trial=trial, stage="embeddings") if config["regen_pretrained"] else None
    )
    plain = source.splits if source is not None else prepare_data(config.for_embeddings())
    splits = mined_splits(config, plain, config["regen_pretrained"])
    parts = [splits.fingerprint, source.fingerprint if source is not None else ""]
    # whether rows are weighed, and which are taken, comes later
    base = {name: config[name] for name in REGENERATION if not name.startswith("regen_personal")}
    for name in ("regeneration", "regen_rows"):
        del base[name]
    base.update(seed=config["seed"], longest=config["MAX_ITEM_LIST_LENGTH"], version=REGENERATION_VERSION)
    base["eval_args"] = config.training_options()["eval_args"]
    mark = fingerprint(base, *parts)
    learned = fingerprint({name: value for name, value in base.items() if name not in _INFERENCE}, *parts)
    directory, trained = _folder(config, "regeneration", mark), _folder(config, "regenerator", learned)

    def make() -> RegeneratedData:
        started, progress, train = time.perf_counter(), bool(config["show_progress"]), _histories(splits)
        whole = training_sequences(train)
        read = pieces(whole, config["MAX_ITEM_LIST_LENGTH"])
        desc = "" if progress else None
        pairs = make_pairs(read, whole, *_mining(config), config["regen_pairs"], config["seed"], desc)
        if not len(pairs):
            raise _no_pattern(config, whole, len(pairs.patterns))
        getLogger().info(f"regeneration: {len(pairs.patterns)} patterns, {len(pairs)} pairs of {len(read)} sequences")
        init_seed(config["seed"], config["reproducibility"])
        vectors = None if source is None else source.model.item_embedding.weight.detach()[: train.item_num]
        model = build(config, train.item_num, vectors).to(config["device"])
        prepared = time.perf_counter() - started
        if config["resume"] is False:
            (trained / STATE).unlink(missing_ok=True)
        tracker = tracker_of(config)
        history = fit(model, pairs, schedule_of(config), trained, progress, tracker.log)
        started = time.perf_counter()
        generated = generate(
            model, read, config["regen_gamma"], config["regen_temperature"], config["seed"],
            desc="Generate patterns" if progress else None, native_kernels=bool(config["native_kernels"]),
        )  # fmt: skip
        started -= prepared + sum(epoch["seconds"] for epoch in history["epochs"])
        more = {"patterns_mined": len(pairs.patterns), "pairs": len(pairs), "training": history}
        more.update(regenerator=trained.name, seed=config["seed"])
        data = combine(whole, read, pairs.patterns, generated)
        return _keep(config, splits, whole, data, directory, mark, started, more, REGENERATION)

    return current().from_first(lambda: stored_or_made(make, "Regeneration", config, splits, mark, directory, trained))


def _mining(config: Config) -> tuple[int, int, int]:
    """Span, support and length of the patterns."""
    return config["regen_span"], config["regen_min_support"], config["regen_pattern_length"]


def _folder(config: Config, what: str, mark: str) -> Path:
    """Where the set or the regenerator of fingerprint `mark` lies."""
    return Path(config["checkpoint_dir"]) / f"{what}-{config['dataset']}-{mark[:12]}"


def _keep(
    config: Config, splits: Splits, whole: Sequences, data: Regenerated, directory: Path, mark: str, started: float,
    more: dict[str, Any], options: Iterable[str],
) -> RegeneratedData:  # fmt: skip
    """Write a set, `started` at a time of `perf_counter`, and its report, which also names `options` and `more`."""
    train, vocabulary = splits.train._dataset, splits.vocabulary()
    data = dataclasses.replace(data, vocabulary=vocabulary, training=training_hash(train, vocabulary))
    found = {
        **report.describe(whole, data, vocabulary["items"]), "dataset": config["dataset"],
        "options": {name: config[name] for name in sorted(options)}, **more,
    }  # fmt: skip
    found["seconds"] = seconds = time.perf_counter() - started
    data.save(directory, mark)
    report.write_report(directory, found)
    getLogger().info(f"Regenerated data: {directory}\n{report.text(found)}")
    return RegeneratedData(data, directory, mark, seconds, found)


def _histories(splits: Splits) -> Any:
    """The training split, which must have histories."""
    train = splits.train._dataset
    if isinstance(train, SequenceDataset) and not train.is_lazy:
        raise DatasetError("regeneration: benchmark files have no histories to regenerate; use an interaction log.")
    return train


def _no_pattern(config: Config, whole: Sequences, patterns: int) -> DatasetError:
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
        dataset: to regenerate.
        output: directory of data sets; the folder `name` of it is written.
        name: of the new data set; default: that of the old one and `-regenerated`.
        model: decides which options are known; if it leaves interactions out, the files hold its split.
        config_file_list: YAML files of options.
        config_dict: options; they win over the files.
        argv: command line options `--key=value`; they win over both. None reads `sys.argv`.

    Returns:
        the folder.

    Raises:
        ConfigError: options are wrong; all problems at once.
        DatasetError: the data set is missing or unfit.
        CheckpointError: a stored part is damaged, or of another run.
    """
    keep_freed_memory()
    given = {**(config_dict or {}), "regeneration": True}
    config = Config(model or "SASRec", dataset, config_file_list, given, argv)
    _check_alone(config, output, name)
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    ensure_dataset(config)
    pretrained = trains_regenerator(config) and config["regen_pretrained"]
    splits = mined_splits(config, prepare_data(config.for_embeddings()), pretrained)
    vocabulary = splits.vocabulary()
    report.check_ids(vocabulary)
    made, desc = regenerate(config), "Write" if config["show_progress"] else None
    folder = report.write_benchmark(splits, made.data, output, name or _named(config), desc)
    found = report.describe(training_sequences(splits.train._dataset), made.data, vocabulary["items"])
    report.write_report(folder, {**made.report, **found})
    return folder


def _named(config: Config) -> str:
    return f"{config['dataset']}-regenerated"


def _check_alone(config: Config, output: Path, name: Optional[str]) -> None:
    """What stage i alone refuses before it reads any data."""
    problems = [] if name is None else name_problems(name)
    folder = Path(output) / (name or _named(config))
    if not problems and folder.resolve() == Path(config["data_path"]).resolve():
        problems.append(f"--name={name}: that is the data set itself; give another name, or another --output")
    elif not problems and (there := folder / f"{folder.name}.inter").exists():
        problems.append(f"--name={name}: {there} is another data set; give another name, or another --output")
    problems += unwritable("output", folder, folder=True)
    problems += unwritable("checkpoint_dir", config["checkpoint_dir"], folder=True)
    if config["regeneration"] == "personalised":
        problems.append("regeneration: personalised weighs rows for one model, and files hold no weights; write true.")
    if config["benchmark_filename"]:
        problems.append("benchmark_filename: benchmark files have no histories to regenerate; leave it out.")
    processes = layout_of(config.final_config_dict).size
    if processes > 1:
        problems.append(f"nproc: {processes} processes share a training, but stage i is one's work; leave it out")
    if problems:
        raise ConfigError(problems)
