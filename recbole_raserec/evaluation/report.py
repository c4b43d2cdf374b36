"""Results for people (tables in text, Markdown, LaTeX and CSV) and for programs (a JSON record)."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from logging import getLogger
from typing import Any, Callable, Optional, TypedDict

import pandas as pd
from recbole.utils import ModelType
from tabulate import LATEX_ESCAPE_RULES, DataRow, Line, TableFormat, tabulate

from recbole_raserec.config import Config, short_name
from recbole_raserec.evaluation.protocols import PROTOCOLS, SAMPLED, SEEN_KEPT, SEEN_REMOVED, Metrics, Options
from recbole_raserec.evaluation.ranking import option_of
from recbole_raserec.evaluation.ranks import write_ranks
from recbole_raserec.kernels import loaded, peak_memory_mb
from recbole_raserec.storage import plain, write_json

PROTOCOL_TITLES = {
    SEEN_KEPT: "seen items kept in the ranking (RecBole's way for sequential models)",
    SEEN_REMOVED: "seen items removed from the ranking",
    SAMPLED: "the targets among sampled items (RecBole's modes uniN and popN)",
}
ABSENT = "-"
#: Columns of a terminal that the text of a comparison may take.
WIDTH = 120
_METRIC_TITLES = {"ndcg": "NDCG", "mrr": "MRR", "map": "MAP"}
_DISTRIBUTIONS = {
    "recbole_raserec": ("recbole-raserec",),
    **{name: (name,) for name in ("recbole", "torch", "numpy", "scipy", "pandas")},
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "faiss-gpu-cu11"),
}
_TEXT = TableFormat(Line("", "-", "--", ""), None, None, None, DataRow("", "  ", ""), DataRow("", "  ", ""), 0, None)

Results = Mapping[str, Metrics]  # protocol -> {"recall@10": value, ...}
Rows = list[list[str]]  # the first row is the head
Content = Mapping[str, Any]  # of `compare.json`


class Record(TypedDict, total=False):
    """Everything a result needs to be understood and repeated, ready for JSON."""

    model: str
    backbone: Optional[str]  # what the model retrieves with; None for a baseline
    dataset: str
    seed: int
    metrics: Mapping[str, Any]  # {"base" | "ours": {"valid" | "test": Results}}; a baseline has only "base"
    improvement_percent: dict[str, dict[str, dict[str, Optional[float]]]]  # of "ours" over "base", as `metrics`
    protocol: Mapping[str, Any]  # what the figures mean, see `protocol_description`
    seconds: Mapping[str, float]  # wall time of each stage
    parameters: Mapping[str, int]  # {"base" | "ours": learned numbers of the model}
    peak_memory_mb: Optional[float]  # largest memory of the process, MiB
    curves: Mapping[str, Any]  # {"base" | "ours": validation values and training losses by epoch}
    checkpoint: str  # directory of the trained model, for `Recommender.load`
    checkpoints: Mapping[str, str]  # the same of each stage, by its name in a table
    versions: dict[str, Optional[str]]
    options: Mapping[str, Any]  # of the run


def report_stages(config: Config, stages: Mapping[str, Any], regeneration: Any, seconds: float) -> Record:
    """Write and print the figures of a run that took so many seconds.

    `stages` are the outcomes from the base to the whole pipeline, `regeneration` is that of stage i, or None.
    """
    base, *more = stages.values()
    retrieves = config["model"] == "RaSeRec"
    ends = {"base": base, "ours": more[-1]} if more else {"base": base}
    metrics = {name: outcome.metrics for name, outcome in ends.items()}
    times = {"recommendation": base.seconds}
    if retrieves and more:
        times["retrieval"] = more[-1].seconds
    if regeneration is not None:
        metrics["stages"] = {name: outcome.metrics for name, outcome in stages.items()}
        times["regeneration"] = regeneration.seconds
        times["recommendation_regenerated"] = stages["base + (i)"].seconds
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    record = result_record(
        model=config["model"], backbone=base.name if retrieves else None, dataset=config["dataset"],
        seed=config["seed"], metrics=metrics, seconds={**times, "this_run": seconds}, options=config.explain(),
        protocol=protocol_description(config, validation_in_history=sequential, validation_in_memory=retrieves),
        parameters={name: outcome.parameters for name, outcome in ends.items()}, peak_memory_mb=peak_memory_mb(),
        curves={name: outcome.curve for name, outcome in ends.items()},
    )  # fmt: skip
    record["checkpoints"] = {name: str(outcome.directory.absolute()) for name, outcome in stages.items()}
    record["checkpoint"] = str([*ends.values()][-1].directory.absolute())
    if config["ranks_file"]:
        ranks = {name: outcome.ranks for name, outcome in stages.items() if outcome.ranks is not None}
        write_ranks(config["ranks_file"], ranks, base.splits.vocabulary()["users"], base.splits.seen)
    print("\n" + record_table(record))
    if config["result_file"]:
        write_json(config["result_file"], record)
        getLogger().info(f"Figures written to {config['result_file']}")
    getLogger().info(f"Checkpoint: {record['checkpoint']}")
    if sequential:
        words = ["recbole-raserec", "recommend", record["checkpoint"]]
        words.append(f"--user={base.splits.vocabulary()['users'][1]}")
        getLogger().info(f"Next: {shlex.join(words)}")
    return record


def result_record(
    *, model: str, dataset: str, seed: int, metrics: Mapping[str, Any], protocol: Mapping[str, Any],
    seconds: Mapping[str, float], backbone: Optional[str], options: Mapping[str, Any], parameters: Mapping[str, int],
    peak_memory_mb: Optional[float], curves: Mapping[str, Any],
) -> Record:  # fmt: skip
    """A record of its fields; improvement and versions are added."""
    record: Record = {"model": model, "backbone": backbone, "dataset": dataset, "seed": seed, "metrics": metrics}
    base, ours = metrics.get("base"), metrics.get("ours")
    if base is not None and ours is not None:
        record["improvement_percent"] = {
            phase: {
                name: {key: _rounded(improvement(value, ours[phase][name][key]), 2) for key, value in values.items()}
                for name, values in results.items()
                if name in ours[phase]
            }
            for phase, results in base.items()
            if phase in ours
        }
    rounded = {stage: round(float(value), 3) for stage, value in seconds.items()}
    more: Record = {
        "protocol": protocol, "seconds": rounded, "parameters": parameters,
        "peak_memory_mb": _rounded(peak_memory_mb, 1), "curves": curves, "versions": versions(), "options": options,
    }  # fmt: skip
    return plain({**record, **more})


def protocol_description(
    config: Options, *, validation_in_history: bool = True, validation_in_memory: bool = False
) -> dict[str, Any]:
    """In words and options, how the figures of a run came about.

    Args:
        validation_in_history: the test queries read the validation item as the last of their history.
        validation_in_memory: the validation pairs had joined the memory when the test was run.
    """
    eval_args = config["eval_args"] or {}
    mode = eval_args.get("mode") or "full"
    modes = dict(mode) if isinstance(mode, Mapping) else {"valid": mode, "test": mode}
    names = (SEEN_KEPT, SEEN_REMOVED) if modes.get("test", "full") == "full" else (SAMPLED,)
    ways = {phase: _way(mode) for phase, mode in modes.items()}
    same = len(set(ways.values())) == 1
    seen = "every item of the user before the target, in the whole log"
    if SAMPLED in names:
        seen += "; " + ("they may be drawn" if option_of(config, "repeatable") else "none is drawn")
    return {
        **{name: eval_args.get(name) for name in ("split", "group_by", "order")},
        "ranking": ways["test"] if same else f"{ways['test']}; in the validation {ways['valid']}",
        "seen_items": {name: PROTOCOL_TITLES[name] for name in names},
        "seen_means": seen if SAMPLED in names else f"{seen}; the target itself is never removed",
        "ties": "among equal scores the lower internal item id ranks first",
        "validation_in_history": validation_in_history,
        "validation_in_memory": validation_in_memory,
    }


def _way(mode: str) -> str:
    """What is ranked in an evaluation mode of RecBole, in words."""
    if mode == "full":
        return "every item of the data set"
    how = "uniformly" if mode.startswith("uni") else "by popularity"
    return f"the target and {mode[3:]} items drawn {how} by RecBole's sampler, by the seed"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the figures, and the compiled kernels; None: not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        found[name] = None
        for distribution in reversed(distributions):  # the first that is there counts
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(distribution)
    kernels = loaded()
    found["kernels"] = None if kernels is None else kernels.name.lstrip("_")
    return found


def improvement(base: float, ours: float) -> Optional[float]:
    """Improvement of `ours` over `base` in percent; None where there is no base to improve on."""
    return None if base == 0 or not math.isfinite(base) or not math.isfinite(ours) else 100 * (ours - base) / base


def _rounded(value: Optional[float], digits: int) -> Optional[float]:
    return None if value is None else round(value, digits)


# ------------------------------------------------------------------------------------------------- tables of one run


def record_table(record: Record, *, style: str = "text", width: int = 80, digits: int = 4) -> str:
    """The test figures of a record: of each stage, or of the base and the model over it, or of a baseline."""
    stages, name = record["metrics"].get("stages", record["metrics"]), record["backbone"] or record["model"]
    titles = (record["model"] if stage == "ours" else stage.replace("base", short_name(name)) for stage in stages)
    rows = [(title, phases["test"]) for title, phases in zip(titles, stages.values())]
    table = results_table(rows, len(rows) > 1, style=style, width=width, digits=digits)
    if any(SAMPLED in results for _, results in rows):
        table += "\n\n" + textwrap.fill(f"Ranked: {record['protocol']['ranking']}.", width)
    return table


def results_table(
    results: Sequence[tuple[str, Results]], compare: bool = False, *, style: str = "text", width: int = 80,
    digits: int = 4,
) -> str:  # fmt: skip
    """One row a model and one block a protocol, named in words.

    Args:
        results: name and metrics by protocol of each model; the protocols and metrics are the same.
        compare: add the improvement of the last over the first in percent.
        style: "text" for the terminal, or "markdown".
        width: columns of the terminal; metrics that do not fit go into a second band of the same block.

    Raises:
        ValueError: The models do not have the same protocols and metrics, or the style is unknown.
    """
    if style not in ("text", "markdown"):
        raise ValueError(f"style is {style!r}; it must be 'text' or 'markdown'.")
    protocols, metrics = _shared_keys(results)
    blocks = []
    for protocol in protocols:
        rows = [["model", *map(metric_title, metrics)]]
        rows += [[name, *(f"{of[protocol][key]:.{digits}f}" for key in metrics)] for name, of in results]
        if compare:
            base, ours = results[0][1][protocol], results[-1][1][protocol]
            rows.append(["improvement", *(percent(improvement(base[key], ours[key])) for key in metrics)])
        title = PROTOCOL_TITLES.get(protocol, protocol)
        blocks.append(markdown_block(title, rows) if style == "markdown" else text_block(title, rows, width))
    return "\n\n".join(blocks)


def _shared_keys(results: Sequence[tuple[str, Results]]) -> tuple[list[str], list[str]]:
    """Protocols and metrics of all models, which must agree."""
    if not results:
        raise ValueError("there is no result to show.")
    first, *others = [(name, {protocol: list(values) for protocol, values in of.items()}) for name, of in results]
    for name, shape in others:
        if shape != first[1]:
            raise ValueError(f"{first[0]} and {name} were not evaluated alike: {first[1]} against {shape}.")
    protocols = [name for name in PROTOCOLS if name in first[1]]
    protocols += [name for name in first[1] if name not in PROTOCOLS]
    return protocols, first[1][protocols[0]] if protocols else []


def text_block(title: str, rows: Rows, width: int) -> str:
    """Rows under a title, first column to the left, the others to the right, in bands no wider than `width`."""
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))]
    bands: list[list[int]] = [[0]]
    for column in range(1, len(widths)):
        if len(bands[-1]) > 1 and sum(widths[other] for other in (*bands[-1], column)) - 2 > width:
            bands.append([0])
        bands[-1].append(column)
    parts = [[[row[column] for column in band] for row in rows] for band in bands]
    return "\n".join([title, *(tabulate(part, tablefmt=_TEXT, **_aligned(part)) for part in parts)])


def markdown_block(title: str, rows: Rows) -> str:
    """Rows as a Markdown table under a bold title; by hand, unpadded, so that a new figure changes one line."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in [head, ruler, *body])])


