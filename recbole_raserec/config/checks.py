"""Checks of option values, alone and together. Each problem is one sentence: option, value, remedy."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

import torch
from recbole.config import Config as RecBoleConfig  # ours, a subclass, imports this module
from recbole.evaluator import metric_types
from recbole.evaluator.register import metric_information, smaller_metrics
from recbole.utils import EvaluatorType, ModelType

from recbole_raserec.config.options import (
    COMPUTED_KEYS,
    ENCODERS,
    NESTED,
    REMEDIES,
    RETRIEVAL_MODEL,
    SAMPLED,
    SEEN_KEPT,
    SEEN_REMOVED,
    DataOptions,
    Options,
    SequentialOptions,
    TrainingOptions,
    accepted,
    combined,
    in_words,
    is_number,
)
from recbole_raserec.config.sources import (
    REFUSED,
    SUPPORTED,
    all_keys,
    get_model,
    get_trainer_class,
    model_keys,
    options_of,
)
from recbole_raserec.distributed import layout_of
from recbole_raserec.errors import ConfigError, nearest, shown
from recbole_raserec.storage import unwritable

#: Packages that figures are sent to while a run goes on, each by an option `log_...`.
TRACKERS = ("wandb", "mlflow")
#: Processes that may always run, however few cores a machine has.
_PROCESSES = 16
#: The most that a checkpoint may say of what takes room for each query, whatever its weights are.
LONGEST = 100_000


def check_names(given: Mapping[str, Any], known: frozenset[str] | None, origins: Mapping[str, str]) -> list[str]:
    """Problems of the options given that the run does not read.

    Args:
        given: the options given.
        known: the options that the run reads; None when that cannot be told, then those of every model.
        origins: where each was given, as the message shows it.
    """
    if known is not None and known.issuperset(given):
        return []
    every = all_keys()
    known = every - COMPUTED_KEYS if known is None else known
    problems = []
    for name in given:
        if name in known:
            continue
        start = f"{name}: {shown(given[name])}{origins.get(name, '')} is"
        if name in REMEDIES or name in COMPUTED_KEYS:
            problems.append(f"{start} not an option; {REMEDIES.get(name, 'remove it, RecBole computes it')}")
        elif name in every:
            readers = [model for model, keys in sorted(model_keys().items()) if name in keys]
            some = ", ".join(readers[:4]) + (", ..." if len(readers) > 4 else "")
            problems.append(f"{start} an option of other models ({some}); this run does not read it, remove it")
        else:
            guess = nearest(name, known) or nearest(name, every)
            problems.append(f"{start} not an option; " + (f"did you mean {guess}?" if guess else "remove it"))
    return problems


def check_values(
    values: dict[str, Any], options: type[Options], origins: Mapping[str, str], defaults: Mapping[str, Any]
) -> list[str]:
    """Problems of the values that their options refuse; those accepted take their option's type, in place.

    Args:
        values: by name; those that `options` does not declare are left alone.
        options: what the run checks.
        origins: where each was given, as the message shows it.
        defaults: values to suggest.
    """
    given = {name: values[name] for name in options.model_fields if name in values}
    right = accepted(options, given)
    values.update(right)
    problems = []
    for name in given:
        if name in right:
            continue
        value, words = values[name], in_words(options.model_fields[name])
        guess = nearest(value, words.choices) if isinstance(value, str) else None
        if guess is not None:
            remedy = f"did you mean {guess}?"
        elif accepted(options, {name: defaults.get(name)}):
            remedy = f"write for example {name}: {defaults[name]}"
        else:
            remedy = "change or remove it"
        problems.append(f"{name}: {shown(value)}{origins.get(name, '')} is not {words.requirement}; {remedy}")
    return problems


def refused(values: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Problems of the options of a checkpoint, of those that say what its `models` (by name) are."""
    own = [kind for name, model in models.items() for kind in options_of(name, model)]
    given = dict(values)
    problems = check_values(given, combined((*own, SequentialOptions, DataOptions, TrainingOptions)), {}, {})
    long = [
        name for name in ("top_k", "MAX_ITEM_LIST_LENGTH") if type(given.get(name)) is int and given[name] > LONGEST
    ]
    return problems + [f"{name}: {given[name]} is more than {LONGEST}" for name in long]


