"""Models against each other: every model on every data set with every seed, and tables of what can be told apart.

`compare` plans the runs, starts what is missing and writes the figures to `compare.json`; `draw` makes the tables and,
with matplotlib, the plots from that file.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from recbole_raserec.comparison.figures import Row, figures
from recbole_raserec.comparison.plan import CELLS, SAVED, Plan, Problems, Run, Seeds, Several, make_plan, named
from recbole_raserec.comparison.runner import command_words, environment_of, finished, run_all
from recbole_raserec.config import SAMPLED, folder_of
from recbole_raserec.distributed import cores, layout_of
from recbole_raserec.errors import MissingExtraError, RaSeRecError, nearest
from recbole_raserec.evaluation import PROTOCOL_TITLES, STYLES, metric_title, plot_bars, plot_lines, versions
from recbole_raserec.storage import read_json, replacing, write_json

#: The figures; every table and the plots are drawn from this file.
FIGURES = "compare.json"
#: Files of the tables, and the plot of all metrics.
TABLES = {"text": "compare.txt", "markdown": "compare.md", "latex": "compare.tex", "csv": "compare.csv"}
PLOT = "compare.png"
#: Plots of groups of targets, and the words on their axes.
GROUPS = {"popularity": "users who had the target in training", "history": "items in the history"}
#: `{title: {model: {x: values of the seeds}}}`
Panels = dict[str, dict[str, dict[Any, list[float]]]]


def compare(
    models: Several, datasets: Several, seeds: Seeds = 5, output: str = "", jobs: Union[str, int] = 1,
    config_file_list: Optional[Sequence[str]] = None, argv: Sequence[str] = (), *, problems: Optional[Problems] = None,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing of a comparison, and write its tables.

    Each model, data set and seed is a run in a process of its own. Finished runs are found again by the fingerprint of
    their options, data and versions, so the same call continues an interrupted comparison. The base of a RaSeRec row,
    and of one with regeneration, is a row of its own, once for all that are built on it.

    Args:
        models: specs `NAME[:key=value[:key=value...]]`, a list or joined by commas: a model and its own options. A
            model of one's own is `package.module:Class`, or in a list the class.
        datasets: names, a list or joined by commas.
        seeds: how many, from the default of `seed` on (5 or "5": 2020 to 2024); or a list ([2020, 2021] or "2020,2021",
            the one seed 2020 as "2020,").
        output: directory of runs, tables and figures; `checkpoint_dir` lies in it unless it is given.
        jobs: runs at a time, each with its part of the cores unless `threads` is given.
        config_file_list: YAML files of options of all models.
        argv: options of all models, `--key=value`.
        problems: found by the caller; they are raised with those found here.

    Returns:
        the content of `compare.json`: "datasets" (`{name: see comparison.figures.figures}`), "failed" (one
        `{"cell", "dataset", "seed", "model", "error"}` each), "seeds", "options", "versions", "command" (the line that
        makes it, without `jobs`).

    Raises:
        ConfigError: with every problem, before anything runs; also where `output` holds figures of another protocol.
        RaSeRecError: runs failed, the first of them first, with their last words; all files are written.
    """
    content = _compare(models, datasets, seeds, output, jobs, config_file_list, argv, problems)
    _raise_failed(content)
    return content


def _compare(
    models: Several, datasets: Several, seeds: Seeds, output: str, jobs: Union[str, int],
    config_file_list: Optional[Sequence[str]], argv: Sequence[str], problems: Optional[Problems],
) -> dict[str, Any]:  # fmt: skip
    environment = environment_of(os.environ)  # before a configuration chooses devices for this process
    problems, text = problems or Problems(), str(jobs).strip()
    if (count := int(text) if text.isascii() and text.isdigit() else 0) < 1:
        problems.add(f"jobs: {jobs!r} is no number of processes; write for example --jobs=2")
    plan = make_plan(models, datasets, seeds, output, config_file_list, argv, problems)
    folder = plan.output / CELLS
    folder.mkdir(parents=True, exist_ok=True)

    def words(run: Run) -> list[str]:
        made: dict[str, Any] = {"show_progress": False}
        if "checkpoint_dir" not in run.options:
            made["checkpoint_dir"] = str(plan.output / SAVED)
        if count > 1 and not run.options.get("threads"):
            made["threads"] = max(1, cores() // count // layout_of(run.options).nproc)
        return command_words(run, folder, made)

    say = functools.partial(print, file=sys.stderr, flush=True)
    named_models = [name for run in plan.runs for name in (run.model, str(run.options.get("backbone", "")))]
    paths = [*(place for name in named_models for place in folder_of(name)), environment.get("PYTHONPATH")]
    if any(paths):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))
    failed = run_all(plan.runs, folder, count, words, environment, say)
    content = {
        "format": "recbole-raserec comparison",
        "command": _command({"models": models, "datasets": datasets}, plan.seeds, output, config_file_list, argv),
        "seeds": list(plan.seeds),
        "options": list(argv),
        "datasets": {name: figures(_rows(plan, name, failed)) for name in plan.rows},
        "failed": [
            {"cell": run.name, "dataset": run.dataset, "seed": run.seed, "model": run.row, "error": failed[run.name]}
            for run in plan.runs
            if run.name in failed
        ],
        "versions": versions(),
    }
    write_json(plan.output / FIGURES, content)
    draw(plan.output)
    return content


