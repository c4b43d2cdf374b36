"""Our models in RecBole's own hands: where RecBole looks a name up, it finds ours.

Nothing is imported until a name is used; `recbole_raserec.plugin` then does the work.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from logging import INFO, getLogger
from typing import Any

from recbole_raserec.compat.import_hooks import patch, replace_function
from recbole_raserec.errors import nearest

_NAMED: set[str] = set()  # models of which the log says whose they are


def _config() -> Any:
    return importlib.import_module("recbole_raserec.config")


def _plugin() -> Any:
    return importlib.import_module("recbole_raserec.plugin")


def _runs_ours(config: Any) -> bool:
    """Whether it is a configuration of this package, of a model that RecBole has not."""
    return hasattr(config, "training_options") and _config().is_ours(config["model"])


def _find_lazily(module: Any, suffix: str, find: Callable[[str], Any]) -> None:
    """Let `module` have `find(name)` under the name of each of our models and `suffix`; None: it has none."""

    def __getattr__(name: str) -> Any:
        model = name.removesuffix(suffix)
        found = find(model) if name.endswith(suffix) and name[:1] != "_" and _config().is_ours(model) else None
        if found is None:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return found

    module.__getattr__ = __getattr__


@patch("our-models", "recbole.utils.utils")
def _lookups(module: Any) -> None:
    """get_model knows the models of this package. A name that RecBole has too is ours, which the log says once; with
    `recbole:` in front it is RecBole's."""

    def make(original: Any) -> Any:
        def get_model(model_name: str) -> Any:
            config, logger = _config(), getLogger()
            if not config.is_ours(model_name):
                name = model_name.removeprefix(config.RECBOLE)
                try:
                    found = original(name)
                except ModuleNotFoundError:  # RecBole looks everywhere, and in one place it imports lightgbm
                    if name in config.model_names():
                        raise
                    guess = nearest(name, config.model_names())
                    remedy = f"did you mean {guess}?" if guess else "write package.module:Class for one of your own"
                    raise ValueError(f"`model_name` [{model_name}] is not the name of a model; {remedy}") from None
                if config.is_ours(found):
                    raise ValueError(f"`model_name` [{model_name}] is not a model of RecBole's")
                return found
            if config.in_recbole(model_name) and model_name not in _NAMED and logger.isEnabledFor(INFO):
                _NAMED.add(model_name)
                logger.info(f"{model_name} is recbole_raserec's model; {config.RECBOLE}{model_name} is RecBole's")
            return config.get_model(model_name)

        return get_model

    replace_function(module.get_model, make)


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A module below RecBole's sequential models for each of ours that RecBole has none for."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        package, _, name = fullname.rpartition(".")
        known = package == "recbole.model.sequential_recommender" and name in map(str.lower, _config().MODELS)
        return importlib.util.spec_from_loader(fullname, self) if known else None

    def exec_module(self, module: types.ModuleType) -> None:
        _find_lazily(module, "", lambda name: _config().get_model(name))


@patch("our-modules", "recbole.model.sequential_recommender")
def _modules(module: Any) -> None:
    """RecBole keeps a model in a module of its name among the sequential models; ours can be imported from there."""
    _find_lazily(module, "", lambda name: _config().get_model(name))
    if not any(isinstance(finder, _Modules) for finder in sys.meta_path):
        sys.meta_path.append(_Modules())


class _Ours(Exception):
    """The configuration being made is of one of our models."""


