"""Write `properties/*.yaml` and the tables of `docs/reference/options.md` from the declarations of the options.

`python -m recbole_raserec.config.properties` writes them, `--check` says which are stale. The files of data sets and of
searches are not written: they choose values.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import yaml
from pydantic.fields import FieldInfo

from recbole_raserec.config.options import (
    OVERALL,
    EncoderOptions,
    LearningOptions,
    Options,
    ProcessOptions,
    TrainingOptions,
    in_words,
    shipped,
    told,
)
from recbole_raserec.config.sources import MODELS, PROPERTIES, options_of

_COLUMN = 32
_BEGIN, _END = "<!-- tables: python -m recbole_raserec.config.properties -->", "<!-- end of the tables -->"

_OVERALL = """\
# Defaults of every run, over RecBole's own. Precedence, highest first: command line, config_dict, config files,
# properties/dataset/DATASET.yaml, properties/model/MODEL.yaml, this file, RecBole's files.
#
# Not set here: train_neg_sample_args. Sequential models that learn by cross entropy over all items need none (null),
# the others keep RecBole's one uniform negative per positive; recbole_raserec.config chooses by model.
"""


def in_order(options: type[Options]) -> dict[str, FieldInfo]:
    """The options of a class with a default: those of the model's own first, then how it is trained."""
    fields = shipped(options)
    if not issubclass(options, LearningOptions):
        return fields
    last = {*EncoderOptions.model_fields, *shipped(TrainingOptions)}
    return {name: fields[name] for name in sorted(fields, key=lambda name: name in last)}


def title(options: type[Options]) -> str:
    """What heads the options of a class."""
    return " ".join((options.__doc__ or "").split())


def _comment(text: str, indent: int = 0) -> list[str]:
    return [" " * indent + f"# {line}" for line in textwrap.wrap(text, (128 if indent else 120) - indent - 2)]


def _entry(name: str, field: FieldInfo) -> list[str]:
    """An option as lines of YAML, with its type and sentence behind the first."""
    flow = None if isinstance(field.default, (dict, list)) else False  # what holds no further mapping, on one line
    text = yaml.safe_dump({name: field.default}, default_flow_style=flow, sort_keys=False, width=1000)
    first, *rest = text.rstrip("\n").split("\n")
    comment = _comment(" ".join(filter(None, (f"({in_words(field).kind})", field.description))), _COLUMN)
    behind = first.ljust(_COLUMN) + comment[0].lstrip() if len(first) < _COLUMN else f"{first}  {comment[0].lstrip()}"
    return [behind, *comment[1:], *rest]


def yaml_of(options: type[Options]) -> str:
    """The options of a class as a part of a YAML file, with a comment each."""
    lines = _comment(title(options))
    for name, field in in_order(options).items():
        above = told(field, "heading", None)
        lines += [] if above is None else ["", *(_comment(above) if above else [])]
        lines += _entry(name, field)
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
    return "" if value is None else f"`{text}`"


def table(options: type[Options]) -> list[str]:
    """The options of a class that say what they do, as lines of a Markdown table."""
    own = in_order(options)
    rows = {**own, **{name: field for name, field in options.model_fields.items() if field.description}}
    lines = ["| option | default | accepts | meaning |", "|---|---|---|---|"]
    for name, field in rows.items():
        default = _cell(field.default) if name in own else "RecBole's"
        cells = (f"`{name}`", default, in_words(field).requirement, field.description or "")
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return lines


def tables() -> str:
    """All options as Markdown: those of every run by section, then those of each model."""
    parts: list[str] = []
    for options in (*OVERALL, ProcessOptions):
        parts += [f"### {title(options).partition(':')[0].partition(' (')[0]}", "", *table(options), ""]
    for name, options in _models():
        parts += [f"## {name}", "", title(options), "", *table(options), ""]
    return "## Every run\n\n" + "\n".join(parts)


def _models() -> Iterable[tuple[str, type[Options]]]:
    first = ["RaSeRec", *(name for name in MODELS if name != "RaSeRec")]
    return [(name, options) for name in first for options in options_of(name, None)]


def files() -> dict[Path, str]:
    """What has to stand in each file."""
    overall = "\n".join([_OVERALL, *map(yaml_of, OVERALL)])
    made = {PROPERTIES / "overall.yaml": overall}
    made.update({PROPERTIES / "model" / f"{name}.yaml": yaml_of(options) for name, options in _models()})
    page = PROPERTIES.parent / "docs" / "reference" / "options.md"
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        before, _, rest = text.partition(_BEGIN)
        made[page] = f"{before}{_BEGIN}\n\n{tables()}\n{_END}{rest.partition(_END)[2]}"
    return made


def main(argv: Optional[list[str]] = None) -> int:
    """Write the files, or, with `--check`, say which are stale; the exit code is 1 if any is."""
    parser = argparse.ArgumentParser(prog="python -m recbole_raserec.config.properties", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are stale")
    check = parser.parse_args(argv).check
    made = files()
    stale = [path for path in made if not path.is_file() or path.read_text(encoding="utf-8") != made[path]]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            path.write_text(made[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
