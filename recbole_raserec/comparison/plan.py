"""What a comparison is to run, and everything in it that can be refused before the first run.

Model specs, data sets and seeds make a plan: each combination is a run with a configuration of its own, named by the
fingerprint of all that decides its figures. The base of a row is a run too, once for all that are built on it. Problems
are collected and raised at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from recbole_raserec.config import (
    PROPERTIES,
    RETRIEVAL_MODEL,
    Config,
    check_run,
    model_names,
    model_versions,
    name_of,
    read_yaml,
    regeneration_options,
    short_name,
    trains_regenerator,
)
from recbole_raserec.data.preparation import ensure_dataset, inter_files, recbole_urls
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError, RaSeRecError
from recbole_raserec.evaluation import versions
from recbole_raserec.storage import MODEL_VERSIONS, fingerprint, plain, read_json, sha256, unwritable

#: Below the output directory: the files of the runs, and what the runs keep where `checkpoint_dir` is not given.
CELLS, SAVED = "cells", "saved"
#: Several values: a list, or a text with commas between them.
Several = Union[str, Sequence[Any]]
#: A count of seeds, a list of them, or the text of one of the two.
Seeds = Union[str, int, Sequence[int]]
#: Paths of data files -> the hash of their contents.
Hashes = dict[tuple[str, ...], str]
#: Options of `run` that a comparison sets itself, and what to do instead.
_TAKEN = {
    "model": "write --models=...",
    "dataset": "write --datasets=...",
    "seed": "write --seeds=...",
    "result_file": "the figures go into the output directory, leave it out",
    "ranks_file": "the ranks go into the output directory, leave it out",
    "backbone_checkpoint": "every base is trained with every seed, leave it out",
    "resume": "finished runs are kept and unfinished ones continued, leave it out or name another output directory",
}
#: Options that cannot differ between the models of a comparison.
_SHARED = ("config_files", "data_path", "checkpoint_dir")
#: Options that say what the figures mean: one value in an output directory, and one for each data set in it.
_PROTOCOL = ("eval_args", "metrics", "topk")
_FILTERS = ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "benchmark_filename")
#: Packages whose version decides a figure.
_VERSIONS = ("recbole_raserec", "recbole", "torch", "numpy", "faiss", "kernels")
#: A number alone above this is not taken for a count of seeds.
_MOST_SEEDS = 100
_EXAMPLES = {"models": "SASRec,RaSeRec:backbone=SASRec", "datasets": "ml-100k"}


@dataclass
class Problems:
    """Problems found so far, each once, with the models they were found in."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, *problems: str, model: str = "") -> None:
        for problem in problems:
            models = self.found.setdefault(problem, [])
            if model and model not in models:
                models.append(model)

    @contextlib.contextmanager
    def noted(self, model: str = "") -> Iterator[None]:
        """Turn what the body raises into problems; the rest of the body is skipped."""
        try:
            yield
        except ConfigError as error:
            self.add(*error.problems, model=model)
        except RaSeRecError as error:
            self.add(str(error), model=model)

    def raise_all(self, models: int) -> None:
        """Raise them as one ConfigError; what not all of the `models` specs share names those that have it."""
        found = self.found.items()
        if texts := [f"models: {', '.join(of)}: {each}" if 0 < len(of) < models else each for each, of in found]:
            raise ConfigError(texts)


@dataclass(frozen=True)
class Spec:
    """A model and its own options, texts as on the command line."""

    model: str
    options: dict[str, str]

    @property
    def label(self) -> str:
        """The spec again, as a row is called."""
        return ":".join([self.model, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True, eq=False)
class Run:
    """A model on a data set with a seed."""

    row: str  # label of its row
    model: str
    dataset: str
    seed: int
    options: Mapping[str, Any]  # without those that the comparison sets
    name: str  # of its files, with the fingerprint of all that decides its figures
    base: Optional[str]  # name of the run of its base
    needs: frozenset[str]  # names of the runs that train what it reuses, its base among them

    @property
    def title(self) -> str:
        """The run as messages call it."""
        return f"{self.dataset} seed {self.seed} {self.row}"


@dataclass(frozen=True)
class Plan:
    """A comparison that can be run."""

    output: Path
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]  # a base before what is built on it
    rows: Mapping[str, Mapping[str, Optional[str]]]  # {data set: {row: its base, or None}}, as in the table


