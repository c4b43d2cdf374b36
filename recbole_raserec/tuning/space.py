"""The space of a search: which options are searched, between which values. It is read from YAML and checked whole.

A line of the file is an option and an Optuna distribution: `alpha: {type: float, low: 0.1, high: 0.9, step: 0.1}`. The
entries of an option that is a list are parameters of their own: `adapter_sizes[6][2]: {type: int, ...}` are the twelve
parameters `adapter_sizes[0][0]` to `adapter_sizes[5][1]`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Optional

from recbole.utils import dataset_arguments, evaluation_arguments

from recbole_raserec.config import (
    PROPERTIES,
    REGENERATION,
    Config,
    check_run,
    read_yaml,
    regeneration_options,
)
from recbole_raserec.errors import ConfigError, MissingExtraError, nearest, shown
from recbole_raserec.storage import plain

try:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
except ImportError:
    raise MissingExtraError("tune", "optuna", "options are searched with it") from None

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Where the shipped spaces lie.
SPACES = PROPERTIES / "tune"
#: Options that decide what is measured: values under different ones cannot be compared.
MEASURES = frozenset(
    {*dataset_arguments, *evaluation_arguments, "ram_valid_metric", "model", "dataset", "seed", "reproducibility"}
) - {"MAX_ITEM_LIST_LENGTH"}
#: The distribution of a type, and what an entry may hold.
_TYPES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "float": (FloatDistribution, ("low", "high", "log", "step")),
    "int": (IntDistribution, ("low", "high", "log", "step")),
    "categorical": (CategoricalDistribution, ("choices",)),
}
#: Significant digits of a value that is drawn.
_DIGITS = 6
#: Combinations with which a value is tried that is refused beside the other options as they are.
_COMPANY = 10
#: Name of a parameter -> its distribution.
Space = dict[str, Any]


def option_of(name: str) -> str:
    """The option that a parameter is of."""
    return name.partition("[")[0]


def options_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Values of parameters, in the order of the space, as options."""
    options: dict[str, Any] = {}
    for name, value in parameters.items():
        option, *indices = name.replace("]", "").split("[")
        if not indices:
            options[option] = value
            continue
        entries = options.setdefault(option, [])
        for index in map(int, indices[:-1]):
            if index == len(entries):
                entries.append([])
            entries = entries[index]
        entries.append(value)
    return options


def rounded(distribution: Any, value: Any) -> Any:
    """A drawn value as a run gets it: a float with six significant digits, within the bounds."""
    if not isinstance(distribution, FloatDistribution):
        return value
    return min(max(float(f"{value:.{_DIGITS}g}"), distribution.low), distribution.high)


def edges(distribution: Any) -> list[Any]:
    """The values that stand for all of them in a check."""
    several = isinstance(distribution, CategoricalDistribution)
    return list(distribution.choices) if several else [distribution.low, distribution.high]