def run_command(
    models: str = "", datasets: str = "", seeds: str = "5", output: str = "", jobs: str = "1", style: str = "text",
    config_files: Optional[Sequence[str]] = None, argv: Sequence[str] = (), **misplaced: Optional[str],
) -> None:  # fmt: skip
    """The command `recbole-raserec compare`: `compare`, and its table printed in the format asked for.

    Args:
        models: as of `compare`; so are the others.
        style: of what is printed: text, markdown, latex, csv or json.
        misplaced: options of `run` that are several here, by name; a given one is a mistake.

    Raises:
        ConfigError: as `compare`.
        RaSeRecError: runs failed, with their last words; the table is printed.
    """
    problems = Problems()
    for name, value in misplaced.items():
        if value is not None:
            problems.add(f"{name}: {value!r}: a comparison has several; write --{name}s={value}")
    files = {**TABLES, "json": FIGURES}
    if style not in files:
        guess = nearest(style, files)
        remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(files)}"
        problems.add(f"format: {style!r} is unknown; {remedy}")
    content = _compare(models, datasets, seeds, output, jobs, config_files, argv, problems)
    print((Path(output) / files[style]).read_text(encoding="utf-8"), end="")
    _raise_failed(content)


def _raise_failed(content: Mapping[str, Any]) -> None:
    if content["failed"]:
        parts = [f"{len(content['failed'])} of the runs failed; the same command tries them again"]
        for of in content["failed"]:
            words = "\n".join(f"    {line}" for line in of["error"].splitlines())
            parts.append(f"  {of['dataset']}, seed {of['seed']}, {of['model']}:\n{words}")
        raise RaSeRecError("\n".join(parts))


def _command(several: Mapping[str, Several], seeds: Sequence[int], output: str, files: Any, argv: Sequence[str]) -> str:
    words = [
        f"--{name}={given if isinstance(given, str) else ','.join(map(named, given))}"
        for name, given in several.items()
    ]
    words.append(f"--seeds={','.join(map(str, seeds))}{',' if len(seeds) == 1 else ''}")
    words += [f"--config_files={' '.join(files)}"] if files else []
    return shlex.join(["recbole-raserec", "compare", *words, *argv, f"--output={output}"])


def _rows(plan: Plan, dataset: str, failed: Mapping[str, str]) -> list[Row]:
    rows = []
    for label, base in plan.rows[dataset].items():
        runs = [run for run in plan.runs if (run.dataset, run.row) == (dataset, label)]
        found = {run.seed: finished(plan.output / CELLS, run) for run in runs}
        done = {seed: run for seed, run in found.items() if run is not None}
        rows.append(Row(label, base, done, {run.seed: failed[run.name] for run in runs if run.name in failed}))
    return rows


def draw(output: Union[str, os.PathLike]) -> None:
    """Make the tables and, with matplotlib, the plots of a directory again from its `compare.json`."""
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
            words = "epoch of the row's own training", "validation, mean over the seeds"
            plot_lines(folder / "compare_training.png", panels, *words)
    except MissingExtraError as error:
        print(f"no {PLOT}: {error}", file=sys.stderr)


def metric_panels(content: Mapping[str, Any]) -> Panels:
    """`{data set and protocol: {model: {metric: values of the seeds}}}`."""
    panels: Panels = {}
    for name, row in _shown(content):
        for protocol, metrics in row["metrics"].items():
            found = [seed["metrics"][protocol] for seed in row["seeds"].values()]
            panels.setdefault(_title(name, protocol), {})[row["model"]] = {
                metric_title(metric).replace("@", "\n@"): [values[metric] for values in found] for metric in metrics
            }
    return panels


def group_panels(content: Mapping[str, Any], grouping: str) -> Panels:
    """`{data set, metric and protocol: {model: {quintile: values of the seeds}}}`; runs without groups are left out."""
    panels: Panels = {}
    for name, row in _shown(content):
        for seed in row["seeds"].values():
            for quintile, values in seed.get("groups", {}).get(grouping, {}).items():
                for protocol in values.keys() & row["metrics"].keys():
                    panel = panels.setdefault(f"{_title(name, protocol)}, {metric_title(seed['grouped'])}", {})
                    panel.setdefault(row["model"], {}).setdefault(quintile, []).append(values[protocol])
    return dict(sorted(panels.items()))


def training_panels(content: Mapping[str, Any]) -> Panels:
    """`{data set and metric: {model: {epoch: validation values of the seeds}}}`, up to the last epoch of all seeds."""
    panels: Panels = {}
    for name, row in _shown(content):
        curves = [seed.get("curve") or {} for seed in row["seeds"].values()]
        valid = [dict(curve.get("valid", ())) for curve in curves]
        epochs = sorted(set.intersection(*map(set, valid))) if valid else []
        if epochs:
            sampled = ", among sampled items" if SAMPLED in row.get("validation", ()) else ""
            panel = panels.setdefault(f"{name}: {metric_title(curves[0]['metric'])}{sampled}", {})
            panel[row["model"]] = {epoch: [values[epoch] for values in valid] for epoch in epochs}
    return panels


def _shown(content: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(data set, row) of the bases and what is built on them, else of all rows."""
    for name, data in content["datasets"].items():
        bases = {row["base"] for row in data["rows"]} - {None}
        yield from ((name, row) for row in data["rows"] if not bases or row["base"] or row["model"] in bases)


def _title(dataset: str, protocol: str) -> str:
    return f"{dataset}: {PROTOCOL_TITLES[protocol].partition(' (')[0]}"
