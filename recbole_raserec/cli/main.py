"""The command ``recbole-raserec``: `run` (the default) and what comes before and after it.

Nothing heavy is imported before it is needed: ``--help`` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from recbole_raserec import __version__
from recbole_raserec.errors import ConfigError, RaSeRecError

# What ``recbole-raserec --help`` and ``recbole-raserec COMMAND --help`` print.


USAGE = """\
usage: recbole-raserec [run] --model=MODEL --dataset=DATASET [--OPTION=VALUE ...]
       recbole-raserec prepare --input=FILE --format=FORMAT --output=DIR --name=NAME
       recbole-raserec regenerate --dataset=DATASET --output=DIR [--OPTION=VALUE ...]
       recbole-raserec compare --models=MODEL,MODEL --datasets=DATASET,... --output=DIR [--OPTION=VALUE ...]
       recbole-raserec tune --model=MODEL --dataset=DATASET --output=DIR [--OPTION=VALUE ...]
       recbole-raserec recommend DIR --items=IDS [--k=N]
       recbole-raserec explain DIR --items=IDS [--k=N]
       recbole-raserec serve DIR [--port=N] [--token_file=FILE]
       recbole-raserec doctor
       recbole-raserec --version

  run         train and evaluate a model (the default)
  prepare     turn raw data into the atomic files that `run` reads
  regenerate  regenerate a training set (DR4SR) and write it as atomic files
  compare     models against each other over data sets and seeds, with significance
  tune        search options by their validation figures (needs the extra `tune`)
  recommend   the best items for a history, from the checkpoint of a finished run
  explain     why these: the memories behind each recommended item
  serve       answer over HTTP, and take up new interactions
  doctor      report the installation, and test it in ten seconds

`recbole-raserec COMMAND --help` lists the options of a command."""

RUN_HELP = """\
usage: recbole-raserec run --model=MODEL --dataset=DATASET [--OPTION=VALUE ...]

Trains a model and prints its test figures, under both protocols (items of the history kept in the ranking, and
removed). RaSeRec trains its backbone first, or reuses it, and is compared with it. The same command continues an
interrupted run from the last finished epoch.

  -m, --model=NAME           RaSeRec, SASRec, DuoRec, BSARec, DARec, or any of RecBole
  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --config_files="A B"       YAML files, later ones win over earlier ones

Every option of RecBole can be given as --OPTION=VALUE and wins over the files. Those that matter most:

  --data_path=DIR            directory that contains NAME/NAME.inter
  --backbone=NAME            RaSeRec: a sequential model of this package or of RecBole
  --backbone_checkpoint=DIR  RaSeRec: use this trained backbone instead of training one
  --top_k=N --alpha=X        RaSeRec: neighbours retrieved; weight of the backbone's own vector, 0 to 1
  --epochs=N                 largest number of training epochs
  --MAX_ITEM_LIST_LENGTH=N   the model sees the last N items of a history
  --seed=N
  --nproc=N                  processes that share every batch; world_size, ip, port, group_offset: several machines
  --checkpoint_dir=DIR       where results of finished and unfinished stages are kept
  --result_file=FILE         write the figures as JSON"""

REGENERATE_HELP = """\
usage: recbole-raserec regenerate --dataset=DATASET --output=DIR [--name=NAME] [--OPTION=VALUE ...]

Mines the patterns of the training split, trains the regenerator on them, lets it write new ones, and puts all of it
behind the original rows: DIR/NAME/NAME.train.inter, with .valid.inter, .test.inter, NAME.yaml (the options under which
RecBole alone reads them) and a report. The same command continues an interrupted run.

  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --output=DIR               directory of data sets to write into
  --name=NAME                of the new data set (default: DATASET-regenerated)
  --regen_gamma=X            share of steps that choose among a sequence's own items, 0 to 1
  --regen_conditions=N       patterns written for a sequence
  --regen_...                the others stand, with a comment each, in properties/overall.yaml
  --data_path, --seed, --checkpoint_dir, --threads, --config_files as of `recbole-raserec run`"""

COMPARE_HELP = """\
usage: recbole-raserec compare --models=SPEC,SPEC,... --datasets=NAME,... --output=DIR [--OPTION=VALUE ...]

