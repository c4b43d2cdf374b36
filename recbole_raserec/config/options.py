"""The options: each is one field of a pydantic class, with its type and range, its default and one sentence.

Options of every run stand here; those of a model stand beside it, in the class that its attribute `options` names. A
user's own model can have such a class, too. The checks, `properties/*.yaml` and the tables of
`docs/reference/options.md` come from the declarations (`python -m recbole_raserec.config.properties` writes them). To
add an option, write one field:

    top_k: Count = option(20, "neighbours per query")
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Callable, Literal, NamedTuple, Optional, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import core_schema


class Options(BaseModel):
    """Base of the classes that declare options. The docstring of such a class heads its part of the YAML file.

    Options of several classes are checked together, field by field: validators belong into their types (`Annotated`).
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


_RECBOLE: Any = object()


def option(
    default: Any = _RECBOLE, sentence: str = "", *, heading: Optional[str] = None, training: bool = True,
    later: bool = False,
) -> Any:  # fmt: skip
    """Declare an option.

    Args:
        default: its value unless another is given; left out: RecBole's files have it, or it needs none.
        sentence: what it does.
        heading: the comment above it in the YAML file, where it starts a paragraph; empty: a blank line alone.
        training: whether it decides what the trained weights are, and with that a run's fingerprint.
        later: added after version 0.1.0 with a default that changes nothing. The fingerprint holds other values alone,
            so that what older versions trained is found.
    """
    more = {"heading": heading, "training": training, "later": later, "shipped": default is not _RECBOLE}
    return Field(default if more["shipped"] else None, description=sentence or None, json_schema_extra=more)


def told(field: FieldInfo, name: str, otherwise: Any = True) -> Any:
    """What `option` was told of a field: `heading`, `training`, `later`; or whether it is `shipped`, with a default."""
    extra = field.json_schema_extra
    return extra.get(name, otherwise) if isinstance(extra, dict) else otherwise


def shipped(options: type[Options]) -> dict[str, FieldInfo]:
    """The options of a class that have a default of this package, in the order of their declaration."""
    return {name: field for name, field in options.model_fields.items() if told(field, "shipped")}


def defaults(options: type[Options]) -> dict[str, Any]:
    """The defaults that a class declares, by name."""
    return {name: copy.deepcopy(field.default) for name, field in shipped(options).items()}


def without_training(options: type[Options]) -> frozenset[str]:
    """Options of a class that leave the trained weights as they are."""
    return frozenset(name for name, field in options.model_fields.items() if not told(field, "training"))


def unchanged_later(options: type[Options], values: Mapping[str, Any]) -> frozenset[str]:
    """The later options of a class that have their default in `values`."""
    later = {name: field for name, field in options.model_fields.items() if told(field, "later", False)}
    return frozenset(name for name, field in later.items() if values.get(name) == field.default)