def _aligned(rows: Rows) -> dict[str, Any]:
    return {"colalign": ("left", *["right"] * (len(rows[0]) - 1)), "disable_numparse": True}


def metric_title(key: str) -> str:
    """A metric as a table's head names it: "ndcg@10" is "NDCG@10"."""
    name, at, k = key.partition("@")
    return _METRIC_TITLES.get(name, name.capitalize()) + at + k


def percent(value: float | None) -> str:
    """A signed percentage, `ABSENT` for None."""
    return ABSENT if value is None else f"{value:+.2f}%"


# --------------------------------------------------------------------- tables of a comparison, from `compare.json`


def text_table(content: Content) -> str:
    """For the terminal: a block for each data set and protocol, one for the costs, and what the figures mean."""
    wrapped = functools.partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return _page(content, lambda title, rows: text_block(title, rows, WIDTH), wrapped)


def markdown_table(content: Content) -> str:
    """The same in Markdown."""
    return _page(content, markdown_block, lambda note: f"- {note}")


def latex_table(content: Content) -> str:
    r"""The same in LaTeX, one `table` each with the protocol in its caption; needs `\usepackage{booktabs}`."""
    return "\n\n".join(
        _latex(title, rows, notes)
        for name, data in content["datasets"].items()
        for title, rows, notes in _blocks(name, data)
    )


