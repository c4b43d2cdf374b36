"""The command `tune`: options searched by their validation figures, with Optuna (extra `tune`).

Trials run in this process, one after the other, through the pipeline of `run`: a pruner has to hear of every epoch and
to end a training between two, which is a function call here; the libraries are imported once; and what a separate
process would protect, the study and each stage's state, is on disk after every epoch anyway. Stages whose options a
trial shares with an earlier one are found by their fingerprints, so a search of the retrieval options trains the
backbone once and searches the neighbours of a split once.

No trial reads a test pair. The best one is run to its end when all are over, and its test figures alone are reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from pathlib import Path
from typing import Any, Optional

import torch
from recbole.utils import init_logger

from recbole_raserec.config import REGENERATION, RETRIEVAL_MODEL, Config, check_run, selection_protocol
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.distributed import layout_of
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError, RaSeRecError, nearest, shown
from recbole_raserec.evaluation import SEEN_KEPT, record_table, versions
from recbole_raserec.quick_start import run, run_stages
from recbole_raserec.storage import plain, read_json, try_lock, write_json
from recbole_raserec.training import Trial
from recbole_raserec.tuning import results
from recbole_raserec.tuning import space as spaces
from recbole_raserec.tuning import study as studies
from recbole_raserec.tuning.space import option_of, options_of, optuna

#: Trials of a search whose number is not given.
TRIALS = 30

#: The best trial's number, and the record of its run as `result_file` receives it.
RECORD = "best.json"

#: What a trial is run with unless the options say otherwise: thirty trainings need no progress bar each.
_QUIET = {"show_progress": False, "state": "WARNING"}

#: How a trial may end without an end of the search: its options do not go together, its training diverges, or its
#: memory does not suffice.
_FAILURES = (ConfigError, DatasetError, MemoryError, torch.cuda.OutOfMemoryError)


def tune_hyper_parameters(
    model: Optional[str] = None, dataset: Optional[str] = None, output: Optional[str] = None,
    trials: Optional[int] = None, space: Optional[str] = None, sampler: str = "tpe", pruner: str = "median",
    config_file_list: Optional[list[str]] = None, config_dict: Optional[dict[str, Any]] = None,
    argv: Optional[list[str]] = None,
) -> dict[str, Any]:  # fmt: skip
    """Search options by the validation metric, or continue the search that `output` holds.

    An option that is given is not searched, whatever the space says of it.

    Args:
        model: as of `run_recbole_raserec`.
        dataset: as of `run_recbole_raserec`.
        output: directory of the search; the study lives in it.
        trials: in all, those of an interrupted search included; default: 30, with the sampler "grid" all combinations.
        space: YAML file, or name of a shipped one; default: the shipped one of the model.
        sampler: "tpe", "random", "grid" or "gp".
        pruner: "median", "halving" or "none".
        config_file_list: as of `run_recbole_raserec`.
        config_dict: as of `run_recbole_raserec`; the option `seed` is that of the sampler too.
        argv: as of `run_recbole_raserec`.

    Returns:
        what `study.json` holds.

    Raises:
        ConfigError: options or space are wrong, all problems at once, before anything runs; or `output` holds another
            search, or is in use.
        RaSeRecError: no trial came to its end.
        DatasetError: as of `run_recbole_raserec`.
        CheckpointError: as of `run_recbole_raserec`.
    """
    given = (model, dataset, config_file_list, config_dict, argv)
    search = _plan(output, trials, space, sampler, pruner, given)
    search.directory.mkdir(parents=True, exist_ok=True)
    lock = try_lock(search.directory / ".lock")
    if lock is None:
        problem = f"output: another process is searching in {search.directory}; wait for it, or end it"
        raise ConfigError([problem])
    with contextlib.ExitStack() as held:
        held.callback(lock.release)
        return _search(search)


@dataclasses.dataclass(frozen=True)
class Search:
    """A search whose options are checked.

    Attributes:
        config: the options that every trial shares.
        given: those of them that were given.
        directory: of the study.
        space: the parameters that are searched.
        fixed: options of the space's file that were given, and therefore are not.
        sampler: of `SAMPLERS`.
        pruner: of `PRUNERS`.
        trials: in all.
        combinations: of the sampler "grid".
    """

    config: Config
    given: dict[str, Any]
    directory: Path
    space: spaces.Space
    fixed: list[str]
    sampler: str
    pruner: str
    trials: int
    combinations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of the study."""
        return f"{self.config['model']}-{self.config['dataset']}"

    @property
    def metric(self) -> str:
        """The metric that stops the last stage's training early."""
        return self.config["ram_valid_metric" if self.config["model"] == RETRIEVAL_MODEL else "valid_metric"]

    @property
    def options(self) -> list[str]:
        """The options that are searched."""
        return list(dict.fromkeys(map(option_of, self.space)))

    def identity(self) -> dict[str, Any]:
        """What has to stay the same for the trials to be comparable and the next ones to be drawn alike."""
        shared = {k: v for k, v in self.config.training_options().items() if k not in self.options}
        if self.config["regeneration"] or "regeneration" in self.space:  # a run keeps these in the data's fingerprint
            shared.update({name: self.config[name] for name in REGENERATION if name not in self.space})
        return {
            "sampler": self.sampler,
            "pruner": self.pruner,
            "space": {name: spaces.described(distribution) for name, distribution in self.space.items()},
            "options": plain(shared),
        }

    def uniform(self) -> dict[str, Any]:
        """Of an option whose entries are searched one by one: its present value, where that is one for all entries."""
        if self.sampler == "grid":
            return {}
        parts = {name: self.config[option_of(name)] for name in self.space if "[" in name}
        return {name: value for name, value in parts.items() if value in (spaces.values(self.space[name]) or ())}


