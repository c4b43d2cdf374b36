"""Models against each other: every model on every data set with every seed, and tables of what can be told apart."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from recbole_raserec.comparison.figures import Row, figures
from recbole_raserec.comparison.plan import CELLS, SAVED, Cell, Plan, Problems, Several, make_plan
from recbole_raserec.comparison.runner import command_words, environment_of, finished, run_cells
from recbole_raserec.distributed import cores, layout_of
from recbole_raserec.errors import MissingExtraError, RaSeRecError, nearest
from recbole_raserec.evaluation import PROTOCOL_TITLES, STYLES, metric_title, plot_bars, plot_lines, versions
from recbole_raserec.storage import read_json, replacing, write_json

# What is drawn from the figures of a comparison: its tables, and with matplotlib its plots.


#: The figures; every table and the plots are drawn from this file.
FIGURES = "compare.json"

#: Files of the tables, and the plot of all metrics.
TABLES = {"text": "compare.txt", "markdown": "compare.md", "latex": "compare.tex", "csv": "compare.csv"}
PLOT = "compare.png"

#: Plots of groups of targets, and the words on their axes.
GROUPS = {"popularity": "users who had the target in training", "history": "items in the history"}

#: Plot of the validation values over the epochs.
TRAINING = "compare_training.png"

#: {title: {model: {x: values of the seeds}}}
Panels = dict[str, dict[str, dict[Any, list[float]]]]


def draw(output: Union[str, os.PathLike]) -> None:
    """Make the tables and, with matplotlib, the plots of a directory anew from its ``compare.json``."""
    folder = Path(output)
    content = read_json(folder / FIGURES)
    for style, name in TABLES.items():
        with replacing(folder / name) as part:
            Path(part).write_text(STYLES[style](content).rstrip("\n") + "\n", encoding="utf-8")
    try:
        if panels := metric_panels(content):
            plot_bars(folder / PLOT, panels, "", "mean over the seeds")
        for grouping, title in GROUPS.items():
            if panels := group_panels(content, grouping):
                plot_bars(folder / f"compare_{grouping}.png", panels, title, "mean over the seeds")
        if panels := training_panels(content):
            plot_lines(folder / TRAINING, panels, "epoch of the row's own training", "validation, mean over the seeds")
    except MissingExtraError as error:
        print(f"no {PLOT}: {error}", file=sys.stderr)


def _shown(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Bases and what stands on them, else all rows."""
    bases = {row["base"] for row in data["rows"]} - {None}
    return [row for row in data["rows"] if not bases or row["base"] or row["model"] in bases]


def metric_panels(content: Mapping[str, Any]) -> Panels:
    """{data set and protocol: {model: {metric: values of the seeds}}}."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        shown = _shown(data)
        for protocol in {each: None for row in shown for each in row["metrics"]}:
            panels[_title(name, protocol)] = {
                row["model"]: {
                    metric_title(metric).replace("@", "\n@"): [
                        seed["metrics"][protocol][metric] for seed in row["seeds"].values()
                    ]
                    for metric in row["metrics"][protocol]
                }
                for row in shown
                if protocol in row["metrics"]
            }
    return panels


def group_panels(content: Mapping[str, Any], grouping: str) -> Panels:
    """{data set, metric and protocol: {model: {quintile: values of the seeds}}}; runs without groups are left out."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        for row in _shown(data):
            for seed in row["seeds"].values():
                for quintile, values in seed.get("groups", {}).get(grouping, {}).items():
                    for protocol in values.keys() & row["metrics"].keys():
                        panel = panels.setdefault(f"{_title(name, protocol)}, {metric_title(seed['grouped'])}", {})
                        panel.setdefault(row["model"], {}).setdefault(quintile, []).append(values[protocol])
    return dict(sorted(panels.items()))


def training_panels(content: Mapping[str, Any]) -> Panels:
    """{data set and metric: {model: {epoch: validation values of the seeds}}}, up to the last epoch of all seeds."""
    panels: Panels = {}
    for name, data in content["datasets"].items():
        for row in _shown(data):
            curves = [seed.get("curve") or {} for seed in row["seeds"].values()]
            valid = [dict(curve.get("valid", ())) for curve in curves]
            epochs = sorted(set.intersection(*map(set, valid))) if valid else []
            if epochs:
                panel = panels.setdefault(f"{name}: {metric_title(curves[0]['metric'])}", {})
                panel[row["model"]] = {epoch: [values[epoch] for values in valid] for epoch in epochs}
    return panels


def _title(dataset: str, protocol: str) -> str:
    return f"{dataset}: {PROTOCOL_TITLES[protocol].partition(' (')[0]}"


#: What can be printed.
FORMATS = (*STYLES, "json")

#: Options of the command that are none of `run`.
OWN = ("models", "datasets", "seeds", "output", "jobs", "format")


