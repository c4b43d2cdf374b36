"""The words of a command line: those of `run`, and the options that a command adds to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from recbole_raserec.errors import ConfigError


def parse_run(words: Sequence[str]) -> tuple[str | None, str | None, list[str] | None, list[str]]:
    """Split the words of `run` into model, data set, configuration files, and the other options as ``--key=value``.

    Raises:
        ConfigError: a word is no option, an option has no value, or one of the three is given twice and differs.
    """
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            problems.append(f"{word!r} is no option: options have the form --key=value.")
            continue
        key, equals, value = word.partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"{word} has no value: write {word}=VALUE (for a switch {word}=True).")
                continue
            value = rest.pop(0)
        key = {"-m": "--model", "-d": "--dataset"}.get(key, key)
        if not key.startswith("--"):
            problems.append(f"{word}: the only short options are -m and -d; write --key=value.")
            continue
        pairs.append((key[2:], value))
    own: dict[str, str] = {}
    for key, value in pairs:
        if key in ("model", "dataset", "config_files"):
            if own.get(key, value) != value:
                problems.append(f"--{key} is given twice, as {own[key]!r} and {value!r}: leave one out.")
            elif not value.strip():
                problems.append(f"--{key} is empty: give a value or leave it out.")
            own[key] = value
    if problems:
        raise ConfigError(problems)
    files = own["config_files"].split() if "config_files" in own else None
    return own.get("model"), own.get("dataset"), files, [f"--{key}={value}" for key, value in pairs if key not in own]


def take_own(options: Iterable[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of :func:`parse_run` that are a command's own, by name, and the others as they are.

    Args:
        options: each ``--key=value``. names: of the command's own; of one that is given twice the last counts.
    """
    own: dict[str, str] = {}
    rest = []
    for option in options:
        key, _, value = option[2:].partition("=")
        if key in names:
            own[key] = value
        else:
            rest.append(option)
    return own, rest