def accepted(options: type[Options], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that their options accept, converted: 1 and 1.0 are one configuration."""
    try:
        valid = options.model_validate(dict(values))
    except ValidationError as error:
        refused = {problem["loc"][0] for problem in error.errors()}
        return accepted(options, {name: value for name, value in values.items() if name not in refused})
    return {name: getattr(valid, name) for name in values}


@functools.cache
def combined(classes: tuple[type[Options], ...]) -> type[Options]:
    """One class with the options of several; of those of one name the first counts."""
    fields: dict[str, FieldInfo] = {}
    for options in reversed(classes):
        fields.update(options.model_fields)
    pairs: dict[str, Any] = {name: (field.annotation, field) for name, field in fields.items()}
    return create_model("RunOptions", __base__=Options, **pairs)


# Types, and what they accept in words.


@dataclass(frozen=True)
class Accepts:
    """A type for what Python's types cannot say: `Annotated[Any, Accepts(...)]`.

    Attributes:
        requirement: what it accepts, in words.
        test: whether it accepts a value.
        kind: its name in a YAML comment.
        convert: makes one value of those that mean the same.
    """

    requirement: str
    test: Callable[[Any], bool]
    kind: str = "str"
    convert: Callable[[Any], Any] = lambda value: value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_plain_validator_function(self._validated)

    def _validated(self, value: Any) -> Any:
        if not self.test(value):
            raise ValueError(self.requirement)
        return self.convert(value)


class Words(NamedTuple):
    """A type in words: what it accepts, its name in a YAML comment, and the names to choose among."""

    requirement: str
    kind: str
    choices: tuple[str, ...] = ()


def in_words(field: FieldInfo) -> Words:
    """What an option accepts."""
    return _words(field.annotation, field.metadata)


def _words(kind: Any, metadata: Iterable[Any]) -> Words:
    marks = [mark for item in metadata for mark in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for mark in marks:
        if isinstance(mark, Accepts):
            return Words(mark.requirement, mark.kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(parts[0], [*parts[1:], *marks])
    if origin is Literal:
        return Words("one of " + ", ".join(map(str, parts)), "str", tuple(map(str, parts)))
    if type(None) in parts:
        words = _words(Union[tuple(part for part in parts if part is not type(None))], marks)
        return words._replace(requirement=f"{words.requirement}, or null")
    if kind is str:
        return Words("a non-empty text" if any(isinstance(mark, MinLen) for mark in marks) else "a text", "str")
    if kind in (int, float):
        return Words(_range(kind, marks), kind.__name__)
    names = {bool: "true or false", dict: "a mapping", list: "a list"}
    plain = origin or kind
    return Words(names.get(plain, "another value"), getattr(plain, "__name__", ""))


def _range(kind: type, marks: Iterable[Any]) -> str:
    """A number's bounds: `an integer >= 1`, `a number in [0, 1)`."""
    low = high = None
    for mark in marks:
        low = mark if isinstance(mark, (Ge, Gt)) else low
        high = mark if isinstance(mark, (Le, Lt)) else high
    above = "" if low is None else f">= {low.ge}" if isinstance(low, Ge) else f"> {low.gt}"
    below = "" if high is None else f"<= {high.le}" if isinstance(high, Le) else f"< {high.lt}"
    if kind is float and above and below:
        return f"a number in {'[('[above[1] == ' ']}{above.split()[1]}, {below.split()[1]}{'])'[below[1] == ' ']}"
    bounds = " and ".join(filter(None, (above, below)))
    return f"{'an integer' if kind is int else 'a number'} {bounds}".rstrip()


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _all(test: Callable[[Any], bool], length: Optional[int] = None) -> Callable[[Any], bool]:
    """A test for lists whose parts all pass `test`."""
    return lambda value: isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(test, value))


_names = _all(lambda part: isinstance(part, str) and bool(part))


def _sizes(value: Any) -> bool:
    return _count(value) or (bool(value) and _all(lambda part: _count(part) or _all(_count, 2)(part))(value))


def _devices(value: Any) -> bool:
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return not isinstance(value, bool) and re.fullmatch(r"(\d+(,\d+)*)?", text.replace(" ", "")) is not None


def _interval(value: Any) -> str:
    """As RecBole reads it; "[5,60]" arrives as a list, which its command line and YAML make of it."""
    if _all(is_number, 2)(value):
        return f"[{value[0]},{value[1]}]"
    return value if isinstance(value, str) else ""


def _is_interval(value: Any) -> bool:
    one = r"[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])]"
    return re.fullmatch(f"{one}(;{one})*", _interval(value)) is not None


def _anything(value: Any) -> bool:
    """For an option that is looked up, or that `config.checks` judges beside others."""
    return True


_LEVELS = ("debug", "info", "warning", "error", "critical")

Natural = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Several = Annotated[int, Ge(2)]
Bounded = Annotated[int, Ge(1), Le(100_000)]  # of what takes room for every row
Weight = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
Dropout = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, MinLen(1)]
Precision = Literal["auto", "float32", "bfloat16"]
Loss = Annotated[Literal["CE", "BPR"], Field(description="CE (softmax over all items) or BPR (one sampled negative)")]
# fmt: off
Names = Annotated[Any, Accepts("a list of names", _names, "list", list)]
Columns = Annotated[Any, Accepts(
    "auto, or a list of names", lambda value: value == "auto" or _names(value), "str or list",
    lambda value: value if isinstance(value, str) else list(value))]
Numbers = Annotated[Any, Accepts("a list of integers >= 0", _all(_count), "list", list)]
Dropouts = Annotated[Any, Accepts(
    "a list of two numbers in [0, 1)", _all(lambda part: is_number(part) and 0 <= part < 1, 2), "list", list)]
Sizes = Annotated[Any, Accepts(
    "a size >= 0, or a list with a size or a pair of sizes for each layer", _sizes, "int or list")]
Devices = Annotated[Any, Accepts("a GPU number, several joined by commas, or empty for the CPU", _devices)]
Column = Annotated[Any, Accepts(
    "a name, or a position from 1", lambda value: bool(value) and type(value) in (str, int), "str", str)]