@patch("our-options", "recbole.config.configurator")
def _options(module: Any) -> None:
    """RecBole's Config knows the options of RecBole's models. For a model of this package it becomes our Config, which
    names the options that the model does not read in a warning, for RecBole takes any."""
    config = module.Config
    init, find, load = config.__init__, config._get_model_and_dataset, config._load_internal_config_dict

    @functools.wraps(init)
    def __init__(
        self: Any, model: Any = None, dataset: Any = None, config_file_list: Any = None, config_dict: Any = None
    ) -> None:
        if type(self) is not config:
            return init(self, model, dataset, config_file_list, config_dict)
        try:
            init(self, model, dataset, config_file_list, dict(config_dict or {}))
        except _Ours:
            vars(self).clear()
            self.__class__ = _config().Config
            given = [] if "ipykernel_launcher" in sys.argv[0] else sys.argv[1:]
            argv = [argument for argument in given if argument.startswith("--") and "=" in argument]
            self.__init__(model, dataset, config_file_list, config_dict, argv, strict=False)

    def _get_model_and_dataset(self: Any, model: Any, dataset: Any) -> Any:
        named = self.external_config_dict.get("model") if model is None else model
        if type(self) is config and _config().is_ours(named):
            raise _Ours
        _, kind, dataset = find(self, model, dataset)
        return _config().recbole_name(kind), kind, dataset

    def _load_internal_config_dict(self: Any, model: str, model_class: Any, dataset: str) -> None:
        load(self, model.removeprefix(_config().RECBOLE), model_class, dataset)

    config.__init__, config._get_model_and_dataset = __init__, _get_model_and_dataset
    config._load_internal_config_dict = _load_internal_config_dict


@patch("our-data", "recbole.data.dataset")
def _datasets(module: Any) -> None:
    """create_dataset looks for a class named after the model; ours read sequences without copies of them."""

    def find(name: str) -> Any:
        sequential = _config().get_model(name).type.name == "SEQUENTIAL"
        return importlib.import_module("recbole_raserec.data").SequenceDataset if sequential else None

    _find_lazily(module, "Dataset", find)


@patch("our-logs", "recbole.data.dataset.dataset")
def _logs(module: Any) -> None:
    """With a configuration of this package, whatever its model: RecBole takes a file with faults as it can, and sorts
    by times as float32, in which seconds of today are multiples of 128. Files are checked, and the order is exact."""

    def around(original: Callable[..., None], ours: str) -> Callable[..., None]:
        @functools.wraps(original)
        def method(self: Any, *given: Any) -> None:
            step = functools.partial(original, self, *given)
            if not hasattr(self.config, "training_options"):
                return step()
            return getattr(importlib.import_module("recbole_raserec.data.preparation"), ours)(self, step)

        return method

    steps = {"_load_inter_feat": "read_log", "_remove_duplication": "drop_repeats"}
    for name, ours in {**steps, "_data_filtering": "filter_log", "_remap_ID_all": "sort_log"}.items():
        setattr(module.Dataset, name, around(getattr(module.Dataset, name), ours))


@patch("our-loaders", "recbole.data.utils")
def _loaders(module: Any) -> None:
    """data_preparation gives our models the loaders that they train with."""

    def make(original: Any) -> Any:
        def data_preparation(config: Any, dataset: Any) -> Any:
            return (_plugin().data_preparation if _runs_ours(config) else original)(config, dataset)

        return data_preparation

    replace_function(module.data_preparation, make)


@patch("our-trainers", "recbole.trainer")
def _trainers(module: Any) -> None:
    """get_trainer looks for a class named after the model."""
    _find_lazily(module, "Trainer", lambda name: _plugin().trainer_of(name))


@patch("our-trainer", "recbole.trainer.trainer")
def _trainer(module: Any) -> None:
    """A Trainer made for one of our models by hand is the one that get_trainer gives."""
    trainer = module.Trainer
    init = trainer.__init__

    @functools.wraps(init)
    def __init__(self: Any, config: Any, model: Any) -> None:
        if type(self) is not trainer or not _runs_ours(config):
            return init(self, config, model)
        self.__class__ = _plugin().trainer_of(config["model"])
        self.__init__(config, model)

    trainer.__init__ = __init__


@patch("our-checkpoints", "recbole.quick_start.quick_start")
def _checkpoints(module: Any) -> None:
    """load_data_and_model also reads a checkpoint directory of this package."""

    def make(original: Any) -> Any:
        def load_data_and_model(model_file: Any) -> Any:
            return (_plugin().load_data_and_model if os.path.isdir(model_file) else original)(model_file)

        return load_data_and_model

    replace_function(module.load_data_and_model, make)
