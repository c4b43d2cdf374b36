"""The commands `recommend`, `explain` and `export`: a checkpoint asked from the shell."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from recbole_raserec.errors import InputError

_FILE = click.Path(path_type=Path)


def _writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """The path, or an InputError if nothing can be written there."""
    from recbole_raserec.storage import unwritable

    for problem in unwritable("output", path, option.metavar == "DIR") if path is not None else []:
        raise InputError(f"{problem}.")
    return path


def _shared(k: int) -> Callable[[Callable], Callable]:
    """The argument and the options that both commands have; `k` items are wanted by default."""
    options = [
        click.argument("checkpoint", type=_FILE, metavar="DIR"),
        click.option("--items", metavar="IDS", help="a history: item ids, oldest first, apart by spaces or commas"),
        click.option("--user", metavar="ID", help="whose history it is; without --items the stored one is used"),
        click.option("--k", default=k, metavar="N", help=f"items wanted (default: {k})"),
        click.option("--strict", is_flag=True, help="an unknown item is an error; otherwise it is dropped"),
        click.option("--device", help="cpu, cuda, ... (default: a GPU if there is one)"),
        click.option(
            "--output", type=_FILE, metavar="FILE", callback=_writable, help="write there instead of to the terminal"
        ),
    ]

    def add(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _format(*names: str) -> Callable[[Callable], Callable]:
    text = "(default: that of --output's name, else text)"
    return click.option("--format", "style", type=click.Choice(names), callback=_style, help=text)


def _style(context: click.Context, option: click.Parameter, value: str | None) -> str:
    """The format asked for, or the one that the name of the output ends with."""
    end = (context.params.get("output") or Path()).suffix[1:].lower()
    return value or (end if end in option.type.choices else "text")  # type: ignore[attr-defined]


@click.command(
    short_help="the best items for a history, from the checkpoint of a finished run",
    epilog="""\b
examples:
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --items="50 172 181" --k=5
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --user=42 --format=json
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --input=histories.txt --output=top10.csv --format=csv""",
)
@_shared(10)
@click.option("--input", "source", type=_FILE, metavar="FILE", help="histories, a line each; - for standard input")
@click.option("--keep_seen", is_flag=True, help="do not leave items of the history out")
@click.option("--candidates", metavar="IDS", help="rank only these items")
@click.option("--exclude", metavar="IDS", help="leave these items out")
@_format("text", "json", "csv")
def recommend(
    checkpoint: Path, items: str | None, user: str | None, k: int, strict: bool, device: str | None,
    output: Path | None, source: Path | None, keep_seen: bool, candidates: str | None, exclude: str | None, style: str,
) -> None:  # fmt: skip
    """The best items for a history. DIR is a finished run; its last line names it.

    Each history is a line of item ids, `50 172 181` or `["50", "172"]`; or a row of a .csv log with the columns of the
    data set (user_id, item_id and, to sort by, timestamp).
    """
    from recbole_raserec.serving import Recommender

    if (source is None) == (items is None and user is None):
        raise InputError("give one history by --items or --user, or several by --input.")
    recommender = Recommender.load(checkpoint, device)
    users = None if user is None else [user]
    sequences = _histories(source) if source is not None else None if items is None else [_ids(items)]
    found = recommender.recommend(sequences, k, not keep_seen, _ids(candidates), _ids(exclude), users, strict)
    for label, dropped, popular in zip(found.labels, found.dropped, found.popular):
        if dropped:
            click.echo(f"history {label}: {dropped} unknown items dropped", err=True)
        if popular:
            click.echo(f"history {label}: nothing known of it; the most popular items", err=True)
    titles = dict(zip(recommender.items, recommender.titles)) if recommender.titles else {}
    _write({"text": _text, "json": _json, "csv": _csv}[style](found, titles), output)
    if style == "text" and output is None and len(found) == 1:
        given = [f"--items={items}"] if items is not None else []
        given += [f"--user={user}"] if user is not None else []
        _next("explain", checkpoint, *given) if recommender.name == "RaSeRec" and given else _next("serve", checkpoint)


@click.command(
    short_help="why these: the memories behind each recommended item",
    epilog="""\b
