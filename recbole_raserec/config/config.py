"""The configuration: RecBole's, with this package's properties, checked as a whole before any data is read."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType

from recbole_raserec.config.checks import check_names, check_together, check_values
from recbole_raserec.config.options import (
    COMPUTED_KEYS,
    ENCODERS,
    NESTED,
    NOT_TRAINING,
    RECURRENT,
    REGENERATION,
    RETRIEVAL_MODEL,
    TRANSFORM_KEYS,
    WITHOUT_NEGATIVES,
    Options,
    SequentialOptions,
    accepted,
    defaults,
    options_for,
    overall_defaults,
    unchanged_later,
    without_training,
)
from recbole_raserec.config.sources import (
    LISTED_KEYS,
    PROPERTIES,
    Loader,
    Parsed,
    config_files_in,
    find_model,
    get_model,
    is_own,
    keys_read_by,
    model_names,
    name_of,
    options_of,
    own_defaults,
    parse_arguments,
    parse_value,
    read_yaml,
    with_names,
    yaml_beside,
)
from recbole_raserec.distributed import layout_of
from recbole_raserec.errors import ConfigError, nearest, shown
from recbole_raserec.storage import fingerprint, plain, raw_format, raw_stem, read_manifest, version_of

#: The devices visible when the program started. RecBole overwrites the variable with gpu_id at every configuration.
_VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")

#: What RecBole's own files add to the columns to load for a model that reads features.
_FEATURES = ("load_col", "threshold", "additional_feat_suffix")

#: Models that score single interactions keep RecBole's protocol, made for labels.
_LABELLED = (ModelType.CONTEXT, ModelType.DECISIONTREE)
_PROTOCOL = ("eval_args", "metrics", "topk", "valid_metric")


def _ours(name: str) -> dict[str, Any]:
    """The options in a shipped YAML file; none if there is no such file."""
    path = PROPERTIES / f"{name}.yaml"
    return read_yaml(path) if path.is_file() else {}


def model_versions(name: str) -> list[str]:
    """What a fingerprint of a model holds beside options and data; of one of the user's a hash of its module."""
    if ":" in name:
        model = get_model(name)
        for part in (inspect.getmodule(model), model):
            with contextlib.suppress(OSError, TypeError):
                return [fingerprint(inspect.getsource(part))]  # type: ignore[arg-type]
    return version_of(name)


