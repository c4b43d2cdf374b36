"""What an option accepts: a rule in words and as a test, and the rules that several options share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Callable


@dataclass(frozen=True)
class Rule:
    """What one option accepts. `kind` converts an accepted value, so that 1 and 1.0 are one configuration."""

    requirement: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    kind: Callable[[Any], Any] | None = None


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A number between the bounds, which count as inside unless they are open."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    if math.isinf(high):
        requirement = f"a number {'>' if open_low else '>='} {low:g}"
    else:
        requirement = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    return Rule(requirement, accepts, kind=float)


def integer(low: int, high: int | None = None) -> Rule:
    """An integer between the bounds, both inside."""

    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    return Rule(f"an integer >= {low}" + ("" if high is None else f" and <= {high}"), accepts)


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule("one of " + ", ".join(names), lambda value: isinstance(value, str) and value in names, names)


def optional(rule: Rule) -> Rule:
    """What `rule` accepts, or nothing."""
    kind = rule.kind
    return Rule(
        f"{rule.requirement}, or null",
        lambda value: value is None or rule.accepts(value),
        rule.choices,
        None if kind is None else lambda value: None if value is None else kind(value),
    )


def _devices(value: Any) -> bool:
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return not isinstance(value, bool) and re.fullmatch(r"(\d+(,\d+)*)?", text.replace(" ", "")) is not None


def _level(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("debug", "info", "warning", "error", "critical")


def _sizes(value: Any) -> bool:
    def size(x: Any) -> bool:
        return type(x) is int and x >= 0

    def pair(x: Any) -> bool:
        return isinstance(x, (list, tuple)) and len(x) == 2 and all(map(size, x))

    return size(value) or (isinstance(value, (list, tuple)) and bool(value) and all(size(x) or pair(x) for x in value))


_INTERVALS = re.compile(r"[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])](;[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])])*")


def _interval(value: Any) -> bool:
    return _INTERVALS.fullmatch(_interval_text(value)) is not None


def _interval_text(value: Any) -> str:
    """As RecBole reads it; "[5,60]" arrives as a list, which its command line and YAML make of it."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number().accepts, value)):
        return f"[{value[0]},{value[1]}]"
    return value if isinstance(value, str) else ""


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a non-empty text", lambda value: isinstance(value, str) and bool(value))
TABLE = Rule("a mapping", lambda value: isinstance(value, dict))
INTERVAL = Rule('an interval such as "[5,inf)" (in quotes)', _interval, kind=_interval_text)
DEVICES = Rule("a GPU number, several joined by commas, or empty for the CPU", _devices)
LEVEL = Rule("one of debug, info, warning, error, critical", _level)
DROPOUT = number(0, 1, open_high=True)
DROPOUTS = Rule(
    "a list of two numbers in [0, 1)",
    lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(DROPOUT.accepts, value)),
    kind=list,
)
NAMES = Rule(
    "a list of names",
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value),
    kind=list,
)
NUMBERS = Rule(
    "a list of integers >= 0",
    lambda value: isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value),
    kind=list,
)
SIZES = Rule("a size >= 0, or a list with a size or a pair of sizes for each layer", _sizes)
