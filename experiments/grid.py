"""Rows of options times seeds, through the runner: each run once, its figures kept, pages and means made of them."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.evaluation.report import versions
from recbole_raserec.storage import read_json, replacing, try_lock, write_json

ROOT = Path(__file__).resolve().parents[1]
#: Data sets whose timestamp is the position in the user's history.
POSITIONS = ("amazon-beauty", "amazon-toys-games", "amazon-sports-outdoors")
METRICS = ("recall@10", "ndcg@10")

Rows = Mapping[str, Sequence[str]]
#: {label: {seed: record}}
Results = dict[str, dict[str, dict[str, Any]]]


def arguments(doc: str, rows: Rows, dataset: str = "amazon-beauty") -> argparse.ArgumentParser:
    """The parser of a script over a grid."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="directory of the data sets; ml-100k needs none of it")
    parser.add_argument("--dataset", default=dataset)
    parser.add_argument("--checkpoint_dir", default="saved", help="where runs live and finished backbones are found")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020, 2021, 2022])
    parser.add_argument(
        "--rows", nargs="+", choices=list(rows), default=list(rows), metavar="ROW", help="run only these"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of a run (0: the library's choice)")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="options of every run")
    parser.add_argument("--output", type=Path, default=None, help="the JSON file; the page goes beside it")
    return parser


def run(options: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run through the runner, in a process of its own: its result record, reduced.

    Returns:
        {"valid" | "test": {protocol: metrics}} of the model in question, the same under "base" if it has a backbone,
        and "seconds" by stage.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "r.json"
        command = [sys.executable, str(ROOT / "run_recbole_raserec.py"), *options, f"--seed={seed}"]
        command += [f"--dataset={args.dataset}", f"--data_path={args.data_path}", f"--result_file={result}"]
        command += [f"--checkpoint_dir={args.checkpoint_dir}", *(f"--{option}" for option in args.options)]
        command += [f"--threads={args.threads}"] if args.threads else []
        subprocess.run(command, check=True)
        record = read_json(result)
    metrics = record["metrics"]
    reduced = {phase: metrics.get("ours", metrics["base"])[phase] for phase in ("valid", "test")}
    if "ours" in metrics:
        reduced["base"] = metrics["base"]
    return {**reduced, "seconds": record["seconds"]}


def fill(
    rows: Rows, args: argparse.Namespace, name: str, page: Callable[[Results], str],
    make: Callable[[Sequence[str], int, argparse.Namespace], dict[str, Any]] = run,
) -> Results:  # fmt: skip
    """Run what `args.output` lacks, seed by seed; write figures and page after each run.

    Args:
        rows: {label: options}. args: of :func:`arguments`. name: of the script.
        page: Markdown of the results; it is written beside the figures, with :func:`made_by` behind it.
        make: does one run.
    """
    for seed in args.seeds:
        for label in args.rows:
            if str(seed) in found(rows, args.output)[label]:  # several processes may share the file
                continue
            record = {**make(rows[label], seed, args), "arguments": settings(args), "versions": versions()}
            args.output.parent.mkdir(parents=True, exist_ok=True)
            lock = try_lock(args.output.with_name(f".{args.output.name}.lock"), wait=True)
            try:
                results = found(rows, args.output)
                results[label][str(seed)] = record
                write_json(args.output, {"rows": results})
                write_page(args, name, page, results)
            finally:
                lock.release()
    return found(rows, args.output)


def found(rows: Rows, path: Path) -> Results:
    """What the file holds, with a place for each of `rows`, in their order."""
    results: Results = {label: {} for label in rows}
    if path.exists():
        for label, runs in read_json(path)["rows"].items():
            results.setdefault(label, {}).update(runs)
    return results


def settings(args: argparse.Namespace) -> str:
    """The arguments of a call that decide its figures, beside data set, rows and seeds."""
    own = set(vars(arguments("", {}).parse_args(["--data_path="])))
    words = [f"--{name}={value}" for name, value in sorted(vars(args).items()) if name not in own and value is not None]
    words += [f"--threads={args.threads}"] if args.threads else []
    return " ".join([*words, *(["--options", *args.options] if args.options else [])])


def made_by(name: str, args: argparse.Namespace, results: Results) -> str:
    """The commands that make these results, and the versions that they were made with, as Markdown."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    made_with: Counter[str] = Counter()
    for label, runs in results.items():
        for words in dict.fromkeys(run["arguments"] for run in runs.values()):
            seeds = tuple(sorted(seed for seed, run in runs.items() if run["arguments"] == words))
            groups.setdefault((words, seeds), []).append(label)
        made_with.update(_written(run.get("versions")) for run in runs.values())
    output = "" if args.output == default_output(name, args.dataset) else f" --output=results/{args.output.name}"
    lines = ["", "## Made by", "", "```bash"]
    for (words, seeds), labels in groups.items():
        line = f"python experiments/{name}.py --data_path=DIR --dataset={args.dataset}{output}"
        line += f" --seeds {' '.join(seeds)} --rows " + " ".join(f'"{label}"' for label in labels)
        lines.append(f"{line} {words}".rstrip())
    lines += ["```", "", "Versions:", ""]
    lines += [f"- {count} run{'s' * (count > 1)}: {words}" for words, count in made_with.items()]
    return "\n".join(lines) + "\n"


def _written(found: Optional[Mapping[str, Any]]) -> str:
    if not found:
        return "not recorded"
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


def default_output(name: str, dataset: str) -> Path:
    """Where a script writes unless `--output` says otherwise."""
    return ROOT / "results" / f"{name}_{dataset}.json"


def figures(results: Results) -> Results:
    """Without what the file holds about the making of each run."""
    return {
        label: {
            seed: {k: v for k, v in run.items() if k not in ("arguments", "versions")} for seed, run in runs.items()
        }
        for label, runs in results.items()
    }


def write_page(args: argparse.Namespace, name: str, page: Callable[[Results], str], results: Results) -> None:
    """The page beside the figures."""
    with replacing(args.output.with_suffix(".md")) as part:
        Path(part).write_text(
            page(figures(results)).rstrip("\n") + "\n" + made_by(name, args, results), encoding="utf-8"
        )


def main(
    doc: str | None, rows: Rows, name: str, page: Callable[[str, Results], str], dataset: str = "amazon-beauty",
    make: Callable[[Sequence[str], int, argparse.Namespace], dict[str, Any]] = run,
    left_out: Callable[[str], Iterable[str]] = lambda dataset: (), given: Optional[Mapping[str, Any]] = None,
) -> tuple[Results, Path]:  # fmt: skip
    """What the scripts' ``main`` do: read the arguments, fill ``results/<name>_<dataset>.json`` and the page.

    Args:
        page: (data set, results) -> Markdown. left_out: data set -> rows that mean nothing there.
        given: further arguments of the script, which it has read.

    Returns:
        the results and the path of their file.
    """
    args = arguments(doc or "", rows, dataset).parse_args()
    vars(args).update(given or {})
    args.output = (args.output or default_output(name, args.dataset)).absolute()
    args.rows = [row for row in args.rows if row not in left_out(args.dataset)]
    results = fill(rows, args, name, lambda found: page(args.dataset, found), make)
    if any(results.values()):
        write_page(args, name, lambda found: page(args.dataset, found), results)
    return figures(results), args.output


def mean(values: Iterable[float], digits: int = 4) -> str:
    """Mean, and the standard deviation in brackets where there are several."""
    values = list(values)
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cells(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """R@10 / N@10 of records {protocol: metrics}, one cell a protocol."""
    records = list(records)
    return [
        " / ".join(mean(record[protocol][metric] for record in records) for metric in METRICS) for protocol in PROTOCOLS
    ]