Runs every model on every data set with every seed, each in a process of its own, and writes tables with mean, standard
deviation, improvement over the base, significance, time and memory: DIR/compare.json, .txt, .md, .tex, .csv, and .png
with matplotlib. What is finished is not run again: the same command continues an interrupted comparison.

  --models=SPEC,...    NAME[:key=value[:key=value...]], a model and its own options (RaSeRec:backbone=SASRec:top_k=10);
                       ; does what : does, in quotes
  --datasets=NAME,...  folders under data_path, or ml-100k
  --seeds=N            how many, from 2020 on (default: 5); with a comma a list of seeds: 2020,2021 or 2020,
  --output=DIR         directory of cells, tables and figures; one protocol each
  --jobs=N             cells to run at a time (default: 1), each with its part of the cores unless --threads is given
  --format=FORMAT      what is printed: text (default), markdown, latex, csv or json

Any option of `recbole-raserec run` holds for all models, as --OPTION=VALUE or in --config_files."""

PREPARE_HELP = """\
formats:
  sequences  one user a line, `user item item ...` in the order of time
  ratings    a table, one interaction a line: user, item, rating, time. Separator and header are recognised;
             columns are found by the usual names, or are 1 to 4, or what the --..._col options say
  amazon     Amazon reviews of 2014, 2018 or 2023, one JSON object a line

examples:
  recbole-raserec prepare --input=reviews_Beauty_5.json.gz --format=amazon --output=dataset --name=amazon-beauty
  recbole-raserec prepare --input=ratings.dat --format=ratings --output=dataset --name=ml-1m --k_core=5
  recbole-raserec prepare --input=log.csv --format=ratings --user_col=uid --item_col=sku --time_col=when \\
      --rating_col=none --output=dataset --name=shop"""

TUNE_HELP = """\
usage: recbole-raserec tune --model=MODEL --dataset=DATASET --output=DIR [--trials=N] [--OPTION=VALUE ...]

Searches options by the validation metric, with Optuna (pip install 'recbole-raserec[tune]'), and reports the test
figures of the best trial alone. The same command continues an interrupted search; after its end it prints the result
again.

  -m, --model=NAME           RaSeRec, DuoRec, SASRec, or any model of RecBole (then with --space)
  -d, --dataset=NAME         folder under data_path, or ml-100k (comes with RecBole)
  --output=DIR               the study lives there; DIR/best.yaml is for `run --config_files=DIR/best.yaml`
  --trials=N                 in all (default: 30; --sampler=grid: every combination)
  --space=FILE               YAML file of the options to search, or one of RaSeRec, SASRec, DuoRec (the defaults of
                             these models), regeneration; an option given here is not searched
  --sampler=NAME             tpe (the default), random, grid or gp
  --pruner=NAME              median (the default), halving or none: ends hopeless trials early
  --OPTION=VALUE             as of `recbole-raserec run`, for every trial"""


SERVE_HELP = """\
The token is better in a file or in the variable RECBOLE_RASEREC_TOKEN: a command line is seen by every user of the
machine and stays in the shell's history. A --token wins over a --token_file, and that over the variable. Without a
token, update, forget and save are refused.