@dataclass(frozen=True)
class _Request:
    """A run that was asked for: its configuration and that of its base."""

    spec: Spec
    dataset: str
    seed: int
    config: Config
    base: Optional[Config]


def make_plan(
    models: Several, datasets: Several, seeds: Seeds, output: str, config_files: Optional[Sequence[str]] = None,
    argv: Sequence[str] = (), problems: Optional[Problems] = None,
) -> Plan:  # fmt: skip
    """Check all that can be checked without a run, and lay out the runs. The arguments are those of `compare`.

    Raises:
        ConfigError: with all problems. A missing data set that RecBole knows has been downloaded, nothing else done.
    """
    problems = problems or Problems()
    specs = parse_specs(models, problems)
    names, numbers = parse_names("datasets", datasets, problems), parse_seeds(seeds, problems)
    if not output:
        problems.add("output: is not given; name the directory to write into, for example --output=comparison")
    for problem in unwritable("output", output, folder=True) if output else []:
        problems.add(problem)
    given = {word[2:].partition("=")[0]: word for word in argv}
    problems.add(*(f"{name}: cannot be given here; {_TAKEN[name]}" for name in given if name in _TAKEN))
    shared = {name: word for name, word in given.items() if name not in _TAKEN}

    requests = []
    for seed, dataset, spec in itertools.product(numbers or (0,), names or ("ml-100k",), specs):
        with problems.noted(spec.label):
            requests.append(_request(spec, dataset, seed, config_files or (), shared))
    _check_data(requests, problems)
    _check_protocols(Path(output or ".") / CELLS, requests, problems)
    problems.raise_all(len(specs))
    plan = _lay_out(Path(output), numbers, requests, problems)
    problems.raise_all(len(specs))
    return plan


def parse_specs(models: Several, problems: Problems) -> list[Spec]:
    """Read `NAME[:key=value[:key=value...]]`, several joined by commas.

    `;` does what `:` does, in quotes. Signs within brackets and quotes belong to the value.
    """
    specs = []
    for text in parse_names("models", models, problems):
        name, *rest = split_outside(text, ":;")
        if rest and "=" not in rest[0] and name.strip() not in model_names():
            name = f"{name.strip()}:{rest.pop(0).strip()}"  # package.module:Class
        options: dict[str, str] = {}
        while rest:
            part = rest.pop(0)
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key == "backbone" and rest and "=" not in rest[0] and value not in model_names():
                value = f"{value}:{rest.pop(0).strip()}"
            if not equals or not key or not value:
                problems.add(f"models: {text!r}: {part!r} is not of the form key=value; write {name}:key=value")
            elif key in _TAKEN:
                problems.add(f"models: {text!r}: {key} cannot be given there; {_TAKEN[key]}")
            elif key in _SHARED:
                problems.add(f"models: {text!r}: {key} is the same for all models; write --{key}={value}")
            elif options.setdefault(key, value) != value:
                problems.add(f"models: {text!r}: {key} is given as {options[key]!r} and as {value!r}; keep one")
        if name.strip():
            specs.append(Spec(name.strip(), options))
        else:
            problems.add(f"models: {text!r} names no model; write NAME:key=value")
    return specs


def parse_names(option: str, given: Several, problems: Problems) -> list[str]:
    """The values of an option, each once."""
    texts = split_outside(given, ",") if isinstance(given, str) else [named(each) for each in given]
    names = [text.strip() for text in texts if text.strip()]
    if not names:
        problems.add(f"{option}: is not given; name one or more, for example --{option}={_EXAMPLES[option]}")
    unique = list(dict.fromkeys(names))
    problems.add(*(f"{option}: {name} is given twice; leave one out" for name in unique if names.count(name) > 1))
    return unique


def named(given: Any) -> str:
    """The name of what a comparison was given: a text, or a model class."""
    return name_of(given) if isinstance(given, type) else given