def compare(
    models: Several,
    datasets: Several,
    seeds: Union[str, int, Sequence[int]] = 5,
    output: str = "",
    jobs: Union[str, int] = 1,
    config_file_list: Optional[Sequence[str]] = None,
    argv: Sequence[str] = (),
    *,
    problems: Optional[Problems] = None,
) -> dict[str, Any]:
    """Run what is missing of a comparison, and write its tables.

    Every cell (model, data set, seed) runs through the runner in a process of its own. Finished cells are found again
    by the fingerprint of their options, data and versions, so the same call continues an interrupted comparison. The
    base of a RaSeRec row, and of one with regeneration, is a row of its own, once for all that stand on it.

    Args:
        models: specs ``NAME[:key=value[:key=value...]]``, a list or joined by commas: a model and its own options.
        datasets: names, a list or joined by commas.
        seeds: how many, from the default of `seed` on (5 or "5": 2020 to 2024); or a list ([2020, 2021] or "2020,2021",
            the one seed 2020 as "2020,").
        output: directory of cells, tables and figures; `checkpoint_dir` lies in it unless it is given.
        jobs: cells to run at a time, each with its part of the cores unless `threads` is given.
        config_file_list, argv: options of all models, YAML files and ``--key=value``.
        problems: found by the caller; they are raised with those found here.

    Returns:
        the content of ``compare.json``: "datasets" ({name: see :func:`recbole_raserec.comparison.figures.figures`}),
        "failed" (one {"cell", "dataset", "seed", "model", "error"} each), "seeds", "options", "versions",
        "command" (the line that makes it, without `jobs`).

    Raises:
        ConfigError: with every problem, before anything runs; also where `output` holds figures of another protocol.
    """
    environment = environment_of(os.environ)  # before a configuration chooses devices for this process
    problems = problems or Problems()
    count = _count(jobs, problems)
    plan = make_plan(models, datasets, seeds, output, config_file_list, argv, problems)
    folder = plan.output / CELLS
    folder.mkdir(parents=True, exist_ok=True)

    def words(cell: Cell) -> list[str]:
        made: dict[str, Any] = {"show_progress": False}
        if "checkpoint_dir" not in cell.options:
            made["checkpoint_dir"] = str(plan.output / SAVED)
        if count > 1 and not cell.options.get("threads"):
            made["threads"] = max(1, cores() // count // layout_of(cell.options).nproc)
        return command_words(cell, folder, made)

    failed = run_cells(plan.cells, folder, count, words, environment, _say)
    content = {
        "format": "recbole-raserec comparison",
        "command": _command(models, datasets, plan.seeds, output, config_file_list, argv),
        "seeds": list(plan.seeds),
        "options": list(argv),
        "datasets": {name: figures(_rows(plan, name, failed)) for name in plan.rows},
        "failed": [
            {
                "cell": cell.name,
                "dataset": cell.dataset,
                "seed": cell.seed,
                "model": cell.row,
                "error": failed[cell.name],
            }
            for cell in plan.cells
            if cell.name in failed
        ],
        "versions": versions(),
    }
    write_json(plan.output / FIGURES, content)
    draw(plan.output)
    return content


def run_command(
    own: Mapping[str, str], config_files: Optional[Sequence[str]], argv: Sequence[str], model: Optional[str],
    dataset: Optional[str],
) -> None:  # fmt: skip
    """The command ``recbole-raserec compare``: :func:`compare`, and its table printed in the format asked for.

    Args:
        own: options of :data:`OWN`, as texts. config_files, argv: those of `run`.
        model, dataset: given in the way of `run`, which is a mistake here.

    Raises:
        ConfigError: as :func:`compare`. RaSeRecError: cells failed, with their last words; the table is printed.
    """
    problems = Problems()
    for name, value in (("model", model), ("dataset", dataset)):
        if value is not None:
            problems.add([f"{name}: {value!r}: a comparison has several; write --{name}s={value}"])
    style = own.get("format", "text")
    if style not in FORMATS:
        guess = nearest(style, FORMATS)
        remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(FORMATS)}"
        problems.add([f"format: {style!r} is unknown; {remedy}"])
    output, seeds, jobs = own.get("output", ""), own.get("seeds", "5"), own.get("jobs", "1")
    content = compare(
        own.get("models", ""), own.get("datasets", ""), seeds, output, jobs, config_files, argv, problems=problems
    )
    name = FIGURES if style == "json" else TABLES[style]
    print((Path(output) / name).read_text(encoding="utf-8"), end="")
    if content["failed"]:
        raise RaSeRecError(_failures(content))


def _command(
    models: Several, datasets: Several, seeds: Sequence[int], output: str, config_files: Optional[Sequence[str]],
    argv: Sequence[str],
) -> str:  # fmt: skip
    several = {"models": models, "datasets": datasets}
    words = [f"--{name}={given if isinstance(given, str) else ','.join(given)}" for name, given in several.items()]
    words.append(f"--seeds={','.join(map(str, seeds))}{',' if len(seeds) == 1 else ''}")
    words += [f"--config_files={' '.join(config_files)}"] if config_files else []
    return shlex.join(["recbole-raserec", "compare", *words, *argv, f"--output={output}"])


def _count(jobs: Union[str, int], problems: Problems) -> int:
    text = str(jobs).strip()
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    problems.add([f"jobs: {jobs!r} is no number of processes; write for example --jobs=2"])
    return 1


def _rows(plan: Plan, dataset: str, failed: Mapping[str, str]) -> list[Row]:
    rows = []
    for label, base in plan.rows[dataset].items():
        cells = [cell for cell in plan.cells if (cell.dataset, cell.row) == (dataset, label)]
        found = {cell.seed: finished(plan.output / CELLS, cell) for cell in cells}
        runs = {seed: run for seed, run in found.items() if run is not None}
        rows.append(Row(label, base, runs, {cell.seed: failed[cell.name] for cell in cells if cell.name in failed}))
    return rows


def _failures(content: Mapping[str, Any]) -> str:
    parts = [f"{len(content['failed'])} of the cells failed; the same command tries them again"]
    for of in content["failed"]:
        words = "\n".join(f"    {line}" for line in of["error"].splitlines())
        parts.append(f"  {of['dataset']}, seed {of['seed']}, {of['model']}:\n{words}")
    return "\n".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
