"""The tables of a comparison, each drawn from the content of ``compare.json``: text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Callable, Optional

from recbole_raserec.evaluation.report import (
    ABSENT,
    PROTOCOL_TITLES,
    markdown_block,
    metric_title,
    percent,
    text_block,
)

#: Columns of a terminal that the text table may take.
WIDTH = 120

Content = Mapping[str, Any]
Rows = list[list[str]]


def text_table(content: Content) -> str:
    """For the terminal: a block for each data set and protocol, one for the costs, and what the figures mean."""

    def listed(notes: list[str]) -> str:
        return "\n".join(textwrap.fill(note, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for note in notes)

    return _page(content, lambda title, rows: text_block(title, rows, WIDTH), listed)


def markdown_table(content: Content) -> str:
    """The same in Markdown."""
    return _page(content, markdown_block, lambda notes: "\n".join(f"- {note}" for note in notes))


def latex_table(content: Content) -> str:
    r"""The same in LaTeX, one ``table`` each with the protocol in its caption; needs ``\usepackage{booktabs}``."""
    return "\n\n".join(
        _latex(title, rows, notes)
        for name, data in content["datasets"].items()
        for title, rows, notes in _blocks(name, data)
    )


def csv_table(content: Content) -> str:
    """One line for each data set, protocol, model and metric, with the protocol spelled out in every line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV)
    for name, data in content["datasets"].items():
        for row in data["rows"]:
            for protocol, metrics in row["metrics"].items():
                for metric, value in metrics.items():
                    writer.writerow(_line(name, data, row, protocol, metric, value))
            if not row["metrics"]:
                writer.writerow([name, "", row["model"], row["base"], "", *[""] * 8, 0, len(row["failed"])])
    return stream.getvalue()


#: How a comparison can be printed; ``json`` is the content itself.
STYLES: dict[str, Callable[[Content], str]] = {
    "text": text_table,
    "markdown": markdown_table,
    "latex": latex_table,
    "csv": csv_table,
}

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


def _page(content: Content, block: Callable[[str, Rows], str], listed: Callable[[list[str]], str]) -> str:
    parts = []
    for name, data in content["datasets"].items():
        for title, rows, notes in _blocks(name, data):
            parts += [block(title, rows), listed(notes)]
    if "command" in content:
        made_with = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
        parts.append(listed([f"made by `{content['command']}`", f"with {made_with}"]))
    return "\n\n".join(parts)


def _blocks(name: str, data: Content) -> Iterator[tuple[str, Rows, list[str]]]:
    """(title, rows with the head first, notes) of a data set's tables: one a protocol, then the costs."""
    notes = _notes(data)
    protocols = {protocol: None for row in data["rows"] for protocol in row["metrics"]}
    for protocol in protocols:
        first = next(row for row in data["rows"] if protocol in row["metrics"])
        metrics = list(first["metrics"][protocol])
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
    yield (
        f"{name}: cost of a run",
        costs,
        [
            "training s: of what the row adds to its base, over all its starts; "
            "wall s, peak MiB: of the row's run, which finds its base trained; without runs that were interrupted",
            *notes["failed"],
        ],
    )


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
    yield (
        f"{name}: validation",
        table,
        ["of the weights that were kept; options are chosen by these, not by the test's"],
    )


def _model(row: Content, protocol: str, metrics: list[str]) -> Rows:
    """The row of a model, and under it those of its comparison with its base."""
    found = row["metrics"].get(protocol, {})
    rows = [[row["model"], *(_spread(found.get(metric), 4) for metric in metrics)]]
    if row["base"] is None:
        return rows
    gains, tested = (row[each].get(protocol, {}) for each in ("improvement_percent", "significance"))
    rows.append([f"- over {row['base']}", *(percent(gains.get(metric)) for metric in metrics)])
    for name in ("users", "seeds"):
        p = [_p(tested.get(metric, {}).get(f"{name}_holm")) for metric in metrics]
        rows.append([f"- p over {name}", *p])
    return rows


def _notes(data: Content) -> dict[str, list[str]]:
    """What the figures mean, by protocol, and under "failed" which runs are missing."""
    of = data["protocol"]
    missing = [f"failed: {row['model']}, seed {', '.join(row['failed'])}" for row in data["rows"] if row["failed"]]
    if of is None:
        return {"failed": missing}
    by_flag = {
        flag: [row["model"] for row in data["rows"] if row[flag]]
        for flag in ("validation_in_history", "validation_in_memory")
    }
    shared = [f"split {_split(of)}; {data['users']} users tested", f"ranking: {of['ranking']}"]
    later = [
        f"ties: {of['ties']}",
        f"validation items in the history that the test reads: {_names(by_flag['validation_in_history'])}; "
        f"validation pairs in the memory: {_names(by_flag['validation_in_memory'])}",
    ]
    pairs = [row["pairs"] for row in data["rows"] if row.get("pairs")]
    if pairs:
        seeds = sorted({pair["seeds"] for pair in pairs})
        later.append(
            "mean ± standard deviation over the seeds; p: paired t-test against the base, over users (seeds averaged: "
            f"{' or '.join(map(str, seeds))}) and over seeds, Holm's correction over all of this table"
        )
    else:
        later.append("mean ± standard deviation over the seeds")
    notes = {
        protocol: [*shared, f"{title}; seen is {of['seen_means']}", *later, *missing]
        for protocol, title in of["seen_items"].items()
    }
    return {**notes, "failed": missing}


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


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
    head, *body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
    caption = ". ".join(_escaped(note) for note in [title, *notes])
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{caption}.}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


def _escaped(text: str) -> str:
    for sign, code in _LATEX.items():
        text = text.replace(sign, code)
    return text


#: The backslash first: the codes have some.
_LATEX = {
    "\\": r"\textbackslash ", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde ", "^": r"\textasciicircum ", "<": r"$<$", ">": r"$>$", "±": r"$\pm$",
}  # fmt: skip