class Config(RecBoleConfig):
    """RecBole's Config for the models of this package and of RecBole.

    Precedence, highest first: command line, `config_dict`, config files (the last named first), the YAML files of this
    package for the data set, the model and overall, RecBole's own files. `eval_args` and `train_neg_sample_args` may
    be given in part; what is left out keeps its value. Differences from RecBole: unknown options are errors, YAML is
    read safely, and texts are parsed as literals, never evaluated.

    Args:
        model: name (of one's own: `package.module:Class`) or class; default: the option `model`.
        dataset: name, or path of a file to prepare; default: the option `dataset`.
        config_file_list: paths of YAML files; those of an option `--config_files="a.yaml b.yaml"` are added.
        config_dict: options by name.
        argv: command line arguments without the program's name; default: those of the process.
        strict: options that the model does not read are errors; otherwise a warning names them, and they are left out.

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
        strict: bool = True,
    ):
        if argv is None:
            argv = [] if "ipykernel_launcher" in sys.argv[0] else sys.argv[1:]
        self._argv, self._strict = list(argv), strict
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
        given = with_names(config_dict or {})
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
        dataset = self._prepared_from(dataset)
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
            meant = str(model if model_class is not None else nearest(model, model_names()))
            options = options_for(options_of(meant, model_class), False)
            self._problems += check_values(dict(given), options, self._origins, {})
            raise ConfigError(self._problems)
        return name_of(model_class), model_class, dataset

    def _prepared_from(self, dataset: Any) -> Any:
        """The name of the data set that is made of a file; a name stays as it is."""
        if isinstance(dataset, (str, os.PathLike)) and raw_format(dataset):
            path = Path(dataset).expanduser().absolute()
            if not path.is_file():
                self._problems.append(f"dataset: the file {shown(str(dataset))} does not exist (looked at {path})")
            self.external_config_dict["dataset_file"] = str(path)
            return raw_stem(path)
        return dataset

    def _find_model(self, option: str, name: Any) -> Any:
        """The class of a model; None, with the problem noted, when there is none."""
        try:
            return find_model(option, name, self._origins.get(option, ""))
        except ConfigError as error:
            self._problems += error.problems
            return None

    def _find_backbone(self) -> tuple[str | None, Any]:
        name = self.external_config_dict.get("backbone", self._shipped(self.model, self.model_class)["backbone"])
        backbone = self._find_model("backbone", name)
        if backbone is not None and (name == RETRIEVAL_MODEL or backbone.type != ModelType.SEQUENTIAL):
            where = self._origins.get("backbone", "")
            self._problems.append(
                f"backbone: {name}{where} is not a sequential model that can stand alone; "
                "choose SASRec, DuoRec or another sequential model"
            )
            backbone = None
        return (name_of(backbone), backbone) if backbone is not None else (None, None)

    @staticmethod
    def _shipped(name: str, model_class: Any) -> dict[str, Any]:
        """The defaults of a model: declared beside it, or changed in its YAML file."""
        declared = {key: value for options in options_of(name, model_class) for key, value in defaults(options).items()}
        if is_own(model_class):
            return {**own_defaults(model_class), **declared, **yaml_beside(model_class)}
        return {**declared, **_ours(f"model/{name}")}

    def _update_internal_config_dict(self, file: str | os.PathLike) -> dict[str, Any]:
        content = read_yaml(file)
        self.internal_config_dict.update(content)
        if Path(file).parent.name == "quick_start_config":
            self._features.update({key: content[key] for key in _FEATURES if key in content})
        return content

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        models = {model: model_class}
        if model == RETRIEVAL_MODEL:
            backbone, self._backbone_class = self._find_backbone()
            models = {backbone: self._backbone_class, **models} if backbone else models
        self._models = models
        self._features: dict[str, Any] = {}
        super()._load_internal_config_dict(next(iter(models)), self._backbone_class or model_class, dataset)
        self.internal_config_dict["MODEL_TYPE"] = model_class.type
        protocol = {key: self.internal_config_dict[key] for key in _PROTOCOL}
        self.internal_config_dict.update({**overall_defaults(), **_ours("overall")})
        for name, kind in models.items():
            self.internal_config_dict.update(self._shipped(name, kind))
        self.internal_config_dict.update(_ours(f"dataset/{dataset}"))
        if model_class.type in _LABELLED:
            self.internal_config_dict.update(protocol)
        # The columns RecBole lists for a model that reads features; our data set files name only those of a sequence.
        self.internal_config_dict.update(self._features)

    # ------------------------------------------------------------------ the final options, checked

    def _get_final_config_dict(self) -> dict[str, Any]:
        given, shipped, keys = self.external_config_dict, self.internal_config_dict, self._known_keys()
        unread = check_names(given, keys, self._origins)
        if not self._strict and unread:
            getLogger().warning(f"Options that {self.model} does not read are left out.\n" + "\n".join(unread))
            for name in [name for name in given if check_names({name: None}, keys, {})]:
                del given[name]
            unread = []
        self._problems += unread
        final = {**copy.deepcopy(shipped), **copy.deepcopy(given)}
        if final.get("training") == "auto" or "training" not in given:  # or a data set's file asks for packed
            by_windows = final.get("loss_type", "CE") != "CE" or final.get("filter_scope") == "window"
            final.update({"training": "prefix"} if by_windows and "training" in final else {})
        if "train_neg_sample_args" not in given and self._needs_no_negatives(final):
            final["train_neg_sample_args"] = None
        for name in NESTED:
            if isinstance(given.get(name), dict) and isinstance(shipped.get(name), dict):
                final[name] = {**copy.deepcopy(shipped[name]), **final[name]}
        if isinstance(final.get("gpu_id"), list):
            final["gpu_id"] = tuple(final["gpu_id"])
        if final.get("show_progress") == "auto":
            final["show_progress"] = bool(sys.stderr and sys.stderr.isatty())
        if isinstance(final.get("topk"), tuple):
            final["topk"] = list(final["topk"])

        sequential = self.model_class.type == ModelType.SEQUENTIAL
        self._problems += check_values(final, self._options(), self._origins, shipped)
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
            final["backbone"] = next(iter(self._models))  # its full name, however it was written
        return final

    def _own(self) -> list[type[Options]]:
        """The classes that declare the options of the model and of its backbone."""
        return [options for name, kind in self._models.items() for options in options_of(name, kind)]

    def _options(self) -> type[Options]:
        """What this run checks: the options of its models, and those of every run."""
        return options_for(reversed(self._own()), self.model_class.type == ModelType.SEQUENTIAL)

    def _learns_by_softmax(self, final: Mapping[str, Any]) -> bool:
        trained = self._backbone_class or self.model_class
        return not hasattr(trained, "input_type") and final.get("loss_type") == "CE"

    def _needs_no_negatives(self, final: Mapping[str, Any]) -> bool:
        sequential = self.model_class.type == ModelType.SEQUENTIAL
        return sequential and (self._learns_by_softmax(final) or not WITHOUT_NEGATIVES.isdisjoint(self._models))

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

    # -- what the pipeline asks of it: the configurations of its other stages, and the options that decide a result

    def for_backbone(self) -> Config:
        """The configuration of the backbone of a RaSeRec run, the same as of a run of that model alone.

        It is made from the options as they were given, without those of the retrieval stage: changing one of these
        leaves the backbone's configuration, and so its checkpoint, what it was. An option of the backbone with the name
        of one of that stage (FOSSIL's `alpha`) keeps its default. Values set on this object after it was made are not
        carried over.

        Raises:
            ValueError: the model of this configuration has no backbone.
        """
        if self.model != RETRIEVAL_MODEL:
            raise ValueError(f"{self.model} has no backbone; only {RETRIEVAL_MODEL} has one.")
        return self._derived(self.final_config_dict["backbone"], self._given(self.model_class.options.model_fields))

    def _given(self, dropped: Iterable[str] = ()) -> dict[str, Any]:
        """The options that were given, without those of the run and those `dropped`."""
        without = {"model", "dataset", "config_files", *dropped}
        return {name: value for name, value in self.external_config_dict.items() if name not in without}

    def _known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that this run reads."""
        known = self._known_keys()
        return {name: value for name, value in options.items() if known is None or name in known}

    def _derived(self, model: str, options: Mapping[str, Any]) -> Config:
        """The configuration of a model on the same data set with these options alone."""
        return type(self)(model, self.dataset, config_dict=Parsed(options), argv=[])

    def reads(self, name: str) -> bool:
        """Whether this run reads an option of that name; True where that cannot be told."""
        return not check_names({name: None}, self._known_keys(), {})

    def never_takes(self, name: str, value: Any) -> bool:
        """Whether an option is not read, or refuses a value whatever the others are."""
        options = self._options()
        return not self.reads(name) or (name in options.model_fields and not accepted(options, {name: value}))

    def with_options(self, options: dict[str, Any]) -> Config:
        """The same configuration, in which `options` take the place of what was given.

        Raises:
            ConfigError: with every problem of the new configuration.
        """
        return self._derived(self.model, {**self._given(), **options})

    def without_regeneration(self) -> Config:
        """The same configuration with `regeneration: false`."""
        return self._derived(self.model, self._given(REGENERATION))

    def for_embeddings(self) -> Config:
        """The configuration of the SASRec whose item vectors the regenerator starts from.

        The options that were given hold for it too, where SASRec knows them; without any for another model, it is a
        run of `--model=SASRec` of the same data, and its checkpoint is shared with that.
        """
        if self.model == "SASRec":
            return self.without_regeneration()
        dropped = {"loss_type", "train_neg_sample_args", "additional_feat_suffix", "preload_weight", *REGENERATION}
        if self.model == RETRIEVAL_MODEL:
            dropped.update(self.model_class.options.model_fields)
        if not ENCODERS & set(self._models):
            dropped.update(("training", "packed_copies"))
        if not (ENCODERS - RECURRENT) & set(self._models):  # sizes of another kind of model
            dropped.update(SequentialOptions.model_fields, ("embedding_size",))
        options = self._derived("SASRec", {})._known(self._given(dropped))
        if "load_col" in options:  # item features, knowledge graphs: not for SASRec
            columns = self.final_config_dict.get("load_col")
            options.update({"load_col": {"inter": columns["inter"]}} if columns and "inter" in columns else {})
        return self._derived("SASRec", options)

    def training_options(self) -> dict[str, Any]:
        """The options that decide what the trained weights are, JSON-able, sorted by name: for fingerprints.

        Paths are left out, `backbone_checkpoint` too: a fingerprint of the retrieval stage has to hold the backbone's.
        """
        options = self.explain()
        without = self.not_training | unchanged_later(self._options(), options)
        options = {name: value for name, value in options.items() if name not in without}
        # Regenerated data have a fingerprint of their own, which the run's holds where there are any.
        unread = set(REGENERATION) if options.get("regeneration") else {*REGENERATION, "memory_regenerated"}
        options = {name: value for name, value in options.items() if name not in unread}
        processes = layout_of(self.final_config_dict).size
        if processes > 1:  # dropout masks are drawn by each for its rows
            options["world_size"] = processes
        protocol = dict(options["eval_args"])
        protocol["mode"] = protocol["mode"]["valid"]  # the test is after the training
        return {**options, "eval_args": protocol}

    @property
    def log_folder(self) -> Path:
        """Where log files and boards of a run go."""
        return Path(self.final_config_dict["log_dir"] or self.final_config_dict["checkpoint_dir"])

    @property
    def not_training(self) -> frozenset[str]:
        """Names of options that leave the trained weights as they are."""
        return NOT_TRAINING | without_training(self._options())

    def options_of_checkpoint(self, name: str) -> dict[str, Any]:
        """The options of the run whose checkpoint directory the option `name` names."""
        return read_manifest(self.final_config_dict[name])["options"]

    def explain(self) -> dict[str, Any]:
        """All final options, JSON-able, sorted by name."""
        return {name: plain(self.final_config_dict[name]) for name in sorted(self.final_config_dict)}


def saved_config(manifest: Mapping[str, Any]) -> Config:
    """The configuration of the run whose checkpoint has this manifest."""
    options = dict(manifest["options"])
    if options["train_neg_sample_args"]["distribution"] == "none":
        del options["train_neg_sample_args"]
    name, dataset, path = options.pop("model"), options.pop("dataset"), options.pop("data_path")
    bare = Config(name, dataset, config_dict=Parsed({k: v for k, v in options.items() if k == "backbone"}), argv=[])
    given = {**bare._known(options), "data_path": os.path.dirname(path)}
    return Config(name, dataset, config_dict=Parsed(given), argv=[])
