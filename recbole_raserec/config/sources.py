"""Where options come from: YAML files, the command line, and the models, which are looked up by name."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import recbole
import yaml
from recbole.utils import dataset_arguments, evaluation_arguments, general_arguments, training_arguments
from recbole.utils import get_model as recbole_get_model
from recbole.utils import get_trainer as recbole_get_trainer

from recbole_raserec.config.options import RUN_KEYS, UNLISTED_KEYS, UNLISTED_MODEL_KEYS, Options
from recbole_raserec.errors import ConfigError, nearest, shown

_HERE = Path(__file__).resolve().parents[1]
#: The shipped YAML files: in the package once installed, beside it in a checkout.
PROPERTIES = next((path for path in (_HERE / "properties", _HERE.parent / "properties") if path.is_dir()), _HERE)
RECBOLE_PROPERTIES = Path(recbole.__file__).resolve().parent / "properties"

#: Read by RecBole for every model.
LISTED_KEYS = (
    frozenset(general_arguments + training_arguments + evaluation_arguments + dataset_arguments)
    | RUN_KEYS
    | UNLISTED_KEYS
)


#: The most values that the aliases in a YAML file may repeat.
_ALIASED = 100_000


class Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-12 as a number, as RecBole does (plain YAML 1.1 wants 1.0e-12)."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _check_aliases(node)
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _check_aliases(node: Any) -> None:
    """Raise a YAMLError where aliases of aliases stand for very many values (a "bomb"), or for themselves."""
    sizes: dict[int, float] = {}  # of each node, its aliases written out

    def size(node: Any) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # while its parts are counted: what holds itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            sizes[id(node)] = 1 + sum(
                size(part) for pair in parts for part in (pair if type(pair) is tuple else [pair])
            )
        return sizes[id(node)]

    if node is not None and size(node) > len(sizes) + _ALIASED:
        raise yaml.YAMLError(f"its aliases (*name) stand for more than {_ALIASED:,} values")


class Parsed(dict):
    """Options whose values already have their types: no text in it is parsed again."""


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """The options in a YAML file; an empty file has none.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping from names to values.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=Loader)
    except FileNotFoundError:
        raise ConfigError([f"config_files: '{path}' does not exist; correct the path or create the file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"config_files: '{path}' cannot be read ({error}); name a YAML text file"]) from None
    except (yaml.YAMLError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise ConfigError([f"config_files: '{path}' is not valid YAML ({line}); correct it there"]) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError([f"config_files: '{path}' is not a mapping; write one `option: value` a line"])
    return content


def parse_value(text: str) -> Any:
    """The value a text stands for: a Python literal, true, false or null in any case, else the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False, "null": None}.get(text.lower(), text)
    # A set, bytes or a complex number is no option's value: RecBole keeps such a text, and so do we.
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else text


def parse_arguments(argv: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Read `--name=value` arguments: (options, problems).

    Everything after the first `=` is the value. Anything that is not of that form is a problem, never ignored.
    """
    texts: dict[str, str] = {}
    problems = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, text = argument.lstrip("-").partition("=")
        if (not argument.startswith("--") or argument.startswith("---")) and equals and name:
            problems.append(f"{argument}: is not of the form --name=value; write --{name}={text}")
        elif not argument.startswith("--") or not name:
            problems.append(f"{argument}: is not of the form --name=value; remove it, or quote a value with spaces")
        elif equals:
            if texts.setdefault(name, text) != text:
                problems.append(f"--{name}: is given as {texts[name]!r} and as {text!r}; keep one")
        elif arguments and not arguments[0].startswith("--"):
            value = arguments.pop(0)
            problems.append(f"{argument} {value}: has no =; write {argument}={value}")
        else:
            problems.append(f"{argument}: has no =; write {argument}=VALUE")
    return {name: parse_value(text) for name, text in texts.items()}, problems


def config_files_in(options: Mapping[str, Any]) -> list[str]:
    """The paths of a `config_files` option: a list, or one text with spaces between the paths."""
    given = options.get("config_files") or []
    return str(given).split() if not isinstance(given, (list, tuple)) else [str(path) for path in given]


# Models: their classes, and the options that these read.

#: Model name -> folder whose face has the class of that name.
MODELS = {
    **dict.fromkeys(
        ("SASRec", "DuoRec", "BSARec", "GRU4Rec", "NARM", "FEARec", "BERT4Rec"), "recbole_raserec.recommendation"
    ),
    "DARec": "recbole_raserec.recommendation.darec",
    "RaSeRec": "recbole_raserec.retrieval",
}


#: In front of a name that this package has too: RecBole's own class.
RECBOLE = "recbole:"

#: Entry points of installed packages that name model classes.
ENTRY_POINTS = "recbole_raserec.models"

#: Classes that were given as such, by name: those of a function or a notebook cannot be imported.
_GIVEN: dict[str, Any] = {}


def get_model(name: str) -> Any:
    """Model class by name: one of this package, an entry point's, RecBole's, or `package.module:Class`.

    `recbole:Class` is RecBole's also where this package has a class of that name.

    Raises:
        ValueError: neither this package nor RecBole has a model of that name.
        ImportError: a model of the user's cannot be imported, or is none.
    """
    if name in MODELS:
        return getattr(importlib.import_module(MODELS[name]), name)
    if name.startswith(RECBOLE):
        return recbole_get_model(name)  # ours, which knows the prefix: `recbole_raserec.compat`
    if ":" in name:
        return _import_model(name)
    found = {} if name in model_keys() else {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return _import_model(found[name]) if name in found else recbole_get_model(name)


def is_ours(model: Any) -> bool:
    """Whether a name, or a class, is one that this package's configuration, data and trainer are for.

    These are its own models and classes derived from them, entry points, and the names `package.module:Class`.
    """
    if isinstance(model, type):
        return any(base.__module__.startswith("recbole_raserec.") for base in model.__mro__)
    if not isinstance(model, str) or model.startswith(RECBOLE):
        return False
    named = model in MODELS or ":" in model
    return named or (model not in model_keys() and model in {entry.name for entry in entry_points(group=ENTRY_POINTS)})


def _import_model(name: str) -> Any:
    """The class that `package.module:Class` names; a module in the working directory is found too."""
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module.strip())
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises
        if name in _GIVEN:
            return _GIVEN[name]
        if isinstance(error, AttributeError) and module in sys.modules:
            known = [key for key, kind in vars(sys.modules[module]).items() if not _no_model(kind)]
            guess = nearest(path, known)
            remedy = f"did you mean {module}:{guess}?" if guess else f"its models: {', '.join(known) or 'none'}"
            raise ImportError(f"the module {module} has no {path}; {remedy}") from None
        why = f"the module {module} cannot be imported ({type(error).__name__}: {error})"
        raise ImportError(f"{why}; install it, or put its folder on PYTHONPATH") from error
    if problem := _no_model(found):
        raise ImportError(problem)
    return found


def _no_model(found: Any) -> str:
    """Why something is no model class; empty if it is one."""
    from recbole.model.abstract_recommender import AbstractRecommender  # loads much

    if isinstance(found, type) and issubclass(found, AbstractRecommender) and hasattr(found, "type"):
        declared = getattr(found, "options", Options)
        is_options = isinstance(declared, type) and issubclass(declared, Options)
        return "" if is_options else f"{found.__name__}.options is no subclass of recbole_raserec.config.Options"
    name = getattr(found, "__name__", shown(found))
    return f"{name} is not a model; derive it from recbole.model.abstract_recommender.SequentialRecommender"


def is_own(model: Any) -> bool:
    """Whether a class, or the class of a model, is neither of this package nor of RecBole."""
    kind = model if isinstance(model, type) else type(model)
    return kind.__module__.partition(".")[0] not in ("recbole", "recbole_raserec")


def name_of(model: type) -> str:
    """The name by which `get_model` finds a class: its own, or `package.module:Class` of one of the user's."""
    if not is_own(model):
        return recbole_name(model)
    name = f"{model.__module__}:{model.__qualname__}"
    place: Any = sys.modules.get(model.__module__)
    if (
        functools.reduce(lambda found, part: getattr(found, part, None), model.__qualname__.split("."), place)
        is not model
    ):
        _GIVEN[name] = model
    return name


def recbole_name(model: type) -> str:
    """The name of a class in a configuration of RecBole's, with a prefix where one of ours has that name."""
    name = model.__name__
    return f"{RECBOLE}{name}" if name in MODELS and not is_ours(model) else name


def in_recbole(name: str) -> bool:
    """Whether RecBole has a model of that name."""
    return (RECBOLE_PROPERTIES / "model" / f"{name}.yaml").is_file()


def short_name(name: str) -> str:
    """The name of a model for files and tables: of `package.module:Class` the class."""
    return re.split("[.:]", name)[-1]


def with_names(options: Mapping[Any, Any]) -> dict[Any, Any]:
    """The options, with names in place of model classes."""
    return {key: name_of(value) if isinstance(value, type) else value for key, value in options.items()}


def own_defaults(model: type) -> dict[str, Any]:
    """Defaults of a user's model: of the model of RecBole it derives from, or that it learns by softmax."""
    values = {} if hasattr(model, "input_type") else {"loss_type": "CE"}
    for base in reversed(model.__mro__):
        path = RECBOLE_PROPERTIES / "model" / f"{base.__name__}.yaml"
        values.update(read_yaml(path) if base.__module__.startswith("recbole.model.") and path.is_file() else {})
    return values


def yaml_beside(model: type) -> dict[str, Any]:
    """The options in the file `Class.yaml` beside the module of a user's model; none if there is no such file."""
    module = getattr(sys.modules.get(model.__module__), "__file__", None) or "-"  # a program may have no file
    path = Path(module).with_name(f"{model.__name__}.yaml")
    return read_yaml(path) if path.is_file() else {}


def folder_of(name: str) -> list[str]:
    """The folder from which a process started elsewhere can import `package.module:Class`, in a list if it needs it."""
    top = sys.modules.get(name.partition(":")[0].partition(".")[0]) if ":" in name else None
    places = [os.path.dirname(path) for path in getattr(top, "__path__", [getattr(top, "__file__", None)]) if path]
    return [os.path.abspath(place) for place in places if "-packages" not in place][:1]


def options_of(name: str, model_class: Any) -> list[type[Options]]:
    """The class that declares the options of a model, in a list; an empty one if no class does.

    Args:
        name: of the model.
        model_class: its class.
    """
    options = getattr(model_class, "options", None)
    if options is None and name in MODELS:
        options = get_model(name).options
    return [options] if isinstance(options, type) and issubclass(options, Options) else []


def get_trainer_class(config: Any) -> Any:
    """RecBole's trainer class for the configured model; for ours, that of its type."""
    return recbole_get_trainer(config["MODEL_TYPE"], RECBOLE if is_ours(config["model"]) else config["model"])


@functools.cache
def model_keys() -> Mapping[str, frozenset[str]]:
    """For each model with a YAML file, here or in RecBole, the options in it."""
    keys: dict[str, frozenset[str]] = {}
    for folder in (RECBOLE_PROPERTIES, PROPERTIES):
        for path in sorted((folder / "model").glob("*.yaml")):
            keys[path.stem] = keys.get(path.stem, frozenset()) | frozenset(read_yaml(path))
    return keys


def model_names() -> list[str]:
    """Names a model can be asked for by, for suggestions."""
    exceptions = {"lightgbm": "LightGBM", "xgboost": "XGBoost"}
    installed = {entry.name for entry in entry_points(group=ENTRY_POINTS)}
    return sorted({exceptions.get(name, name) for name in model_keys()} | {"Random"} | installed)


def find_model(option: str, name: Any, where: str) -> Any:
    """The class of a model of this package, of RecBole or of the user.

    Args:
        option: the option that names it.
        name: its name.
        where: where the name was given, as a message shows it.

    Raises:
        ConfigError: there is no such model, or it needs a library that is not installed.
    """
    if name is None:
        raise ConfigError([f"{option}: is not given; name one, for example --{option}=SASRec"])
    if isinstance(name, str) and (name.isidentifier() or ":" in name):
        try:
            return get_model(name)
        except ImportError as error:
            if ":" in name or name in {entry.name for entry in entry_points(group=ENTRY_POINTS)}:
                raise ConfigError([f"{option}: {name}{where}: {error}"]) from error
            # RecBole looks through all its packages for an unknown name, and one of them imports lightgbm.
            if name in model_names():
                problem = f"{option}: {name}{where} cannot be imported ({error}); install what it needs"
                raise ConfigError([problem]) from error
        except (ValueError, AttributeError):
            pass
    guess = nearest(name, model_names())
    some = "choose RaSeRec, DuoRec, SASRec or a model of RecBole, or write package.module:Class for one of your own"
    remedy = f"did you mean {guess}?" if guess else some
    raise ConfigError([f"{option}: {shown(name)}{where} is not a model; {remedy}"])


def all_keys() -> frozenset[str]:
    """Every option of this package and of RecBole, whatever the model."""
    files = [*RECBOLE_PROPERTIES.glob("quick_start_config/*.yaml"), *PROPERTIES.glob("dataset/*.yaml")]
    files += [RECBOLE_PROPERTIES / "dataset" / "sample.yaml", RECBOLE_PROPERTIES / "dataset" / "ml-100k.yaml"]
    files += [RECBOLE_PROPERTIES / "overall.yaml", PROPERTIES / "overall.yaml"]
    return (LISTED_KEYS | UNLISTED_MODEL_KEYS).union(*model_keys().values(), *(read_yaml(path) for path in files))


_READ = re.compile(r"""config(?:\[\s*|\.get\(\s*)["']([\w-]+)["']|["']([\w-]+)["'] (?:not )?in (?:self\.)?config\b""")


def keys_in_source(source: str) -> set[str]:
    """Names that Python source reads from a configuration."""
    return {first or second for first, second in _READ.findall(source)}


@functools.cache
def keys_read_by(model_class: type) -> frozenset[str] | None:
    """Options that a model's code reads; None when its source is not at hand.

    Of the model's own module all of it counts (layers defined beside the model read options too), of the modules of
    its base classes only those classes.
    """
    keys: set[str] = set()
    try:
        keys |= keys_in_source(inspect.getsource(inspect.getmodule(model_class)))  # type: ignore[arg-type]
        for base in model_class.__mro__[1:]:
            if base.__module__.split(".")[0] not in ("torch", "builtins", "abc"):
                keys |= keys_in_source(inspect.getsource(base))
    except (OSError, TypeError):
        return None
    return frozenset(keys)


# What is known of models: which batches may be cut, and what RaSeRec retrieves with.

#: Models whose scores, loss and gradients stay the same when `item_seq` [B, L] is cut to the longest sequence of the
#: batch: padding never enters them. (In RecBole the padding row of an embedding is initialised like any other, so that
#: a model that sums over positions without a mask, STAMP for one, does depend on L.) A batch transform, such as the
#: masking of BERT4Rec, has to come after the cut.
TRIMMABLE = frozenset({
    "BERT4Rec", "CORE", "FDSA", "FPMC", "GCSAN", "GRU4Rec", "GRU4RecF", "GRU4RecKG", "KSR", "NARM", "S3Rec", "SASRec",
    "SASRecF", "SRGNN", "TransRec",
})  # fmt: skip


def trims(model: Any) -> bool:
    """Whether batches for a model, or its class, may be cut to their longest sequence without a change of any result.

    A model that `TRIMMABLE` does not know says so itself with a class attribute `trims = True`. What a user's class
    derives from says nothing of what it adds.
    """
    kind = model if isinstance(model, type) else type(model)
    own = is_own(kind)
    said = [vars(base)["trims"] for base in kind.__mro__ if "trims" in vars(base) and (is_own(base) or not own)]
    return bool(said[0] if said else not own and kind.__name__ in TRIMMABLE)


#: What the option `backbone` may name.
SUPPORTED: tuple[str, ...] = (
    "BERT4Rec", "BSARec", "CORE", "Caser", "DARec", "DuoRec", "FDSA", "FEARec", "FOSSIL", "FPMC", "GCSAN", "GRU4Rec",
    "GRU4RecF", "HGN", "HRM", "LightSANs", "NARM", "NPE", "NextItNet", "SASRec", "SASRecF", "SHAN", "SINE", "SRGNN",
    "STAMP",
)  # fmt: skip

_KNOWLEDGE = "reads a data set of its own kind, with a knowledge graph, and retrieval needs plain sequences"
_MIXTURE = "ranks by a mixture of probabilities (items seen, items near, all items), not by one dot product"

#: RecBole 1.2.1's sequential models that do not, and why.
REFUSED: dict[str, str] = {
    "DIEN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "DIN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "GRU4RecCPR": _MIXTURE,
    "GRU4RecKG": _KNOWLEDGE,
    "KSR": _KNOWLEDGE,
    "RepeatNet": "ranks by a mixture of two probabilities (repeat, explore), not by one dot product",
    "S3Rec": "reads item attributes, and is trained in two runs (pre-training, then fine-tuning)",
    "SASRecCPR": _MIXTURE,
    "TransRec": "ranks by a Euclidean distance, not by a dot product",
}