Interval = Annotated[Any, Accepts('an interval such as "[5,inf)" (in quotes)', _is_interval, "str", _interval)]
Level = Annotated[Any, Accepts(
    f"one of {', '.join(_LEVELS)}", lambda value: isinstance(value, str) and value.lower() in _LEVELS)]
Port = Annotated[Any, Accepts("a port, 1 to 65535", lambda value: str(value) in map(str, range(1, 1 << 16)), "int")]
Processes = Annotated[Any, Accepts(
    "-1 or an integer >= 1", lambda value: type(value) is int and (value == -1 or value >= 1), "int")]
Regenerates = Annotated[Any, Accepts(
    "true, false or personalised", lambda value: value in (True, False, "personalised"), "bool or str")]
Progress = Annotated[Any, Accepts(
    "true, false or auto", lambda value: value in (True, False, "auto"), "bool or str")]
EvalArgs = Annotated[Any, Accepts("a mapping with split, order, group_by, mode", _anything, "dict")]
Metrics = Annotated[Any, Accepts("a list of names", _anything, "list")]
Cutoffs = Annotated[Any, Accepts("a list of integers > 0", _anything, "list")]
Metric = Annotated[Any, Accepts("one of metrics at one of topk", _anything)]
ModelName = Annotated[Any, Accepts("a model", _anything)]
# fmt: on

# Options of every run, by section of `properties/overall.yaml`.

#: The two protocols of a ranking of all items: those of the history stay in it (RecBole's way), or are taken out. The
#: third is of a ranking among sampled items.
SEEN_KEPT, SEEN_REMOVED, SAMPLED = "seen_kept", "seen_removed", "sampled"


class RunOptions(Options):
    """Environment"""

    seed: Annotated[int, Ge(0), Le(2**32 - 1)] = option(2020, "random seed, RecBole's")
    reproducibility: bool = option(True, "deterministic kernels where the library has them")
    data_path: Text = option("dataset/", "directory that contains NAME/NAME.inter of a data set NAME", training=False)
    checkpoint_dir: Text = option("saved", "directory of the checkpoints", training=False)
    show_progress: Progress = option(
        "auto", "progress bars: true, false, or auto: on a terminal, elsewhere one line an epoch", training=False
    )
    result_file: Optional[Text] = option(None, "write the final figures to this JSON file", training=False)
    ranks_file: Optional[Text] = option(None, "write the rank of every test target to this .npz file", training=False)
    threads: Optional[Count] = option(None, "CPU threads; null leaves it to the library", training=False)
    resume: bool = option(True, "continue an interrupted run of the same configuration and data", training=False)
    use_gpu: bool = option(sentence="a GPU, where torch sees one; the compiled kernels are for the CPU", training=False)
    gpu_id: Devices = option(sentence="which GPU", training=False)
    worker: Natural = option(training=False)
    state: Level = option(training=False)
    log_dir: Optional[Text] = option(
        None, "directory of log/, log_tensorboard/ and what trackers write; null: checkpoint_dir", training=False
    )
    log_wandb: bool = option(sentence="figures to Weights & Biases, of the project wandb_project", training=False)
    log_mlflow: bool = option(
        False, "figures to MLflow, below log_dir unless MLFLOW_TRACKING_URI is set", training=False
    )
    save_dataset: bool = option(training=False)
    dataset_save_path: Optional[Text] = option(training=False)
    save_dataloaders: bool = option(training=False)
    dataloaders_save_path: Optional[Text] = option(training=False)


class ProcessOptions(Options):
    """Processes"""

    nproc: Count = option(sentence="processes that share every batch, on CPUs or GPUs", training=False)
    world_size: Processes = option(sentence="processes on all machines", training=False)
    group_offset: Natural = option(sentence="processes on the machines before this one", training=False)
    ip: Text = option(sentence="address of the first machine", training=False)
    port: Port = option(sentence="port of the first machine", training=False)


class DataOptions(Options):
    """Data: what a sequence needs, and nothing else"""

    load_col: Optional[dict] = option(
        {"inter": ["user_id", "item_id", "timestamp"]}, "suffix of the atomic file: columns to load"
    )
    MAX_ITEM_LIST_LENGTH: Bounded = option(50, "the model sees the last that many items of a history")
    bucket_batches: bool = option(True, "batch windows of similar length together, so that less of a batch is padding")
    unload_col: Optional[dict] = option()
    val_interval: Optional[dict] = option()
    user_inter_num_interval: Optional[Interval] = option()
    item_inter_num_interval: Optional[Interval] = option()
    USER_ID_FIELD: Text = option()
    ITEM_ID_FIELD: Text = option()
    TIME_FIELD: Text = option()
    transform: Optional[
        Literal["mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined"]
    ] = option()


