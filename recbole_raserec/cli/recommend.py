"""The commands `recommend` and `explain`: a checkpoint asked from the shell."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from recbole_raserec.errors import InputError

_FILE = click.Path(path_type=Path)


def _shared(k: int) -> Callable[[Callable], Callable]:
    """The argument and the options that both commands have; `k` items are wanted by default."""
    options = [
        click.argument("checkpoint", type=_FILE, metavar="DIR"),
        click.option("--items", metavar="IDS", help="a history: item ids, oldest first, apart by spaces or commas"),
        click.option("--user", metavar="ID", help="whose history it is; without --items the stored one is used"),
        click.option("--k", default=k, metavar="N", help=f"items wanted (default: {k})"),
        click.option("--strict", is_flag=True, help="an unknown item is an error; otherwise it is dropped"),
        click.option("--device", help="cpu, cuda, ... (default: a GPU if there is one)"),
        click.option("--output", type=_FILE, metavar="FILE", help="write there instead of to the terminal"),
    ]

    def add(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _format(*names: str) -> Callable[[Callable], Callable]:
    return click.option("--format", "style", type=click.Choice(names), default="text", help="(default: text)")


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
    sequences: Any = None if items is None else [_ids(items)]
    users = None if user is None else [user]
    if source is not None:
        sequences = _histories(source)
    found = recommender.recommend(sequences, k, not keep_seen, _ids(candidates), _ids(exclude), users, strict)
    for label, dropped, popular in zip(found.labels, found.dropped, found.popular):
        if dropped:
            click.echo(f"history {label}: {dropped} unknown items dropped", err=True)
        if popular:
            click.echo(f"history {label}: nothing known of it; the most popular items", err=True)
    titles = dict(zip(recommender.items, recommender.titles)) if recommender.titles else {}
    _write({"text": _text, "json": _json, "csv": _csv}[style](found, titles), output)


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


def _lines(text: str, path: Path) -> Iterator[list[Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.lstrip().startswith("["):
            yield _ids(line)
            continue
        try:
            yield json.loads(line)
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
    for row in zip(*columns.values()):
        writer.writerow([*row, *([titles[row[2]]] if titles else [])])
    return file.getvalue().rstrip("\n")


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text)
        return
    from recbole_raserec.storage import replacing

    with replacing(output) as part:
        Path(part).write_text(text + "\n", encoding="utf-8")