def _plan(output: Any, trials: Any, space: Any, sampler: Any, pruner: Any, given: tuple) -> Search:
    """A search of what `tune_hyper_parameters` was given, or a ConfigError with all that is wrong."""
    problems = [] if output else ["output: is not given; name the directory of the search: --output=DIR"]
    if trials is not None and (type(trials) is not int or trials < 1):
        problems.append(f"trials: {shown(trials)} is not an integer >= 1; write for example trials: {TRIALS}")
    for name, value, known in (("sampler", sampler, studies.SAMPLERS), ("pruner", pruner, studies.PRUNERS)):
        if value not in known:
            guess = nearest(value, known)
            remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(known)}"
            problems.append(f"{name}: {shown(value)} is unknown; {remedy}")
    try:
        config = Config(*given)
        check_run(config)
        layout = layout_of(config.final_config_dict)
        if layout.size > 1:
            problems.append(f"nproc: {layout.size} processes share a run, but trials run in one; leave it out")
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    options = config.external_config_dict
    searched: spaces.Space = {}
    fixed: list[str] = []
    combinations: list[dict[str, Any]] = []
    try:
        path = spaces.find_space(None if space is None else str(space), config["model"])
    except ConfigError as error:
        problems += error.problems
    else:
        read, wrong = spaces.read_space(path)
        fixed = [option for option in dict.fromkeys(map(option_of, read)) if option in options]
        searched = {name: distribution for name, distribution in read.items() if option_of(name) not in fixed}
        if not searched and not wrong:
            problems.append(f"space: every option of {path} is given, none is left to search; leave some out")
        problems += [f"space: {problem}" for problem in wrong] + spaces.check_space(config, searched, path)
        if sampler == "grid":
            combinations, uncountable = spaces.grid(searched)
            problems += uncountable
    if problems:
        raise ConfigError(problems)
    number = trials or (len(combinations) if sampler == "grid" else TRIALS)
    number = min(number, len(combinations)) if sampler == "grid" else number
    own = ("model", "dataset", "config_files", "result_file")
    kept = {name: value for name, value in options.items() if name not in own}
    config = config.with_options({name: value for name, value in _QUIET.items() if name not in kept})
    return Search(config, kept, Path(output), searched, fixed, sampler, pruner, number, combinations)


def _search(search: Search) -> dict[str, Any]:
    config = search.config
    study = studies.open_study(
        search.directory, search.name, bool(config["valid_metric_bigger"]), search.identity(), search.uniform()
    )
    study.pruner = studies.pruner(search.pruner)
    init_logger(config)
    over = len(studies.finished(study))
    if over < search.trials:
        ensure_dataset(config)
        print(
            f"Searching {', '.join(search.options)} in {search.directory / studies.STORAGE}: {search.trials} trials"
            + (f", {over} of them are over" if over else "")
            + (f"; given and therefore not searched: {', '.join(search.fixed)}" if search.fixed else ""),
            flush=True,
        )
    for _ in range(over, search.trials):
        trial, drawn = studies.next_trial(study, search.space, search.sampler, config["seed"], search.combinations)
        _run_trial(search, study, trial, drawn)
        gc.collect()
    return _report(search, study)