class FileOptions(Options):
    """A file as the data set (--dataset=ratings.csv): how it is prepared; as of `recbole-raserec prepare`"""

    dataset_file: Optional[Text] = option(None, "set by dataset=FILE: the file", training=False)
    user_col: Optional[Column] = option(None, "the user's column; null: found by its name", training=False)
    item_col: Optional[Column] = option(None, "the item's", training=False)
    rating_col: Optional[Column] = option(None, "the rating's; none: there is none", training=False)
    time_col: Optional[Column] = option(None, "the time's; none: the lines are in order", training=False)
    sep: Optional[Text] = option(None, "between the columns: a sign, or tab; null: found", training=False)
    k_core: Natural = option(0, "keep users and items with that many interactions, repeatedly", training=False)
    drop_duplicates: bool = option(False, "keep only a user's first interaction with an item", training=False)


class TrainingOptions(Options):
    """Training"""

    weight_averaging: Dropout = option(
        0,
        "in [0, 1): validate and keep a moving average of the weights with this decay a step (0.999 reaches back over "
        "a thousand steps); 0: the last step's weights",
    )
    native_kernels: bool = option(True, "SASRec and DuoRec: use the compiled kernels where the processor can run them")
    softmax_precision: Precision = option(
        "auto",
        "loss of this package's models: float32; bfloat16: its products in bfloat16; auto: bfloat16 where the compiled "
        "kernel for it is there or a GPU multiplies in it, otherwise float32",
    )
    learner: Literal["adam", "sgd", "adagrad", "rmsprop", "sparse_adam"] = option()
    weight_decay: Weight = option()
    clip_grad_norm: Optional[dict] = option()
    eval_step: Natural = option()
    shuffle: bool = option()
    repeatable: bool = option()
    enable_amp: bool = option()
    enable_scaler: bool = option()
    require_pow: bool = option()
    embedding_size: Count = option()
    dropout_prob: Dropout = option()


class RegenerationOptions(Options):
    """Dataset regeneration (DR4SR, arXiv 2405.17795): sequential models train on mined and generated patterns too. The
    names of the paper are in brackets; the options below the first count only where it is on."""

    regeneration: Regenerates = option(
        False,
        "regenerate the training set first; personalised (DR4SR+; SASRec, DuoRec, BSARec, GRU4Rec, NARM): and weigh "
        "each regenerated row by what it is worth to the model",
    )
    regenerated_data: Optional[Text] = option(None, "directory of a regenerated set to use instead of making one")
    regen_rows: Literal["both", "patterns", "generated"] = option(
        "both",
        "what joins the training set: patterns (mined), generated (what is not among these), or both",
    )
    regen_pretrained: bool = option(True, "start from the item vectors of a trained SASRec (trained, or found, first)")
    regen_span: Several = option(5, "items of a history that a pattern may span (the paper's alpha)")
    regen_min_support: Count = option(2, "users whose histories must hold a pattern (the paper's beta)")
    regen_pairs: Count = option(10, "patterns that the regenerator learns of one sequence, at most")
    regen_pattern_length: Several = option(5, "items of a pattern, at most")
    regen_hidden_size: Count = option(64, "of the regenerator, where regen_pretrained is false; otherwise SASRec's")
    regen_layers: Count = option(2, "of its encoder, and of its decoder")
    regen_heads: Count = option(2, "attention heads")
    regen_inner_size: Count = option(256, "inner size of its feed-forward layers")
    regen_dropout: Dropout = option(0.5, "in [0, 1)")
    regen_conditions: Count = option(5, "latent spaces, and patterns generated for a sequence (K)")
    regen_learning_rate: Positive = option(0.001, "Adam")
    regen_epochs: Count = option(40, "at most")
    regen_stopping_step: Count = option(
        3, "stop after that many epochs without a better loss of held-out pairs (the paper: none)"
    )
    regen_held_out: Dropout = option(0.05, "share of the sequences whose pairs are held out, in [0, 1)")
    regen_batch_pairs: Count = option(1024, "pairs in a batch, about")
    regen_entropy: Weight = option(0.1, "weight of the entropy of the conditions' use")
    regen_tau_decay: PositiveShare = option(0.995, "the Gumbel-softmax's temperature is multiplied by it every step")
    regen_tau_least: PositiveShare = option(0.1, "down to this")
    regen_gamma: Share = option(
        0.1,
        "share of restrictive steps when patterns are generated, in [0, 1]; the best of the paper's plot (its code "
        "always takes 1)",
    )
    regen_temperature: Weight = option(0, "0: the best item at each step; above: drawn")
    regen_personal_epochs: Count = option(5, "personalised: passes over all rows while the scores are learned")
    regen_personal_every: Count = option(10, "steps of the model between two steps of the scores")
    regen_personal_terms: Natural = option(3, "terms of the Neumann series for the inverse Hessian, beyond the first")
    regen_personal_rate: Positive = option(0.1, "its rate")
    regen_personal_learning_rate: Positive = option(0.001, "Adam, of the scores")