def csv_table(content: Content) -> str:
    """One line for each data set, protocol, model and metric, with the protocol spelled out in every line."""
    lines = []
    for name, data in content["datasets"].items():
        for row in data["rows"]:
            for protocol, metrics in row["metrics"].items():
                lines += [_line(name, data, row, protocol, metric, value) for metric, value in metrics.items()]
            if not row["metrics"]:
                lines.append([name, "", row["model"], row["base"], *[""] * 9, 0, len(row["failed"]), *[""] * 10])
    return pd.DataFrame(lines, columns=list(_CSV), dtype=object).to_csv(index=False, lineterminator="\n")


#: How a comparison can be printed; `json` is the content itself.
STYLES: dict[str, Callable[[Content], str]] = {
    "text": text_table, "markdown": markdown_table, "latex": latex_table, "csv": csv_table
}  # fmt: skip
_CSV = (
    "dataset", "protocol", "model", "base", "metric", "mean", "std", "validation_mean", "improvement_percent",
    "p_users", "p_users_holm", "p_seeds", "p_seeds_holm", "seeds", "failed", "parameters", "training_seconds",
    "wall_seconds", "peak_memory_mb", "split", "ranking", "seen_items", "ties", "validation_in_history",
    "validation_in_memory",
)  # fmt: skip


