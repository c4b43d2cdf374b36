"""What was asked of a comparison, read: model specs, data sets, seeds. Problems are collected, to be raised at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Union

from recbole_raserec.configuration.sources import PROPERTIES, read_yaml
from recbole_raserec.errors import ConfigError, RaSeRecError

#: A number alone above this is not taken for a count of seeds.
MOST_SEEDS = 100

#: Several values: a list, or a text with commas between them.
Several = Union[str, Sequence[str]]

#: Options of `run` that a comparison sets itself, and what to do instead.
TAKEN = {
    "model": "write --models=...",
    "dataset": "write --datasets=...",
    "seed": "write --seeds=...",
    "result_file": "the figures go into the output directory, leave it out",
    "ranks_file": "the ranks go into the output directory, leave it out",
    "backbone_checkpoint": "every base is trained with every seed, leave it out",
    "resume": "finished cells are kept and unfinished ones continued, leave it out or name another output directory",
}

#: Options that cannot differ between the models of a comparison.
SHARED = ("config_files", "data_path", "checkpoint_dir")


@dataclass
class Problems:
    """Problems found so far, each once, with the models they were found in."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, problems: Iterable[str], model: str = "") -> None:
        for problem in problems:
            models = self.found.setdefault(problem, [])
            if model and model not in models:
                models.append(model)

    @contextlib.contextmanager
    def noted(self, model: str = "") -> Iterator[None]:
        """Turn what the body raises into problems; the rest of the body is skipped."""
        try:
            yield
        except ConfigError as error:
            self.add(error.problems, model)
        except RaSeRecError as error:
            self.add([str(error)], model)

    def raise_all(self, models: int) -> None:
        """Raise them as one ConfigError; what not all of the `models` specs share names those that have it."""
        if self.found:
            raise ConfigError(
                [
                    f"models: {', '.join(of)}: {problem}" if 0 < len(of) < models else problem
                    for problem, of in self.found.items()
                ]
            )


@dataclass(frozen=True)
class Spec:
    """A model and its own options, texts as on the command line."""

    model: str
    options: dict[str, str]

    @property
    def label(self) -> str:
        """The spec again, as a row is called."""
        return label(self.model, self.options)


def label(model: str, options: dict[str, str]) -> str:
    return ":".join([model, *(f"{name}={value}" for name, value in options.items())])


def parse_specs(models: Several, problems: Problems) -> list[Spec]:
    """Read ``NAME[:key=value[:key=value...]]``, several joined by commas.

    ``;`` does what ``:`` does, in quotes. Signs within brackets and quotes belong to the value.
    """
    specs = []
    for text in parse_names("models", models, problems):
        name, *rest = split_outside(text, ":;")
        options: dict[str, str] = {}
        for part in rest:
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or not key or not value:
                problems.add([f"models: {text!r}: {part!r} is not of the form key=value; write {name}:key=value"])
            elif key in TAKEN:
                problems.add([f"models: {text!r}: {key} cannot be given there; {TAKEN[key]}"])
            elif key in SHARED:
                problems.add([f"models: {text!r}: {key} is the same for all models; write --{key}={value}"])
            elif options.setdefault(key, value) != value:
                problems.add([f"models: {text!r}: {key} is given as {options[key]!r} and as {value!r}; keep one"])
        spec = Spec(name.strip(), options)
        if not spec.model:
            problems.add([f"models: {text!r} names no model; write NAME:key=value"])
        else:
            specs.append(spec)
    return specs


def parse_names(option: str, given: Several, problems: Problems) -> list[str]:
    """The values of an option, each once."""
    texts = split_outside(given, ",") if isinstance(given, str) else list(given)
    names = [text.strip() for text in texts if text.strip()]
    if not names:
        problems.add([f"{option}: is not given; name one or more, for example --{option}={_EXAMPLES[option]}"])
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    problems.add(f"{option}: {name} is given twice; leave one out" for name in twice)
    return list(dict.fromkeys(names))


_EXAMPLES = {"models": "SASRec,RaSeRec:backbone=SASRec", "datasets": "ml-100k"}


def parse_seeds(given: Union[str, int, Sequence[int]], problems: Problems) -> tuple[int, ...]:
    """Seeds to run. A number alone is how many, from the default of `seed` on; with a comma it is a list of seeds, so
    that ``2020,`` is the one seed 2020.
    """
    first = int(read_yaml(PROPERTIES / "overall.yaml")["seed"])
    remedy = f"write how many (--seeds=5: {first} to {first + 4}), or a list (--seeds={first},{first + 1})"
    if isinstance(given, (str, int)):
        texts = [part.strip() for part in str(given).split(",")]
        alone = len(texts) == 1
        numbers = [int(text) for text in texts if text.isascii() and text.isdigit()]
        wrong = len(numbers) != len([text for text in texts if text])
    else:
        numbers, alone = list(given), False
        wrong = not all(type(number) is int and number >= 0 for number in numbers)
    if wrong or not numbers or (alone and numbers[0] < 1):
        problems.add([f"seeds: {given!r} is neither a number of seeds nor a list of them; {remedy}"])
    elif alone and numbers[0] > MOST_SEEDS:
        problems.add([f"seeds: {given} would be {given} seeds; for the seed {given} write --seeds={given}, (a comma)"])
    elif len(set(numbers)) != len(numbers):
        problems.add([f"seeds: {given!r} names a seed twice; leave one out"])
    else:
        return tuple(range(first, first + numbers[0])) if alone else tuple(numbers)
    return ()


def split_outside(text: str, separators: str) -> list[str]:
    """Split `text` at each of the `separators` that stands outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
        if sign in separators and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
