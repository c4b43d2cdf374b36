"""Two checkouts of this project against each other: are the figures the same to the last digit, and is it as fast?

    python benchmarks/trees.py OLD NEW
    python benchmarks/trees.py OLD NEW --quick --rows=comparison,SASRec-packed
    python benchmarks/trees.py OLD NEW --beauty --data_path=DIR
    python benchmarks/trees.py OLD NEW --speed --rounds=5 --data_path=DIR
    python benchmarks/trees.py OLD NEW --figures --speed=sasrec-epoch,full-ranking --data_path=DIR

OLD and NEW are directories. Each must hold its compiled kernels (`python setup.py build_ext --inplace` makes them).
Nothing of either is imported here. What is used is what both versions give to the outside: the script of a run, the
command `recbole-raserec compare`, the JSON files that these write, and the benchmarks' `--side=ours`. Each run is a
process of the same Python with PYTHONPATH on its tree, in an empty directory, on the CPU with one thread.

Figures (the default) are metrics, validation curves, training losses, numbers of parameters, ranks of all test targets
and, of the comparison, its p-values. Seconds, memory, paths, options and versions are no figures. Every row runs in
both trees on OLD's data. The exit code is 1 if a row differs or fails in either.

Speed: the trees' own benchmarks, this package's side alone, in turns (OLD, NEW, OLD, NEW, ...). Medians are printed,
and new / old: below 1 NEW takes less. They need amazon-beauty below --data_path, or below the directory that the
variable RASEREC_DATA names.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.machinery
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

#: What a figure is in the record of a run, and in a comparison.
RECORD = ("metrics", "improvement_percent", "parameters", "curves")
COMPARISON = ("seeds", "datasets", "failed")
#: What is no figure, wherever it stands.
NO_FIGURES = ("protocol", "training_seconds", "wall_seconds", "peak_memory_mb", "error")

#: Options of every run: what sums in a fixed order.
ALWAYS = ("--use_gpu=false", "--threads=1", "--show_progress=false")

#: Rows of figures, each a run: name -> options.
RUNS: dict[str, tuple[str, ...]] = {
    "ml-100k": ("--model=RaSeRec", "--backbone=SASRec", "--dataset=ml-100k"),
    "pipeline": (
        "--model=RaSeRec", "--backbone=SASRec", "--dataset=planted", "--regeneration=true", "--memory=both",
        "--head=both", "--alpha=0.2", "--training=packed", "--epochs=2", "--ram_epochs=2", "--regen_epochs=2",
    ),
    **{
        f"{model}-{form}": (f"--model={model}", f"--training={form}", "--dataset=planted", "--epochs=1")
        for model in ("SASRec", "DuoRec", "GRU4Rec") for form in ("packed", "prefix")
    },
    "BERT4Rec": ("--model=BERT4Rec", "--dataset=planted", "--epochs=1"),
}  # fmt: skip
#: The same epochs on real data, a minute or more each.
BEAUTY = {
    f"{name}-beauty": tuple(option.replace("=planted", "=amazon-beauty") for option in options)
    for name, options in RUNS.items() if name not in ("ml-100k", "pipeline")
}  # fmt: skip
#: The row that is no run: the command that stands on this page.
COMPARE, PAGE = "comparison", Path("results") / "comparison_planted.md"

#: With --quick.
SHORT = {"ml-100k": ("--epochs=2", "--ram_epochs=1"), COMPARE: ("--seeds=2020,",)}

#: Benchmarks: name -> figures of the side that are timed; the memory of the process is measured in all.
SPEED = {
    "sasrec-epoch": ("seconds",),
    "stage3-epoch": ("seconds", "once_seconds"),
    "full-ranking": ("seconds",),
    "serve-latency-flat": ("seconds", "single_50_ms"),
}


class Failed(Exception):
    """A process of a tree ended with an error; the text has its last lines."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """A checkout, run from outside.

    Attributes:
        name: what messages call it.
        path: its directory.
    """

    name: str
    path: Path

    def problems(self) -> list[str]:
        """Why it cannot be compared; empty if it can."""
        package = self.path / "recbole_raserec"
        if not (self.path / "run_recbole_raserec.py").is_file() or not package.is_dir():
            return [f"{self.name}: {self.path} is no checkout: it lacks run_recbole_raserec.py or recbole_raserec/."]
        if not self.kernels():
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            return [
                f"{self.name}: no compiled kernels for this Python, recbole_raserec/kernels/_native_*{suffix}, in "
                f"{self.path}; make them there: python setup.py build_ext --inplace"
            ]
        with tempfile.TemporaryDirectory() as folder:
            found = self.python(Path(folder), ["-c", "import recbole_raserec; print(recbole_raserec.__file__)"]).strip()
        if package.resolve() not in Path(found.splitlines()[-1]).resolve().parents:
            return [f"{self.name}: Python imports {found} and not the package in {self.path}."]
        return []

    def kernels(self) -> list[str]:
        """Names of the compiled kernels that this Python can load."""
        found = sorted((self.path / "recbole_raserec").rglob("_native_*"))
        names = [(path.name.partition(".")[0], "." + path.name.partition(".")[2]) for path in found]
        return [name for name, suffix in names if suffix in importlib.machinery.EXTENSION_SUFFIXES]

    def environment(self, folder: Path, threads: int = 1) -> dict[str, str]:
        """Variables of a process of this tree that runs in `folder`."""
        own = {"PYTHONPATH": str(self.path), "TMPDIR": str(folder), "OMP_NUM_THREADS": str(threads)}
        return {"OMP_WAIT_POLICY": "passive", **os.environ, **own}

    def python(self, folder: Path, words: Sequence[str], threads: int = 1) -> str:
        """Run Python in `folder`.

        Args:
            folder: becomes the current directory, and holds temporary files.
            words: arguments of the interpreter.
            threads: of its libraries.

        Returns:
            what it printed.

        Raises:
            Failed: its exit code is not 0.
        """
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=self.environment(folder, threads), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {last_line(done.stderr) or last_line(done.stdout)}")
        return done.stdout

    def run(self, options: Sequence[str]) -> dict[str, Any]:
        """The figures of a run with these options."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = [*options, *ALWAYS, "--result_file=r.json", "--ranks_file=r.npz"]
            self.python(folder, [str(self.path / "run_recbole_raserec.py"), *given])
            with np.load(folder / "r.npz", allow_pickle=False) as arrays:
                ranks = {key: arrays[key].tolist() for key in arrays.files}
            return {**figures_of(read(folder / "r.json"), RECORD), "ranks": ranks}

    def compare(self, words: Sequence[str]) -> dict[str, Any]:
        """The figures of `recbole-raserec compare`, as this tree's installation would call it."""
        code = "import sys; from {} import {} as main; sys.exit(main())".format(*self.entry_point())
        with tempfile.TemporaryDirectory() as folder:
            self.python(Path(folder), ["-c", code, "compare", *words, "--use_gpu=false", "--output=made"])
            return figures_of(read(Path(folder) / "made" / "compare.json"), COMPARISON)

    def entry_point(self) -> tuple[str, str]:
        """Module and function behind the command `recbole-raserec`."""
        for name in ("setup.py", "pyproject.toml"):
            path = self.path / name
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            found = re.search(r"""\brecbole-raserec["']?\s*=\s*["']?([\w.]+):(\w+)""", text)
            if found:
                return found.group(1), found.group(2)
        raise Failed("neither setup.py nor pyproject.toml names the command recbole-raserec")

    def benchmark(self, name: str, data_path: Path, threads: int) -> dict[str, float]:
        """The figures of this package's side of a benchmark."""
        words = [str(self.path / "benchmarks" / "run.py"), name, "--side=ours", f"--data_path={data_path}"]
        with tempfile.TemporaryDirectory() as folder:
            printed = self.python(Path(folder), [*words, f"--threads={threads}"], threads)
        made = json.loads(printed.strip().splitlines()[-1])
        return {key: made[key] for key in (*SPEED[name], "peak_mb") if key in made}


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def figures_of(content: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """These keys of a record, without what is no figure."""
    return {key: _stripped(content[key]) for key in keys if key in content}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items() if key not in NO_FIGURES}
    return [_stripped(item) for item in value] if isinstance(value, list) else value


