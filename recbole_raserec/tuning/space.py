"""The space of a search: which options are searched, between which values. It is read from YAML and checked whole."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Optional

from recbole.utils import dataset_arguments, evaluation_arguments

from recbole_raserec.config import PROPERTIES, REGENERATION, check_run, read_yaml, regeneration_options
from recbole_raserec.errors import ConfigError, nearest, shown
from recbole_raserec.storage import plain

#: Where the shipped spaces lie.
SPACES = PROPERTIES / "tune"

#: What an entry may hold, by its type.
KEYS = {"float": ("low", "high", "log", "step"), "int": ("low", "high", "log", "step"), "categorical": ("choices",)}

#: Options that decide what is measured: values under different ones cannot be compared.
MEASURES = frozenset(
    {*dataset_arguments, *evaluation_arguments, "ram_valid_metric", "model", "dataset", "seed", "reproducibility"}
) - {"MAX_ITEM_LIST_LENGTH"}

#: Significant digits of a value that is drawn.
DIGITS = 6

#: Combinations with which a value is tried that is refused beside the other options as they stand.
_COMPANY = 10


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One option that is searched.

    Attributes:
        kind: "float", "int" or "categorical". low, high: bounds, both inside. log: drawn evenly by order of magnitude.
        step: distance between two values; None: any (float), 1 (int). choices: of a categorical one.
    """

    kind: str
    low: Any = None
    high: Any = None
    log: bool = False
    step: Any = None
    choices: tuple[Any, ...] = ()

    def suggest(self, name: str, trial: Any) -> Any:
        """The value that an Optuna trial takes, or took."""
        if self.kind == "categorical":
            return trial.suggest_categorical(name, list(self.choices))
        if self.kind == "int":
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return self.rounded(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log))

    def rounded(self, value: Any) -> Any:
        """The value as a run gets it: a float with :data:`DIGITS` significant digits, within the bounds."""
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high) if self.kind == "float" else value

    def edges(self) -> list[Any]:
        """The values that stand for all of them in a check."""
        return list(self.choices) or [self.low, self.high]

    def values(self) -> Optional[list[Any]]:
        """All of its values in order; None where they cannot be counted."""
        if self.kind == "categorical":
            return list(self.choices)
        if self.log or (self.kind == "float" and self.step is None):
            return None
        if self.kind == "int":
            return list(range(self.low, self.high + 1, self.step or 1))
        return [self.rounded(self.low + number * self.step) for number in range(_steps(self) + 1)]

    def draw(self, generator: random.Random) -> Any:
        """A value for a check; how often which comes is of no matter."""
        values = self.values()
        if values is not None:
            return generator.choice(values)
        value = generator.uniform(self.low, self.high)
        return round(value) if self.kind == "int" else value

    def described(self) -> dict[str, Any]:
        """The entry as JSON and YAML hold it."""
        entry = {name: plain(getattr(self, name)) for name in KEYS[self.kind]}
        return {"type": self.kind, **{name: value for name, value in entry.items() if value not in (None, False)}}


Space = dict[str, Parameter]


def find_space(name: Optional[str], model: str) -> Path:
    """The file of a space: a path, the name of a shipped one, or, without a name, the one of the model.

    Raises:
        ConfigError: there is none.
    """
    shipped = {path.stem: path for path in sorted(SPACES.glob("*.yaml"))}
    if name is None:
        if model in shipped:
            return shipped[model]
        raise ConfigError(
            [f"space: none is shipped for {model}, only for {', '.join(shipped)}; write one and name it: --space=FILE"]
        )
    if name in shipped:
        return shipped[name]
    if not Path(name).is_file():
        guess = nearest(name, shipped)
        remedy = f"did you mean {guess}?" if guess else f"name a YAML file, or one of {', '.join(shipped)}"
        raise ConfigError([f"space: {name!r} does not exist; {remedy}"])
    return Path(name)


def read_space(path: Path) -> tuple[Space, list[str]]:
    """The entries of a file that are right in themselves, and the problems of the others."""
    try:
        content = read_yaml(path)
    except ConfigError as error:
        return {}, [problem.replace("config_files:", "space:", 1) for problem in error.problems]
    space, problems = {}, []
    for name, entry in content.items():
        wrong = _entry_problems(entry)
        problems += [f"{name}: {problem} (in {path})" for problem in wrong]
        if not wrong:
            space[name] = _parameter(entry)
    if not content:
        problems.append(f"space: {path} holds no option; write one `option: {{type: float, low: 0, high: 1}}` a line")
    return space, problems