def check_together(options: Mapping[str, Any], reads: Callable[[str], bool], retrieval: bool) -> list[str]:
    """Problems between values that are each right on their own.

    Args:
        options: the final options.
        reads: whether the model or its backbone reads an option of that name.
        retrieval: whether the retrieval stage runs.
    """
    heads: dict[str, list[str]] = {}  # length of a vector -> the numbers of heads that must divide it
    if reads("n_heads"):
        heads["hidden_size" if reads("hidden_size") else "embedding_size"] = ["n_heads"]
    if retrieval:
        # A model that has both (GRU4Rec) returns vectors of its items' length.
        heads.setdefault("embedding_size" if reads("embedding_size") else "hidden_size", []).append("ram_heads")
    problems = []
    for size, names in heads.items():
        total: Any = options.get(size)
        counts: list[Any] = [options.get(name) for name in names]
        if not all(type(value) is int and value > 0 for value in [total, *counts]):
            continue  # reported on its own
        wrong = [f"{name}: {count}" for name, count in zip(names, counts) if total % count]
        if wrong:
            step = math.lcm(*counts)
            problems.append(
                f"{size}: {total} is not divisible by {' and '.join(wrong)}; "
                f"set {size} to a multiple, for example {size}: {total + step - total % step}, or change the heads"
            )
    if retrieval:
        lists, probes = options.get("ivf_lists"), options.get("ivf_probes")
        if type(lists) is int and type(probes) is int and probes > lists:
            problems.append(f"ivf_probes: {probes} is more than ivf_lists: {lists}; set ivf_probes to {lists} or less")
        shortest, longest, span = (options.get(f"memory_{name}") for name in ("min_length", "max_length", "span"))
        if type(shortest) is int and type(longest) is int and longest < shortest:
            problems.append(
                f"memory_max_length: {longest} is less than memory_min_length: {shortest}; set it to {shortest} or more"
            )
        mined = options.get("memory") in ("patterns", "both")
        if mined and type(shortest) is int and type(span) is int and span <= shortest:
            problems.append(
                f"memory_span: {span} leaves no pattern with a prefix of memory_min_length: {shortest}; "
                f"set memory_span to {shortest + 1} or more"
            )
        if options.get("transition_head") and options.get("memory_scope") == "past":
            problems.append(
                "memory_scope: past bars what others did later, which transition_head counts; leave one out"
            )
    if reads("filter_scope") and options.get("filter_scope") == "window" and options.get("training") == "packed":
        problems.append(
            "filter_scope: window lets a position see later ones, which training: packed predicts; "
            "set training: prefix, or filter_scope: causal"
        )
    for first, second in itertools.combinations(("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD"), 2):
        if options.get(first) is not None and options.get(first) == options.get(second):
            problems.append(f"{second}: {shown(options[second])} is {first} too; name another column")
    problems += _check_windows(options, reads)
    targets = ["valid_metric", "ram_valid_metric"] if retrieval else ["valid_metric"]
    return problems + _check_metrics(options, targets) + _check_eval_args(options) + _check_negatives(options)


def _check_windows(options: Mapping[str, Any], reads: Callable[[str], bool]) -> list[str]:
    """What FEARec's delays and BERT4Rec's masks ask of the length of a window."""
    length, problems = options.get("MAX_ITEM_LIST_LENGTH"), []
    if type(length) is not int or length < 1:
        return []  # reported on its own
    factor, ratio = options.get("topk_factor"), options.get("mask_ratio")
    if reads("topk_factor") and isinstance(factor, (int, float)):
        count, most = int(factor * math.log(length)), length - length % 2
        if not 1 <= count <= most:
            problems.append(
                f"topk_factor: {factor} takes int({factor} x log {length}) = {count} delays of a window of "
                f"MAX_ITEM_LIST_LENGTH: {length}; set it so that they are at least 1 and at most {most}"
            )
        if options.get("n_layers") == 1:
            problems.append("n_layers: 1: FEARec shares its frequencies among several layers; set n_layers: 2 or more")
        if options.get("use_filter"):
            problems.append("use_filter: true needs weights that RecBole's FEARec does not have; leave it out")
    if options.get("transform") == "mask_itemseq" and isinstance(ratio, (int, float)) and int(ratio * length) < 1:
        problems.append(
            f"mask_ratio: {ratio} masks no item of a window of MAX_ITEM_LIST_LENGTH: {length}; "
            f"set it to {math.ceil(1000 / length) / 1000} or more"
        )
    return problems


