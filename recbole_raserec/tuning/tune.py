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
import csv
import dataclasses
import gc
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from recbole.utils.logger import init_logger

from recbole_raserec.config import REGENERATION, RETRIEVAL_MODEL, Config, check_run, selection_protocol
from recbole_raserec.data.preparation import ensure_dataset
from recbole_raserec.distributed import layout_of
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError, RaSeRecError, nearest, shown
from recbole_raserec.evaluation import PROTOCOL_TITLES, plot_points, record_table, text_block, versions
from recbole_raserec.quick_start import run, run_stages
from recbole_raserec.storage import plain, read_json, replacing, try_lock, unwritable, write_json
from recbole_raserec.training import Trial
from recbole_raserec.tuning import space as spaces
from recbole_raserec.tuning import study as studies
from recbole_raserec.tuning.space import option_of, options_of, optuna

#: Trials of a search whose number is not given.
_MANY = 30
#: Files of a search: the best trial as a configuration; its number and the record of its run; all trials; the study.
BEST, RECORD, TRIALS, STUDY, PLOTS = "best.yaml", "best.json", "trials.csv", "study.json", "plots"
#: Trials in the table, and its width in characters.
_SHOWN, _WIDTH = 10, 100
#: Optuna's names of how a trial ended -> ours.
_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
#: What a trial is run with unless the options say otherwise: thirty trainings need no progress bar each.
_QUIET = {"show_progress": False, "state": "WARNING"}
#: How a trial may end without an end of the search: its options do not go together, or its memory does not suffice.
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
        model: as of `run_recbole_raserec`; so are the arguments that are not named here.
        output: directory of the search; the study lives in it.
        trials: in all, those of an interrupted search included; default: 30, with the sampler "grid" all combinations.
        space: YAML file, or name of a shipped one; default: the shipped one of the model.
        sampler: "tpe", "random", "grid" or "gp".
        pruner: "median", "halving" or "none".
        config_dict: the option `seed` is that of the sampler too.

    Returns:
        what `study.json` holds.

    Raises:
        ConfigError: options or space are wrong, all problems at once, before anything runs; or `output` holds another
            search, or is in use.
        RaSeRecError: no trial came to its end.
        DatasetError, CheckpointError: as of `run_recbole_raserec`.
    """
    given = (model, dataset, config_file_list, config_dict, argv)
    search = _plan(output, trials, space, sampler, pruner, given)
    search.directory.mkdir(parents=True, exist_ok=True)
    lock = try_lock(search.directory / ".lock")
    if lock is None:
        problem = f"output: another process is searching in {search.directory}; wait for it, or end it"
        raise ConfigError([problem])
    try:
        return _search(search)
    finally:
        lock.release()


@dataclasses.dataclass(frozen=True)
class Search:
    """A search whose options are checked."""

    config: Config  # the options that every trial shares
    given: dict[str, Any]  # those of them that were given
    directory: Path
    space: spaces.Space  # the parameters that are searched
    fixed: list[str]  # options of the space's file that were given, and therefore are not
    sampler: str
    pruner: str
    trials: int  # in all
    combinations: list[dict[str, Any]]  # of the sampler "grid"

    @property
    def name(self) -> str:
        """Of the study."""
        return f"{self.config['model']}-{self.config['dataset']}"

    @property
    def metric(self) -> str:
        """The metric that stops the last stage's training early."""
        return self.config["ram_valid_metric" if self.config["model"] == RETRIEVAL_MODEL else "valid_metric"]

    @property
    def deepest(self) -> int:
        """The most neighbours that any trial asks for."""
        if self.config["model"] != RETRIEVAL_MODEL:
            return 0
        return max(spaces.edges(self.space["top_k"])) if "top_k" in self.space else self.config["top_k"]

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
    problems += unwritable("output", output, folder=True) if output else []
    if trials is not None and (type(trials) is not int or trials < 1):
        problems.append(f"trials: {shown(trials)} is not an integer >= 1; write for example trials: {_MANY}")
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
    options, combinations = config.external_config_dict, list[dict[str, Any]]()
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
    number = min(trials or len(combinations), len(combinations)) if sampler == "grid" else trials or _MANY
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
        done = f", {over} of them are over" if over else ""
        fixed = f"; given and therefore not searched: {', '.join(search.fixed)}" if search.fixed else ""
        where = f"{', '.join(search.options)} in {search.directory / studies.STORAGE}"
        print(f"Searching {where}: {search.trials} trials{done}{fixed}", flush=True)
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
        stages, _ = run_stages(config, Trial(after_epoch, search.deepest))
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


