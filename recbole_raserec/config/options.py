"""The options: which names exist, what each accepts, which belong together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Callable

# What an option accepts: a rule in words and as a test, and the rules that several options share.


@dataclass(frozen=True)
class Rule:
    """What one option accepts. `kind` converts an accepted value, so that 1 and 1.0 are one configuration."""

    requirement: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()
    kind: Callable[[Any], Any] | None = None


def number(low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Rule:
    """A number between the bounds, which count as inside unless they are open."""

    def accepts(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and (value < high if open_high else value <= high)

    if math.isinf(high):
        requirement = f"a number {'>' if open_low else '>='} {low:g}"
    else:
        requirement = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    return Rule(requirement, accepts, kind=float)


def integer(low: int, high: int | None = None) -> Rule:
    """An integer between the bounds, both inside."""

    def accepts(value: Any) -> bool:
        return type(value) is int and low <= value and (high is None or value <= high)

    return Rule(f"an integer >= {low}" + ("" if high is None else f" and <= {high}"), accepts)


def choice(*names: str) -> Rule:
    """One of these names."""
    return Rule("one of " + ", ".join(names), lambda value: isinstance(value, str) and value in names, names)


def optional(rule: Rule) -> Rule:
    """What `rule` accepts, or nothing."""
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


def _level(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("debug", "info", "warning", "error", "critical")


def _sizes(value: Any) -> bool:
    def size(x: Any) -> bool:
        return type(x) is int and x >= 0

    def pair(x: Any) -> bool:
        return isinstance(x, (list, tuple)) and len(x) == 2 and all(map(size, x))

    return size(value) or (isinstance(value, (list, tuple)) and bool(value) and all(size(x) or pair(x) for x in value))


_INTERVALS = re.compile(r"[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])](;[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])])*")


def _interval(value: Any) -> bool:
    return _INTERVALS.fullmatch(_interval_text(value)) is not None


def _interval_text(value: Any) -> str:
    """As RecBole reads it; "[5,60]" arrives as a list, which its command line and YAML make of it."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number().accepts, value)):
        return f"[{value[0]},{value[1]}]"
    return value if isinstance(value, str) else ""


FLAG = Rule("true or false", lambda value: isinstance(value, bool))
TEXT = Rule("a non-empty text", lambda value: isinstance(value, str) and bool(value))
TABLE = Rule("a mapping", lambda value: isinstance(value, dict))
INTERVAL = Rule('an interval such as "[5,inf)" (in quotes)', _interval, kind=_interval_text)
DEVICES = Rule("a GPU number, several joined by commas, or empty for the CPU", _devices)
LEVEL = Rule("one of debug, info, warning, error, critical", _level)
DROPOUT = number(0, 1, open_high=True)
DROPOUTS = Rule(
    "a list of two numbers in [0, 1)",
    lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(DROPOUT.accepts, value)),
    kind=list,
)
NAMES = Rule(
    "a list of names",
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) and name for name in value),
    kind=list,
)
NUMBERS = Rule(
    "a list of integers >= 0",
    lambda value: isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value),
    kind=list,
)
SIZES = Rule("a size >= 0, or a list with a size or a pair of sizes for each layer", _sizes)


#: The two protocols of evaluation: items of the history stay in the ranking (RecBole's way), or are taken out.
SEEN_KEPT, SEEN_REMOVED = "seen_kept", "seen_removed"


#: The model whose configuration holds a second model's, its backbone.
RETRIEVAL_MODEL = "RaSeRec"