class EvaluationOptions(Options):
    """Evaluation: by default leave-one-out in time order, every item ranked"""

    eval_args: EvalArgs = option(
        {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user",
         "mode": {"valid": "full", "test": "full"}},
        "keys that are left out keep the value they have here; mode: full ranks all items; uniN, popN, such as uni100: "
        "the target among N items that RecBole draws uniformly or by popularity",
    )  # fmt: skip
    metrics: Metrics = option(["Recall", "NDCG"], training=False)
    topk: Cutoffs = option([5, 10, 20], training=False)
    valid_metric: Metric = option("NDCG@10", "early stopping; one of metrics at one of topk")
    valid_protocol: Literal["auto", "seen_kept", "seen_removed"] = option(
        "auto",
        "validation figures of which protocol stop a training and tune the kNN head: seen_kept, seen_removed; auto: "
        "RecBole's, kept for sequential models, removed for general ones; validation among sampled items has only one",
        later=True,
    )
    eval_batch_size: Count = option(1024, training=False)
    eval_memory_mb: Positive = option(
        512, "MiB that the scores of an evaluation may take; they are computed in chunks", training=False
    )
    metric_decimal_place: Count = option(training=False)
    loss_decimal_place: Count = option(training=False)


# What models have in common: each chooses among these, and may set other defaults.


class SequentialOptions(Options):
    """Sizes of a transformer; the ranges hold for every sequential model that has an option of the name."""

    n_layers: Count = option(2, "transformer layers")
    n_heads: Count = option(2, "attention heads; must divide hidden_size")
    hidden_size: Count = option(64, "length of an item's and a user's vector")
    inner_size: Count = option(256, "inner size of the feed-forward layers")
    hidden_dropout_prob: Dropout = option(0.5, "dropout of the hidden states, in [0, 1)")
    attn_dropout_prob: Dropout = option(0.5, "dropout of the attention weights, in [0, 1)")
    hidden_act: Literal["gelu", "relu", "swish", "tanh", "sigmoid"] = option(
        "gelu", "gelu, relu, swish, tanh or sigmoid"
    )
    layer_norm_eps: Positive = option(1e-12)
    initializer_range: Positive = option(0.02, "standard deviation of the initial weights")
    num_layers: Count = option()


class LearningOptions(Options):
    """How a model is trained; the ranges hold for all models."""

    learning_rate: Positive = option(0.001, "Adam", heading="")
    train_batch_size: Count = option(512, "windows in a batch")
    epochs: Count = option(100, "at most; early stopping usually ends sooner")
    stopping_step: Natural = option(10, "stop after more than that many evaluations without a better valid_metric")


class EncoderOptions(LearningOptions):
    """How SASRec, DuoRec, BSARec, GRU4Rec and NARM are trained."""

    training: Literal["auto", "prefix", "packed"] = option(
        "auto",
        "prefix: one window per target; packed: all targets of a sequence in one pass; auto: packed where it can be "
        "(loss_type: CE, filter_scope: causal) and histories have 30 items or more on average, otherwise prefix",
    )
    packed_copies: Count = option(1, "rows among which `packed` distributes a sequence's targets in each epoch")


#: The sections of `properties/overall.yaml`.
OVERALL = (RunOptions, DataOptions, FileOptions, TrainingOptions, RegenerationOptions, EvaluationOptions)


def overall_defaults() -> dict[str, Any]:
    """The defaults of every run."""
    return {name: value for section in OVERALL for name, value in defaults(section).items()}


