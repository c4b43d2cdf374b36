"""The package's docstrings as Markdown: cross references, and one entry an argument."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(~?)([\w.]+)`")
TUPLE = re.compile(r"(?<!`)<(?=[a-z]+(?: [a-z]+)*, )")
LITERAL = re.compile(r"``([^`\n]+)``")
SECTION = re.compile(r"^(?:Args|Attributes):$")
NAMES = re.compile(r"(?:^|(?<=[.;)] ))((?:\w+, )*\w+): ")


class Docstrings(griffe.Extension):
    """Runs over every object of the package once it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of a package in place."""
        for thing in everything(pkg):
            if thing.docstring is not None:
                text = one_entry_each(thing.docstring.value, known(thing))
                text = LITERAL.sub(r"`\1`", TUPLE.sub("&lt;", text))
                thing.docstring.value = ROLE.sub(lambda match, thing=thing: reference(match, thing), text)


def everything(thing: Any) -> Iterator[Any]:
    """An object and what is defined in it."""
    yield thing
    for member in thing.members.values():
        if not member.is_alias:
            yield from everything(member)


def known(thing: Any) -> set[str]:
    """Names that entries of a docstring may have: parameters, or attributes and what `__init__` takes."""
    if thing.is_function:
        return {parameter.name for parameter in thing.parameters}
    if thing.is_class:
        return {*thing.members, *(parameter.name for parameter in thing.parameters)}
    return set()


def one_entry_each(text: str, names: set[str]) -> str:
    """Give each of several arguments described on one line, or together, an entry of its own."""
    lines, result, inside = text.split("\n"), [], False
    entry: list[str] = []

    def flush() -> None:
        if entry:
            result.extend(split_entry(" ".join(entry), names))
            entry.clear()

    for line in lines:
        if SECTION.match(line):
            inside = True
            result.append(line)
        elif inside and line.startswith("    ") and not line.startswith("     "):
            flush()
            entry.append(line.strip())
        elif inside and entry and line.startswith("     "):
            entry.append(line.strip())
        else:
            flush()
            inside = inside and not line.strip()
            result.append(line)
    flush()
    return "\n".join(result)


def split_entry(entry: str, names: set[str]) -> list[str]:
    """``a, b: text. c: text`` as one line for each of a, b and c."""
    starts = [match for match in NAMES.finditer(entry) if set(match[1].split(", ")) <= names]
    if not starts or starts[0].start():
        return ["    " + entry]
    ends = [match.start() for match in starts[1:]] + [len(entry)]
    return [
        f"    {name}: {entry[match.end() : end].strip()}"
        for match, end in zip(starts, ends)
        for name in match[1].split(", ")
    ]


def reference(match: re.Match[str], thing: Any) -> str:
    """A link to an object of the reference, if it is there; otherwise its name."""
    short, name = match[1], match[2]
    try:
        target = thing.resolve(name)
    except griffe.NameResolutionError:
        target = name
    shown = name.split(".")[-1] if short else name
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
