"""The errors this package raises on purpose. Each message names what was asked, what was found and the remedy."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence
from typing import Any


class RaSeRecError(Exception):
    """Base class: the command line prints such an error as one message, without a traceback."""


class ConfigError(RaSeRecError, ValueError):
    """One or more options are wrong. All problems found are reported together.

    Args:
        problems: one sentence per problem, each naming the option, its value and the remedy.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        head = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{head} in the configuration:\n" + "\n".join(f"  - {p}" for p in self.problems))


class DatasetError(RaSeRecError):
    """The data set is missing, unreadable or unfit for the run."""


class CheckpointError(RaSeRecError):
    """A checkpoint or memory is missing, damaged, not of this package, or belongs to another configuration."""


class DiskFullError(RaSeRecError, OSError):
    """A file could not be written whole: disk full, quota used up, or larger than files may be."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno, self.strerror = errno.ENOSPC, "no room on the disk"

    def __str__(self) -> str:
        return str(self.args[0])


class InputError(RaSeRecError, ValueError):
    """What a trained model was asked does not make sense: histories, ids, k, events."""


class MissingExtraError(RaSeRecError, ImportError):
    """A package that an optional part needs is not installed.

    Args:
        extra: which of this package's extras has it.
        package: what is missing.
        why: what needs it.
    """

    def __init__(self, extra: str, package: str, why: str):
        super().__init__(f"{package} is not installed, and {why}: pip install 'recbole-raserec[{extra}]'")


class ProcessError(RaSeRecError):
    """One of the processes that share a run died or failed."""


def nearest(word: object, words: Iterable[str]) -> str | None:
    """The most similar of `words`, whatever the case; None when nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in sorted(words)}
    found = difflib.get_close_matches(str(word).lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def shown(value: Any) -> str:
    """The value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