def values(distribution: Any) -> Optional[list[Any]]:
    """All values in order; None where they cannot be counted."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    low, step = distribution.low, distribution.step
    if distribution.log or step is None:
        return None
    return [rounded(distribution, low + n * step) for n in range(round((distribution.high - low) / step) + 1)]


def described(distribution: Any) -> dict[str, Any]:
    """The entry as JSON and YAML hold it."""
    kind, keys = next((kind, keys) for kind, (type_, keys) in _TYPES.items() if isinstance(distribution, type_))
    entry = {name: plain(getattr(distribution, name)) for name in keys}
    if kind == "int" and entry["step"] == 1:
        del entry["step"]
    return {"type": kind, **{name: value for name, value in entry.items() if value not in (None, False)}}


def find_space(name: Optional[str], model: str) -> Path:
    """The file of a space: a path, the name of a shipped one, or, without a name, the one of the model.

    Raises:
        ConfigError: there is none.
    """
    shipped = {path.stem: path for path in sorted(SPACES.glob("*.yaml"))}
    path = shipped.get(model if name is None else name) or Path(name or "")
    if path.is_file():
        return path
    if name is None:
        problem = f"none is shipped for {model}, only for {', '.join(shipped)}; write one and name it: --space=FILE"
    else:
        guess = nearest(name, shipped)
        remedy = f"did you mean {guess}?" if guess else f"name a YAML file, or one of {', '.join(shipped)}"
        problem = f"{name!r} does not exist; {remedy}"
    raise ConfigError([f"space: {problem}"])


def read_space(path: Path) -> tuple[Space, list[str]]:
    """The parameters of a file that are right in themselves, and the problems of the other entries."""
    try:
        content = read_yaml(path)
    except ConfigError as error:
        return {}, [problem.replace("config_files:", "space:", 1) for problem in error.problems]
    space: Space = {}
    problems = []
    for name, entry in content.items():
        wrong = _entry_problems(entry)
        problems += [f"{name}: {problem} (in {path})" for problem in wrong]
        if not wrong:
            given = {key: value for key, value in entry.items() if key != "type" and value is not None}
            space.update(dict.fromkeys(_parameters(name), _TYPES[entry["type"]][0](**given)))
    if not content:
        problems.append(f"space: {path} holds no option; write one `option: {{type: float, low: 0, high: 1}}` a line")
    return space, problems


def _parameters(name: str) -> Iterable[str]:
    """The parameters of an entry: one, or one for each entry of a list `option[N]`, `option[N][M]`, ..."""
    counts = re.findall(r"\[(\d+)\]", name)
    places = itertools.product(*(range(int(count)) for count in counts))
    return (option_of(name) + "".join(f"[{index}]" for index in place) for place in places) if counts else [name]


def check_space(config: Config, space: Space, path: Path) -> list[str]:
    """Problems of options that the run does not read, that must not be searched, or that refuse their own values.

    Every bound and every choice is put into the configuration. One that is refused beside the other options as they
    are is wrong where it is refused beside ten draws of them too; what a single combination is refused for fails the
    trial that draws it.
    """
    problems: list[str] = []
    regenerates = config["regeneration"] or "regeneration" in space
    unread = () if regenerates else (*REGENERATION, "memory_regenerated")
    decided = regenerates and not {"regeneration", "regen_rows", "regenerated_data"} & set(space)
    dead = set(REGENERATION) - set(regeneration_options(config)) if decided else ()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    company = [options_of(study.ask(space).params) for _ in range(_COMPANY)]
    for option in dict.fromkeys(map(option_of, space)):
        if option in MEASURES or option in config.not_training:
            why = "decides what is measured, and trials could not be compared"
            why = why if option in MEASURES else "changes nothing of what is trained"
            problems.append(f"{option}: {why}; remove it")
            continue
        if option in unread:
            problems.append(f"{option}: counts only with regeneration; give regeneration: true, or remove it")
        elif option in dead:
            these = ", ".join(f"{name}: {config[name]}" for name in ("regeneration", "regen_rows", "regenerated_data"))
            problems.append(f"{option}: decides nothing with {these}; change these, or remove it")
        names = [name for name in space if option_of(name) == option]
        for edge in edges(space[names[0]]):
            value = options_of(dict.fromkeys(names, edge))
            wrong = _refusals(config, value)
            alone = wrong and config.never_takes(option, value[option])
            if alone or (wrong and all(_refusals(config, {**others, **value}) for others in company)):
                problems += wrong
            if wrong and not config.reads(option):
                break  # the next value is refused in the same words
    unique = list(dict.fromkeys(problem.replace(" (in config_dict)", "") for problem in problems))
    return [f"space: {problem} (in {path})" for problem in unique]


def _refusals(config: Config, options: Mapping[str, Any]) -> list[str]:
    try:
        check_run(config.with_options(dict(options)))
    except ConfigError as error:
        return error.problems
    return []


def grid(space: Space) -> tuple[list[dict[str, Any]], list[str]]:
    """All combinations in the order of the file, and the problems of options whose values cannot be counted."""
    several = {name: values(distribution) for name, distribution in space.items()}
    problem = "the grid sampler tries every value, and these cannot be counted; give it choices or a step"
    problems = [f"space: {name}: {problem}" for name, known in several.items() if known is None]
    drawn = itertools.product(*(known or () for known in several.values()))  # none where one cannot be counted
    return [dict(zip(several, each)) for each in drawn], problems


def _entry_problems(entry: Any) -> list[str]:
    """What is wrong with one entry in itself."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or entry["type"] not in _TYPES:
        given = entry.get("type") if isinstance(entry, dict) else entry
        return [f"{shown(given)} is no space; write {{type: float | int | categorical, ...}}"]
    kind = entry["type"]
    known = _TYPES[kind][1]
    problems = []
    for key in [key for key in entry if key not in ("type", *known)]:
        guess = nearest(key, known)
        remedy = f"did you mean {guess}?" if guess else f"it has {', '.join(known)}"
        problems.append(f"{key}: is no key of type {kind}; {remedy}")
    return problems + (_choice_problems(entry.get("choices")) if kind == "categorical" else _range_problems(entry))


def _choice_problems(choices: Any) -> list[str]:
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
        return [f"choices: {shown(choices)} is not a list of values; write choices: [a, b]"]
    wrong = [value for value in choices if value is not None and not isinstance(value, (bool, int, float, str))]
    if wrong:
        return [f"choices: {shown(wrong[0])} is neither a number, a text, true, false nor null; remove it"]
    if len({(type(value), value) for value in choices}) < len(choices):
        return [f"choices: {shown(choices)} names a value twice; keep one"]
    return []


def _range_problems(entry: Mapping[str, Any]) -> list[str]:
    number = "an integer" if entry["type"] == "int" else "a number"
    low, high, log, step = (entry.get(key) for key in ("low", "high", "log", "step"))  # type: Any, Any, Any, Any

    def is_number(value: Any) -> bool:
        kinds = (int,) if entry["type"] == "int" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)

    bounds = (("low", low), ("high", high))
    problems = [f"{key}: {shown(value)} is not {number}; give one" for key, value in bounds if not is_number(value)]
    if log not in (None, True, False):
        problems.append(f"log: {shown(log)} is neither true nor false; write log: true, or remove it")
    if step is not None and not (is_number(step) and step > 0):
        problems.append(f"step: {shown(step)} is not {number} > 0; remove it")
    if problems:
        return problems
    if low >= high:
        return [f"low: {shown(low)} is not below high: {shown(high)}; swap them, or set the option itself"]
    if log and step is not None:
        return ["step: does not go with log: true; keep one of the two"]
    if log and low <= 0:
        return [f"low: {shown(low)} has no logarithm; raise it, or remove log: true"]
    if step is not None and (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)):
        return [f"step: {shown(step)} does not lead from low: {shown(low)} to high: {shown(high)}; change one of them"]
    return []