def parse_seeds(given: Seeds, problems: Problems) -> tuple[int, ...]:
    """Seeds to run: a number alone is how many, from the default of `seed` on; with a comma (`2020,`) it is a list."""
    first = int(read_yaml(PROPERTIES / "overall.yaml")["seed"])
    remedy = f"write how many (--seeds=5: {first} to {first + 4}), or a list (--seeds={first},{first + 1})"
    if isinstance(given, (str, int)):
        texts = [part.strip() for part in str(given).split(",")]
        alone = len(texts) == 1
        numbers = [int(text) for text in texts if text.isascii() and text.isdigit()]
        wrong = len(numbers) != len([text for text in texts if text])
    else:
        numbers, alone = list(given), False
        wrong = not all(type(number) is int and number >= 0 for number in numbers)
    if wrong or not numbers or (alone and numbers[0] < 1):
        problems.add(f"seeds: {given!r} is neither a number of seeds nor a list of them; {remedy}")
    elif alone and numbers[0] > _MOST_SEEDS:
        problems.add(f"seeds: {given} would be {given} seeds; for the seed {given} write --seeds={given}, (a comma)")
    elif len(set(numbers)) != len(numbers):
        problems.add(f"seeds: {given!r} names a seed twice; leave one out")
    else:
        return tuple(range(first, first + numbers[0])) if alone else tuple(numbers)
    return ()


def split_outside(text: str, separators: str) -> list[str]:
    """Split `text` at each of the `separators` that is outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
        if sign in separators and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _request(spec: Spec, dataset: str, seed: int, files: Sequence[str], shared: Mapping[str, str]) -> _Request:
    """The configurations of a run, or a RaSeRecError with what is wrong in them."""
    own = {name: f"--{name}={value}" for name, value in spec.options.items()}
    words = [*{**shared, **own}.values(), f"--seed={seed}"]
    try:
        config = Config(spec.model, dataset, list(files), None, words)
    except ConfigError as error:
        raise ConfigError([_shared_remedy(problem, spec) for problem in error.problems]) from None
    problems = Problems()
    if config["backbone_checkpoint"]:
        problems.add(f"backbone_checkpoint: is set in a file; {_TAKEN['backbone_checkpoint']}")
    if config["resume"] is False:
        problems.add(f"resume: is false; {_TAKEN['resume']}")
    with problems.noted():
        check_run(config)
    for name in (config.model, config["backbone"] or ""):
        if name.startswith("__main__:"):
            problems.add(
                f"models: {name} lies in the program itself, which the runs cannot import; move it to a module"
            )
    problems.raise_all(0)
    base = config.without_regeneration() if config["regeneration"] else config
    base = base.for_backbone() if config["model"] == RETRIEVAL_MODEL else base
    return _Request(spec, config["dataset"], seed, config, None if base is config else base)


def _shared_remedy(problem: str, spec: Spec) -> str:
    """An option of all models that not all of them read has another remedy than that of a run."""
    name, told = problem.partition(":")[0], "this run does not read it, remove it"
    remedy = f"this one does not read it; give it to those that do, as NAME:{name}=VALUE"
    return problem if name in spec.options else problem.replace(told, remedy)


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
            problems.add(f"datasets: {str(error)[0].lower()}{str(error)[1:]}")


def _check_protocols(folder: Path, requests: Sequence[_Request], problems: Problems) -> None:
    """Refuse figures that mean different things, among the runs asked for and those in the directory."""
    made = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(CheckpointError):
            record = read_json(path)
            if isinstance(record, dict) and {"dataset", "options"} <= record.keys():
                made.append((record["dataset"], record["options"], f"the run {path.stem}"))
    made += [(each.dataset, each.config.explain(), each.spec.label) for each in requests]
    known: dict[tuple[str, str], tuple[str, str]] = {}  # (option, data set) -> (value, of which run)
    told: set[str] = set()
    for dataset, options, run in made:
        for option in (*_PROTOCOL, *_FILTERS):
            value = _meaning(option, options.get(option))
            before, other = known.setdefault((option, dataset if option in _FILTERS else ""), (value, run))
            if before != value and option not in told:
                told.add(option)
                both = f"{option} is {before} for {other}, and {value} for {run} on {dataset}"
                remedy = "give one value to all, or name another output directory"
                problems.add(f"output: {folder.parent} would hold figures of two protocols: {both}; {remedy}")


def _meaning(option: str, value: Any) -> str:
    """An option's value as a text that is the same where it means the same."""
    if option in ("metrics", "topk"):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        value = sorted({each.lower() if isinstance(each, str) else each for each in values})
    return str(dict(sorted(value.items())) if isinstance(value, Mapping) else value)