examples:
  recbole-raserec serve saved/RaSeRec-ml-100k-...
  recbole-raserec serve saved/RaSeRec-ml-100k-... --port=9000 --token_file=token.txt --max_k=100"""


# The words of a command line: those of `run`, and the options that a command adds to them.


def parse_run(words: Sequence[str]) -> tuple[str | None, str | None, list[str] | None, list[str]]:
    """Split the words of `run` into model, data set, configuration files, and the other options as ``--key=value``.

    Raises:
        ConfigError: a word is no option, an option has no value, or one of the three is given twice and differs.
    """
    pairs: list[tuple[str, str]] = []
    problems: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            problems.append(f"{word!r} is no option: options have the form --key=value.")
            continue
        key, equals, value = word.partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                problems.append(f"{word} has no value: write {word}=VALUE (for a switch {word}=True).")
                continue
            value = rest.pop(0)
        key = {"-m": "--model", "-d": "--dataset"}.get(key, key)
        if not key.startswith("--"):
            problems.append(f"{word}: the only short options are -m and -d; write --key=value.")
            continue
        pairs.append((key[2:], value))
    own: dict[str, str] = {}
    for key, value in pairs:
        if key in ("model", "dataset", "config_files"):
            if own.get(key, value) != value:
                problems.append(f"--{key} is given twice, as {own[key]!r} and {value!r}: leave one out.")
            elif not value.strip():
                problems.append(f"--{key} is empty: give a value or leave it out.")
            own[key] = value
    if problems:
        raise ConfigError(problems)
    files = own["config_files"].split() if "config_files" in own else None
    return own.get("model"), own.get("dataset"), files, [f"--{key}={value}" for key, value in pairs if key not in own]


def take_own(options: Iterable[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of :func:`parse_run` that are a command's own, by name, and the others as they are.

    Args:
        options: each ``--key=value``. names: of the command's own; of one that is given twice the last counts.
    """
    own: dict[str, str] = {}
    rest = []
    for option in options:
        key, _, value = option[2:].partition("=")
        if key in names:
            own[key] = value
        else:
            rest.append(option)
    return own, rest


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are this package's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message} (`recbole-raserec {self.prog.split()[-1]} --help` lists the options)"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None: those of the process.

    Returns:
        Exit code: 0, 2 for an error of this package (one message on stderr), 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": _run, "prepare": _prepare, "regenerate": _regenerate, "recommend": _recommend, "explain": _explain,
        "serve": _serve, "compare": _compare, "tune": _tune, "doctor": _doctor,
    }  # fmt: skip
    if words[:1] in (["-h"], ["--help"], ["help"]):
        print(USAGE)
        return 0
    if words[:1] == ["--version"]:
        print(_versions())
        return 0
    if not words:
        print(USAGE, file=sys.stderr)
        return 2
    command = "run" if words[0].startswith("-") else words.pop(0)
    try:
        if command not in commands:
            near = difflib.get_close_matches(command, commands, n=1, cutoff=0.5)
            guess = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands)}."
            raise ConfigError([f"unknown sub-command {command!r}: {guess}"])
        commands[command](words)
    except RaSeRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "the same command continues from the last finished epoch"
        hint = "nothing was written" if command in ("prepare", "serve") else again
        print(f"\nInterrupted: {hint}.", file=sys.stderr)
        return 130
    return 0


