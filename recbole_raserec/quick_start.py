"""The main job: stage ii -> stage iii -> report, for RaSeRec; or any RecBole model under the same protocols."""

from __future__ import annotations

import time
from logging import getLogger
from pathlib import Path
from typing import Any, Optional

import torch
from recbole.utils import ModelType, init_logger, init_seed

from recbole_raserec.allocator import keep_freed_memory, peak_memory_mb
from recbole_raserec.config import Config
from recbole_raserec.configuration.options import ENCODERS
from recbole_raserec.data.source import ensure_dataset
from recbole_raserec.distributed.group import current
from recbole_raserec.distributed.launch import launch, layout_of, layout_problems
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation.protocols import evaluation_problems
from recbole_raserec.evaluation.ranks_file import write_ranks
from recbole_raserec.evaluation.report import (
    protocol_description,
    record_table,
    result_record,
    write_result,
)
from recbole_raserec.personalise import personalise
from recbole_raserec.recommendation.backbone import REFUSED, SUPPORTED
from recbole_raserec.regenerate import regenerate
from recbole_raserec.registry import get_model
from recbole_raserec.serving.checkpoint import read_manifest
from recbole_raserec.stages import Outcome, Trial, fine_tune, train_model


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
        MissingExtraError: the model needs an extra of this package.
        ProcessError: with `nproc`, one of the processes died or failed.
    """
    config = Config(model, dataset, config_file_list, config_dict, argv)
    check_run(config)
    if layout_of(config.final_config_dict).size > 1:
        return launch(config, (model, dataset, config_file_list, config_dict, config._argv))
    init_logger(config)
    return run(config)


def run(config: Any) -> dict[str, Any]:
    """All stages and the report of a configuration that :func:`check_run` let through; returns the record, or an empty
    one in a process of a group that is not its first."""
    started = time.perf_counter()
    stages, data = run_stages(config)
    if not current().first:
        return {}
    return _report(config, stages, data, time.perf_counter() - started)


def run_stages(config: Any, trial: Optional[Trial] = None) -> tuple[dict[str, Outcome], Any]:
    """The stages that the options ask for, by name and in their order, and the data of stage i or None.

    Args:
        config: checked, see :func:`check_run`.
        trial: given where the run is one of a search; the last stage is then what counts.
    """
    keep_freed_memory()
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    current().first_here(lambda: ensure_dataset(config))

    before = None if trial is None else trial.unwatched()
    stages: dict[str, Outcome] = {}
    if not config["regeneration"]:
        plain, data = config, None
    else:
        plain, data = config.without_regeneration(), regenerate(config, before)  # stage i
        personal = config["regeneration"] == "personalised"
    if config["model"] == "RaSeRec":
        base = train_model(plain.for_backbone(), config["backbone_checkpoint"], trial=before)  # stage ii
        stages["base"] = base
        if data is not None:
            data = _personal(config.for_backbone(), data, base) if personal else data
            stages["base + (i)"] = base_i = train_model(config.for_backbone(), regenerated=data, trial=before)
            if trial is None:  # nothing rests on it
                stages["base + (iii)"] = fine_tune(plain, base)
            stages["base + (i) + (iii)"] = fine_tune(config, base_i, trial)
        else:
            stages["base + (iii)"] = fine_tune(config, base, trial)  # stage iii
    else:
        base = stages["base"] = train_model(plain, trial=before if data is not None else trial)
        if data is not None:
            data = _personal(config, data, base) if personal else data
            stages["base + (i)"] = train_model(config, regenerated=data, trial=trial)
    return stages, data


def _personal(config: Any, data: Any, base: Outcome) -> Any:
    """:func:`personalise`, by the first process alone."""
    return current().from_first(lambda: personalise(config, data, base))


def check_run(config: Any) -> None:
    """What only the runner can refuse, still before any data is read.

    Raises:
        ConfigError: with all of it.
    """
    problems = evaluation_problems(config)
    if config["model"] == "RaSeRec" and config["backbone"] in REFUSED:
        problems.append(
            f"backbone: {config['backbone']} {REFUSED[config['backbone']]}; choose one of {', '.join(SUPPORTED)}."
        )
    target = config["backbone"] if config["model"] == "RaSeRec" else config["model"]
    if config["regeneration"] == "personalised" and not hasattr(get_model(target), "weighted_loss"):
        problems.append(
            f"regeneration: personalised weighs rows in the loss of {', '.join(sorted(ENCODERS))}, not in that of "
            f"{target}; write regeneration: true, or choose one of these."
        )
    elif config["regeneration"] == "personalised":
        loss = (config.for_backbone() if config["model"] == "RaSeRec" else config).final_config_dict.get("loss_type")
        if loss != "CE":
            problems.append(f"regeneration: personalised weighs rows of loss_type: CE; it is {loss}.")
    if config["regeneration"] and config["regenerated_data"] and not Path(config["regenerated_data"]).is_dir():
        problems.append(
            f"regenerated_data: {config['regenerated_data']} is no directory; name the one of a run with regeneration, "
            "regeneration-... below its checkpoint_dir."
        )
    if config["regeneration"] and config["benchmark_filename"]:
        problems.append("regeneration: benchmark files have no histories to regenerate; leave one of the two out.")
    if config["regeneration"] and config["pre_model_path"]:
        options = read_manifest(config["pre_model_path"])["options"]
        if options.get("regeneration"):
            problems.append(
                f"pre_model_path: {config['pre_model_path']} was pre-trained on regenerated data, which the base must "
                "not have seen; name the directory of the run without."
            )
    if config["regeneration"] and config["backbone_checkpoint"]:
        problems.append(
            f"backbone_checkpoint: {config['backbone_checkpoint']} was trained already, and regeneration trains anew; "
            "leave one of the two out."
        )
    if not problems and any(config[name] for name in ("nproc", "world_size", "group_offset")):
        problems = layout_problems(config, config.for_backbone() if config["model"] == "RaSeRec" else config)
    if problems:
        raise ConfigError(problems)
    installed = getattr(get_model(target), "check_installed", None)
    if installed is not None:
        installed(config)


def _report(config: Any, stages: dict[str, Outcome], data: Any, seconds: float) -> dict[str, Any]:
    """Write and print the figures; `stages` from the base to the whole pipeline, `data` of stage i or None."""
    base, *more = stages.values()
    ours = more[-1] if more else None
    times = {"recommendation": base.seconds}
    metrics: dict[str, Any] = {"base": base.metrics}
    if ours is not None:
        metrics["ours"] = ours.metrics
    if config["model"] == "RaSeRec" and ours is not None:
        times["retrieval"] = ours.seconds
    if data is not None:
        times["regeneration"] = data.seconds
        times["recommendation_regenerated"] = stages["base + (i)"].seconds
        metrics["stages"] = {name: outcome.metrics for name, outcome in stages.items()}
    times["this_run"] = seconds
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    record = result_record(
        model=config["model"],
        backbone=base.name if config["model"] == "RaSeRec" else None,
        dataset=config["dataset"],
        seed=config["seed"],
        metrics=metrics,
        protocol=protocol_description(
            config, validation_in_history=sequential, validation_in_memory=config["model"] == "RaSeRec"
        ),
        seconds=times,
        options=config.explain(),
        parameters={name: outcome.parameters for name, outcome in (("base", base), ("ours", ours)) if outcome},
        peak_memory_mb=peak_memory_mb(),
        curves={name: outcome.curve for name, outcome in (("base", base), ("ours", ours)) if outcome},
    )
    if config["ranks_file"]:
        users = base.splits.vocabulary()["users"]
        ranks = {name: outcome.ranks for name, outcome in stages.items() if outcome.ranks is not None}
        write_ranks(config["ranks_file"], ranks, users, base.splits.seen)
    if config["result_file"]:
        write_result(config["result_file"], record)
    print("\n" + record_table(record))
    logger = getLogger()
    if config["result_file"]:
        logger.info(f"Figures written to {config['result_file']}")
    logger.info(f"Checkpoint: {(ours or base).directory}")
    return record