#: Options of every model.
COMMON: dict[str, Rule] = {
    "seed": integer(0, 2**32 - 1),
    "gpu_id": DEVICES,
    "worker": integer(0),
    **dict.fromkeys(("use_gpu", "reproducibility", "show_progress", "shuffle", "repeatable", "log_wandb"), FLAG),
    **dict.fromkeys(("save_dataset", "save_dataloaders", "enable_amp", "enable_scaler", "require_pow"), FLAG),
    **dict.fromkeys(("resume", "bucket_batches", "native_kernels"), FLAG),
    "softmax_precision": choice("auto", "float32", "bfloat16"),
    "valid_protocol": choice("auto", "seen_kept", "seen_removed"),
    **dict.fromkeys(("data_path", "checkpoint_dir", "USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"), TEXT),
    **dict.fromkeys(("result_file", "ranks_file", "dataset_save_path", "dataloaders_save_path"), optional(TEXT)),
    **dict.fromkeys(("clip_grad_norm", "load_col", "unload_col", "val_interval"), optional(TABLE)),
    **dict.fromkeys(("user_inter_num_interval", "item_inter_num_interval"), optional(INTERVAL)),
    **dict.fromkeys(("hidden_dropout_prob", "attn_dropout_prob", "dropout_prob"), DROPOUT),
    **dict.fromkeys(("epochs", "train_batch_size", "eval_batch_size", "MAX_ITEM_LIST_LENGTH"), integer(1)),
    **dict.fromkeys(("eval_step", "stopping_step"), integer(0)),
    **dict.fromkeys(("metric_decimal_place", "loss_decimal_place", "embedding_size"), integer(1)),
    "state": LEVEL,
    "threads": optional(integer(1)),
    "nproc": integer(1),
    "world_size": Rule("-1 or an integer >= 1", lambda value: type(value) is int and (value == -1 or value >= 1)),
    "group_offset": integer(0),
    "ip": TEXT,
    "port": Rule("a port, 1 to 65535", lambda value: str(value) in map(str, range(1, 1 << 16))),
    "learning_rate": number(0, open_low=True),
    "weight_decay": number(0),
    "eval_memory_mb": number(0, open_low=True),
    "weight_averaging": number(0, 1, open_high=True),
    "learner": choice("adam", "sgd", "adagrad", "rmsprop", "sparse_adam"),
    "transform": optional(choice("mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined")),
}

#: Options of sequential models; each has some of them.
SEQUENTIAL: dict[str, Rule] = {
    **dict.fromkeys(("n_layers", "n_heads", "num_layers", "hidden_size", "inner_size"), integer(1)),
    "hidden_act": choice("gelu", "relu", "swish", "tanh", "sigmoid"),
    "layer_norm_eps": number(0, open_low=True),
    "initializer_range": number(0, open_low=True),
}

#: Options of SASRec, DuoRec, BSARec, GRU4Rec and NARM as this package trains them.
ENCODER: dict[str, Rule] = {
    "loss_type": choice("CE", "BPR"),
    "training": choice("prefix", "packed"),
    "packed_copies": integer(1),
}

#: Options of DuoRec's contrastive loss.
CONTRAST: dict[str, Rule] = {
    "contrast": choice("un", "su", "us", "us_x", "none"),
    "lmd": number(0),
    "lmd_sem": number(0),
    "contrast_share": number(0, 1, open_low=True),
    "tau": number(0, open_low=True),
    "sim": choice("dot", "cos"),
}

#: Options of BSARec's filter.
FILTER: dict[str, Rule] = {
    "filter_weight": number(0, 1),
    "filter_cutoff": integer(1),
    "filter_scope": choice("causal", "window"),
}

#: Options of FEARec.
FREQUENCY: dict[str, Rule] = {
    **{name: rule for name, rule in CONTRAST.items() if name != "contrast_share"},
    "loss_type": choice("CE", "BPR"),
    "global_ratio": number(0, 1, open_low=True),
    "topk_factor": number(0, open_low=True),
    **dict.fromkeys(("dual_domain", "std", "fredom"), FLAG),
    "spatial_ratio": number(0, 1),
    "fredom_type": optional(choice("un", "su", "us", "us_x")),
}

#: Options of one model alone.
OF_ONE: dict[str, dict[str, Rule]] = {
    "BSARec": FILTER,
    "FEARec": FREQUENCY,
    "BERT4Rec": {
        "loss_type": choice("CE", "BPR"),
        "transform": choice("mask_itemseq"),
        "mask_ratio": number(0, 1, open_low=True),
        "ft_ratio": number(0, 1),
    },
    "NARM": {"dropout_probs": DROPOUTS},
}

#: Models that train as SASRec of this package does, those of them whose sizes mean something else, and those that have
#: DuoRec's contrast.
RECURRENT = frozenset({"GRU4Rec", "NARM"})
ENCODERS = frozenset({"SASRec", "DuoRec", "BSARec"}) | RECURRENT
CONTRASTED = frozenset({"DuoRec", "BSARec"})

