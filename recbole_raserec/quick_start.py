"""The main job: regenerate -> recommend -> retrieve -> report; or any RecBole model under the same protocols."""

from __future__ import annotations

import time
from typing import Any, Optional

import torch
from recbole.utils import init_seed
from recbole.utils.logger import init_logger

from recbole_raserec.config import RETRIEVAL_MODEL, Config, check_run, with_names
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.distributed import current, layout_of, silence, start
from recbole_raserec.evaluation import report_stages
from recbole_raserec.kernels import keep_freed_memory
from recbole_raserec.recommendation import train_model
from recbole_raserec.regeneration import personalise, regenerate
from recbole_raserec.retrieval import fine_tune
from recbole_raserec.training import Outcome, Trial, tracked


def run_recbole_raserec(
    model: Any = None, dataset: Optional[str] = None, config_file_list: Optional[list[str]] = None,
    config_dict: Optional[dict[str, Any]] = None, argv: Optional[list[str]] = None,
) -> dict[str, Any]:  # fmt: skip
    """Train and evaluate a model, for RaSeRec its backbone first, and return the record that `result_file` receives.

    What an earlier run with the same options, data and seed finished is reused, what it left unfinished is continued.

    Args:
        model: name, of this package or of RecBole, or `package.module:Class` of your own; or a class.
        dataset: its name.
        config_file_list: YAML files of options.
        config_dict: options; they win over the files.
        argv: command line options `--key=value`; they win over both. None reads `sys.argv`.

    Raises:
        ConfigError: options are wrong; all problems at once, before any data is read.
        DatasetError: the data set is missing or unfit.
        CheckpointError: a checkpoint to reuse is damaged, or of something else.
        MissingExtraError: the model needs an extra of this package.
        ProcessError: with `nproc`, one of the processes died or failed.
    """
    config = Config(model, dataset, config_file_list, config_dict, argv)
    check_run(config)
    layout = layout_of(config.final_config_dict)
    if layout.size > 1:
        given = (config.model, dataset, config_file_list, with_names(config_dict or {}), config._argv)
        return start(layout, run_process, given, config["device"].type == "cuda", config["threads"]) or {}
    init_logger(config)
    return run(config)


def run_process(*given: Any) -> dict[str, Any]:
    """`run` in one process of a group, of which only the first shows what happens; `given` makes the Config."""
    config = Config(*given)
    if current().first:
        init_logger(config)
    else:
        silence()
        config = config.with_options({"show_progress": False, "state": "ERROR", "log_wandb": False})
    return run(config)


def run(config: Config) -> dict[str, Any]:
    """All stages and the report of a checked configuration; the record is empty in any process but the first."""
    started = time.perf_counter()
    stages, data = run_stages(config)
    return dict(report_stages(config, stages, data, time.perf_counter() - started)) if current().first else {}


def run_stages(config: Config, trial: Optional[Trial] = None) -> tuple[dict[str, Outcome], Any]:
    """The stages of a checked configuration, by name, and the data of stage i or None; of a `trial` the last counts."""
    with tracked(config):
        return _stages(config, trial)


def _stages(config: Config, trial: Optional[Trial]) -> tuple[dict[str, Outcome], Any]:
    keep_freed_memory()
    if config["threads"]:
        torch.set_num_threads(int(config["threads"]))
    init_seed(config["seed"], config["reproducibility"])
    current().first_here(lambda: ensure_dataset(config))

    regeneration, retrieval = config["regeneration"], config["model"] == RETRIEVAL_MODEL
    plain = config.without_regeneration() if regeneration else config
    before, stages = trial and trial.unwatched(), {}  # of a search: for a stage that is not the last

    data: Any = regenerate(config, before) if regeneration else None  # stage i
    first, second = (plain.for_backbone(), config.for_backbone()) if retrieval else (plain, config)
    last = before if retrieval else trial
    stages["base"] = base = train_model(  # stage ii: the backbone, or a model that stands alone
        first, config["backbone_checkpoint"], trial=before if regeneration else last, backbone=retrieval
    )
    if regeneration == "personalised":
        data = current().from_first(lambda: personalise(second, data, base))
    if regeneration:
        stages["base + (i)"] = train_model(second, regenerated=data, trial=last, stage="recommendation_regenerated")

    if retrieval and not (regeneration and trial):  # stage iii
        stages["base + (iii)"] = fine_tune(plain, base, trial)
    if retrieval and regeneration:
        stages["base + (i) + (iii)"] = fine_tune(config, stages["base + (i)"], trial)
    return stages, data
