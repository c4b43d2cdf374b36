"""The commands ``recommend`` and ``explain``: a checkpoint asked from the shell."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from recbole_raserec.errors import InputError
from recbole_raserec.storage import replacing

RECOMMEND = """\
Each history is a line of item ids, `50 172 181` or `["50", "172"]`; or a row of a .csv log with the columns of the data
set (user_id, item_id and, to sort by, timestamp).

examples:
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --items="50 172 181" --k=5
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --user=42 --format=json
  recbole-raserec recommend saved/RaSeRec-ml-100k-... --input=histories.txt --output=top10.csv --format=csv"""

EXPLAIN = """\
examples:
  recbole-raserec explain saved/RaSeRec-ml-100k-... --items="50 172 181"
  recbole-raserec explain saved/RaSeRec-ml-100k-... --user=42 --format=html --output=why.html"""


def add_recommend(parser: argparse.ArgumentParser) -> None:
    """The options of ``recommend``."""
    _shared(parser, 10)
    parser.add_argument("--input", type=Path, metavar="FILE", help="histories, a line each; - for standard input")
    parser.add_argument("--keep_seen", action="store_true", help="do not leave items of the history out")
    parser.add_argument("--candidates", metavar="IDS", help="rank only these items")
    parser.add_argument("--exclude", metavar="IDS", help="leave these items out")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="(default: text)")


def add_explain(parser: argparse.ArgumentParser) -> None:
    """The options of ``explain``."""
    _shared(parser, 5)
    parser.add_argument("--format", choices=("text", "json", "html"), default="text", help="(default: text)")


def _shared(parser: argparse.ArgumentParser, k: int) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a finished run; its last line names it")
    parser.add_argument("--items", metavar="IDS", help="a history: item ids, oldest first, apart by spaces or commas")
    parser.add_argument("--user", metavar="ID", help="whose history it is; without --items the stored one is used")
    parser.add_argument("--k", type=int, default=k, help=f"items wanted (default: {k})")
    parser.add_argument("--strict", action="store_true", help="an unknown item is an error; otherwise it is dropped")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to the terminal")


def recommend(args: argparse.Namespace) -> None:
    """Run ``recommend``."""
    from recbole_raserec.serving import Recommender

    given = [name for name in ("items", "user", "input") if getattr(args, name) is not None]
    if not given or ("input" in given and len(given) > 1):
        raise InputError("give one history by --items or --user, or several by --input.")
    recommender = Recommender.load(args.checkpoint, args.device)
    sequences: Any = None if args.items is None else [_ids(args.items)]
    users = None if args.user is None else [args.user]
    if args.input is not None:
        sequences = _histories(args.input)
    found = recommender.recommend(
        sequences, args.k, not args.keep_seen, _ids(args.candidates), _ids(args.exclude), users, args.strict
    )
    for query in range(len(found)):
        if found.dropped[query]:
            print(f"history {found.labels[query]}: {found.dropped[query]} unknown items dropped", file=sys.stderr)
        if found.popular[query]:
            print(f"history {found.labels[query]}: nothing known of it; the most popular items", file=sys.stderr)
    titles = dict(zip(recommender.items, recommender.titles)) if recommender.titles else {}
    _write({"text": _text, "json": _json, "csv": _csv}[args.format](found, titles), args.output)


def explain(args: argparse.Namespace) -> None:
    """Run ``explain``."""
    from recbole_raserec.serving import Recommender

    if args.items is None and args.user is None:
        raise InputError("give a history by --items or --user.")
    recommender = Recommender.load(args.checkpoint, args.device)
    found = recommender.explain(_ids(args.items), args.k, args.user, args.strict)
    if found.dropped:
        print(f"{found.dropped} unknown items dropped", file=sys.stderr)
    _write({"text": found.to_text, "json": lambda: found.to_json(2), "html": found.to_html}[args.format](), args.output)


def _ids(text: Optional[str]) -> Any:
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


def _write(text: str, output: Optional[Path]) -> None:
    if output is None:
        print(text)
        return
    with replacing(output) as part:
        Path(part).write_text(text + "\n", encoding="utf-8")