def _run(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(RUN_HELP)
        return
    model, dataset, files, options = parse_run(words)
    from recbole_raserec.quick_start import run_recbole_raserec

    run_recbole_raserec(model=model, dataset=dataset, config_file_list=files, config_dict=None, argv=options)


def _regenerate(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(REGENERATE_HELP)
        return
    model, dataset, files, options = parse_run(words)
    own, rest = take_own(options, ("output", "name"))
    if not own.get("output"):
        raise ConfigError(["output: is not given; name the directory to write into, for example --output=dataset"])
    from pathlib import Path

    from recbole_raserec.regeneration import regenerate_dataset

    print(regenerate_dataset(dataset, Path(own["output"]), own.get("name"), model, files, None, rest))


def _recommend(words: list[str]) -> None:
    from recbole_raserec.cli.recommend import RECOMMEND, add_recommend, recommend

    args = _parsed("recommend", "The best items for a history.", RECOMMEND, add_recommend, words)
    if args is not None:
        recommend(args)


def _explain(words: list[str]) -> None:
    from recbole_raserec.cli.recommend import EXPLAIN, add_explain, explain

    args = _parsed("explain", "Why items are recommended.", EXPLAIN, add_explain, words)
    if args is not None:
        explain(args)


def _serve(words: list[str]) -> None:
    from pathlib import Path

    from recbole_raserec.serving.http import Settings, find_token, serve

    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("checkpoint", type=Path, metavar="DIR", help="a finished run; its last line names it")
        parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
        parser.add_argument("--port", type=int, default=8000, metavar="N", help="(default: 8000; 0: any free one)")
        parser.add_argument("--token_file", type=Path, metavar="FILE", help="that holds the token of changing calls")
        parser.add_argument("--token", metavar="TEXT", help="the token itself; see below")
        parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
        for name, field in Settings.model_fields.items():
            if name != "token":
                help_ = field.description + ("" if "default" in field.description else f" (default: {field.default})")
                parser.add_argument(
                    f"--{name}", type=type(field.default), metavar="N", default=field.default, help=help_
                )

    args = _parsed("serve", "Serve a checkpoint over HTTP.", SERVE_HELP, options, words)
    if args is not None:
        limits = {name: getattr(args, name) for name in Settings.model_fields if name != "token"}
        settings = Settings(token=find_token(args.token, args.token_file), **limits)
        serve(args.checkpoint, settings, args.host, args.port, args.device)


def _doctor(words: list[str]) -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print it as JSON")
        parser.add_argument("--no_self_test", action="store_true", help="report only")

    args = _parsed("doctor", "Report the installation and test it.", "", options, words)
    if args is None:
        return
    from recbole_raserec.cli.main import doctor

    found, checks = doctor.environment(), []
    if not args.json:
        print(doctor.text(found))
    for check in [] if args.no_self_test else doctor.self_test():
        checks.append(check)
        if not args.json:
            print(
                f"self-test {check.name}: {'ok' if check.passed else 'FAILED'} ({check.found}, {check.seconds:.1f} s)"
            )
    if args.json:
        print(json.dumps({**found, "self_test": [dataclasses.asdict(check) for check in checks]}, indent=2))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise RaSeRecError(
            f"self-test failed: {', '.join(failed)}; install the package again, or report what is above."
        )


def _parsed(
    name: str, description: str, epilog: str, options: Callable[[argparse.ArgumentParser], None], words: list[str]
) -> argparse.Namespace | None:
    """The options of a command; None where its help was asked for, and printed."""
    parser = _Parser(
        prog=f"recbole-raserec {name}", description=description, epilog=epilog, allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options(parser)
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return None
    return parser.parse_args(words)


def _compare(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(COMPARE_HELP)
        return
    model, dataset, files, options = parse_run(words)
    from recbole_raserec.comparison import OWN, run_command

    own, rest = take_own(options, OWN)
    run_command(own, files, rest, model, dataset)


def _tune(words: list[str]) -> None:
    if {"-h", "--help"} & set(words):
        print(TUNE_HELP)
        return
    model, dataset, files, options = parse_run(words)
    texts, rest = take_own(options, ("output", "trials", "space", "sampler", "pruner"))
    own: dict[str, Any] = dict(texts)
    if texts.get("trials", "").isdecimal():
        own["trials"] = int(texts["trials"])
    from recbole_raserec.tuning import tune_hyper_parameters

    tune_hyper_parameters(model, dataset, **own, config_file_list=files, argv=rest)


def _prepare(words: list[str]) -> None:
    parser = _prepare_parser()
    if {"-h", "--help"} & set(words):
        parser.print_help()
        return
    known = re.findall(r"--\w+", parser.format_usage())
    unknown = [name for name in (word.partition("=")[0] for word in words) if name[:2] == "--" and name not in known]
    if unknown:
        near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
        raise ConfigError(
            [
                f"unknown option {name}" + (f": did you mean {guess[0]}?" if guess else ".")
                for name, guess in near.items()
            ]
        )
    options: dict[str, Any] = vars(parser.parse_args(words))
    from recbole_raserec.data.preparation import Options, prepare

    options["sep"] = {"tab": "\t", "\\t": "\t", "space": " "}.get(options["sep"], options["sep"])
    print(prepare(Options(**options)).text())


def _prepare_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="recbole-raserec prepare",
        description="Turn raw data into RecBole's atomic files: OUTPUT/NAME/NAME.inter.",
        epilog=PREPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="the raw file, plain or .gz")
    parser.add_argument("--format", required=True, metavar="FORMAT", help="sequences, ratings or amazon (see below)")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory of the data sets, data_path of a run")
    parser.add_argument("--name", required=True, metavar="NAME", help="name of the data set")
    parser.add_argument(
        "--k_core",
        type=int,
        default=0,
        metavar="K",
        help="keep users and items with at least K interactions, repeatedly",
    )
    parser.add_argument(
        "--drop_duplicates", action="store_true", help="keep only the first interaction of a user with an item"
    )
    for role in ("user", "item", "rating", "time"):
        absent = ", or none" if role in ("rating", "time") else ""
        parser.add_argument(f"--{role}_col", metavar="COL", help=f"name or position (from 1) of the {role}{absent}")
    parser.add_argument("--sep", metavar="SEP", help="separator of the columns, such as , or :: or tab")
    header = parser.add_mutually_exclusive_group()
    header.add_argument("--header", action="store_true", default=None, help="the first line names the columns")
    header.add_argument("--no_header", action="store_false", dest="header", help="the first line is an interaction")
    parser.add_argument("--encoding", default="utf-8", help="of the raw file (default: utf-8)")
    parser.add_argument(
        "--max_bad", type=float, default=0.01, metavar="SHARE", help="tolerated share of bad lines (default: 0.01)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def _versions() -> str:
    """This package's version and those of what it stands on, without importing any of it."""
    found = [f"recbole-raserec {__version__}"]
    for name in ("recbole", "torch", "numpy"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join(found)


if __name__ == "__main__":
    raise SystemExit(main())
