"""Pairs of equal runs at the same time in one directory: does each process end with the figures of a run alone?

    python experiments/equal_runs.py
    python experiments/equal_runs.py --pairs=24 --at_once=4 --apart=6 --output=equal_runs.json
    python experiments/equal_runs.py --tree=DIR

starts the same command twice, RaSeRec over SASRec with regeneration on the small data set of the repository, in one
current directory with one `checkpoint_dir`, again for each pair. Two such processes want the same patterns,
backbones, memory and module. One may make them while the other waits for and reuses them; but neither may fail, nor
read what is half written. One run alone comes first: its metrics, validation curves, training losses and numbers of
parameters are what all the others must have, to the last digit. Seconds are not compared. `--apart=S` starts the second
process of a pair later, of the first pair by nothing and of the last by S seconds, so that they meet at other stages.

It prints a row a process, with the number of lines in which it said that it waited or reused something (a run alone
reuses its own SASRec), and writes all of it as JSON. Exit code 1 if a process failed or has other figures. `--tree`
runs another checkout with the same Python.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.trees import RECORD, Tree, figures_of, first_difference, last_line, read

ROOT = Path(__file__).resolve().parents[1]

#: The command of every process: all stages, seconds each.
OPTIONS = (
    "--model=RaSeRec", "--backbone=SASRec", "--dataset=planted", "--regeneration=true", "--training=packed",
    "--hidden_size=16", "--inner_size=16", "--n_layers=1", "--epochs=2", "--ram_inner_size=16", "--ram_epochs=2",
    "--regen_layers=1", "--regen_inner_size=16", "--regen_conditions=2", "--regen_epochs=2", "--checkpoint_dir=saved",
    "--threads=1", "--use_gpu=false", "--show_progress=false",
)  # fmt: skip

#: What a process says when it waits for another one, and when it takes what is there.
SAID = {"waited": re.compile(r"\bwait(ing|ed|s)?\b", re.I), "reused": re.compile(r"\breus(ing|ed|es?)\b", re.I)}

#: What the names of the two processes of a pair are made of.
PAIR = ("a", "b")


def start(tree: Tree, folder: Path, name: str, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a run in `folder`; its record and its output are there under `name`."""
    words = [sys.executable, str(tree.path / "run_recbole_raserec.py"), *OPTIONS, *options]
    words += [f"--data_path={tree.path / 'dataset'}", f"--result_file={name}.json"]
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            words, cwd=folder, env=tree.environment(folder), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip


def outcome(process: subprocess.Popen[bytes], folder: Path, name: str, until: float) -> dict[str, Any]:
    """Wait for a run, until a time of `monotonic`: what it left.

    Returns:
        "exit_code" (None: it was ended for taking too long), "waited" and "reused" (lines that say so), "last_line" of
        its output, without the name of the directory, and "figures" (None: there are none).
    """
    try:
        code: int | None = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    printed = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    result = folder / f"{name}.json"
    return {
        "exit_code": code,
        **{name: sum(bool(word.search(line)) for line in printed.splitlines()) for name, word in SAID.items()},
        "last_line": last_line(printed).replace(f"{folder}/", ""),
        "figures": figures_of(read(result), RECORD) if code == 0 and result.is_file() else None,
    }


def run_together(tree: Tree, names: Sequence[str], later: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in one new directory, each `later` seconds after the one before; what each left."""
    with tempfile.TemporaryDirectory() as name:
        folder, until = Path(name), time.monotonic() + args.timeout
        processes = []
        for number, run in enumerate(names):
            time.sleep(later if number else 0)
            processes.append(start(tree, folder, run, args.options))
        return [outcome(process, folder, run, until) for process, run in zip(processes, names)]


def judge(made: dict[str, Any], alone: dict[str, Any]) -> str | None:
    """What is wrong with a run of a pair; None if nothing is."""
    if made["exit_code"] is None:
        return f"took too long; {made['last_line']}"
    if made["figures"] is None:
        return f"exit code {made['exit_code']}: {made['last_line']}"
    return first_difference(alone["figures"], made["figures"], ("the run alone", "this run"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a process."""
    lines = [f"{'pair':>5}{'later, s':>10}  run{'exit':>6}{'waited':>8}{'reused':>8}  figures"]
    for row in rows:
        code = "-" if row["exit_code"] is None else row["exit_code"]
        line = f"{row['pair']:>5}{row['later']:>10.1f}  {row['run']:<3}{code:>6}{row['waited']:>8}{row['reused']:>8}"
        lines.append(f"{line}  {row['difference'] or 'those of the run alone'}")
    return "\n".join(lines)


def summary(rows: Sequence[dict[str, Any]], alone: dict[str, Any]) -> dict[str, int]:
    """Processes by what became of them."""
    return {
        "processes": len(rows),
        "equal to the run alone": sum(row["difference"] is None for row in rows),
        "with other figures": sum(row["difference"] is not None and row["finished"] for row in rows),
        "without figures": sum(not row["finished"] for row in rows),
        "with an exit code other than 0": sum(row["exit_code"] != 0 for row in rows),
        "that waited": sum(row["waited"] > alone["waited"] for row in rows),
        "that reused more than a run alone": sum(row["reused"] > alone["reused"] for row in rows),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12, help="(default: 12)")
    parser.add_argument("--at_once", type=int, default=1, help="pairs that run at the same time (default: 1)")
    parser.add_argument("--apart", type=float, default=0.0, help="seconds that the last pair starts apart (default: 0)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a pair (default: 600)")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to run (default: this one)")
    parser.add_argument("--options", nargs="*", default=[], metavar="--KEY=VALUE", help="more options of every run")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "equal_runs.json", help="the JSON file")
    args, more = parser.parse_known_args()
    args.options += more
    return args


def main() -> int:
    """Run all pairs, write the file, print the table; the exit code."""
    args = arguments()
    tree = Tree("tree", args.tree.resolve())
    (alone,) = run_together(tree, ["alone"], 0.0, args)
    if alone["figures"] is None:
        print(f"The run alone failed, exit code {alone['exit_code']}: {alone['last_line']}", file=sys.stderr)
        return 2

    def pair(number: int) -> list[dict[str, Any]]:
        later = args.apart * number / max(1, args.pairs - 1)
        rows = []
        for run, made in zip(PAIR, run_together(tree, PAIR, later, args)):
            found = {"finished": made["figures"] is not None, "difference": judge(made, alone)}
            rows.append({"pair": number + 1, "later": later, "run": run, **made, **found})
        print(f"pair {number + 1} of {args.pairs} done", file=sys.stderr, flush=True)
        return rows

    with ThreadPoolExecutor(args.at_once) as pool:
        rows = [row for rows in pool.map(pair, range(args.pairs)) for row in rows]
    kept = [{key: value for key, value in row.items() if key != "figures"} for row in rows]
    found = summary(rows, alone)
    content = {
        "command": [*OPTIONS, *args.options], "at_once": args.at_once, "apart": args.apart, "summary": found,
        "alone": alone, "processes": kept,
    }  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(table(rows), "", *(f"{name}: {value}" for name, value in found.items()), sep="\n")
    return 1 if any(row["difference"] is not None or row["exit_code"] != 0 for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
