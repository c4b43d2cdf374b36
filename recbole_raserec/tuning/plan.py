"""What a search is to do: its options and its space, checked as a whole before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable

from recbole_raserec.configuration.options import REGENERATION, RETRIEVAL_MODEL
from recbole_raserec.configuration.text import nearest, plain, shown
from recbole_raserec.distributed.launch import layout_of
from recbole_raserec.errors import ConfigError
from recbole_raserec.quick_start import check_run
from recbole_raserec.tuning.space import Space, check_space, find_space, grid, read_space
from recbole_raserec.tuning.study import PRUNERS, SAMPLERS

#: Trials of a search whose number is not given.
TRIALS = 30

#: What a trial is run with unless the options say otherwise: thirty trainings need no progress bar each.
_QUIET = {"show_progress": False, "state": "WARNING"}


@dataclasses.dataclass(frozen=True)
class Search:
    """A search whose options are checked.

    Attributes:
        config: the options that every trial shares. given: those of them that were given.
        space: those that are searched. fixed: those of the space's file that were given, and therefore are not.
        trials: in all. combinations: of the sampler "grid".
    """

    config: Any
    given: dict[str, Any]
    directory: Path
    space: Space
    fixed: list[str]
    sampler: str
    pruner: str
    trials: int
    combinations: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.config['model']}-{self.config['dataset']}"

    @property
    def metric(self) -> str:
        """The metric that stops the last stage's training early."""
        return self.config["ram_valid_metric" if self.config["model"] == RETRIEVAL_MODEL else "valid_metric"]

    def identity(self) -> dict[str, Any]:
        """What has to stay the same for the trials to be comparable and the next ones to be drawn alike."""
        shared = {k: v for k, v in self.config.training_options().items() if k not in self.space}
        if self.config["regeneration"] or "regeneration" in self.space:  # a run keeps these in the data's fingerprint
            shared.update({name: self.config[name] for name in REGENERATION if name not in self.space})
        return {
            "sampler": self.sampler,
            "pruner": self.pruner,
            "space": {name: parameter.described() for name, parameter in self.space.items()},
            "options": plain(shared),
        }


def plan_search(output: Any, trials: Any, space: Any, sampler: Any, pruner: Any, build: Callable[[], Any]) -> Search:
    """A search of what :func:`recbole_raserec.tune.tune_hyper_parameters` was given.

    Args:
        output, trials, space, sampler, pruner: as given. build: makes the configuration that every trial shares.

    Raises:
        ConfigError: options or space are wrong, all problems at once.
    """
    problems = [] if output else ["output: is not given; name the directory of the search: --output=DIR"]
    if trials is not None and (type(trials) is not int or trials < 1):
        problems.append(f"trials: {shown(trials)} is not an integer >= 1; write for example trials: {TRIALS}")
    for name, value, known in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS)):
        if value not in known:
            guess = nearest(value, known)
            remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(known)}"
            problems.append(f"{name}: {shown(value)} is unknown; {remedy}")
    try:
        config = build()
        check_run(config)
        layout = layout_of(config.final_config_dict)
        if layout.size > 1:
            problems.append(f"nproc: {layout.size} processes share a run, but trials run in one; leave it out")
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    searched: Space = {}
    fixed: list[str] = []
    combinations: list[dict[str, Any]] = []
    try:
        path = find_space(None if space is None else str(space), config["model"])
    except ConfigError as error:
        problems += error.problems
    else:
        searched, wrong = read_space(path)
        fixed = [name for name in searched if name in config.external_config_dict]
        searched = {name: parameter for name, parameter in searched.items() if name not in fixed}
        if not searched and not wrong:
            problems.append(f"space: every option of {path} is given, none is left to search; leave some out")
        problems += [f"space: {problem}" for problem in wrong] + check_space(config, searched, path)
        if sampler == "grid":
            combinations, uncountable = grid(searched)
            problems += uncountable
    if problems:
        raise ConfigError(problems)
    number = trials or (len(combinations) if sampler == "grid" else TRIALS)
    number = min(number, len(combinations)) if sampler == "grid" else number
    own = ("model", "dataset", "config_files", "result_file")
    given = {name: value for name, value in config.external_config_dict.items() if name not in own}
    config = config.with_options({name: value for name, value in _QUIET.items() if name not in given})
    return Search(config, given, Path(output), searched, fixed, sampler, pruner, number, combinations)