def _check_metrics(options: Mapping[str, Any], targets: list[str]) -> list[str]:
    metrics: Any = options.get("metrics")
    topk: Any = options.get("topk")
    metrics = [metrics] if isinstance(metrics, str) else metrics
    topk = [topk] if type(topk) is int else topk
    problems = []
    if not isinstance(metrics, (list, tuple)) or not metrics:
        problems.append(f"metrics: {shown(metrics)} is not a list of names; write metrics: ['Recall', 'NDCG']")
        metrics = []
    for metric in metrics:
        if str(metric).lower() not in metric_types:
            guess = nearest(metric, metric_types)
            remedy = f"did you mean {guess}?" if guess else f"RecBole has {', '.join(sorted(metric_types))}"
            problems.append(f"metrics: {shown(metric)} is not a metric; {remedy}")
    if not isinstance(topk, (list, tuple)) or not topk or not all(type(k) is int and k > 0 for k in topk):
        problems.append(f"topk: {shown(options.get('topk'))} is not a list of integers > 0; write topk: [5, 10, 20]")
    if problems:
        return problems
    kinds = {metric_types[metric.lower()] for metric in metrics}
    if len(kinds) > 1:
        return [f"metrics: {shown(metrics)} mixes ranking and value metrics; keep those of one kind"]
    ranking = kinds == {EvaluatorType.RANKING}
    single = [metric for metric in metrics if not ranking or "rec.meanrank" in metric_information[metric.lower()]]
    allowed = single + [f"{metric}@{k}" for metric in metrics if metric not in single for k in topk]
    mode = options["eval_args"].get("mode", "full") if isinstance(options.get("eval_args"), dict) else "full"
    if not ranking and "full" in (mode.values() if isinstance(mode, dict) else [mode]):
        problems.append(f"metrics: {shown(list(metrics))} compare scores with labels; set eval_args: {{mode: uni100}}")
    for name in targets:
        if len(targets) > 1 and str(options.get(name)).lower().partition("@")[0] in smaller_metrics:
            problems.append(f"{name}: {options[name]} is better when smaller; choose another, such as NDCG@10")
        if str(options.get(name)).lower() not in {candidate.lower() for candidate in allowed}:
            problems.append(
                f"{name}: {shown(options.get(name))} is not computed with metrics: {shown(list(metrics))} and topk: "
                f"{shown(list(topk))}; choose one of {', '.join(allowed)}, or extend metrics or topk"
            )
    return problems


def _check_eval_args(options: Mapping[str, Any]) -> list[str]:
    given = options.get("eval_args")
    if not isinstance(given, dict):
        return [f"eval_args: {shown(given)} is not a mapping; write eval_args: {{split: {{LS: valid_and_test}}}}"]
    problems = _check_nested("eval_args", given)
    split = given.get("split")
    parts = list(split.items()) if isinstance(split, dict) else []
    kind: Any = parts[0][0] if len(parts) == 1 else None
    share: Any = parts[0][1] if len(parts) == 1 else None
    held_out = kind == "LS" and share in ("valid_and_test", "valid_only", "test_only")
    ratio = kind == "RS" and isinstance(share, (list, tuple)) and len(share) > 0
    if not held_out and not (ratio and all(is_number(part) and part >= 0 for part in share) and sum(share) > 0):
        problems.append(
            f"eval_args: split {shown(split)} is neither {{LS: valid_and_test | valid_only | test_only}} nor "
            "{RS: [0.8, 0.1, 0.1]}; write split: {LS: valid_and_test}"
        )
    for key, allowed in (("order", ("TO", "RO")), ("group_by", ("user", "none", None))):
        if given.get(key) not in allowed:
            problems.append(f"eval_args: {key} {shown(given.get(key))} is unknown; write {key}: {allowed[0]}")
    mode = given.get("mode")
    modes = mode if isinstance(mode, dict) and mode and set(mode) <= {"valid", "test"} else {"valid": mode}
    for value in modes.values():
        if not isinstance(value, str) or not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d*", value):
            problems.append(f"eval_args: mode {shown(value)} is none of full, labeled, uniN, popN; write mode: full")
    return problems


def _check_negatives(options: Mapping[str, Any]) -> list[str]:
    given = options.get("train_neg_sample_args")
    if given is None or given == "None":
        return []
    if not isinstance(given, dict):
        return [f"train_neg_sample_args: {shown(given)} is not a mapping; write null, or {{distribution: uniform}}"]
    problems = _check_nested("train_neg_sample_args", given)
    if given.get("distribution", "uniform") not in ("uniform", "popularity", "none", "None", None):
        problems.append(
            f"train_neg_sample_args: distribution {shown(given['distribution'])} is unknown; "
            "write distribution: uniform, popularity or none"
        )
    return problems


