"""What a comparison is to run, as cells, and everything in it that can be refused before the first one runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from recbole_raserec.comparison.names import PROTOCOL, cell_name
from recbole_raserec.comparison.specs import (
    TAKEN,
    Problems,
    Several,
    Spec,
    label,
    parse_names,
    parse_seeds,
    parse_specs,
)
from recbole_raserec.config import Config
from recbole_raserec.configuration.options import RETRIEVAL_MODEL
from recbole_raserec.configuration.stage_options import trains_regenerator
from recbole_raserec.data.fetch import recbole_urls
from recbole_raserec.data.source import ensure_dataset
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.fileio import read_json
from recbole_raserec.quick_start import check_run
from recbole_raserec.registry import MODELS

#: Below the output directory: the cells, and what their runs keep where `checkpoint_dir` is not given.
CELLS, SAVED = "cells", "saved"

#: One value for each data set, as PROTOCOL.
_FILTERS = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "benchmark_filename")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run: a model on a data set with a seed.

    Attributes:
        row: label of its row. model, dataset, seed: of the run.
        options: of the run, by name, without those that the comparison sets.
        name: of its files; it holds the fingerprint of all that decides its figures.
        base: name of the cell of its base, which runs before it; None without one.
        shares: what its run trains or writes that another cell's run may, too; such cells take turns.
    """

    row: str
    model: str
    dataset: str
    seed: int
    options: Mapping[str, Any]
    name: str
    base: Optional[str]
    shares: frozenset[str]


@dataclass(frozen=True)
class Plan:
    """A comparison that can be run.

    Attributes:
        output: its directory. seeds: of every row.
        cells: in the order to run them, a base before what stands on it.
        rows: {data set: {label of a row: label of its base, or None}}, in the order of the table.
    """

    output: Path
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    rows: Mapping[str, Mapping[str, Optional[str]]]


@dataclass(frozen=True)
class _Request:
    """A cell that was asked for: its configuration and that of its base."""

    spec: Spec
    dataset: str
    seed: int
    config: Any
    base: Any


def make_plan(
    models: Several, datasets: Several, seeds: Union[str, int, Sequence[int]], output: str,
    config_files: Optional[Sequence[str]] = None, argv: Sequence[str] = (), problems: Optional[Problems] = None,
) -> Plan:  # fmt: skip
    """Check all that can be checked without a run, and lay out the cells.

    Args:
        models, datasets, seeds, output: see :func:`recbole_raserec.comparison.driver.compare`.
        config_files, argv: options of all models, as the runner takes them.
        problems: what the caller has found so far; it is raised with what is found here.

    Raises:
        ConfigError: with all problems. A missing data set that RecBole knows has been downloaded, nothing else done.
    """
    problems = problems or Problems()
    specs = parse_specs(models, problems)
    names, numbers = parse_names("datasets", datasets, problems), parse_seeds(seeds, problems)
    if not output:
        problems.add(["output: is not given; name the directory to write into, for example --output=comparison"])
    elif Path(output).exists() and not Path(output).is_dir():
        problems.add([f"output: {output} is a file; name a directory"])
    given = {word[2:].partition("=")[0]: word for word in argv}
    problems.add(f"{name}: cannot be given here; {TAKEN[name]}" for name in given if name in TAKEN)
    shared = {name: word for name, word in given.items() if name not in TAKEN}

    requests = []
    for seed in numbers or (0,):
        for dataset in names or ("ml-100k",):
            for spec in specs:
                with problems.noted(spec.label):
                    requests.append(_request(spec, dataset, seed, config_files, shared))
    _check_data(requests, problems)
    _check_protocols(Path(output or ".") / CELLS, requests, problems)
    problems.raise_all(len(specs))
    plan = _lay_out(Path(output), numbers, requests, problems)
    problems.raise_all(len(specs))
    return plan


def _request(
    spec: Spec, dataset: str, seed: int, config_files: Optional[Sequence[str]], shared: Mapping[str, str]
) -> _Request:
    """The configurations of a cell.

    Raises:
        RaSeRecError: they are wrong.
    """
    own = {name: f"--{name}={value}" for name, value in spec.options.items()}
    words = [*{**shared, **own}.values(), f"--seed={seed}"]
    try:
        config = Config(spec.model, dataset, list(config_files or ()), None, words)
    except ConfigError as error:
        raise ConfigError([_shared_remedy(problem, spec) for problem in error.problems]) from None
    problems = Problems()
    problems.add(f"{name}: is set in a file; {TAKEN[name]}" for name in ("backbone_checkpoint",) if config[name])
    problems.add(["resume: is false; " + TAKEN["resume"]] if config["resume"] is False else [])
    with problems.noted():
        check_run(config)
    problems.raise_all(0)
    base = config.without_regeneration() if config["regeneration"] else config
    base = base.for_backbone() if config["model"] == RETRIEVAL_MODEL else base
    return _Request(spec, dataset, seed, config, None if base is config else base)


