"""The configuration: RecBole's, with this package's properties, checked as a whole before any data is read."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType

from recbole_raserec.configuration.checks import check_names, check_together, check_values
from recbole_raserec.configuration.derived import DerivedConfigs
from recbole_raserec.configuration.key_sets import COMPUTED_KEYS, TRANSFORM_KEYS
from recbole_raserec.configuration.options import NESTED, RETRIEVAL_MODEL, WITHOUT_NEGATIVES, rules_for
from recbole_raserec.configuration.sources import (
    LISTED_KEYS,
    PROPERTIES,
    Loader,
    Parsed,
    config_files_in,
    find_model,
    keys_read_by,
    model_names,
    parse_arguments,
    parse_value,
    read_yaml,
)
from recbole_raserec.configuration.text import nearest, shown
from recbole_raserec.errors import ConfigError

#: The devices visible when the program started. RecBole overwrites the variable with gpu_id at every configuration.
_VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")

#: What RecBole's own files add to the columns to load for a model that reads features.
_FEATURES = ("load_col", "threshold", "additional_feat_suffix")

#: Models that score single interactions keep RecBole's protocol, made for labels.
_LABELLED = (ModelType.CONTEXT, ModelType.DECISIONTREE)
_PROTOCOL = ("eval_args", "metrics", "topk", "valid_metric")


class Config(DerivedConfigs, RecBoleConfig):
    """RecBole's Config for the models of this package and of RecBole.

    Precedence, highest first: command line, `config_dict`, config files (the last named first), the YAML files of this
    package for the data set, the model and overall, RecBole's own files. `eval_args` and `train_neg_sample_args` may
    be given in part; what is left out keeps its value. Differences from RecBole: unknown options are errors, YAML is
    read safely, and texts are parsed as literals, never evaluated.

    Args:
        model: name or class; default: the option `model`.
        dataset: name; default: the option `dataset`.
        config_file_list: paths of YAML files; those of an option `--config_files="a.yaml b.yaml"` are added.
        config_dict: options by name.
        argv: command line arguments without the program's name; default: those of the process.

    Raises:
        ConfigError: with every problem found. Nothing but YAML files has been read at that point.
    """

    parameters: dict[str, list[str]]
    internal_config_dict: dict[str, Any]
    external_config_dict: dict[str, Any]
    final_config_dict: dict[str, Any]

    def __init__(
        self,
        model: Any = None,
        dataset: str | None = None,
        config_file_list: Sequence[str | os.PathLike] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        argv: Sequence[str] | None = None,
    ):
        if argv is None:
            argv = [] if "ipykernel_launcher" in sys.argv[0] else sys.argv[1:]
        self._argv = list(argv)
        self._problems: list[str] = []
        self._origins: dict[str, str] = {}
        self._backbone_class: Any = None
        try:
            super().__init__(model, dataset, config_file_list, config_dict)
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, AssertionError) as error:
            raise ConfigError([f"RecBole refuses the options: {error or type(error).__name__}"]) from error

    # ------------------------------------------------------------------ what was given

    def _init_parameters_category(self) -> None:
        super()._init_parameters_category()
        # RecBole extends these lists in place; they belong to its module.
        self.parameters = {category: list(names) for category, names in self.parameters.items()}

    def _build_yaml_loader(self) -> type:
        return Loader

    def _load_config_files(self, file_list: Sequence[str | os.PathLike] | None) -> dict[str, Any]:
        if isinstance(file_list, (str, os.PathLike)):
            file_list = [file_list]
        named = [os.fspath(path) for path in file_list or []]
        named += [path for path in config_files_in(parse_arguments(self._argv)[0]) if path not in named]
        options: dict[str, Any] = {}
        for path in named:
            try:
                content = read_yaml(path)
            except ConfigError as error:
                self._problems += error.problems
                continue
            if content.pop("config_files", None) is not None:
                self._problems.append(f"config_files: cannot be set in {path}; give it on the command line")
            options.update(content)
            self._origins.update(dict.fromkeys(content, f" (in {path})"))
        return options

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        given = dict(config_dict or {})
        for name in [name for name in given if not isinstance(name, str)]:
            self._problems.append(f"config_dict: the key {shown(name)} is not a text; use names of options")
            del given[name]
        if given.pop("config_files", None) is not None:
            self._problems.append("config_files: cannot be set in config_dict; pass the paths as config_file_list")
        self._origins.update(dict.fromkeys(given, " (in config_dict)"))
        return copy.deepcopy(given) if isinstance(config_dict, Parsed) else self._convert_config_dict(given)

    def _load_cmd_line(self) -> dict[str, Any]:
        options, problems = parse_arguments(self._argv)
        self._problems += problems
        self._origins.update(dict.fromkeys(options, " (on the command line)"))
        return options

    def _convert_config_dict(self, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: parse_value(value) if isinstance(value, str) else copy.deepcopy(value)
            for name, value in config_dict.items()
        }

    # ------------------------------------------------------------------ the model, its backbone, the defaults

    def _get_model_and_dataset(self, model: Any, dataset: str | None) -> tuple[str, Any, str]:
        given = self.external_config_dict
        model = given.get("model") if model is None else model
        dataset = given.get("dataset") if dataset is None else dataset
        model_class = model if isinstance(model, type) else self._find_model("model", model)
        # A data set called 2019 arrives from the command line as a number.
        dataset = str(dataset) if type(dataset) is int else dataset
        if not isinstance(dataset, str) or not dataset:
            self._problems.append("dataset: is not given; name one, for example --dataset=ml-100k")
        elif dataset in (".", "..") or Path(dataset).name != dataset:
            self._problems.append(
                f"dataset: {shown(dataset)} is a path; write its last part, and the rest as data_path"
            )
        if model_class is None or not isinstance(dataset, str):
            self._problems += check_names(given, None, self._origins)
            meant = model if model_class is not None else nearest(model, model_names())
            self._problems += check_values(dict(given), rules_for([str(meant)], False), self._origins, {})
            raise ConfigError(self._problems)
        name = model_class.__name__ if isinstance(model, type) else model
        return name, model_class, dataset

    def _find_model(self, option: str, name: Any) -> Any:
        """The class of a model; None, with the problem noted, when there is none."""
        try:
            return find_model(option, name, self._origins.get(option, ""))
        except ConfigError as error:
            self._problems += error.problems
            return None

    def _find_backbone(self) -> tuple[str | None, Any]:
        name = self.external_config_dict.get("backbone", read_yaml(self._ours("model", self.model))["backbone"])
        backbone = self._find_model("backbone", name)
        if backbone is not None and (name == RETRIEVAL_MODEL or backbone.type != ModelType.SEQUENTIAL):
            where = self._origins.get("backbone", "")
            self._problems.append(
                f"backbone: {name}{where} is not a sequential model that can stand alone; "
                "choose SASRec, DuoRec or another sequential model"
            )
            backbone = None
        return (name, backbone) if backbone is not None else (None, None)

    @staticmethod
    def _ours(*parts: str) -> Path:
        return PROPERTIES.joinpath(*parts[:-1], parts[-1] + ".yaml")

    def _update_internal_config_dict(self, file: str | os.PathLike) -> dict[str, Any]:
        content = read_yaml(file)
        self.internal_config_dict.update(content)
        if Path(file).parent.name == "quick_start_config":
            self._features.update({key: content[key] for key in _FEATURES if key in content})
        return content

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        names = [model]
        if model == RETRIEVAL_MODEL:
            backbone, self._backbone_class = self._find_backbone()
            names = [backbone, model] if backbone else [model]
        self._names = names
        self._features: dict[str, Any] = {}
        super()._load_internal_config_dict(names[0], self._backbone_class or model_class, dataset)
        self.internal_config_dict["MODEL_TYPE"] = model_class.type
        protocol = {key: self.internal_config_dict[key] for key in _PROTOCOL}
        ours = [self._ours("overall"), *(self._ours("model", name) for name in names), self._ours("dataset", dataset)]
        for path in ours:
            if path.is_file():
                self._update_internal_config_dict(path)
        if model_class.type in _LABELLED:
            self.internal_config_dict.update(protocol)
        # The columns RecBole lists for a model that reads features; our data set files name only those of a sequence.
        self.internal_config_dict.update(self._features)

    # ------------------------------------------------------------------ the final options, checked

    def _get_final_config_dict(self) -> dict[str, Any]:
        given, defaults = self.external_config_dict, self.internal_config_dict
        final = {**copy.deepcopy(defaults), **copy.deepcopy(given)}
        if final.get("training") == "packed" and final.get("loss_type", "CE") != "CE" and "training" not in given:
            final["training"] = "prefix"  # a data set's file asks for packed where the loss allows it
        if "train_neg_sample_args" not in given and self._needs_no_negatives(final):
            final["train_neg_sample_args"] = None
        for name in NESTED:
            if isinstance(given.get(name), dict) and isinstance(defaults.get(name), dict):
                final[name] = {**copy.deepcopy(defaults[name]), **final[name]}
        if isinstance(final.get("gpu_id"), list):
            final["gpu_id"] = tuple(final["gpu_id"])
        if isinstance(final.get("topk"), tuple):
            final["topk"] = list(final["topk"])

        keys = self._known_keys()
        self._problems += check_names(given, keys, self._origins)
        sequential = self.model_class.type == ModelType.SEQUENTIAL
        self._problems += check_values(final, rules_for(self._names, sequential), self._origins, defaults)
        retrieval = self.model == RETRIEVAL_MODEL
        if not sequential and final.get("regeneration"):
            self._problems.append(
                f"regeneration: {shown(final['regeneration'])}, but {self.model} reads no sequences; leave it out"
            )
        self._problems += check_together(final, lambda name: keys is None or name in keys, retrieval)
        if sequential and isinstance(final.get("train_neg_sample_args"), dict) and self._learns_by_softmax(final):
            value = shown(final["train_neg_sample_args"])
            self._problems.append(
                f"train_neg_sample_args: {value} with loss_type: CE, which ranks all items and samples none; "
                "remove train_neg_sample_args, or write loss_type: BPR"
            )
        if self._problems:
            raise ConfigError(self._problems)
        if "gpu_id" not in given and _VISIBLE_DEVICES is not None:
            final["gpu_id"] = _VISIBLE_DEVICES
        if retrieval:
            # The retrieval stage learns by cross entropy, whatever the backbone learned by.
            final["loss_type"], final["train_neg_sample_args"] = "CE", None
        return final

    def _learns_by_softmax(self, final: Mapping[str, Any]) -> bool:
        trained = self._backbone_class or self.model_class
        return not hasattr(trained, "input_type") and final.get("loss_type") == "CE"

    def _needs_no_negatives(self, final: Mapping[str, Any]) -> bool:
        sequential = self.model_class.type == ModelType.SEQUENTIAL
        return sequential and (self._learns_by_softmax(final) or not WITHOUT_NEGATIVES.isdisjoint(self._names))

    def _known_keys(self) -> frozenset[str] | None:
        """Options this run reads; None when that cannot be told (unknown backbone, model without source)."""
        if self.model == RETRIEVAL_MODEL and self._backbone_class is None:
            return None
        keys = LISTED_KEYS.union(self.internal_config_dict)
        if self.external_config_dict.get("transform") is not None:
            keys |= TRANSFORM_KEYS
        for model_class in filter(None, (self.model_class, self._backbone_class)):
            read = keys_read_by(model_class)
            if read is None:
                return None
            keys |= read
        return keys - COMPUTED_KEYS

    # ------------------------------------------------------------------ what RecBole derives from them

    def _set_default_parameters(self) -> None:
        asked = self.external_config_dict.get("data_path")
        super()._set_default_parameters()
        if asked is not None:
            # RecBole has its own copy of ml-100k and reads that one, wherever the user points.
            folder = os.path.join(asked, self.dataset)
            if os.path.isfile(os.path.join(folder, f"{self.dataset}.inter")):
                self.final_config_dict["data_path"] = folder

    def _init_device(self) -> None:
        super()._init_device()
        if not self.final_config_dict["use_gpu"]:
            self.final_config_dict["device"] = torch.device("cpu")
