"""The structure of the package in figures: modules, lines, the longest chain of imports, circles, imports past a face.

    python tests/structure.py

A face is the ``__init__.py`` of a folder. An import through it counts as one of the file that defines the name, which
is the file that a reader opens next. Imports inside functions count too, and so do those for types alone.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "recbole_raserec"


def measure(package: Path = PACKAGE) -> dict[str, Any]:
    """Counts of a package, see `FIGURES`; `chain` lists the files of the longest chain."""
    files = {_dotted(path, package): path for path in sorted(package.rglob("*.py"))}
    faces = {name for name, path in files.items() if path.name == "__init__.py"}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    exported = {face: dict(_imports(trees[face], files, package.name) + _named(trees[face], files)) for face in faces}
    edges: dict[str, set[str]] = {name: set() for name in files if name not in faces}
    past = []
    for name in edges:
        for local, module in _imports(trees[name], files, package.name):
            folder = module if module in faces else module.rpartition(".")[0]
            inside = name.startswith(folder + ".")
            if module not in faces and not inside and folder != package.name:
                past.append(f"{name} imports {module}")
            while module in faces and local in exported[module]:
                module = exported[module][local]
            if module not in faces and module != name:
                edges[name].add(module)
    try:
        order = list(graphlib.TopologicalSorter(edges).static_order())
        circle: list[str] = []
    except graphlib.CycleError as error:
        order, circle = [], error.args[1]
    return {
        "modules": len(edges),
        "faces": len(faces),
        "top": sum(1 for path in package.glob("*.py") if path.name != "__init__.py"),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files.values()),
        "chain": _longest(edges, order),
        "circle": circle,
        "past": past,
    }


def _dotted(path: Path, package: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.AST, files: dict[str, Path], package: str) -> list[tuple[str, str]]:
    """(imported name, module of the package it is imported from)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((alias.name, whole if whole in files else str(node.module)))
        elif isinstance(node, ast.Import):
            found += [("", alias.name) for alias in node.names if alias.name in files]
    return found


def _named(tree: ast.AST, files: dict[str, Path]) -> list[tuple[str, str]]:
    """The same of a face that lists its names in a mapping, and imports them when they are used."""
    pairs = [pair for node in ast.walk(tree) if isinstance(node, ast.Dict) for pair in zip(node.keys, node.values)]
    texts = [
        (key.value, value.value)
        for key, value in pairs
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    ]
    return [pair for pair in texts if pair[1] in files]


def _longest(edges: dict[str, set[str]], order: list[str]) -> list[str]:
    @functools.cache
    def down(name: str) -> tuple[str, ...]:
        return (name, *max((down(other) for other in edges[name]), key=len, default=()))

    return list(max((down(name) for name in order), key=len, default=()))


#: What is counted, in words, and the most that it may be.
FIGURES = {
    "modules": ("modules beside the faces", 95),
    "top": ("files at the top level beside __init__", 3),
    "lines": ("lines of Python", 25_000),
    "chain": ("files of the longest chain of imports", 11),
    "circle": ("files of a circle of imports", 0),
    "past": ("imports past a face", 0),
}


def size(value: Any) -> int:
    """A count, or the number of things in a list."""
    return value if isinstance(value, int) else len(value)


if __name__ == "__main__":
    found = measure()
    for name, (words, most) in FIGURES.items():
        print(f"{size(found[name]):>7,}  {words} (at most {most:,})")
    print(f"{found['faces']:>7,}  faces\n")
    print("The longest chain: " + " -> ".join(found["chain"]))
    print("\n".join(found["past"]))