def first_difference(old: Any, new: Any, names: tuple[str, str] = ("OLD", "NEW"), place: str = "") -> str | None:
    """Where two contents of JSON files differ first, in words; None if they are equal.

    Args:
        old: the one.
        new: the other.
        names: what the two are called.
        place: where both stand in the whole.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{place}/{key}" if place else str(key)
            if key not in old or key not in new:
                return f"{here}: in {names[0] if key in old else names[1]} only"
            found = first_difference(old[key], new[key], names, here)
            if found is not None:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{place}: {len(old)} and {len(new)} values"
        pairs = enumerate(zip(old, new))
        return next((found for n, (a, b) in pairs if (found := first_difference(a, b, names, f"{place}[{n}]"))), None)
    return None if type(old) is type(new) and old == new else f"{place}: {old!r} and {new!r}"


def page_command(tree: Tree, data_path: Path) -> list[str]:
    """The words of the comparison that stands on the page, on the data in `data_path`."""
    text = (tree.path / PAGE).read_text(encoding="utf-8")
    found = re.search(r"^recbole-raserec compare (.*?)\n```", text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit(f"{tree.path / PAGE} has no command `recbole-raserec compare`.")
    words = shlex.split(found.group(1).replace("\\\n", " "))
    own = ("--output=", "--data_path=")
    return [*(word for word in words if not word.startswith(own)), f"--data_path={data_path}"]


def compare_figures(trees: tuple[Tree, Tree], args: argparse.Namespace) -> int:
    """Print a line a row; the number of rows that are not equal."""
    sample = trees[0].path / "dataset"  # the same data for both
    print(f"{'figures':<22}{'OLD, s':>8}{'NEW, s':>8}  first difference", flush=True)
    unequal = 0

    def made(tree: Tree, row: str) -> tuple[Any, float]:
        more = list(SHORT.get(row, ())) if args.quick else []
        started = time.perf_counter()
        try:
            if row == COMPARE:
                words = [word for word in page_command(trees[0], sample) if not (more and word.startswith("--seeds="))]
                found: Any = tree.compare([*words, *more])
            else:
                data_path = args.data_path if row in BEAUTY else sample
                found = tree.run([*{**RUNS, **BEAUTY}[row], f"--data_path={data_path}", *more])
        except Failed as error:
            found = error
        return found, time.perf_counter() - started

    for row in args.rows:
        with ThreadPoolExecutor(args.jobs) as pool:
            (old, old_seconds), (new, new_seconds) = pool.map(made, trees, (row, row))
        failed = [f"{tree.name} failed, {of}" for tree, of in zip(trees, (old, new)) if isinstance(of, Failed)]
        found = "; ".join(failed) or first_difference(old, new)
        unequal += found is not None
        print(f"{row:<22}{old_seconds:>8.1f}{new_seconds:>8.1f}  {found or 'equal'}", flush=True)
    print(f"{len(args.rows) - unequal} of {len(args.rows)} rows equal")
    return unequal


def compare_speed(trees: tuple[Tree, Tree], args: argparse.Namespace) -> int:
    """Print a line a measurement; the number of benchmarks that failed."""
    title = f"speed, {args.rounds} rounds"
    print(f"{title:<36}{'OLD':>10}{'NEW':>10}{'new/old':>9}  range of each", flush=True)
    failures = 0
    for name in args.speed:
        rounds: tuple[list[Any], list[Any]] = ([], [])
        try:
            for number in range(args.rounds):
                for tree, found in zip(trees, rounds):
                    print(f"{name}: round {number + 1}, {tree.name}", file=sys.stderr, flush=True)
                    found.append(tree.benchmark(name, args.data_path, args.threads))
        except Failed as error:
            failures += 1
            print(f"{name:<36}{tree.name} failed, {error}", flush=True)
            continue
        for key in [key for key in rounds[0][0] if key in rounds[1][0]]:
            columns = [[made[key] for made in found] for found in rounds]
            old, new = (statistics.median(values) for values in columns)
            ranges = ", ".join(f"{min(values):.4g} to {max(values):.4g}" for values in columns)
            print(f"{name + ' ' + key:<36}{old:>10.4g}{new:>10.4g}{new / old:>9.3f}  {ranges}", flush=True)
    return failures


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--figures", action="store_true", help="compare figures (the default without --speed)")
    parser.add_argument("--rows", help=f"rows of figures, joined by commas (default: {', '.join([*RUNS, COMPARE])})")
    parser.add_argument("--quick", action="store_true", help="ml-100k: two epochs; comparison: one seed")
    parser.add_argument("--beauty", action="store_true", help="rows on amazon-beauty too, one epoch of each model")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="2: both trees' runs at the same time")
    parser.add_argument(
        "--speed", nargs="?", const=",".join(SPEED), metavar="NAME,...", help=f"default: {', '.join(SPEED)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each benchmark and tree (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a benchmark (default: 1)")
    parser.add_argument("--data_path", type=Path, default=os.environ.get("RASEREC_DATA"), help="has amazon-beauty/")
    args = parser.parse_args(argv)
    rows = [*RUNS, COMPARE, *(BEAUTY if args.beauty else ())]
    args.rows = args.rows.split(",") if args.rows else rows
    args.speed = args.speed.split(",") if args.speed else []
    for given, known in ((args.rows, [*RUNS, COMPARE, *BEAUTY]), (args.speed, list(SPEED))):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"{', '.join(unknown)}: choose from {', '.join(known)}")
    args.figures = args.figures or not args.speed
    if args.speed or (args.figures and any(row in BEAUTY for row in args.rows)):
        where = Path(args.data_path or "")
        if not args.data_path or not (where / "amazon-beauty" / "amazon-beauty.inter").is_file():
            parser.error("--data_path must name the directory that has amazon-beauty/amazon-beauty.inter")
        args.data_path = where.resolve()
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two trees; the exit code."""
    args = arguments(argv)
    trees = (Tree("OLD", args.old.resolve()), Tree("NEW", args.new.resolve()))
    problems = [problem for tree in trees for problem in tree.problems()]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    kernels = [", ".join(tree.kernels()) for tree in trees]
    for tree, names in zip(trees, kernels):
        print(f"{tree.name}: {tree.path} ({names})")
    if kernels[0] != kernels[1]:
        print("The trees have different kernels: their figures may differ in the last digits.")
    bad = compare_figures(trees, args) if args.figures else 0
    bad += compare_speed(trees, args) if args.speed else 0
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