def _lay_out(output: Path, seeds: tuple[int, ...], requests: Sequence[_Request], problems: Problems) -> Plan:
    """Runs in their order, rows in the order of the table; one run for a base that several are built on."""
    hashes: Hashes = {}
    runs: dict[str, Run] = {}
    rows: dict[str, dict[str, Optional[str]]] = {}
    asked: dict[str, str] = {}
    named = [(request, run_name(request.config, hashes)) for request in requests]
    labels = {(request.dataset, request.seed, request.spec.label): name for request, name in named}
    for request, name in named:
        if asked.setdefault(name, request.spec.label) != request.spec.label:
            problems.add(f"models: {asked[name]} and {request.spec.label} are the same run; leave one out")
    for request, name in named:
        row, base = rows.setdefault(request.dataset, {}), None
        if request.base is not None:
            base = run_name(request.base, hashes)
            kept = {key: text for key, text in request.spec.options.items() if key in request.base.external_config_dict}
            label = asked.get(base) or Spec(request.base.model, kept).label
            if labels.setdefault((request.dataset, request.seed, label), base) != base:
                problem = f"models: the base of {request.spec.label} is another run than the row {label}"
                problems.add(f"{problem}; give the options in which they differ in the specs")
            if base not in runs:
                runs[base] = _run(label, request, request.base, base, None, hashes)
            row.setdefault(label, None)
        if name not in runs:
            runs[name] = _run(request.spec.label, request, request.config, name, base, hashes)
        row[request.spec.label] = None if base is None else runs[base].row
    return Plan(output, seeds, tuple(runs.values()), rows)


def _run(row: str, request: _Request, config: Config, name: str, base: Optional[str], hashes: Hashes) -> Run:
    needs = set() if base is None else {base}
    if trains_regenerator(config) and config["regen_pretrained"]:
        needs.add(run_name(config.for_embeddings(), hashes))
    taken = {"model", "dataset", "config_files", *_TAKEN}
    options = {key: value for key, value in config.external_config_dict.items() if key not in taken}
    return Run(row, config.model, request.dataset, request.seed, options, name, base, frozenset(needs))


def run_name(config: Config, hashes: Hashes) -> str:
    """Model, data set, seed, and the fingerprint of the options, data and versions that decide the figures.

    The hashes of data files that were read so far are in `hashes`, by their paths; new ones are added.
    """
    options: dict[str, Any] = {name: plain(config[name]) for name in _PROTOCOL}
    options["training"] = config.training_options()
    models, parts = {config.model}, [_content(config, hashes)]
    if config.model == RETRIEVAL_MODEL:
        options["backbone"] = config.for_backbone().training_options()
        models.add(options["backbone"]["model"])
    if config["regeneration"]:
        options["regeneration"] = {name: plain(config[name]) for name in regeneration_options(config)}
        pretrained = trains_regenerator(config) and config["regen_pretrained"]
        options["embeddings"] = config.for_embeddings().training_options() if pretrained else None
        given = Path(config["regenerated_data"]) if config["regenerated_data"] else None
        parts += [sha256(path) for path in sorted(given.iterdir()) if path.is_file()] if given else []
    found = versions()
    options["versions"] = {name: found[name] for name in _VERSIONS}
    options["model_versions"] = {
        name: model_versions(name) if ":" in name else MODEL_VERSIONS.get(name) for name in sorted(models)
    }
    return f"{short_name(config.model)}-{config['dataset']}-{config['seed']}-{fingerprint(options, *parts)[:12]}"


def _content(config: Config, hashes: Hashes) -> str:
    """Hash of the files that the run reads: interactions, and features where the model has some."""
    folder, dataset = Path(config["data_path"]), config["dataset"]
    paths = inter_files(folder, dataset, config["benchmark_filename"])
    suffixes = {*(config["load_col"] or ()), *(config["additional_feat_suffix"] or ())} - {"inter"}
    reads_texts = config["item_vectors"] in ("text", "both") or config["transition_head"] or config["memory_text"]
    suffixes |= {"item"} if reads_texts else set()
    paths += [folder / f"{dataset}.{suffix}" for suffix in sorted(suffixes)]
    key = tuple(str(path) for path in paths if path.is_file())
    if key not in hashes:
        hashes[key] = fingerprint({Path(path).name: sha256(path) for path in key})
    return hashes[key]