def _line(name: str, data: Content, row: Content, protocol: str, metric: str, value: Content) -> list[Any]:
    tested = row.get("significance", {}).get(protocol, {}).get(metric, {})
    gain = row.get("improvement_percent", {}).get(protocol, {}).get(metric)
    of = data["protocol"]
    before = (row.get("validation") or {}).get(protocol, {}).get(metric, {}).get("mean")
    line = [name, protocol, row["model"], row["base"], metric, value["mean"], value["std"], before, gain]
    line += [tested.get(each) for each in ("users", "users_holm", "seeds", "seeds_holm")]
    line += [len(row["seeds"]), len(row["failed"]), row["parameters"]]
    line += [row[each]["mean"] for each in ("training_seconds", "wall_seconds", "peak_memory_mb")]
    line += [_split(of), of["ranking"], of["seen_items"][protocol], of["ties"]]
    return [*line, row["validation_in_history"], row["validation_in_memory"]]


def _page(content: Content, block: Callable[[str, Rows], str], listed: Callable[[str], str]) -> str:
    parts = []
    for name, data in content["datasets"].items():
        for title, rows, notes in _blocks(name, data):
            parts += [block(title, rows), "\n".join(map(listed, notes))]
    if "command" in content:
        made_with = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
        parts.append("\n".join(map(listed, (f"made by `{content['command']}`", f"with {made_with}"))))
    return "\n\n".join(parts)


def _blocks(name: str, data: Content) -> Iterator[tuple[str, Rows, list[str]]]:
    """(title, rows with the head first, notes) of a data set's tables: one a protocol, then the costs."""
    notes = _notes(data)
    protocols = {protocol: None for row in data["rows"] for protocol in row["metrics"]}
    for protocol in protocols:
        metrics = next(list(row["metrics"][protocol]) for row in data["rows"] if protocol in row["metrics"])
        rows = [["model", *map(metric_title, metrics)]]
        for row in data["rows"]:
            rows += _model(row, protocol, metrics)
        yield f"{name}: {PROTOCOL_TITLES.get(protocol, protocol)}", rows, notes[protocol]
    yield from _validation(name, data["rows"])
    costs = [["model", "seeds", "parameters", "training s", "wall s", "peak MiB"]]
    for row in data["rows"]:
        count = row["parameters"]
        cells = [_seeds(row), ABSENT if count is None else f"{count:,}"]
        cells += [_spread(row[each], 1) for each in ("training_seconds", "wall_seconds")]
        costs.append([row["model"], *cells, _spread(row["peak_memory_mb"], 0)])
    note = "training s: of what the row adds to its base, over all its starts; "
    note += "wall s, peak MiB: of the row's run, which finds its base trained; without runs that were interrupted"
    yield f"{name}: cost of a run", costs, [note, *notes["failed"]]