#: Options of DARec: the language model, its texts, adapters, tasks, and what is put into its attention.
LANGUAGE: dict[str, Rule] = {
    "loss_type": choice("CE"),
    "training": choice("packed"),
    "packed_copies": integer(1),
    "llm": optional(TEXT),
    "llm_precision": choice("auto", "float32", "bfloat16"),
    "item_text_fields": optional(NAMES),
    "item_text_length": integer(1),
    "history": choice("items", "tokens"),
    "text_items": integer(2),
    "token_budget": integer(1),
    "adapter_sizes": SIZES,
    **dict.fromkeys(("adapter_dropout", "head_dropout"), DROPOUT),
    "item_head": choice("table", "text"),
    "head_from_text": FLAG,
    "head_min_interactions": integer(0),
    "context_mask": choice("off", "bias", "dual"),
    **dict.fromkeys(("align_weight", "hard_weight"), number(0)),
    "hard_similarity": choice("text", "collaborative"),
    "hard_negatives": integer(1),
    "hard_tau": number(0, open_low=True),
    "collaborative": optional(TEXT),
    "collaborative_layers": optional(NUMBERS),
}

#: Options of the retrieval stage: changing one never changes the backbone.
RETRIEVAL: dict[str, Rule] = {
    "backbone": Rule("a model", lambda value: True),  # looked up by name before this
    "backbone_checkpoint": optional(TEXT),
    "freeze_backbone": FLAG,
    "memory": choice("pairs", "patterns", "both"),
    "memory_min_length": integer(1),
    "memory_max_length": optional(integer(1)),
    "memory_thin": number(0, 1),
    "memory_span": integer(2),
    "memory_min_support": integer(1),
    "memory_frequency_weight": number(0),
    "memory_scope": choice("history", "past"),
    "retrieve_by": choice("sequence", "target"),
    "memory_refresh": integer(1),
    "memory_regenerated": FLAG,
    "cache_neighbours": FLAG,
    "top_k": integer(1),
    "similarity": choice("cosine", "dot"),
    "index": choice("auto", "flat", "ivf", "hnsw", "ivfpq"),
    "ivf_lists": integer(1),
    "ivf_probes": integer(1),
    "head": choice("ram", "knn", "both"),
    "ram": choice("dual", "single"),
    "alpha": number(0, 1),
    "learnable_alpha": FLAG,
    "beta": number(0, 1),
    "attn_tau": number(0, open_low=True),
    "ram_heads": integer(1),
    "ram_inner_size": integer(1),
    "ram_dropout": DROPOUT,
    "ram_learning_rate": number(0, open_low=True),
    "ram_weight_averaging": number(0, 1, open_high=True),
    "ram_train_batch_size": integer(1),
    "ram_epochs": integer(1),
    "ram_stopping_step": integer(0),
    "ram_valid_metric": TEXT,
}

#: Options of dataset regeneration; all but the first count only where that is on.
REGENERATION: dict[str, Rule] = {
    "regeneration": Rule("true, false or personalised", lambda value: value in (True, False, "personalised")),
    "regenerated_data": optional(TEXT),
    "regen_pretrained": FLAG,
    "regen_rows": choice("both", "patterns", "generated"),
    **dict.fromkeys(("regen_span", "regen_pattern_length"), integer(2)),
    **dict.fromkeys(
        ("regen_min_support", "regen_pairs", "regen_hidden_size", "regen_layers", "regen_heads"), integer(1)
    ),
    **dict.fromkeys(("regen_inner_size", "regen_conditions", "regen_epochs", "regen_batch_pairs"), integer(1)),
    "regen_stopping_step": integer(1),
    "regen_dropout": DROPOUT,
    "regen_learning_rate": number(0, open_low=True),
    "regen_held_out": number(0, 1, open_high=True),
    **dict.fromkeys(("regen_entropy", "regen_temperature"), number(0)),
    **dict.fromkeys(("regen_tau_decay", "regen_tau_least"), number(0, 1, open_low=True)),
    "regen_gamma": number(0, 1),
    **dict.fromkeys(("regen_personal_epochs", "regen_personal_every"), integer(1)),
    "regen_personal_terms": integer(0),
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


def rules_for(models: Iterable[str], sequential: bool) -> dict[str, Rule]:
    """The rules that apply to a run of `models` (a model and, if it has one, its backbone)."""
    models = set(models)
    rules = dict(COMMON)
    if sequential:
        rules.update({**SEQUENTIAL, **REGENERATION})
    if models & ENCODERS:
        rules.update(ENCODER)
    if models & CONTRASTED:
        rules.update(CONTRAST)
    for name in models & set(OF_ONE):
        rules.update(OF_ONE[name])
    if "DARec" in models:
        rules.update(LANGUAGE)
    if RETRIEVAL_MODEL in models:
        rules.update(RETRIEVAL)
    return rules


# Names of options by what they are for: of the run, of RecBole alone, computed, without a say in the training.


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


# Which options of stage i a run reads: not all where patterns are mined alone, or the set was made before.


#: Options that mined patterns depend on.
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
