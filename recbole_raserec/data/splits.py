"""From a configuration to loaders: data set, split, samplers, and what each user has seen before each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
import recbole.data.dataset
import scipy.sparse as sp
from recbole.data.dataloader import NegSampleEvalDataLoader, TrainDataLoader
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import ModelType

from recbole_raserec.config import Config, get_model, model_keys, trims
from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.loaders import BucketLoader, PackedLoader
from recbole_raserec.data.regenerated import Regenerated, joined
from recbole_raserec.errors import CheckpointError, ConfigError, shown
from recbole_raserec.storage import data_fingerprint, plain, read_ids

#: Items of a mean history from which on `training: auto` is packed: there an epoch is some ten times faster.
LONG = 30


@dataclasses.dataclass
class Splits:
    """One prepared data set: the whole of it (ids, vocabulary) and a RecBole data loader for each part.

    Attributes:
        seen: per phase ("valid", "test") a boolean matrix [n_users, n_items], the history before that phase's target.
        fingerprint: hash of the filtered log and its external ids.
        form: what the option `training` is or, where it is auto, comes to.
    """

    dataset: Any
    train: Any
    valid: Any
    test: Any
    seen: dict[str, sp.csr_matrix]
    fingerprint: str
    form: str = "prefix"

    def settle(self, *configs: Config) -> None:
        """Put the form of training in the place of `training: auto`."""
        for config in configs:
            if config["training"] == "auto":
                config["training"] = self.form

    def vocabulary(self) -> dict[str, list[str]]:
        """See `vocabulary_of`."""
        return vocabulary_of(self.dataset)


def vocabulary_of(dataset: Any) -> dict[str, list[str]]:
    """External ids of users and items in the order of the internal ones (index 0: padding)."""
    fields = {"users": dataset.uid_field, "items": dataset.iid_field}
    return {name: [str(token) for token in dataset.field2id_token[field]] for name, field in fields.items()}


def prepare(
    config: Config, dataset_class: Any, trim: bool, same_target: bool = False, packed: Optional[bool] = False,
    regenerated: Optional[Regenerated] = None, costs: Optional[Callable[[Any, Any], np.ndarray]] = None,
    dataset: Any = None,
) -> Splits:  # fmt: skip
    """Read, filter and split the data set as RecBole does, and put this package's loaders on it.

    Args:
        dataset_class: see `get_dataset_class`.
        trim: the model gives the same result on batches cut to their longest row.
        same_target: the model's loss reads same-target windows (DuoRec).
        packed: train on all positions of a sequence in one pass; None: where histories are long.
        regenerated: sequences that join the training split.
        costs: (config, training split) -> tokens of each item [V], for a model whose batches they bound.
        dataset: already read, of that class.
    """
    dataset = dataset_class(config) if dataset is None else dataset
    log = dataset.inter_feat
    digest = data_fingerprint(dataset)
    log_users, log_items = np.asarray(log[dataset.uid_field]), np.asarray(log[dataset.iid_field])
    built = dataset.build()
    if regenerated is not None and len(built) > 1:
        built[0] = joined(built[0], regenerated.with_ids_of(vocabulary_of(dataset)))
    lazy = isinstance(built[0], SequenceDataset) and built[0].is_lazy
    samplers = _samplers(config, dataset, built) if lazy else create_samplers(config, dataset, built)
    train_class = get_dataloader(config, "train")
    if packed is None:
        mean = len(log_users) / max(1, dataset.user_num - 1)
        packed = lazy and trim and train_class is TrainDataLoader and mean >= LONG
        if packed:
            getLogger().info(f"training: packed, as histories have {mean:.0f} items on average; auto: from {LONG} on")
    if lazy and trim and train_class is TrainDataLoader:
        bucket = config["bucket_batches"] is not False
        loader_class = PackedLoader if packed else BucketLoader
        bounded = {"costs": costs(config, built[0])} if packed and costs is not None else {}
        train = loader_class(config, built[0], samplers[0], config["shuffle"], bucket, same_target, **bounded)
        for phase, part in zip(("valid", "test"), built[1:]):  # RecBole joins windows of sampled items: of one length
            part.trim = config["eval_args"]["mode"][phase] == "full"
    else:
        train = train_class(config, built[0], samplers[0], shuffle=config["shuffle"])
    users_per_batch = config["eval_batch_size"]
    seen, loaders = {}, []
    try:
        for number, phase in enumerate(("valid", "test"), start=1):
            if lazy:
                seen[phase] = dataset.store.seen(*built[number].windows()[:2])
            else:
                seen[phase] = _seen_without(log_users, log_items, built[number:], dataset)
            kind = get_dataloader(config, phase)
            kind = SampledLoader if kind is NegSampleEvalDataLoader else kind
            full = config["MODEL_TYPE"] != ModelType.SEQUENTIAL and kind is not SampledLoader
            config["eval_batch_size"] = users_per_batch * (dataset.item_num if full else 1)  # there users x items
            loaders.append(kind(config, built[number], samplers[number], shuffle=False))
            loaders[-1].training = getattr(built[0], "original", None) or built[0]  # whose counts some metrics read
    finally:
        config["eval_batch_size"] = users_per_batch
    return Splits(dataset, train, loaders[0], loaders[1], seen, digest, "packed" if packed else "prefix")


class SampledLoader(NegSampleEvalDataLoader):
    """RecBole's loader of sampled items, which draws the same ones whenever it is read: by the seed of the run.

    So the epochs of a training, all models and a resumed run are measured alike, and the training's own draws are not
    changed by an evaluation.
    """

    def __iter__(self) -> Iterator[Any]:
        state = np.random.get_state()
        np.random.seed(self.config["seed"])
        try:
            yield from super().__iter__()
        finally:
            np.random.set_state(state)


def _samplers(config: Config, dataset: Any, built: list[Any]) -> Any:
    """RecBole's samplers of a sequential data set, where something is sampled: they hold a set for every user."""
    mode = config["eval_args"]["mode"]
    modes = set(mode.values()) if isinstance(mode, dict) else {mode}
    if modes == {"full"} and config["train_neg_sample_args"]["distribution"] == "none":
        return None, None, None
    return create_samplers(config, dataset, built)


