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
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from recbole_raserec import __version__
from recbole_raserec.cli_help import COMPARE_HELP, PREPARE_HELP, REGENERATE_HELP, RUN_HELP, TUNE_HELP, USAGE
from recbole_raserec.cli_words import parse_run, take_own
from recbole_raserec.errors import ConfigError, RaSeRecError


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

    from recbole_raserec.regenerate import regenerate_dataset

    print(regenerate_dataset(dataset, Path(own["output"]), own.get("name"), model, files, None, rest))


def _recommend(words: list[str]) -> None:
    from recbole_raserec.serving import commands

    args = _parsed("recommend", "The best items for a history.", commands.RECOMMEND, commands.add_recommend, words)
    if args is not None:
        commands.recommend(args)


def _explain(words: list[str]) -> None:
    from recbole_raserec.serving import commands

    args = _parsed("explain", "Why items are recommended.", commands.EXPLAIN, commands.add_explain, words)
    if args is not None:
        commands.explain(args)


def _serve(words: list[str]) -> None:
    from recbole_raserec.serving import service

    args = _parsed("serve", "Serve a checkpoint over HTTP.", service.SERVE_HELP, service.add_serve, words)
    if args is not None:
        service.serve(args)


def _doctor(words: list[str]) -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print it as JSON")
        parser.add_argument("--no_self_test", action="store_true", help="report only")

    args = _parsed("doctor", "Report the installation and test it.", "", options, words)
    if args is None:
        return
    from recbole_raserec import doctor

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
    from recbole_raserec.comparison.driver import OWN, run_command

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
    from recbole_raserec.tune import tune_hyper_parameters

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
    from recbole_raserec.data.convert import Options, prepare

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