examples:
  recbole-raserec explain saved/RaSeRec-ml-100k-... --items="50 172 181"
  recbole-raserec explain saved/RaSeRec-ml-100k-... --user=42 --format=html --output=why.html""",
)
@_shared(5)
@_format("text", "json", "html")
def explain(
    checkpoint: Path, items: str | None, user: str | None, k: int, strict: bool, device: str | None,
    output: Path | None, style: str,
) -> None:  # fmt: skip
    """Why items are recommended. DIR is a finished run; its last line names it."""
    from recbole_raserec.serving import Recommender

    if items is None and user is None:
        raise InputError("give a history by --items or --user.")
    found = Recommender.load(checkpoint, device).explain(_ids(items), k, user, strict)
    if found.dropped:
        click.echo(f"{found.dropped} unknown items dropped", err=True)
    _write({"text": found.to_text, "json": lambda: found.to_json(2), "html": found.to_html}[style](), output)
    if style == "text" and output is None:
        _next("serve", checkpoint)


@click.command(
    short_help="vectors as tables, networks as ONNX or torch.export programs",
    epilog="""\b
examples:
  recbole-raserec export saved/RaSeRec-ml-100k-... --vectors --output=vectors
  recbole-raserec export saved/RaSeRec-ml-100k-... --onnx --torch_export --output=programs""",
)
@click.argument("checkpoint", type=_FILE, metavar="DIR")
@click.option("--output", type=_FILE, metavar="DIR", callback=_writable, required=True, help="directory to write into")
@click.option("--vectors", is_flag=True, help="vectors of items, users and (RaSeRec) memories")
@click.option(
    "--format",
    "style",
    type=click.Choice(["parquet", "npy"]),
    default="parquet",
    help="of the vectors (default: parquet; npy: with a .csv of the rows)",
)
@click.option("--onnx", is_flag=True, help="backbone and module as ONNX (needs the extra `onnx`)")
@click.option("--torch_export", is_flag=True, help="backbone and module as torch.export programs")
@click.option(
    "--tolerance",
    type=float,
    default=1e-4,
    metavar="X",
    help="largest difference from the package's scores, relative to the largest (default: 1e-4)",
)
def export(
    checkpoint: Path, output: Path, vectors: bool, style: str, onnx: bool, torch_export: bool, tolerance: float
) -> None:  # fmt: skip
    """Write what a finished run, DIR, has learned for other programs. All of it is compared with the scores of this
    package on stored histories."""
    from recbole_raserec.serving import Recommender, write_programs, write_vectors

    kinds = [name for name, wanted in (("onnx", onnx), ("torch_export", torch_export)) if wanted]
    if not kinds and not vectors:
        raise InputError("nothing is asked for: give --vectors, --onnx or --torch_export.")
    recommender = Recommender.load(checkpoint, "cpu")
    for line in write_vectors(recommender, output, style, tolerance) if vectors else []:
        click.echo(line)
    for line in write_programs(recommender, output, kinds, tolerance) if kinds else []:
        click.echo(line)


def _ids(text: str | None) -> Any:
    return None if text is None else text.replace(",", " ").split()


def _histories(path: Path) -> Any:
    if path.suffix == ".csv":
        import pandas as pd

        try:
            return pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise InputError(f"input: {path} cannot be read as a table ({error}).") from None
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"input: {path} cannot be read ({error}).") from None
    return list(_lines(text, path))


def _lines(text: str, path: Path) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield json.loads(line) if line.lstrip().startswith("[") else _ids(line)
        except ValueError:
            raise InputError(f"input: line {number} of {path} is no JSON list: {line:.60}") from None


def _text(found: Any, titles: dict[str, str]) -> str:
    lines = []
    for label, items, scores in zip(found.labels, found.items, found.scores):
        lines += [f"history {label}"] if len(found) > 1 else []
        for rank, (item, score) in enumerate(zip(items, scores), start=1):
            lines.append(f"{rank:>3}. {score:>9.4f}  {item}" + (f"  {titles[item]}" if item in titles else ""))
    return "\n".join(lines)


def _json(found: Any, titles: dict[str, str]) -> str:
    rows = []
    for query, label in enumerate(found.labels):
        items = [
            {"item": item, "score": float(score), **({"title": titles[item]} if item in titles else {})}
            for item, score in zip(found.items[query], found.scores[query])
        ]
        flags = {"dropped": int(found.dropped[query]), "popular": bool(found.popular[query])}
        rows.append({"query": label, "items": items, **flags})
    return json.dumps(rows, ensure_ascii=False, indent=2)


def _csv(found: Any, titles: dict[str, str]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = found.columns()
    writer.writerow([*columns, *(["title"] if titles else [])])
    writer.writerows([*row, *([titles[row[2]]] if titles else [])] for row in zip(*columns.values()))
    return file.getvalue().rstrip("\n")


def _next(command: str, checkpoint: Path, *words: str) -> None:
    """Say, beside the answer, which command a new user may type next."""
    click.echo("next: " + shlex.join(["recbole-raserec", command, str(checkpoint), *words]), err=True)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text)
        return
    from recbole_raserec.storage import replacing

    with replacing(output) as part:
        Path(part).write_text(text + "\n", encoding="utf-8")