def _seen_without(users: np.ndarray, items: np.ndarray, later: Any, dataset: Any) -> sp.csr_matrix:
    """The log without the targets of the `later` phases, as a boolean matrix [n_users, n_items]."""
    shape = (dataset.user_num, dataset.item_num)
    counts = sp.csr_matrix((np.ones(len(users)), (users, items)), shape=shape)
    for part in later:
        u, i = part.inter_feat[dataset.uid_field].numpy(), part.inter_feat[dataset.iid_field].numpy()
        counts = counts - sp.csr_matrix((np.ones(len(u)), (u, i)), shape=shape)
    counts.data = counts.data > 0.5
    counts.eliminate_zeros()
    return counts.astype(bool)


def get_dataset_class(config: Config) -> Any:
    """Data set class for the configured model: the lazy one where RecBole would use its SequentialDataset."""
    known = {
        ModelType.SEQUENTIAL: SequenceDataset, ModelType.KNOWLEDGE: recbole.data.dataset.KnowledgeBasedDataset
    }  # fmt: skip
    usual = known.get(config["MODEL_TYPE"], recbole.data.dataset.Dataset)
    return getattr(recbole.data.dataset, f"{config['model']}Dataset", usual)


def prepare_data(config: Config, regenerated: Optional[Regenerated] = None, dataset: Any = None) -> Splits:
    """Data set, loaders and seen items as the configured model needs them; `regenerated` joins the training split.

    A `dataset` that was read already is not read again.

    Raises:
        ConfigError: packed training with a loss other than cross entropy.
    """
    model_class = get_model(config["model"])
    packed: Optional[bool] = config["training"] == "packed" and hasattr(model_class, "encode_positions")
    if config["training"] == "auto" and hasattr(model_class, "encode_positions"):
        packed = None
    if packed and config["loss_type"] != "CE":
        problem = f"training: packed predicts by cross entropy, and loss_type is {config['loss_type']}"
        raise ConfigError([f"{problem}; set training: prefix, or loss_type: CE"])
    same_target = getattr(model_class, "needs_same_target", lambda _: False)(config)
    costs = getattr(model_class, "token_costs", None)
    kind, cut = get_dataset_class(config), trims(model_class)
    return prepare(config, kind, cut, same_target, packed, regenerated, costs, dataset)


def check_same_split(
    option: str, directory: Path, manifest: Mapping[str, Any], config: Config, splits: Splits
) -> None:  # fmt: skip
    """Refuse another run's checkpoint, named by `option`, if its training split may hold what this run is tested on.

    Raises:
        CheckpointError: Users, items or the log behind them are others, or they were split in another way.
    """
    dataset, problem = config["dataset"], ""
    if read_ids(directory) != splits.vocabulary():
        problem = f"other users or items than data set {dataset} has (data set, filters or order differ); train one on "
        problem += "this data"
    elif manifest["data"] != splits.fingerprint:
        problem = f"other interactions of the same users and items than data set {dataset} has; train one on this data"
    elif (theirs := _split(manifest["options"])) != (ours := _split(config)):
        problem = f"another split of data set {dataset} (eval_args: {shown(theirs)}, here {shown(ours)}), so it may "
        problem += "have learned what is tested here; train one on this split"
    if problem:
        raise CheckpointError(f"{option}: {directory} was trained on {problem}.")


#: Options that decide which interactions are read, and how items are numbered.
_LOG = (
    "dataset", "user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter",
    "benchmark_filename", "filter_inter_by_user_or_item", "MAX_ITEM_LIST_LENGTH",
)  # fmt: skip
#: Parts of the names of options that a trained model's scores do not depend on.
_TRAINING = (
    "dropout",
    "loss",
    "learn",
    "train",
    "init",
    "reg",
    "neg",
    "epochs",
    "stopping_step",
    "precision",
    "kernels",
)


def check_same_options(option: str, path: Path, theirs: Mapping[str, Any], config: Config) -> None:
    """Refuse a checkpoint of RecBole, which names no users and items, unless its run read the same and scores alike.

    Raises:
        CheckpointError: naming all options that differ.
    """
    name = str(theirs.get("model")).rpartition(":")[2]
    if name != config["model"]:
        remedy = f"set --backbone={name} or name another file"
        raise CheckpointError(f"{option}: {path} holds a {name}, but the backbone is {config['model']}; {remedy}.")
    own = (key for key in model_keys().get(name, ()) if not any(part in key for part in _TRAINING))
    names = [key for key in (*_LOG, *sorted(own)) if key in theirs]
    pairs = {key: (plain(theirs[key]), plain(config[key])) for key in names}  # RecBole's files write 'None' for None
    pairs["eval_args"] = _split(theirs), _split(config)
    wrong = [f"{key}: {shown(a)} (here {shown(b)})" for key, (a, b) in pairs.items() if a != b and str(a) != str(b)]
    if wrong:
        raise CheckpointError(f"{option}: {path} was trained with {', '.join(wrong)}; set the options to its values.")


def _split(options: Any) -> dict[str, Any]:
    """What decides which interactions are trained on."""
    given = plain(options["eval_args"])
    return {name: given.get(name) for name in ("split", "order", "group_by")}
