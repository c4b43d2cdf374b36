"""The main job: stage ii -> stage iii -> report, for RaSeRec; or any RecBole model under the same protocols."""

from __future__ import annotations

import time
from logging import getLogger
from typing import Any, Optional

import torch
from recbole.utils import init_logger, init_seed

from recbole_raserec.allocator import keep_freed_memory
from recbole_raserec.config import Config
from recbole_raserec.data.source import ensure_dataset
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation.protocols import evaluation_problems
from recbole_raserec.evaluation.report import (
    comparison_table,
    protocol_description,
    result_record,
    results_table,
    write_result,
)
from recbole_raserec.recommendation.backbone import REFUSED, SUPPORTED
from recbole_raserec.stages import Outcome, fine_tune, train_model


def run_recbole_raserec(
    model: Optional[str] = None,
    dataset: Optional[str] = None,
    config_file_list: Optional[list[str]] = None,
    config_dict: Optional[dict[str, Any]] = None,
    argv: Optional[list[str]] = None,
) -> dict[str, Any]:
    """Train and evaluate a model; for RaSeRec its backbone first.

    Whatever a former run with the same options, data and seed finished is reused, whatever it left unfinished is
    continued (`resume`).

    Args:
        model: model name, of this package or of RecBole.
        dataset: data set name.
        config_file_list: YAML files of options.
        config_dict: options; they win over the files.
        argv: command line options ``--key=value``; they win over both. None reads ``sys.argv``.

    Returns:
        the record that `result_file` receives, see :func:`recbole_raserec.evaluation.report.result_record`.

    Raises:
        ConfigError: options are wrong; all problems at once, before any data is read.
        DatasetError: the data set is missing or unfit.
        CheckpointError: a checkpoint to reuse is damaged or foreign.
    """
    started = time.perf_counter()
    keep_freed_memory()
    config = Config(model, dataset, config_file_list, config_dict, argv)
    _check(config)
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    ensure_dataset(config)

    if config["model"] == "RaSeRec":
        base = train_model(config.for_backbone(), checkpoint=config["backbone_checkpoint"])  # stage ii
        ours: Optional[Outcome] = fine_tune(config, base)  # stage iii
    else:
        base, ours = train_model(config), None

    return _report(config, base, ours, time.perf_counter() - started)


def _check(config: Any) -> None:
    """What only the runner can refuse, still before any data is read."""
    problems = evaluation_problems(config)
    for name in ("nproc", "world_size"):
        if (config[name] or 0) > 1:
            problems.append(
                f"{name}: {config[name]} processes are not supported by this runner; leave it out (threads: N)."
            )
    if config["model"] == "RaSeRec" and config["backbone"] in REFUSED:
        problems.append(
            f"backbone: {config['backbone']} {REFUSED[config['backbone']]}; choose one of {', '.join(SUPPORTED)}."
        )
    if problems:
        raise ConfigError(problems)


def _report(config: Any, base: Outcome, ours: Optional[Outcome], seconds: float) -> dict[str, Any]:
    stages = {"recommendation": base.seconds}
    metrics = {"base": base.metrics}
    if ours is not None:
        stages["retrieval"] = ours.seconds
        metrics["ours"] = ours.metrics
    stages["this_run"] = seconds
    record = result_record(
        model=config["model"],
        backbone=base.name if ours else None,
        dataset=config["dataset"],
        seed=config["seed"],
        metrics=metrics,
        protocol=protocol_description(config, validation_in_memory=ours is not None),
        seconds=stages,
        options=config.explain(),
    )
    if config["result_file"]:
        write_result(config["result_file"], record)
    if ours is None:
        print("\n" + results_table({base.name: base.metrics["test"]}))
    else:
        print("\n" + comparison_table(base.metrics["test"], ours.metrics["test"], (base.name, config["model"])))
    logger = getLogger()
    if config["result_file"]:
        logger.info(f"Figures written to {config['result_file']}")
    logger.info(f"Checkpoint: {(ours or base).directory}")
    return record
