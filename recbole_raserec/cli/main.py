"""The command `recbole-raserec`: `run` (the default) and what comes before and after it, as one click application.

Options that a command does not declare are those of a run: they go on to `Config` as `--key=value`. Nothing heavy is
imported before it is needed: `--help` and a wrong word answer at once.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from recbole_raserec import __version__
from recbole_raserec.cli.doctor import doctor
from recbole_raserec.cli.recommend import explain, export, recommend
from recbole_raserec.errors import ConfigError, RaSeRecError, nearest

#: Options of `run` that a command names itself; a line of words may hold each once.
_NAMED = ("model", "dataset", "config_files")


class _Application(click.Group):
    """Commands in the order of their use. Without a command it is `run`; all wrong words are reported at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        after = ["recommend", "explain", "serve", "export"]
        return ["run", "prepare", "regenerate", *after, "compare", "tune", "options", "doctor"]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"]:
            args = ["--help"]
        elif args and args[0].startswith("-") and args[0] not in ("-h", "--help", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str, click.Command, list[str]]:
        name, *words = args
        if name not in self.commands:
            guess = nearest(name, self.commands)
            remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(self.list_commands(ctx))}."
            raise ConfigError([f"unknown sub-command {name!r}: {remedy}"])
        command = self.commands[name]
        if {"-h", "--help"} & set(words):
            words = ["--help"]
        elif command.context_settings.get("ignore_unknown_options"):
            words = _pairs(words)
        else:
            _check_known(ctx, command, words)
        return name, command, words


def _pairs(words: Sequence[str]) -> list[str]:
    """Words of a run, each as `--key=value`.

    Raises:
        ConfigError: a word is no option, an option has no value, or one of `_NAMED` is empty or has two values.
    """
    found, problems, named, rest = [], [], dict[str, str](), list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        key = {"-m": "--model", "-d": "--dataset"}.get(key, key)
        if not word.startswith("-") or word in ("-", "--"):
            problems.append(f"{word!r} is no option: options have the form --key=value.")
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"{word} has no value: write {word}=VALUE (for a switch {word}=True).")
        else:
            value = value if equals else rest.pop(0)
            if not key.startswith("--"):
                problems.append(f"{word}: the only short options are -m and -d; write --key=value.")
            elif key[2:] in _NAMED and not value.strip():
                problems.append(f"{key} is empty: give a value or leave it out.")
            elif key[2:] in _NAMED and named.setdefault(key, value) != value:
                problems.append(f"{key} is given twice, as {named[key]!r} and {value!r}: leave one out.")
            found.append(f"{key}={value}")
    if problems:
        raise ConfigError(problems)
    return found


def _check_known(context: click.Context, command: click.Command, words: Sequence[str]) -> None:
    """Raise a ConfigError with all options that the command does not have, that it misses, and that exclude others."""
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    given = list(dict.fromkeys(word.partition("=")[0] for word in words if word.startswith("--")))
    problems = []
    for name in given:
        if name not in known:
            guess = nearest(name[2:], [each[2:] for each in known])
            problems.append(f"unknown option {name}" + (f": did you mean --{guess}?" if guess else "."))
    missing = [option.opts[0] for option in options if option.required and option.opts[0] not in given]
    if missing and not problems:
        problems.append(f"not given: {', '.join(missing)}")
    for option in options:
        if {*option.secondary_opts} & {*given} and {*option.opts} & {*given}:
            problems.append(f"{option.opts[0]} and {option.secondary_opts[0]} exclude each other: leave one out.")
    if problems:
        raise ConfigError([f"{each} (`recbole-raserec {command.name} --help` lists the options)" for each in problems])