def options_for(own: Iterable[type[Options]], sequential: bool) -> type[Options]:
    """The options that a run checks.

    Args:
        own: those of its model and, if it has one, of its backbone; the first wins.
        sequential: whether the model reads sequences.
    """
    shared = (SequentialOptions, RegenerationOptions) if sequential else ()
    common = (RunOptions, ProcessOptions, DataOptions, FileOptions, TrainingOptions, LearningOptions, EvaluationOptions)
    return combined((*own, *shared, *common))


# Names of options by what they are for.

#: The model whose configuration holds a second model's, its backbone.
RETRIEVAL_MODEL = "RaSeRec"

#: Models that train as SASRec of this package does, and those of them whose sizes mean something else.
RECURRENT = frozenset({"GRU4Rec", "NARM"})
ENCODERS = frozenset({"SASRec", "DuoRec", "BSARec"}) | RECURRENT

#: Options that hold options; a key left out keeps the value of the file below.
NESTED: dict[str, tuple[str, ...]] = {
    "eval_args": ("split", "order", "group_by", "mode"),
    "train_neg_sample_args": ("distribution", "sample_num", "alpha", "dynamic", "candidate_num"),
}

#: Sequential models with an input type that learn a target without negatives, where RecBole's default would feed
#: sampled items as if they were targets.
WITHOUT_NEGATIVES = frozenset({"RepeatNet"})

#: Options of the run, not of a model: how it is started.
RUN_KEYS = frozenset({"model", "dataset", "config_files", "verbose", *ProcessOptions.model_fields})

#: Options that RecBole 1.2.1 reads, whatever the model, without listing them in a YAML file or argument list.
UNLISTED_KEYS = frozenset({"encoding", "tail_ratio", "token_num_threshold", "xgb_early_stopping_rounds"})

#: The same, read by one model's code alone (or, eta, by one transform).
UNLISTED_MODEL_KEYS = frozenset({"cin", "contrast", "eta", "feature_num", "has_residual", "norm", "sim", "use_filter"})

#: Options of RecBole's sequence transforms; read when `transform` is set.
TRANSFORM_KEYS = frozenset({"beta", "eta", "ft_ratio", "mask_ratio"})

#: Entries RecBole computes and overwrites; a value given for one would be lost in silence.
COMPUTED_KEYS = frozenset({
    "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "local_rank", "offset",
    "single_spec", "valid_neg_sample_args", "test_neg_sample_args", "CROP_ITEM_SEQ", "CROP_ITEM_SEQ_LEN",
    "INVERSE_ITEM_SEQ", "MASK_INDEX", "MASK_ITEM_SEQ", "NEG_ITEMS", "POS_ITEMS", "REORDER_ITEM_SEQ",
})  # fmt: skip

#: What leaves the trained weights as they are, beside the options declared so.
NOT_TRAINING = (RUN_KEYS | COMPUTED_KEYS | {"wandb_project", "config_file"}) - {"model", "dataset"}

#: What to write instead of a name that RecBole once had, or computes.
REMEDIES = {
    "device": "set gpu_id, or use_gpu: false for the CPU",
    "llm": "set item_text_encoder",
    "local_rank": "set nproc, the runner numbers the processes",
    "offset": "set group_offset",
    "neg_sampling": "set train_neg_sample_args",
    "training_neg_sample_num": "set train_neg_sample_args",
    "eval_setting": "set eval_args",
}


# Which options of stage i a run reads: not all where patterns are mined alone, or the set was made before.

#: Options of dataset regeneration; all but the first count only where that is on.
REGENERATION = tuple(RegenerationOptions.model_fields)

#: Those that mined patterns depend on.
MINING = ("regen_span", "regen_min_support", "regen_pattern_length")


def trains_regenerator(config: Any) -> bool:
    """Whether stage i of a run learns to generate: not where patterns are mined alone, or the set was made before."""
    return bool(config["regeneration"] and not config["regenerated_data"] and config["regen_rows"] != "patterns")


def regeneration_options(config: Any) -> list[str]:
    """The options of stage i that decide what a run trains on, beside the content of `regenerated_data`."""
    if not config["regeneration"]:
        return []
    names = ["regeneration", "regen_rows"]
    if config["regeneration"] == "personalised":
        names += [name for name in REGENERATION if name.startswith("regen_personal")]
    if trains_regenerator(config):
        known = {*names, "regenerated_data"}
        names += [name for name in REGENERATION if name not in known and not name.startswith("regen_personal")]
    elif not config["regenerated_data"]:
        names += MINING
    return sorted(names)