def _validation(name: str, rows: list[Content]) -> Iterator[tuple[str, Rows, list[str]]]:
    """The table of validation figures: by these options are chosen; none for figures of earlier versions."""
    metric = next((row["valid_metric"] for row in rows if row.get("valid_metric")), None)
    protocols = {protocol: None for row in rows for protocol in row.get("validation") or ()}
    if metric is None or not protocols:
        return
    table = [["model", *(f"{metric_title(metric)}, {protocol.replace('_', ' ')}" for protocol in protocols)]]
    for row in rows:
        of = row["validation"]
        table.append([row["model"], *(_spread(of.get(protocol, {}).get(metric), 4) for protocol in protocols)])
    note = "of the weights that were kept; options are chosen by these, not by the test's"
    yield f"{name}: validation", table, [note]


def _model(row: Content, protocol: str, metrics: list[str]) -> Rows:
    """The row of a model, and under it those of its comparison with its base."""
    found = row["metrics"].get(protocol, {})
    rows = [[row["model"], *(_spread(found.get(metric), 4) for metric in metrics)]]
    if row["base"] is None:
        return rows
    gains, tested = (row[each].get(protocol, {}) for each in ("improvement_percent", "significance"))
    rows.append([f"- over {row['base']}", *(percent(gains.get(metric)) for metric in metrics)])
    for name in ("users", "seeds"):
        rows.append([f"- p over {name}", *(_p(tested.get(metric, {}).get(f"{name}_holm")) for metric in metrics)])
    return rows


def _notes(data: Content) -> dict[str, list[str]]:
    """What the figures mean, by protocol, and under "failed" which runs are missing."""
    of = data["protocol"]
    missing = [f"failed: {row['model']}, seed {', '.join(row['failed'])}" for row in data["rows"] if row["failed"]]
    if of is None:
        return {"failed": missing}
    history, memory = (
        ", ".join(row["model"] for row in data["rows"] if row[flag]) or "none"
        for flag in ("validation_in_history", "validation_in_memory")
    )
    shared = [f"split {_split(of)}; {data['users']} users tested", f"ranking: {of['ranking']}"]
    spread = "mean ± standard deviation over the seeds"
    if seeds := sorted({row["pairs"]["seeds"] for row in data["rows"] if row.get("pairs")}):
        spread += "; p: paired t-test against the base, over users (seeds averaged: "
        spread += f"{' or '.join(map(str, seeds))}) and over seeds, Holm's correction over all of this table"
    later = [
        f"ties: {of['ties']}",
        f"validation items in the history that the test reads: {history}; validation pairs in the memory: {memory}",
        spread,
    ]
    notes = {
        protocol: [*shared, f"{title}; seen is {of['seen_means']}", *later, *missing]
        for protocol, title in of["seen_items"].items()
    }
    return {**notes, "failed": missing}


def _split(protocol: Content) -> str:
    split = ", ".join(f"{kind}: {share}" for kind, share in (protocol["split"] or {}).items())
    return f"{split}, order {protocol['order']}, by {protocol['group_by']}"


def _seeds(row: Content) -> str:
    done, failed = len(row["seeds"]), len(row["failed"])
    return f"{done} of {done + failed}" if failed else str(done)


def _spread(value: Optional[Content], digits: int) -> str:
    if value is None or value["mean"] is None:
        return ABSENT
    spread = "" if value["std"] is None else f" ±{value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _p(value: Optional[float]) -> str:
    if value is None:
        return ABSENT
    return "<.001" if value < 0.001 else f"{value:.3f}"


def _latex(title: str, rows: Rows, notes: list[str]) -> str:
    caption = "".join(LATEX_ESCAPE_RULES.get(sign, sign) for sign in ". ".join([title, *notes]))
    table = tabulate(rows, headers="firstrow", tablefmt="latex_booktabs", **_aligned(rows))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}.}}", table, r"\end{table}"]
    return "\n".join(lines).replace("±", r"$\pm$")