def _print_trial(search: Search, study: Any) -> None:
    last = _trial_record(studies.finished(study)[-1], search.space)
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
    trials = [_trial_record(trial, search.space) for trial in studies.finished(study)]
    ranked = studies.best_first(study)
    if not ranked:
        reasons = list(dict.fromkeys(trial["reason"] for trial in trials if "reason" in trial))[:3]
        why = f": {'; '.join(reasons)}" if reasons else "; all were pruned"
        raise RaSeRecError(f"none of the {len(trials)} trials in {directory} came to its end{why}")
    best = ranked[0]
    chosen = options_of(trials[best.number]["options"])
    how = f"sampler {search.sampler}, pruner {search.pruner}, seed {config['seed']}"
    by = PROTOCOL_TITLES[selection_protocol(config)]
    header = [
        f"The best of {len(trials)} trials of the study {search.name} ({how}):",
        f"trial {best.number}, validation {search.metric} {best.value:.6f}, {by}.",
        f"Searched: {', '.join(search.options)}.",
    ]
    shared = {"model": config["model"], "dataset": config["dataset"], **search.given}
    _write_best(directory / BEST, header, {**shared, **chosen})
    identity = search.identity()
    record: dict[str, Any] = {
        "study": search.name,
        **{name: config[name] for name in ("model", "dataset", "seed")},
        "metric": search.metric,
        "direction": study.direction.name.lower(),
        "protocol": selection_protocol(config),
        **{name: identity[name] for name in ("sampler", "pruner", "space")},
        "given": plain(search.given),
        "best": best.number,
        "importances": studies.importances(study),
        "versions": {**versions(), "optuna": optuna.__version__},
        "trials": trials,
    }
    _write_trials(directory / TRIALS, trials, list(search.space))
    write_json(directory / STUDY, plain(record))
    _draw(directory / PLOTS, record)
    print("\n" + _trials_table(record))
    print(f"\nTest figures of trial {best.number}:")
    _test(search, best.number, chosen)
    print(f"\nTo run it: python run_recbole_raserec.py --config_files={directory / BEST}", flush=True)
    return record


def _test(search: Search, number: int, options: dict[str, Any]) -> None:
    """Print the test figures of the best trial: as they are stored, otherwise its run goes on to its test."""
    path = search.directory / RECORD
    stored: Any = read_json(path) if path.is_file() else {"trial": None}
    if stored["trial"] == number:
        print("\n" + record_table(stored["record"]))
    else:
        write_json(path, {"trial": number, "record": run(search.config.with_options(options))})


def _trial_record(trial: Any, space: spaces.Space) -> dict[str, Any]:
    """A trial that is over, ready for JSON; `value` is that of its best weights, `seconds` are of its last process."""
    state = _STATES[trial.state.name]
    found = {
        "number": trial.number,
        "state": state,
        "value": trial.value if state == "complete" else None,
        "options": studies.values_of(trial.params, space),
        "epochs": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
        "seconds": trial.user_attrs.get("seconds"),
    }
    reason = trial.user_attrs.get("reason")
    return found if reason is None else {**found, "reason": reason}


def _write_best(path: Path, header: Sequence[str], options: Mapping[str, Any]) -> None:
    """A configuration file; `header` becomes comments, a line each."""
    body = yaml.safe_dump(plain(options), sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as part:
        part.write_text("".join(f"# {line}\n" for line in header) + body, encoding="utf-8")


def _write_trials(path: Path, trials: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """One trial a line; what a trial does not have is empty, and what is not a text or number is JSON."""
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "value", "epochs", "seconds", *names, "reason"])
        for trial in trials:
            options = [_cell(trial["options"][name]) if name in trial["options"] else "" for name in names]
            last = max(map(int, trial["epochs"]), default=0)
            cells = [trial["number"], trial["state"], trial["value"], last, trial["seconds"]]
            writer.writerow([*cells, *options, trial.get("reason", "")])


def _trials_table(record: Mapping[str, Any]) -> str:
    """The best trials of a study's record, and what became of the others."""
    names, sign = list(dict.fromkeys(map(option_of, record["space"]))), -1 if record["direction"] == "maximize" else 1
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    complete.sort(key=lambda trial: (sign * trial["value"], trial["number"]))
    rows = [["trial", record["metric"], "epochs", "seconds", *names]]
    for trial in complete[:_SHOWN]:
        seconds = "-" if trial["seconds"] is None else f"{trial['seconds']:.0f}"
        last = max(map(int, trial["epochs"]), default=0)
        rows.append([str(trial["number"]), f"{trial['value']:.4f}", str(last), seconds])
        options = options_of(trial["options"])
        rows[-1] += [str(_cell(options.get(name))) for name in names]
    counts = {state: sum(trial["state"] == state for trial in record["trials"]) for state in _STATES.values()}
    ended = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    title = f"{record['study']}: {ended}; validation {record['metric']},\n{PROTOCOL_TITLES[record['protocol']]}"
    shares = ", ".join(f"{name} {share:.2f}" for name, share in (record["importances"] or {}).items())
    return text_block(title, rows, _WIDTH) + (f"\nimportance: {shares}" if shares else "")


def _draw(folder: Path, record: Mapping[str, Any]) -> None:
    """Plots of the value by trial and by each option; none where there is no matplotlib."""
    maximize = record["direction"] == "maximize"
    by_trial: dict[str, list[tuple[Any, float]]] = {"complete": [], "pruned": []}
    by_option: dict[str, Any] = {name: {state: [] for state in by_trial} for name in record["space"]}
    best: list[tuple[Any, float]] = []
    for trial in record["trials"]:
        state, height = trial["state"], trial["value"]
        if state == "pruned" and trial["epochs"]:
            height = trial["epochs"][max(trial["epochs"], key=int)]
        if height is None:
            continue
        by_trial[state].append((trial["number"], height))
        for name, entry in record["space"].items():
            value = trial["options"][name]
            by_option[name][state].append((str(_cell(value)) if entry["type"] == "categorical" else value, height))
        if state == "complete":
            better = not best or (height > best[-1][1] if maximize else height < best[-1][1])
            best.append((trial["number"], height if better else best[-1][1]))
    with contextlib.suppress(ImportError):
        plot_points(folder / "history.png", by_trial, "trial", record["metric"], steps={"best so far": best})
        for name, entry in record["space"].items():
            plot_points(folder / f"{name}.png", by_option[name], name, record["metric"], log=bool(entry.get("log")))


def _cell(value: Any) -> Any:
    return json.dumps(value) if value is None or isinstance(value, (bool, list)) else value
