"""What the pipeline asks of a configuration: those of its other stages, and the options that decide a result."""

from __future__ import annotations

from typing import Any

from recbole.utils import ModelType

from recbole_raserec.configuration.checks import check_names
from recbole_raserec.configuration.key_sets import NOT_TRAINING
from recbole_raserec.configuration.options import (
    ENCODER,
    ENCODERS,
    LANGUAGE,
    RECURRENT,
    REGENERATION,
    RETRIEVAL,
    RETRIEVAL_MODEL,
    SEQUENTIAL,
    rules_for,
)
from recbole_raserec.configuration.sources import Parsed
from recbole_raserec.configuration.text import plain
from recbole_raserec.distributed.launch import layout_of


class DerivedConfigs:
    """Part of :class:`recbole_raserec.config.Config`."""

    def for_backbone(self: Any) -> Any:
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
        dropped = {"model", "dataset", "config_files", *RETRIEVAL}
        options = {name: value for name, value in self.external_config_dict.items() if name not in dropped}
        return type(self)(self.final_config_dict["backbone"], self.dataset, config_dict=Parsed(options), argv=[])

    def reads(self: Any, name: str) -> bool:
        """Whether this run reads an option of that name; True where that cannot be told."""
        return not check_names({name: None}, self._known_keys(), {})

    def never_takes(self: Any, name: str, value: Any) -> bool:
        """Whether an option is not read, or refuses a value whatever the others are."""
        rule = rules_for(self._names, self.model_class.type == ModelType.SEQUENTIAL).get(name)
        return not self.reads(name) or (rule is not None and not rule.accepts(value))

    def with_options(self: Any, options: dict[str, Any]) -> Any:
        """The same configuration, in which `options` take the place of what was given.

        Raises:
            ConfigError: with every problem of the new configuration.
        """
        dropped = ("model", "dataset", "config_files")
        given = {name: value for name, value in self.external_config_dict.items() if name not in dropped}
        return type(self)(self.model, self.dataset, config_dict=Parsed({**given, **options}), argv=[])

    def without_regeneration(self: Any) -> Any:
        """The same configuration with `regeneration: false`."""
        options = {name: value for name, value in self.external_config_dict.items() if name not in REGENERATION}
        options = {name: value for name, value in options.items() if name not in ("model", "dataset", "config_files")}
        return type(self)(self.model, self.dataset, config_dict=Parsed(options), argv=[])

    def for_collaborator(self: Any) -> Any:
        """The configuration of the model that the option `collaborative` of DARec names, the same as of a run of it.

        Of the options given, those hold that the model and DARec have in common and that do not describe the training
        or the size of DARec itself: the data, the split, the seed, the place of the checkpoints.
        """
        name = self.final_config_dict["collaborative"]
        model = type(self)(name, self.dataset, config_dict=Parsed({}), argv=[])
        own = {"model", "dataset", "config_files", "loss_type", "training", "packed_copies", *LANGUAGE, *REGENERATION}
        own |= {"epochs", "stopping_step", "learning_rate", "train_batch_size", "weight_averaging", "initializer_range"}
        own |= {"MAX_ITEM_LIST_LENGTH", "eval_batch_size", *RETRIEVAL}
        known = model._known_keys()
        options = {
            option: value
            for option, value in self.external_config_dict.items()
            if option not in own and (known is None or option in known)
        }
        return type(self)(name, self.dataset, config_dict=Parsed(options), argv=[])

    def for_embeddings(self: Any) -> Any:
        """The configuration of the SASRec whose item vectors the regenerator starts from.

        The options that were given hold for it too, where SASRec knows them; without any for another model, it is a
        run of ``--model=SASRec`` of the same data, and its checkpoint is shared with that.
        """
        if self.model == "SASRec":
            return self.without_regeneration()
        known = type(self)("SASRec", self.dataset, config_dict=Parsed({}), argv=[])
        dropped = {"model", "dataset", "config_files", "loss_type", "train_neg_sample_args", *RETRIEVAL, *REGENERATION}
        dropped |= {"additional_feat_suffix", "preload_weight"}
        if not ENCODERS & set(self._names):
            dropped |= set(ENCODER)
        if not (ENCODERS - RECURRENT) & set(self._names):  # sizes of another kind of model
            dropped |= {*SEQUENTIAL, "hidden_dropout_prob", "attn_dropout_prob", "embedding_size"}
        columns = self.final_config_dict.get("load_col")
        interactions = {"load_col": {"inter": columns["inter"]}} if columns and "inter" in columns else {}
        options = {
            name: value
            for name, value in self.external_config_dict.items()
            if name not in dropped and (known._known_keys() is None or name in (known._known_keys() or ()))
        }
        if "load_col" in options:  # item features, knowledge graphs: not for SASRec
            options.update(interactions)
        return type(self)("SASRec", self.dataset, config_dict=Parsed(options), argv=[])

    def training_options(self: Any) -> dict[str, Any]:
        """The options that decide what the trained weights are, JSON-able, sorted by name: for fingerprints.

        Paths are left out, `backbone_checkpoint` too: a fingerprint of the retrieval stage has to hold the backbone's.
        """
        options = {name: value for name, value in self.explain().items() if name not in NOT_TRAINING}
        # Regenerated data have a fingerprint of their own, which the run's holds where there are any.
        unread = set(REGENERATION) if options.get("regeneration") else {*REGENERATION, "memory_regenerated"}
        options = {name: value for name, value in options.items() if name not in unread}
        processes = layout_of(self.final_config_dict).size
        if processes > 1:  # dropout masks are drawn by each for its rows
            options["world_size"] = processes
        if options["valid_protocol"] == "auto":  # what it was before there was the option
            del options["valid_protocol"]
        protocol = dict(options["eval_args"])
        protocol["mode"] = protocol["mode"]["valid"]  # the test is after the training
        return {**options, "eval_args": protocol}

    def explain(self: Any) -> dict[str, Any]:
        """All final options, JSON-able, sorted by name."""
        return {name: plain(self.final_config_dict[name]) for name in sorted(self.final_config_dict)}