def _print_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Print this package's version and those of what it needs, without importing any of it."""
    if wanted:
        versions = {"recbole-raserec": __version__, **dict.fromkeys(("recbole", "torch", "numpy"), "(not installed)")}
        for name in ("recbole", "torch", "numpy"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        click.echo(", ".join(map(" ".join, versions.items())))
        context.exit()


@click.group(
    cls=_Application,
    subcommand_metavar="[COMMAND] --OPTION=VALUE ...",
    epilog="`recbole-raserec COMMAND --help` lists the options of a command; without a command it is `run`.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_versions, help="print the versions"
)
def app() -> None:
    """Retrieval-augmented sequential recommendation for RecBole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; `argv` are arguments without the program's name, by default those of the process.

    Returns:
        Exit code: 0, 2 for an error of this package (one message on stderr), 130 when interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        click.echo(app.make_context("recbole-raserec", [], resilient_parsing=True).get_help(), err=True)
        return 2
    try:
        with app.make_context("recbole-raserec", words) as context:
            app.invoke(context)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except (click.UsageError, RaSeRecError) as error:
        if isinstance(error, click.UsageError):
            path = "recbole-raserec" if error.ctx is None else error.ctx.command_path
            error = ConfigError([f"{error.format_message()} (`{path} --help` lists the options)"])
        click.echo(f"error: {error}", err=True)
        return 2
    except OSError as error:
        from recbole_raserec.storage import disk_full

        if not disk_full(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}no room on the disk ({error.strerror}); free some, then try again.", err=True)
        return 2
    except KeyboardInterrupt:
        again = "the same command continues from the last finished epoch"
        hint = "nothing was written" if words[0] in ("prepare", "serve") else again
        click.echo(f"\nInterrupted: {hint}.", err=True)
        return 130
    return 0


def _option(name: str, metavar: str | None, text: str, *names: str, **more: Any) -> Callable[[Callable], Callable]:
    return click.option(name, *names, metavar=metavar, help=text, **more)


def _paths(context: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    return value.split() if value else None


_RUN_OPTIONS = (
    _option("--model", "NAME", "RaSeRec, SASRec, DuoRec, BSARec, DARec, any of RecBole, or package.module:Class", "-m"),
    _option("--dataset", "NAME", "folder under data_path, ml-100k (comes with RecBole), or a file: ratings.csv", "-d"),
    _option("--config_files", '"A B"', "YAML files, later ones win over earlier ones", callback=_paths),
)


def _command(short: str, usage: str, *options: Callable[[Callable], Callable]) -> Callable[[Callable], click.Command]:
    """A command with options of its own, which hands all others on to a run."""

    def make(function: Callable) -> click.Command:
        function = click.pass_context(function)
        for option in reversed(options):
            function = option(function)
        return app.command(
            short_help=short, options_metavar=f"{usage} [--OPTION=VALUE ...]",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )(function)  # fmt: skip

    return make


@_command("train and evaluate a model (the default)", "--model=MODEL --dataset=DATASET", *_RUN_OPTIONS)
def run(context: click.Context, model: str | None, dataset: str | None, config_files: list[str] | None) -> None:
    """Train a model and print its test figures, under both protocols (items of the history kept in the ranking, and
    removed). RaSeRec trains its backbone first, or reuses it, and is compared with it. The same command continues an
    interrupted run from the last finished epoch.

    A data set that is a file (.csv, .tsv, .jsonl, .json, .parquet, each also .gz) is prepared first, into data_path,
    and again when it has changed; --user_col, --item_col, --time_col and --k_core say how (see `prepare`).

    Every option of RecBole can be given as --OPTION=VALUE and wins over the files; `recbole-raserec options` and
    `recbole-raserec options MODEL` list this package's. Those that matter most:

    \b
      --data_path=DIR            directory that contains NAME/NAME.inter
      --backbone=NAME            RaSeRec: a sequential model of this package, of RecBole, or package.module:Class
      --backbone_checkpoint=DIR  RaSeRec: use this trained backbone (or RecBole's .pth) instead of training one
      --top_k=N --alpha=X        RaSeRec: neighbours retrieved; weight of the backbone's own vector, 0 to 1
      --epochs=N                 largest number of training epochs
      --MAX_ITEM_LIST_LENGTH=N   the model sees the last N items of a history
      --seed=N
      --nproc=N                  processes that share every batch; world_size, ip, port, group_offset: several machines
      --checkpoint_dir=DIR       where results of finished and unfinished stages are kept
      --result_file=FILE         write the figures as JSON
    """
    from recbole_raserec.quick_start import run_recbole_raserec

    given: dict[str, Any] = {"model": model, "dataset": dataset, "config_file_list": config_files, "config_dict": None}
    run_recbole_raserec(**given, argv=context.args)


@app.command(short_help="the options of every run, or those of a model")
@click.argument("model", required=False)
def options(model: str | None) -> None:
    """List the options of every run, or those of MODEL, with their defaults, what they accept and what they do."""
    from recbole_raserec.config import MODELS, OVERALL, in_words, options_of

    sections = OVERALL if model is None else options_of(model, None)
    if not sections:
        guess = nearest(model, MODELS)
        remedy = f"did you mean {guess}?" if guess else f"choose one of {', '.join(MODELS)}."
        raise ConfigError([f"model: {model} has no options of this package; {remedy}"])
    formatter = click.HelpFormatter(width=118)
    for section in sections:
        formatter.write_text(" ".join((section.__doc__ or "").split()))
        rows = []
        for name, field in section.model_fields.items():
            if field.description:
                default = "" if field.default is None else field.default
                rows.append((f"--{name}={default}", f"{field.description} ({in_words(field).requirement})"))
        with formatter.indentation():
            formatter.write_dl(rows, col_max=32)
        formatter.write_paragraph()
    click.echo(formatter.getvalue().rstrip())


@_command(
    "regenerate a training set (DR4SR) and write it as atomic files", "--dataset=DATASET --output=DIR", *_RUN_OPTIONS,
    _option("--output", "DIR", "directory of data sets to write into"),
    _option("--name", "NAME", "of the new data set (default: DATASET-regenerated)"),
)  # fmt: skip
def regenerate(context: click.Context, config_files: list[str] | None, output: str | None, **options: Any) -> None:
    """Mine the patterns of the training split, train the regenerator on them, let it write new ones, and put all of it
    behind the original rows: DIR/NAME/NAME.train.inter, with .valid.inter, .test.inter, NAME.yaml (the options under
    which RecBole alone reads them) and a report. The same command continues an interrupted run.

    \b
      --regen_gamma=X            share of steps that choose among a sequence's own items, 0 to 1
      --regen_conditions=N       patterns written for a sequence
      --regen_...                the others are in properties/overall.yaml, with a comment each
      --data_path, --seed, --checkpoint_dir, --threads as of `recbole-raserec run`
    """
    if not output:
        raise ConfigError(["output: is not given; name the directory to write into, for example --output=dataset"])
    from recbole_raserec.regeneration import regenerate_dataset

    options = {**options, "output": Path(output), "config_file_list": config_files, "argv": context.args}
    click.echo(regenerate_dataset(**options))


@_command(
    "models against each other over data sets and seeds, with significance",
    "--models=SPEC,SPEC,... --datasets=NAME,... --output=DIR",
    _option("--models", "SPEC,...", "NAME[:key=value[:key=value...]], a model and its own options "
            "(RaSeRec:backbone=SASRec:top_k=10); ; does what : does, in quotes", default=""),
    _option("--datasets", "NAME,...", "folders under data_path, or ml-100k", default=""),
    _option("--seeds", "N", "how many, from 2020 on (default: 5); with a comma a list of seeds: 2020,2021 or 2020,",
            default="5"),
    _option("--output", "DIR", "directory of runs, tables and figures; one protocol each", default=""),
    _option("--jobs", "N", "runs at a time (default: 1), each with its part of the cores unless --threads is given",
            default="1"),
    _option("--format", "FORMAT", "what is printed: text (default), markdown, latex, csv or json", "style",
            default="text"),
    _option("--model", None, "", hidden=True), _option("--dataset", None, "", hidden=True), _RUN_OPTIONS[2],
)  # fmt: skip
def compare(context: click.Context, **options: Any) -> None:
    """Run every model on every data set with every seed, each in a process of its own, and write tables with mean,
    standard deviation, improvement over the base, significance, time and memory: DIR/compare.json, .txt, .md, .tex,
    .csv, and .png with matplotlib. What is finished is not run again: the same command continues an interrupted
    comparison.

    Any option of `recbole-raserec run` holds for all models, as --OPTION=VALUE or in --config_files.
    """
    from recbole_raserec.comparison import run_command

    run_command(argv=context.args, **options)


@_command(
    "search options by their validation figures (needs the extra `tune`)",
    "--model=MODEL --dataset=DATASET --output=DIR", *_RUN_OPTIONS,
    _option("--output", "DIR", "the study lives there; DIR/best.yaml is for `run --config_files=DIR/best.yaml`"),
    _option("--trials", "N", "in all (default: 30; --sampler=grid: every combination)"),
    _option("--space", "FILE", "YAML file of the options to search, or one of RaSeRec, SASRec, DuoRec, DARec (the "
            "defaults of these models), regeneration; an option given here is not searched"),
    _option("--sampler", "NAME", "tpe (the default), random, grid or gp", default="tpe"),
    _option("--pruner", "NAME", "median (the default), halving or none: ends hopeless trials early", default="median"),
)  # fmt: skip
def tune(context: click.Context, trials: str | None, config_files: list[str] | None, **options: Any) -> None:
    """Search options by the validation metric, with Optuna (pip install 'recbole-raserec[tune]'), and report the test
    figures of the best trial alone. The same command continues an interrupted search; after its end it prints the
    result again.

    --OPTION=VALUE holds for every trial, as of `recbole-raserec run`.
    """
    from recbole_raserec.tuning import tune_hyper_parameters

    number: Any = int(trials) if trials is not None and trials.isdecimal() else trials
    tune_hyper_parameters(trials=number, config_file_list=config_files, argv=context.args, **options)


class _Serve(click.Command):
    """The command `serve`; its limits are declared beside the service, and imported when they are needed."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        from recbole_raserec.serving.http import Settings

        *params, help_option = super().get_params(ctx)
        for name, field in Settings.model_fields.items():
            if name not in ("token", "read_token"):
                flag = isinstance(field.default, bool)
                told = flag or "default" in field.description
                text = field.description + ("" if told else f" (default: {field.default})")
                metavar = None if flag else "NAMES" if name == "trusted_hosts" else "N"
                params.append(
                    click.Option([f"--{name}"], metavar=metavar, is_flag=flag, default=field.default, help=text)
                )
        return [*params, help_option]


@app.command(
    cls=_Serve,
    short_help="answer over HTTP, and store new interactions",
    epilog="""\b
examples:
  recbole-raserec serve saved/RaSeRec-ml-100k-...
  recbole-raserec serve saved/RaSeRec-ml-100k-... --port=9000 --token_file=token.txt --max_k=100""",
)
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="DIR")
@_option("--host", "NAME", "address to listen on (default: 127.0.0.1)", default="127.0.0.1")
@_option("--port", "N", "(default: 8000; 0: any free one)", default=8000)
@_option("--token_file", "FILE", "that holds the token of changing calls", type=click.Path(path_type=Path))
@_option("--token", "TEXT", "the token itself; see above")
@_option("--read_token_file", "FILE", "that holds the token of reading calls", type=click.Path(path_type=Path))
@_option("--device", "NAME", "cpu, cuda, ... (default: a GPU if there is one)")
@click.option("--read_only", is_flag=True, help="write nothing into DIR, and refuse all changes")
@click.option("--public", is_flag=True, help="let other machines read without a token")
def serve(
    checkpoint: Path, host: str, port: int, token_file: Path | None, token: str | None, read_token_file: Path | None,
    device: str | None, read_only: bool, public: bool, **limits: Any,
) -> None:  # fmt: skip
    """Serve a checkpoint over HTTP. DIR is a finished run; its last line names it.

    The token is better in a file or in the variable RECBOLE_RASEREC_TOKEN: a command line is seen by every user of the
    machine and stays in the shell's history. A --token wins over a --token_file, and that over the variable. Without a
    token, update, forget and save are refused. Reading needs a token where --read_token_file or the variable
    RECBOLE_RASEREC_READ_TOKEN names one; with a --host that other machines reach it must, unless --public is given.
    """
    from recbole_raserec.serving import http

    reading = http.find_token(None, read_token_file, http.READ_TOKEN_VARIABLE)
    settings = http.Settings(token=http.find_token(token, token_file), read_token=reading, **limits)
    http.serve(checkpoint, settings, host, port, device, read_only, public)


@app.command(
    short_help="turn raw data into the atomic files that `run` reads",
    epilog="""\b
formats:
  sequences  one user a line, `user item item ...` in the order of time
  ratings    a table, one interaction a line: user, item, rating, time. Separator and header are recognised;
             columns are found by the usual names, or are 1 to 4, or what the --..._col options say
  json       JSON lines, one object an interaction; columns as of ratings
  parquet    columns as of ratings (needs the extra `frames`)
  amazon     Amazon reviews of 2014, 2018 or 2023, one JSON object a line
  auto       (default) .csv .tsv .dat .txt: ratings; .json .jsonl .ndjson: json; .parquet .pq: parquet

\b
examples:
  recbole-raserec prepare --input=ratings.csv
  recbole-raserec prepare --input=reviews_Beauty_5.json.gz --format=amazon --output=dataset --name=amazon-beauty
  recbole-raserec prepare --input=ratings.dat --format=ratings --output=dataset --name=ml-1m --k_core=5
  recbole-raserec prepare --input=log.csv --format=ratings --user_col=uid --item_col=sku --time_col=when \\
      --rating_col=none --output=dataset --name=shop""",
)
@_option("--input", "FILE", "the raw file, plain or .gz", required=True)
@_option("--format", "FORMAT", "of the file (see below)", default="auto")
@_option("--output", "DIR", "directory of the data sets, data_path of a run (default: dataset)", default="dataset")
@_option("--name", "NAME", "name of the data set (default: that of the file)", default="")
@_option("--k_core", "K", "keep users and items with at least K interactions, repeatedly", default=0)
@_option("--drop_duplicates", None, "keep only the first interaction of a user with an item", is_flag=True)
@_option("--user_col", "COL", "name or position (from 1) of the user")
@_option("--item_col", "COL", "name or position (from 1) of the item")
@_option("--rating_col", "COL", "name or position (from 1) of the rating, or none")
@_option("--time_col", "COL", "name or position (from 1) of the time, or none")
@_option("--sep", "SEP", "separator of the columns, such as , or :: or tab")
@_option("--header/--no_header", None, "whether the first line names the columns, or is an interaction", default=None)
@_option("--encoding", "NAME", "of the raw file (default: utf-8)", default="utf-8")
@_option("--max_bad", "SHARE", "tolerated share of bad lines (default: 0.01)", default=0.01)
@_option("--overwrite", None, "replace an existing file", is_flag=True)
def prepare(**options: Any) -> None:
    """Turn raw data into RecBole's atomic files: OUTPUT/NAME/NAME.inter."""
    from recbole_raserec.data import preparation

    click.echo(preparation.prepare(preparation.Options(**options)).text())


for command in (recommend, explain, export, doctor):
    app.add_command(command)


if __name__ == "__main__":
    raise SystemExit(main())
