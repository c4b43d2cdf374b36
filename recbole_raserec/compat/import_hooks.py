"""Patches of other packages' modules: registered by name, made as soon as the module they concern is imported.

Registering a patch imports nothing. What is patched stands in `recbole_raserec.compat.patches`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One patch.

    Its `function` is called with a module after it was executed; one `around` has no arguments, and yields once for it.
    """

    name: str
    modules: tuple[str, ...]
    needed: Callable[[], bool]
    function: Callable[..., Any]
    around: bool

    @property
    def active(self) -> bool:
        """Whether this environment needs it."""
        return self.needed()

    @property
    def reason(self) -> str:
        """Why it is there."""
        return " ".join((self.function.__doc__ or "").split())


_PATCHES: list[Patch] = []
_DONE: set[tuple[str, str]] = set()  # (patch, module)


def patch(name: str, *modules: str, needed: Callable[[], bool] = lambda: True, around: bool = False) -> Callable:
    """Register the decorated function as a patch; the arguments are the attributes of `Patch`."""

    def register(function: Callable) -> Callable:
        _PATCHES.append(Patch(name, modules, needed, function, around))
        return function

    return register


def all_patches() -> list[Patch]:
    """All patches, in the order in which they are made."""
    return list(_PATCHES)


def apply() -> None:
    """Make every patch, now or as soon as its module is imported. Calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in dict.fromkeys(name for entry in _PATCHES for name in entry.modules):
        if name in sys.modules:
            _patch(sys.modules[name])


def _patch(module: types.ModuleType) -> None:
    for entry in _PATCHES:
        key = (entry.name, module.__name__)
        if module.__name__ in entry.modules and not entry.around and key not in _DONE and entry.active:
            _DONE.add(key)
            entry.function(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a module, and makes the patches around and after its execution."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not any(fullname in entry.modules for entry in _PATCHES):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            # Set on this one loader, so that its type, which other tools look at, stays what it is.
            vars(spec.loader)["exec_module"] = _patched(spec.loader.exec_module)
        return spec


def _patched(execute: Callable[[types.ModuleType], None]) -> Callable[[types.ModuleType], None]:
    def exec_module(module: types.ModuleType) -> None:
        with contextlib.ExitStack() as stack:
            for entry in _PATCHES:
                if module.__name__ in entry.modules:
                    _DONE.discard((entry.name, module.__name__))  # executing it again undoes the patch
                    if entry.around:
                        stack.enter_context(contextlib.contextmanager(entry.function)())
            execute(module)
        _patch(module)

    return exec_module


def _forward(*args: Any, **options: Any) -> Any:
    return REPLACEMENT(*args, **options)  # type: ignore[name-defined]  # noqa: F821


def replace_function(function: Any, make: Callable[[Any], Callable]) -> None:
    """Let `function` do what `make(original)` does, wherever it was imported already.

    A module's attribute could be replaced instead, but RecBole's modules and its users' scripts import these functions
    by name, often before this package; such a name would keep the old function, and silently train another model. The
    object stays the same, so pickles, comparisons and other patches of it go on working.
    """
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    key = f"_recbole_raserec_{function.__name__}"
    while key in function.__globals__:  # replaced before
        key += "_"
    function.__signature__ = inspect.signature(function)
    function.__globals__[key] = make(types.FunctionType(*parts))
    function.__code__ = _forward.__code__.replace(co_names=(key,), co_name=function.__name__)


class View(types.ModuleType):
    """A module as one module of RecBole is to see it: the real one, but for the attributes given."""

    def __init__(self, real: types.ModuleType, **attributes: Any):
        super().__init__(real.__name__, real.__doc__)
        self.__dict__.update(attributes, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)
