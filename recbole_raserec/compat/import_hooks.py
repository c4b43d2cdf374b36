"""Mends of other packages' modules: registered by name, put in force when a module is imported, or at once.

A mend is one small function; its docstring is the reason for it. It waits until the module it concerns is imported, so
that registering it imports nothing. What is mended stands in :mod:`recbole_raserec.compat.patches`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mend:
    """One mend: its `name`, the `reason` for it, and whether this environment needs it (`active`)."""

    name: str
    reason: str
    active: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    modules: tuple[str, ...]
    needed: Callable[[], bool]
    patch: Callable[..., Any]  # (module) -> None; if `around`: a generator function ()
    around: bool


_ENTRIES: list[_Entry] = []
_DONE: set[tuple[str, str]] = set()  # (mend, module)


def mend(name: str, *modules: str, needed: Callable[[], bool] = lambda: True, around: bool = False) -> Callable:
    """Register the decorated function as a mend of `modules`.

    Args:
        name: of the mend. needed: whether this environment needs it.
        around: the function is a generator that yields once while a module is executed; otherwise it is called with
            the module afterwards.
    """

    def register(patch: Callable) -> Callable:
        _ENTRIES.append(_Entry(name, modules, needed, patch, around))
        return patch

    return register


def mends() -> list[Mend]:
    """All mends, in the order in which they are applied."""
    return [Mend(entry.name, " ".join((entry.patch.__doc__ or "").split()), entry.needed()) for entry in _ENTRIES]


def apply() -> None:
    """Put every mend in force, now or as soon as its module is imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in dict.fromkeys(name for entry in _ENTRIES for name in entry.modules):
        if name in sys.modules:
            _patch(sys.modules[name])


def _patch(module: types.ModuleType) -> None:
    for entry in _ENTRIES:
        key = (entry.name, module.__name__)
        if module.__name__ in entry.modules and not entry.around and key not in _DONE and entry.needed():
            _DONE.add(key)
            entry.patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and puts the mends around and after its execution."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(fullname in entry.modules for entry in _ENTRIES):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # Set on this one loader, so that its type, which other tools look at, stays what it is.
            vars(spec.loader)["exec_module"] = _mended(spec.loader.exec_module)
        return spec


def _mended(execute: Callable[[types.ModuleType], None]) -> Callable[[types.ModuleType], None]:
    def exec_module(module: types.ModuleType) -> None:
        with contextlib.ExitStack() as stack:
            for entry in _ENTRIES:
                if module.__name__ in entry.modules:
                    _DONE.discard((entry.name, module.__name__))  # executing it again undoes the mend
                    if entry.around:
                        stack.enter_context(contextlib.contextmanager(entry.patch)())
            execute(module)
        _patch(module)

    return exec_module


class View(types.ModuleType):
    """A module as one module of RecBole shall see it: the real one, but for the attributes given."""

    def __init__(self, real: types.ModuleType, **attributes: Any):
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(attributes, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)