def _shared_remedy(problem: str, spec: Spec) -> str:
    """An option of all models that not all of them read has another remedy than that of a run."""
    name, told = problem.partition(":")[0], "this run does not read it, remove it"
    if name in spec.options:
        return problem
    return problem.replace(told, f"this one does not read it; give it to those that do, as NAME:{name}=VALUE")


def _check_data(requests: Sequence[_Request], problems: Problems) -> None:
    """Look for the data; where all else is well, what is missing and known to RecBole is downloaded."""
    wrong, looked = bool(problems.found), set()
    for request in requests:
        config = request.config
        key = (request.dataset, config["data_path"], str(config["benchmark_filename"]))
        if key in looked or (wrong and request.dataset in recbole_urls()):
            continue
        looked.add(key)
        try:
            ensure_dataset(config)
        except DatasetError as error:
            text = str(error)
            problems.add([f"datasets: {text[0].lower()}{text[1:]}"])


def _check_protocols(folder: Path, requests: Sequence[_Request], problems: Problems) -> None:
    """Refuse figures that mean different things, among the cells asked for and those in the directory."""
    known: dict[tuple[str, str], tuple[str, str]] = {}  # (option, data set) -> (value, whose)
    told: set[str] = set()
    cells = [(of["dataset"], of["options"], f"the cell {name}") for name, of in _records(folder).items()]
    cells += [(each.dataset, each.config.explain(), each.spec.label) for each in requests]
    for dataset, options, whose in cells:
        for option in (*PROTOCOL, *_FILTERS):
            value = _meaning(option, options.get(option))
            before, other = known.setdefault((option, dataset if option in _FILTERS else ""), (value, whose))
            if before != value and option not in told:
                told.add(option)
                problems.add(
                    [
                        f"output: {folder.parent} would hold figures of two protocols: {option} is {before} for "
                        f"{other}, and {value} for {whose} on {dataset}; give one value to all, or name another "
                        "output directory"
                    ]
                )


def _records(folder: Path) -> dict[str, Any]:
    """The readable result records of a directory, by name of the cell."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_json(path)
        except CheckpointError:
            continue
        if isinstance(record, dict) and {"dataset", "options"} <= record.keys():
            found[path.stem] = record
    return found


def _meaning(option: str, value: Any) -> str:
    """An option's value as a text that is the same where it means the same."""
    if option in ("metrics", "topk"):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        value = sorted(set(map(str.lower, values))) if option == "metrics" else sorted(set(values))
    return str(dict(sorted(value.items())) if isinstance(value, Mapping) else value)


def _lay_out(output: Path, seeds: tuple[int, ...], requests: Sequence[_Request], problems: Problems) -> Plan:
    """Cells in the order to run, rows in the order of the table; one cell for a base that several stand on."""
    hashes: dict[tuple[str, ...], str] = {}
    cells: dict[str, Cell] = {}
    rows: dict[str, dict[str, Optional[str]]] = {}
    asked: dict[str, str] = {}
    named = [(request, cell_name(request.config, hashes)) for request in requests]
    labels = {(request.dataset, request.seed, request.spec.label): name for request, name in named}
    for request, name in named:
        if asked.setdefault(name, request.spec.label) != request.spec.label:
            problems.add([f"models: {asked[name]} and {request.spec.label} are the same run; leave one out"])
    for request, name in named:
        row = rows.setdefault(request.dataset, {})
        base_name = None
        if request.base is not None:
            base_name = cell_name(request.base, hashes)
            kept = {key: text for key, text in request.spec.options.items() if key in request.base.external_config_dict}
            base_label = asked.get(base_name) or label(request.base.model, kept)
            if labels.setdefault((request.dataset, request.seed, base_label), base_name) != base_name:
                problems.add(
                    [
                        f"models: the base of {request.spec.label} is another run than the row {base_label}; give the "
                        "options in which they differ in the specs"
                    ]
                )
            if base_name not in cells:
                cells[base_name] = _cell(base_label, request, request.base, base_name, None, hashes)
            row.setdefault(base_label, None)
        cells.setdefault(name, _cell(request.spec.label, request, request.config, name, base_name, hashes))
        row[request.spec.label] = None if base_name is None else cells[base_name].row
    return Plan(output, seeds, tuple(cells.values()), rows)


def _cell(
    row: str, request: _Request, config: Any, name: str, base: Optional[str], hashes: dict[tuple[str, ...], str]
) -> Cell:
    shares = {name} if base is None else {name, base}
    if trains_regenerator(config):  # mining takes seconds, and is locked by itself
        shares.add(f"regeneration-{request.dataset}-{request.seed}")
        if config["regen_pretrained"]:
            shares.add(cell_name(config.for_embeddings(), hashes))
    if config["collaborative"] in MODELS:
        shares.add(cell_name(config.for_collaborator(), hashes))
    taken = {"model", "dataset", "config_files", *TAKEN}
    options = {key: value for key, value in config.external_config_dict.items() if key not in taken}
    return Cell(row, config.model, request.dataset, request.seed, options, name, base, frozenset(shares))
