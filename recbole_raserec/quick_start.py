"""The main job: stage ii -> stage iii -> report, for RaSeRec; or any RecBole model under the same protocols."""

from __future__ import annotations

import time
from typing import Any, Optional

import torch
from recbole.utils import init_logger, init_seed

from recbole_raserec.config import Config, check_run
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.distributed import current, layout_of, silence, start
from recbole_raserec.evaluation import report_stages
from recbole_raserec.kernels import keep_freed_memory
from recbole_raserec.recommendation import train_model
from recbole_raserec.regeneration import personalise, regenerate
from recbole_raserec.retrieval import fine_tune
from recbole_raserec.training import Outcome, Trial

#: Options of a process that shows nothing.
QUIET = {"show_progress": False, "state": "ERROR", "log_wandb": False}


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
    layout = layout_of(config.final_config_dict)
    if layout.size > 1:
        given = (model, dataset, config_file_list, config_dict, config._argv)
        return start(layout, run_process, given, config["device"].type == "cuda", config["threads"]) or {}
    init_logger(config)
    return run(config)


def run_process(*given: Any) -> dict[str, Any]:
    """:func:`run` in one process of a group, of which the first alone shows what happens; `given` makes the Config."""
    config = Config(*given)
    if current().first:
        init_logger(config)
        return run(config)
    silence()
    return run(config.with_options(QUIET))


def run(config: Any) -> dict[str, Any]:
    """All stages and the report of a configuration that :func:`check_run` let through; returns the record, or an empty
    one in a process of a group that is not its first."""
    started = time.perf_counter()
    stages, data = run_stages(config)
    if not current().first:
        return {}
    return dict(report_stages(config, stages, data, time.perf_counter() - started))


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