def _run_trial(search: Search, study: Any, trial: Any, drawn: dict[str, Any]) -> None:
    """Run one trial and tell the study how it ended; an error that is no trial's own leaves it to be continued."""
    started = time.perf_counter()
    known = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    told: dict[str, Any] = {}

    def after_epoch(epoch: int, value: float) -> None:
        if epoch + 1 not in known:  # of an interrupted trial the last epoch is repeated
            trial.report(value, epoch + 1)
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        config = search.config.with_options(options_of(drawn))
        check_run(config)
        stages, _ = run_stages(config, Trial(after_epoch, _deepest(search)))
        last = list(stages.values())[-1]
        if study.user_attrs.get("data", last.splits.fingerprint) != last.splits.fingerprint:
            data = f"other data under the name {config['dataset']}"
            raise CheckpointError(f"{search.directory} holds trials on {data}; name another directory.")
        study.set_user_attr("data", last.splits.fingerprint)
        told["values"] = last.metrics["valid"][selection_protocol(config)][search.metric.lower()]
    except optuna.TrialPruned:
        told["state"] = optuna.trial.TrialState.PRUNED
    except (*_FAILURES, ValueError) as error:
        if type(error) is ValueError and str(error) != "Training loss is nan":  # RecBole's words for a divergence
            raise
        reason = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error) or type(error).__name__
        trial.set_user_attr("reason", reason)
        told["state"] = optuna.trial.TrialState.FAIL
    trial.set_user_attr("seconds", round(time.perf_counter() - started, 3))
    study.tell(trial, **told)
    _print_trial(search, study)


def _deepest(search: Search) -> int:
    """The most neighbours that any trial asks for."""
    if search.config["model"] != RETRIEVAL_MODEL:
        return 0
    return max(spaces.edges(search.space["top_k"])) if "top_k" in search.space else search.config["top_k"]


def _print_trial(search: Search, study: Any) -> None:
    last = results.trial_record(studies.finished(study)[-1], search.space)
    options = ", ".join(f"{name} {value}" for name, value in options_of(last["options"]).items())
    figure = f"{search.metric} {last['value']:.4f}" if last["value"] is not None else last["state"]
    if last["state"] == "pruned":
        figure += f" after epoch {max(last['epochs'], key=int)}"
    if "reason" in last:
        figure += f" ({last['reason']})"
    best = studies.best_first(study)
    so_far = f"; best {best[0].value:.4f} (trial {best[0].number})" if best else ""
    print(f"trial {last['number']}: {figure}, {last['seconds']:.0f} s: {options}{so_far}", flush=True)


def _report(search: Search, study: Any) -> dict[str, Any]:
    config, directory = search.config, search.directory
    trials = [results.trial_record(trial, search.space) for trial in studies.finished(study)]
    ranked = studies.best_first(study)
    if not ranked:
        reasons = list(dict.fromkeys(trial["reason"] for trial in trials if "reason" in trial))[:3]
        raise RaSeRecError(
            f"none of the {len(trials)} trials in {directory} came to its end"
            + (f": {'; '.join(reasons)}" if reasons else "; all were pruned")
        )
    best = ranked[0]
    chosen = options_of(trials[best.number]["options"])
    header = [
        f"The best of {len(trials)} trials of the study {search.name} (sampler {search.sampler}, pruner "
        f"{search.pruner}, seed {config['seed']}):",
        f"trial {best.number}, validation {search.metric} {best.value:.6f}, seen items "
        + ("kept in the ranking." if selection_protocol(config) == SEEN_KEPT else "removed from the ranking."),
        f"Searched: {', '.join(search.options)}.",
    ]
    shared = {"model": config["model"], "dataset": config["dataset"], **search.given}
    results.write_best(directory / results.BEST, header, {**shared, **chosen})
    record: dict[str, Any] = {
        "study": search.name,
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "metric": search.metric,
        "direction": study.direction.name.lower(),
        "protocol": selection_protocol(config),
        "sampler": search.sampler,
        "pruner": search.pruner,
        "space": search.identity()["space"],
        "given": plain(search.given),
        "best": best.number,
        "importances": studies.importances(study),
        "versions": {**versions(), "optuna": optuna.__version__},
        "trials": trials,
    }
    results.write_trials(directory / results.TRIALS, trials, list(search.space))
    write_json(directory / results.STUDY, plain(record))
    results.draw(directory / results.PLOTS, record)
    print("\n" + results.trials_table(record))
    print(f"\nTest figures of trial {best.number}:")
    _test(search, best.number, chosen)
    print(f"\nTo run it: python run_recbole_raserec.py --config_files={directory / results.BEST}", flush=True)
    return record


def _test(search: Search, number: int, options: dict[str, Any]) -> None:
    """Print the test figures of the best trial: as they are stored, otherwise its run goes on to its test."""
    path = search.directory / RECORD
    if path.is_file():
        stored = read_json(path)
        if stored["trial"] == number:
            print("\n" + record_table(stored["record"]))
            return
    record = run(search.config.with_options(options))
    write_json(path, {"trial": number, "record": record})