def _check_nested(name: str, given: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in given:
        if key not in NESTED[name]:
            guess = nearest(key, NESTED[name])
            remedy = f"did you mean {guess}?" if guess else f"it has {', '.join(NESTED[name])}"
            problems.append(f"{name}: the key {shown(key)} is unknown; {remedy}")
    return problems


def check_run(config: RecBoleConfig) -> None:
    """What only the runner can refuse, still before any data is read.

    Raises:
        ConfigError: with all of it.
        MissingExtraError: the model needs an extra of this package.
    """
    retrieval = config["model"] == RETRIEVAL_MODEL
    name = config["backbone"] if retrieval else config["model"]
    problems = evaluation_problems(config)
    for package in TRACKERS:
        found = importlib.util.find_spec(package) if config[f"log_{package}"] else None
        if config[f"log_{package}"] and (found is None or found.origin is None):  # without origin: any folder so named
            remedy = f"pip install 'recbole-raserec[{package}]', or leave it out"
            problems.append(f"log_{package}: true needs the package {package}, which is not installed; {remedy}")
    if retrieval and name in REFUSED:
        problems.append(f"backbone: {name} {REFUSED[name]}; choose one of {', '.join(SUPPORTED)}.")
    if config["regeneration"]:
        problems += _regeneration_problems(config, name)
    for option in ("result_file", "ranks_file"):
        problems += unwritable(option, config[option]) if config[option] else []
    for option, folder in {"checkpoint_dir": config["checkpoint_dir"], "log_dir": config.log_folder}.items():
        problems += unwritable(option, folder, folder=True) if option == "checkpoint_dir" or config[option] else []
    if not problems and any(config[option] for option in ("nproc", "world_size", "group_offset")):
        problems = layout_problems(config, config.for_backbone() if retrieval else config)
    if problems:
        raise ConfigError(problems)
    installed = getattr(get_model(name), "check_installed", None)
    if installed is not None:
        installed(config)


def _regeneration_problems(config: RecBoleConfig, name: str) -> list[str]:
    """What of a run that trains the model `name` cannot be regenerated."""
    data, checkpoint, pretrained = (
        config[option] for option in ("regenerated_data", "backbone_checkpoint", "pre_model_path")
    )
    problems = []
    if config["regeneration"] == "personalised" and not hasattr(get_model(name), "weighted_loss"):
        problems.append(
            f"regeneration: personalised weighs rows in the loss of {', '.join(sorted(ENCODERS))}, not in that of "
            f"{name}; write regeneration: true, or choose one of these."
        )
    elif config["regeneration"] == "personalised":
        target = config.for_backbone() if config["model"] == RETRIEVAL_MODEL else config
        if target["loss_type"] != "CE":
            problems.append(f"regeneration: personalised weighs rows of loss_type: CE; it is {target['loss_type']}.")
    if data and not Path(data).is_dir():
        problems.append(
            f"regenerated_data: {data} is no directory; name the one of a run with regeneration, regeneration-... "
            "below its checkpoint_dir."
        )
    if config["benchmark_filename"]:
        problems.append("regeneration: benchmark files have no histories to regenerate; leave one of the two out.")
    if pretrained and config.options_of_checkpoint("pre_model_path").get("regeneration"):
        problems.append(
            f"pre_model_path: {pretrained} was pre-trained on regenerated data, which the base must not have seen; "
            "name the directory of the run without."
        )
    if checkpoint:
        problems.append(
            f"backbone_checkpoint: {checkpoint} was trained already, and regeneration trains again; leave one of the "
            "two out."
        )
    return problems


def layout_problems(config: RecBoleConfig, target: RecBoleConfig) -> list[str]:
    """What of a configuration cannot run in the processes it asks for, one sentence each; empty if all is well.

    Args:
        config: of the run.
        target: of the model that stage ii trains.
    """
    from recbole.trainer import Trainer  # loads much

    layout = layout_of(config.final_config_dict)
    if layout.offset + layout.nproc > layout.size:
        return [
            f"world_size: {layout.size} processes are fewer than group_offset: {layout.offset} and nproc: "
            f"{layout.nproc} make; set world_size to the number of processes on all machines"
        ]
    if layout.size <= 1:
        return []
    cores = os.cpu_count() or 1
    if layout.nproc > max(_PROCESSES, cores):
        return [f"nproc: {layout.nproc} processes on a machine with {cores} cores; set it to {cores} or less"]
    asked, remedy = f"nproc: {layout.size} processes", "leave nproc and world_size out (threads: N)"
    rows, model, trainer = f"{asked} share the rows of a batch, but", target["model"], get_trainer_class(target)
    contrast, gpus = target["contrast"], torch.cuda.device_count()
    problems = {
        f"{asked} need torch.distributed, which this build of torch lacks; install another, or {remedy}":
            not torch.distributed.is_available(),
        f"gpu_id: {config['gpu_id']} names {gpus} GPUs that are there, for nproc: {layout.nproc}; name one for each "
        f"process, write use_gpu: false, or {remedy}":
            config["device"].type == "cuda" and gpus < layout.nproc,
        f"{rows} DARec reads texts for all of them together; {remedy}":
            model == "DARec",
        f"{rows} FEARec chooses its delays by the mean over all of them; {remedy}":
            model == "FEARec",
        f"{asked} share the steps of RecBole's Trainer, but {model} is trained by {trainer.__name__}, in another way; "
        f"{remedy}":
            trainer is not Trainer and model not in ("DARec", "FEARec"),
        f"{rows} contrast: {contrast} compares each of them with all others; write contrast: none, or {remedy}":
            contrast not in (None, "none"),
        f"{asked} draw the same negatives, but train_neg_sample_args: dynamic takes them from the model while it "
        f"trains; write dynamic: false, or {remedy}":
            (target["train_neg_sample_args"] or {}).get("dynamic"),
        f"{asked} add dense gradients up; write learner: adam instead of sparse_adam, or {remedy}":
            target["learner"] == "sparse_adam",
        f"{asked} do not scale the loss; leave enable_scaler: true out, or {remedy}":
            target["enable_scaler"],
    }  # fmt: skip
    return [problem for problem, found in problems.items() if found]


def selection_protocol(config: RecBoleConfig) -> str:
    """The protocol whose validation figures stop a training early and choose among trials."""
    if _modes(config)["valid"] != "full":
        return SAMPLED
    if config["valid_protocol"] != "auto":
        return config["valid_protocol"]
    return SEEN_KEPT if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else SEEN_REMOVED


def evaluation_problems(config: RecBoleConfig) -> list[str]:
    """What in the evaluation options cannot be honoured here, one sentence each; empty if all is well."""
    problems, modes = [], _modes(config)
    counts = {"data.num_items", "data.num_users", "data.count_items", "data.count_users"}
    ranked = counts | {"rec.topk", "rec.items", "rec.meanrank"}
    usable = sorted(name for name, needs in metric_information.items() if ranked.issuperset(needs))
    metrics = config["metrics"]
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if name.lower() not in metric_information:
            problems.append(f"metrics: {name} is unknown; choose among {', '.join(usable)}.")
        elif name.lower() not in usable and (
            metric_types[name.lower()] != EvaluatorType.VALUE or "full" in modes.values()
        ):
            what = "needs the score of each item; with all items ranked"
            problems.append(f"metrics: {name} {what} choose among {', '.join(usable)}.")
    for phase, value in modes.items():
        if value == "labeled":
            problems.append(
                f"eval_args: mode of {phase} is 'labeled', but items are ranked here; set it to full, uniN or popN."
            )
    chosen = config["valid_protocol"] if "valid_protocol" in config else "auto"  # noqa: SIM401
    if modes["valid"] != "full" and chosen not in (None, "auto"):
        problems.append(
            f"valid_protocol: {chosen} is of all items, but the mode of valid is {modes['valid']!r}; leave it out."
        )
    return problems


def metric_needs(config: Any, metric: str | None = None) -> set[str]:
    """What one metric, or all that are configured, read, by the names of RecBole's Collector."""
    metrics = config["metrics"] if metric is None else metric
    names = [metrics] if isinstance(metrics, str) else metrics
    return {need for name in names for need in metric_information[name.lower()]}


def _modes(config: Any) -> dict[str, str]:
    """Which items are ranked in each phase: full, labeled, uniN or popN; one left out is as the other."""
    mode = (config["eval_args"] or {}).get("mode") or "full"
    given = mode if isinstance(mode, Mapping) else {"valid": mode}
    first = next(iter(given.values()), "full")
    return {phase: given.get(phase, first) for phase in ("valid", "test")}