def check_space(config: Any, space: Space, path: Path) -> list[str]:
    """Problems of options that the run does not read, that must not be searched, or that refuse their own values.

    Every bound and every choice is put into the configuration. One that is refused beside the other options as they
    stand is wrong where it is refused beside ten draws of them too; what a single combination is refused for fails
    the trial that draws it.
    """
    problems = []
    regenerates = config["regeneration"] or "regeneration" in space
    unread = () if regenerates else (*REGENERATION, "memory_regenerated")
    dead: set[str] = set()
    if regenerates and not {"regeneration", "regen_rows", "regenerated_data"} & set(space):
        dead = set(REGENERATION) - set(regeneration_options(config))
    for name in space:
        if name in MEASURES:
            problems.append(f"{name}: decides what is measured, and trials could not be compared; remove it")
        elif name in config.not_training:
            problems.append(f"{name}: changes nothing of what is trained; remove it")
        elif name in unread:
            problems.append(f"{name}: counts only with regeneration; give regeneration: true, or remove it")
        elif name in dead:
            problems.append(
                f"{name}: decides nothing with regeneration: {config['regeneration']}, regen_rows: "
                f"{config['regen_rows']}, regenerated_data: {config['regenerated_data']}; change these, or remove it"
            )
    generator = random.Random(0)
    company = [{name: space[name].draw(generator) for name in space} for _ in range(_COMPANY)]
    for name, parameter in space.items():
        if name in MEASURES or name in config.not_training:
            continue
        for value in parameter.edges():
            wrong = _refusals(config, {name: value})
            alone = wrong and config.never_takes(name, value)
            if alone or (wrong and all(_refusals(config, {**others, name: value}) for others in company)):
                problems += wrong
            if wrong and not config.reads(name):
                break  # the next value is refused in the same words
    unique = list(dict.fromkeys(problem.replace(" (in config_dict)", "") for problem in problems))
    return [f"space: {problem} (in {path})" for problem in unique]


def _refusals(config: Any, options: Mapping[str, Any]) -> list[str]:
    try:
        check_run(config.with_options(dict(options)))
    except ConfigError as error:
        return error.problems
    return []


def grid(space: Space) -> tuple[list[dict[str, Any]], list[str]]:
    """All combinations in the order of the file, and the problems of options whose values cannot be counted."""
    values = {name: parameter.values() for name, parameter in space.items()}
    problems = [
        f"space: {name}: the grid sampler tries every value, and these cannot be counted; give it choices or a step"
        for name, several in values.items()
        if several is None
    ]
    if problems:
        return [], problems
    product = itertools.product(*(several or () for several in values.values()))
    return [dict(zip(values, combination)) for combination in product], []


def _parameter(entry: Mapping[str, Any]) -> Parameter:
    kind = entry["type"]
    if kind == "categorical":
        return Parameter(kind, choices=tuple(entry["choices"]))
    number = float if kind == "float" else int
    step = entry.get("step")
    bounds = number(entry["low"]), number(entry["high"])
    return Parameter(kind, *bounds, bool(entry.get("log", False)), None if step is None else number(step))


def _entry_problems(entry: Any) -> list[str]:
    """What is wrong with one entry in itself."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or entry["type"] not in KEYS:
        given = entry.get("type") if isinstance(entry, dict) else entry
        return [f"{shown(given)} is no space; write {{type: float | int | categorical, ...}}"]
    kind = entry["type"]
    problems = []
    for key in entry:
        if key != "type" and key not in KEYS[kind]:
            guess = nearest(key, KEYS[kind])
            remedy = f"did you mean {guess}?" if guess else f"it has {', '.join(KEYS[kind])}"
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
    whole = entry["type"] == "int"
    low, high, log, step = (entry.get(key) for key in KEYS["float"])  # type: Any, Any, Any, Any
    problems = []
    for key, value in (("low", low), ("high", high)):
        if not _is_number(value, whole):
            problems.append(f"{key}: {shown(value)} is not {'an integer' if whole else 'a number'}; give one")
    if log not in (None, True, False):
        problems.append(f"log: {shown(log)} is neither true nor false; write log: true, or remove it")
    if step is not None and not (_is_number(step, whole) and step > 0):
        problems.append(f"step: {shown(step)} is not {'an integer' if whole else 'a number'} > 0; remove it")
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


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) if whole else math.isfinite(value)


def _steps(parameter: Parameter) -> int:
    return round((parameter.high - parameter.low) / parameter.step)
