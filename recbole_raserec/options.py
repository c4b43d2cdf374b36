"""The options: which names exist, which values they take, which belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Callable

#: The model whose configuration holds a second model's, its backbone.
RETRIEVAL_MODEL = "RaSeRec"


@dataclass(frozen=True)
class Rule:
    """What one option accepts. `kind` converts an accepted value, so that 1 and 1.0 are one configuration."""

    requirement: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    kind: Callable[[Any], Any] | None = None


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    if math.isinf(high):
        requirement = f"a number {'>' if open_low else '>='} {low:g}"
    else:
        requirement = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    return Rule(requirement, accepts, kind=float)


def _integer(low: int, high: int | None = None) -> Rule:
    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    return Rule(f"an integer >= {low}" + ("" if high is None else f" and <= {high}"), accepts)


def _choice(*names: str) -> Rule:
    return Rule("one of " + ", ".join(names), lambda value: isinstance(value, str) and value in names, names)


def _optional(rule: Rule) -> Rule:
    kind = rule.kind
    return Rule(
        f"{rule.requirement}, or null",
        lambda value: value is None or rule.accepts(value),
        rule.choices,
        None if kind is None else lambda value: None if value is None else kind(value),
    )


def _devices(value: Any) -> bool:
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return not isinstance(value, bool) and re.fullmatch(r"(\d+(,\d+)*)?", text.replace(" ", "")) is not None


def _logging_level(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("debug", "info", "warning", "error", "critical")


_INTERVALS = re.compile(r"[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])](;[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])])*")
_FLAG = Rule("true or false", lambda value: isinstance(value, bool))
_TEXT = Rule("a non-empty text", lambda value: isinstance(value, str) and bool(value))
_TABLE = Rule("a mapping", lambda value: isinstance(value, dict))
_INTERVAL = Rule(
    'an interval such as "[5,inf)" (in quotes)',
    lambda value: isinstance(value, str) and _INTERVALS.fullmatch(value) is not None,
)
_DROPOUT = number(0, 1, open_high=True)

#: Options of every model.
COMMON: dict[str, Rule] = {
    "seed": _integer(0, 2**32 - 1),
    "gpu_id": Rule("a GPU number, several joined by commas, or empty for the CPU", _devices),
    "worker": _integer(0),
    **dict.fromkeys(("use_gpu", "reproducibility", "show_progress", "shuffle", "repeatable", "log_wandb"), _FLAG),
    **dict.fromkeys(("save_dataset", "save_dataloaders", "enable_amp", "enable_scaler", "require_pow"), _FLAG),
    **dict.fromkeys(("resume", "bucket_batches", "native_kernels"), _FLAG),
    "softmax_precision": _choice("auto", "float32", "bfloat16"),
    **dict.fromkeys(("data_path", "checkpoint_dir", "USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"), _TEXT),
    **dict.fromkeys(("result_file", "ranks_file", "dataset_save_path", "dataloaders_save_path"), _optional(_TEXT)),
    **dict.fromkeys(("clip_grad_norm", "load_col", "unload_col", "val_interval"), _optional(_TABLE)),
    **dict.fromkeys(("user_inter_num_interval", "item_inter_num_interval"), _optional(_INTERVAL)),
    **dict.fromkeys(("hidden_dropout_prob", "attn_dropout_prob", "dropout_prob"), _DROPOUT),
    **dict.fromkeys(("epochs", "train_batch_size", "eval_batch_size", "MAX_ITEM_LIST_LENGTH"), _integer(1)),
    **dict.fromkeys(("eval_step", "stopping_step"), _integer(0)),
    **dict.fromkeys(("metric_decimal_place", "loss_decimal_place", "embedding_size"), _integer(1)),
    "state": Rule("one of debug, info, warning, error, critical", _logging_level),
    "threads": _optional(_integer(1)),
    "nproc": _integer(1),
    "world_size": Rule("-1 or an integer >= 1", lambda value: type(value) is int and (value == -1 or value >= 1)),
    "group_offset": _integer(0),
    "ip": _TEXT,
    "port": Rule("a port, 1 to 65535", lambda value: str(value) in map(str, range(1, 1 << 16))),
    "learning_rate": number(0, open_low=True),
    "weight_decay": number(0),
    "eval_memory_mb": number(0, open_low=True),
    "weight_averaging": number(0, 1, open_high=True),
    "learner": _choice("adam", "sgd", "adagrad", "rmsprop", "sparse_adam"),
    "transform": _optional(
        _choice("mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined")
    ),
}

#: Options of sequential models; each has some of them.
SEQUENTIAL: dict[str, Rule] = {
    **dict.fromkeys(("n_layers", "n_heads", "num_layers", "hidden_size", "inner_size"), _integer(1)),
    "hidden_act": _choice("gelu", "relu", "swish", "tanh", "sigmoid"),
    "layer_norm_eps": number(0, open_low=True),
    "initializer_range": number(0, open_low=True),
}

#: Options of SASRec and DuoRec as this package trains them.
ENCODER: dict[str, Rule] = {
    "loss_type": _choice("CE", "BPR"),
    "training": _choice("prefix", "packed"),
    "packed_copies": _integer(1),
}

#: Options of DuoRec's contrastive loss.
CONTRAST: dict[str, Rule] = {
    "contrast": _choice("un", "su", "us", "us_x", "none"),
    "lmd": number(0),
    "lmd_sem": number(0),
    "tau": number(0, open_low=True),
    "sim": _choice("dot", "cos"),
}


def _sizes(value: Any) -> bool:
    def size(x: Any) -> bool:
        return type(x) is int and x >= 0

    def pair(x: Any) -> bool:
        return isinstance(x, (list, tuple)) and len(x) == 2 and all(map(size, x))

    return size(value) or (isinstance(value, (list, tuple)) and bool(value) and all(size(x) or pair(x) for x in value))


_NAMES = Rule(
    "a list of names",
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value),
    kind=list,
)
_NUMBERS = Rule(
    "a list of integers >= 0",
    lambda value: isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value),
    kind=list,
)

#: Options of DARec: the language model, its texts, adapters, tasks, and what is put into its attention.
LANGUAGE: dict[str, Rule] = {
    "loss_type": _choice("CE"),
    "training": _choice("packed"),
    "packed_copies": _integer(1),
    "llm": _optional(_TEXT),
    "llm_precision": _choice("auto", "float32", "bfloat16"),
    "item_text_fields": _optional(_NAMES),
    "item_text_length": _integer(1),
    "history": _choice("items", "tokens"),
    "text_items": _integer(2),
    "token_budget": _integer(1),
    "adapter_sizes": Rule("a size >= 0, or a list with a size or a pair of sizes for each layer", _sizes),
    **dict.fromkeys(("adapter_dropout", "head_dropout"), _DROPOUT),
    "head_from_text": _FLAG,
    "context_mask": _choice("off", "bias", "dual"),
    **dict.fromkeys(("align_weight", "hard_weight"), number(0)),
    "hard_similarity": _choice("text", "collaborative"),
    "hard_negatives": _integer(1),
    "hard_tau": number(0, open_low=True),
    "collaborative": _optional(_TEXT),
    "collaborative_layers": _optional(_NUMBERS),
}

#: Options of the retrieval stage: changing one never changes the backbone.
RETRIEVAL: dict[str, Rule] = {
    "backbone": Rule("a model", lambda value: True),  # looked up by name before this
    "backbone_checkpoint": _optional(_TEXT),
    "freeze_backbone": _FLAG,
    "memory": _choice("pairs", "patterns", "both"),
    "memory_min_length": _integer(1),
    "memory_max_length": _optional(_integer(1)),
    "memory_thin": number(0, 1),
    "memory_span": _integer(2),
    "memory_min_support": _integer(1),
    "memory_frequency_weight": number(0),
    "memory_scope": _choice("history", "past"),
    "retrieve_by": _choice("sequence", "target"),
    "memory_refresh": _integer(1),
    "memory_regenerated": _FLAG,
    "cache_neighbours": _FLAG,
    "top_k": _integer(1),
    "similarity": _choice("cosine", "dot"),
    "index": _choice("auto", "flat", "ivf", "hnsw", "ivfpq"),
    "ivf_lists": _integer(1),
    "ivf_probes": _integer(1),
    "head": _choice("ram", "knn", "both"),
    "ram": _choice("dual", "single"),
    "alpha": number(0, 1),
    "learnable_alpha": _FLAG,
    "beta": number(0, 1),
    "attn_tau": number(0, open_low=True),
    "ram_heads": _integer(1),
    "ram_inner_size": _integer(1),
    "ram_dropout": _DROPOUT,
    "ram_learning_rate": number(0, open_low=True),
    "ram_weight_averaging": number(0, 1, open_high=True),
    "ram_train_batch_size": _integer(1),
    "ram_epochs": _integer(1),
    "ram_stopping_step": _integer(0),
    "ram_valid_metric": _TEXT,
}

#: Options of dataset regeneration; all but the first count only where that is on.
REGENERATION: dict[str, Rule] = {
    "regeneration": Rule("true, false or personalised", lambda value: value in (True, False, "personalised")),
    "regenerated_data": _optional(_TEXT),
    "regen_pretrained": _FLAG,
    "regen_rows": _choice("both", "patterns", "generated"),
    **dict.fromkeys(("regen_span", "regen_pattern_length"), _integer(2)),
    **dict.fromkeys(
        ("regen_min_support", "regen_pairs", "regen_hidden_size", "regen_layers", "regen_heads"), _integer(1)
    ),
    **dict.fromkeys(("regen_inner_size", "regen_conditions", "regen_epochs", "regen_batch_pairs"), _integer(1)),
    "regen_stopping_step": _integer(1),
    "regen_dropout": _DROPOUT,
    "regen_learning_rate": number(0, open_low=True),
    "regen_held_out": number(0, 1, open_high=True),
    **dict.fromkeys(("regen_entropy", "regen_temperature"), number(0)),
    **dict.fromkeys(("regen_tau_decay", "regen_tau_least"), number(0, 1, open_low=True)),
    "regen_gamma": number(0, 1),
    **dict.fromkeys(("regen_personal_epochs", "regen_personal_every"), _integer(1)),
    "regen_personal_terms": _integer(0),
    **dict.fromkeys(("regen_personal_rate", "regen_personal_learning_rate"), number(0, open_low=True)),
}

#: Options that hold options; a key left out keeps the value of the file below.
NESTED: dict[str, tuple[str, ...]] = {
    "eval_args": ("split", "order", "group_by", "mode"),
    "train_neg_sample_args": ("distribution", "sample_num", "alpha", "dynamic", "candidate_num"),
}

#: Sequential models with an input type that learn a target without negatives, where RecBole's default would feed
#: sampled items as if they were targets.
WITHOUT_NEGATIVES = frozenset({"RepeatNet"})

#: Options of the run, not of a model: how it is started.
RUN_KEYS = frozenset(
    [
        "model",
        "dataset",
        "config_files",
        "nproc",
        "ip",
        "port",
        "world_size",
        "group_offset",
        "verbose",
    ]
)

#: Options that RecBole 1.2.1 reads, whatever the model, without listing them in a YAML file or argument list.
UNLISTED_KEYS = frozenset(["encoding", "tail_ratio", "token_num_threshold", "xgb_early_stopping_rounds"])

#: The same, read by one model's code alone (or, eta, by one transform).
UNLISTED_MODEL_KEYS = frozenset(["cin", "contrast", "eta", "feature_num", "has_residual", "norm", "sim", "use_filter"])

#: Options of RecBole's sequence transforms; read when `transform` is set.
TRANSFORM_KEYS = frozenset(["beta", "eta", "ft_ratio", "mask_ratio"])

#: Entries RecBole computes and overwrites; a value given for one would be lost in silence.
COMPUTED_KEYS = frozenset(
    [
        "MODEL_TYPE",
        "MODEL_INPUT_TYPE",
        "collaborative_options",
        "eval_type",
        "device",
        "local_rank",
        "offset",
        "single_spec",
        "valid_neg_sample_args",
        "test_neg_sample_args",
        "CROP_ITEM_SEQ",
        "CROP_ITEM_SEQ_LEN",
        "INVERSE_ITEM_SEQ",
        "MASK_INDEX",
        "MASK_ITEM_SEQ",
        "NEG_ITEMS",
        "POS_ITEMS",
        "REORDER_ITEM_SEQ",
    ]
)

#: What to write instead of a name that RecBole once had, or computes.
REMEDIES = {
    "device": "set gpu_id, or use_gpu: false for the CPU",
    "local_rank": "set nproc, the runner numbers the processes",
    "offset": "set group_offset",
    "neg_sampling": "set train_neg_sample_args",
    "training_neg_sample_num": "set train_neg_sample_args",
    "eval_setting": "set eval_args",
}

#: Options that leave the trained weights as they are.
NOT_TRAINING = (
    RUN_KEYS
    | COMPUTED_KEYS
    | frozenset(
        [
            "cache_neighbours",
            "data_path",
            "checkpoint_dir",
            "backbone_checkpoint",
            "result_file",
            "ranks_file",
            "resume",
            "threads",
            "gpu_id",
            "use_gpu",
            "worker",
            "show_progress",
            "state",
            "log_wandb",
            "wandb_project",
            "save_dataset",
            "dataset_save_path",
            "save_dataloaders",
            "dataloaders_save_path",
            "config_file",
            "eval_batch_size",
            "eval_memory_mb",
            "topk",
            "metrics",
            "metric_decimal_place",
            "loss_decimal_place",
        ]
    )
) - {"model", "dataset"}


def rules_for(models: Iterable[str], sequential: bool) -> dict[str, Rule]:
    """The rules that apply to a run of `models` (a model and, if it has one, its backbone)."""
    models = set(models)
    rules = dict(COMMON)
    if sequential:
        rules.update({**SEQUENTIAL, **REGENERATION})
    if models & {"SASRec", "DuoRec"}:
        rules.update(ENCODER)
    if "DuoRec" in models:
        rules.update(CONTRAST)
    if "DARec" in models:
        rules.update(LANGUAGE)
    if RETRIEVAL_MODEL in models:
        rules.update(RETRIEVAL)
    return rules
