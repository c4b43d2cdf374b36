"""Stage iii: build the memory, train the retrieval-augmented module over the backbone, test with the whole memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from recbole_raserec.config import SEEN_REMOVED, Config, selection_protocol
from recbole_raserec.data import POSITION, BucketLoader, RowLoader, SequenceDataset
from recbole_raserec.errors import ConfigError
from recbole_raserec.recommendation import wrap_backbone
from recbole_raserec.retrieval.heads import tune_knn
from recbole_raserec.retrieval.queries import NeighbourCache, Queries, Rows, builders_of, encode_split
from recbole_raserec.retrieval.raserec import TRAINING_BUFFERS, RaSeRec
from recbole_raserec.retrieval.transitions import GRID, tune_transitions
from recbole_raserec.storage import fingerprint, version_of
from recbole_raserec.training import Hooks, Outcome, Trial, run_stage

SAMPLE, SAMPLE_SCORES = 4_000, 1 << 20  # validation windows on which the transition head is tuned; scores at a time
CALIBRATION = 20_000  # memories from which the module's starting scale is taken


class RetrievalHooks(Hooks):
    """Encodes, searches and looks up for one training of RaSeRec.

    Frozen backbone: training and validation windows are encoded and searched once. Otherwise keys are encoded again
    before each epoch and each evaluation, and the training windows' neighbours searched again every `memory_refresh`
    epochs; in between they are part of the training state, so that a resumed run sees the same ones.

    The model's empty memory receives the memories of `train` and, with `joined`, the training split with regenerated
    rows, of the generated ones. Exact searches are looked up in `cache`; the windows of `test` are searched before it.
    """

    def __init__(
        self, model: RaSeRec, train: SequenceDataset, valid: SequenceDataset, config: Union[Config, Mapping[str, Any]],
        cache: Optional[NeighbourCache] = None, joined: Optional[SequenceDataset] = None,
        test: Optional[SequenceDataset] = None,
    ):  # fmt: skip
        self.model, self.train, self.valid, self.test, self._cache = model, train, valid, test, cache
        self.trains, self._config = model.augments, config
        self.refresh, self.progress = config["memory_refresh"], bool(config["show_progress"])
        self._observe(train)
        if model.shares_repeats:
            users, positions, _ = train.windows()
            codes = train.store.users().astype(np.int64) * model.n_items + train.store.items
            _, first, place = np.unique(codes, return_index=True, return_inverse=True)
            again = (first[place] < np.arange(len(codes)))[train.store.offsets[users] + positions]
            model.repeat_share.fill_((again.sum() + 1) / (len(again) + 2))  # Laplace's rule
        self._queries = {"train": self.encode(train, "training"), "valid": self.encode(valid, "validation")}
        queries, kind = self._queries["train"], config["memory"]
        self._builders = builders_of(config, train, queries, joined, self.progress)
        for builder in self._builders:
            model.remember(builder.keys(model.encoder, queries), builder.rows)
        if not len(model.memory):
            least, most, support = (config[f"memory_{name}"] for name in ("min_length", "max_length", "min_support"))
            raise ConfigError(
                [f"memory: {kind} leaves no memory at all; lower memory_min_length ({least}), raise "
                 f"memory_max_length ({most}) or lower memory_min_support ({support})."]
            )  # fmt: skip
        sample = np.linspace(0, len(model.memory) - 1, min(len(model.memory), CALIBRATION)).astype(np.int64)
        device = queries.h.device
        keys = model.own(torch.from_numpy(model.memory.keys[sample])).to(device)
        targets = torch.from_numpy(model.memory.targets[sample].astype(np.int64)).to(device)
        h = keys
        if kind == "patterns":  # user vectors are not on the scale of the memories' keys
            h = model.own(queries.h)[torch.linspace(0, len(queries) - 1, len(sample)).long().to(device)]
        model.ram.calibrate(h, keys, model.item_vectors().detach()[targets])
        if not model.frozen:
            for name, dtype in zip(TRAINING_BUFFERS, (torch.int32, torch.bool)):
                model.register_buffer(name, torch.zeros(len(queries), model.top_k, dtype=dtype, device=device))

    def encode(self, split: SequenceDataset, what: str) -> Queries:
        """Encode the windows of a split with the model's current backbone."""
        device = next(self.model.ram.parameters()).device
        return encode_split(self.model.encoder, split, device, f"Encode {what}" if self.progress else None)

    def search(self, queries: Queries, what: str) -> Queries:
        """Find the neighbours of `queries` in the model's memory."""
        memory, top_k, desc = self.model.memory, self.model.top_k, f"Search {what}" if self.progress else None
        if self._cache is not None and self.model.frozen:
            self._cache.search(queries, memory, top_k, desc)
        else:
            queries.search(memory, top_k, desc)
        return queries

    def before_epoch(self, epoch: int) -> None:
        """Make the training windows' vectors and neighbours known to the model."""
        if self.model.frozen:
            if "train" not in self.model.known:
                self.model.known["train"] = self.search(self._queries["train"], "training")
            return
        queries = self._reencode()
        if epoch % self.refresh == 0 or not bool(self.model.known_mask.any()):
            self.search(queries, "training")
            self.model.known_ids.copy_(queries.ids)
            self.model.known_mask.copy_(queries.mask)
        queries.ids, queries.mask = self.model.known_ids.long(), self.model.known_mask
        self.model.known["train"] = queries

    def before_evaluation(self) -> None:
        """Bring the memory's keys up to date; with a frozen backbone look the validation windows up."""
        if not self.model.frozen:
            self._reencode()
        elif "valid" not in self.model.known:
            self.model.known["valid"] = self.search(self._queries["valid"], "validation")

    def after_training(self, validate: Callable[[], float], metric: str) -> bool:
        """With the kNN or the transition head: choose their weights on the validation split."""
        model, log, head = self.model, getLogger(), self.model.transitions
        if model.knn:
            best = tune_knn(model, validate, self.progress)
            share, tau = float(model.knn_share), float(model.knn_tau)
            log.info(f"kNN head: share {share:g}, tau {tau:g}, validation {metric} {best:.4f}")
        if head is not None:
            best = best if model.knn else validate()
            removed = model.shares_repeats or selection_protocol(self._config) == SEEN_REMOVED
            best = tune_transitions(model, self._sample(), removed, metric, validate, best)
            chosen = ", ".join(f"{name} {value:g}" for name, value in zip((*GRID, "repeats"), head.weights.tolist()))
            chosen += f", share of the kNN head {float(model.knn_share):g}" if model.knn else ""
            log.info(f"Transition head: {chosen}, validation {metric} {best:.4f}")
        return model.gives_probabilities

    def before_test(self) -> None:
        """Add the validation pairs to the memory, as the papers do before the test; the weights stay as they are."""
        if not self.model.frozen:
            self._reencode()
        self._observe(self.valid)
        late = self.encode(self.valid, "validation")
        self.model.remember(late.h, Rows(late.targets, late.users, late.positions, late.times))
        if self.test is not None:
            self.model.known["test"] = self.search(self.encode(self.test, "test"), "test")

    def _sample(self) -> Iterator[tuple[Interaction, torch.Tensor]]:
        """Validation windows, evenly spread, and their targets, in batches."""
        model, valid = self.model, self.valid
        users, positions, targets = valid.windows()
        device = next(model.ram.parameters()).device
        rows = np.linspace(0, len(users) - 1, min(len(users), SAMPLE)).astype(np.int64)
        batches = -(-len(rows) // max(1, SAMPLE_SCORES // model.n_items))
        for part in (rows[first::batches] for first in range(batches)):
            seq, lengths = valid.store.windows(users[part], positions[part], valid.max_item_list_len)
            names = model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.USER_ID, POSITION
            fields = dict(zip(names, (seq, lengths, users[part], positions[part])))
            if valid.store.times is not None:
                fields[model.time_field] = valid.store.times[valid.store.offsets[users[part]] + positions[part]]
            batch = Interaction({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in fields.items()})
            yield batch.to(device), torch.from_numpy(targets[part])

    def _observe(self, split: SequenceDataset) -> None:
        users, positions, _ = split.windows()
        starts = split.store.offsets[users]
        self.model.observe(split.store.items, starts + positions, starts)

    def _reencode(self) -> Queries:
        queries = self.encode(self.train, "training")
        self.model.refresh_memory(torch.cat([b.keys(self.model.encoder, queries) for b in self._builders]))
        return queries


def fine_tune(config: Config, base: Outcome, trial: Optional[Trial] = None) -> Outcome:
    """Stage iii: build the memory, train the retrieval-augmented module, add the validation pairs, and test.

    Args:
        config: of the RaSeRec run.
        base: the trained backbone.
        trial: given where the run is one of a search.

    Raises:
        ConfigError: the backbone's score is not a dot product of user and item vectors.
    """
    splits = base.splits
    if not isinstance(splits.train._dataset, SequenceDataset) or not splits.train._dataset.is_lazy:
        raise ConfigError([f"backbone: {base.name} reads its own kind of data set; retrieval needs plain sequences."])
    inner = config.for_backbone()
    splits.settle(config, inner)
    init_seed(config["seed"], config["reproducibility"])
    backbone = wrap_backbone(base.model, config, splits.dataset)
    model = RaSeRec(config, splits.train._dataset, backbone).to(config["device"])
    train, valid, test = (data._dataset for data in (splits.train, splits.valid, splits.test))
    joined = train if train.original is not None else None  # with regenerated rows
    train = train if joined is None else joined.original
    searches = Path(config["checkpoint_dir"]) / "neighbours"
    cache = NeighbourCache(searches, least=trial.top_k if trial else 0) if config["cache_neighbours"] else None
    hooks = RetrievalHooks(model, train, valid, config, cache, joined if config["memory_regenerated"] else None, test)
    stage = copy.deepcopy(config)  # the module trains under `ram_*` in place of the backbone's options
    for name in ("learning_rate", "weight_averaging", "train_batch_size", "epochs", "stopping_step", "valid_metric"):
        stage[name] = config[f"ram_{name}"]
    if config["ram_weight_decay"] is not None:
        stage["weight_decay"] = config["ram_weight_decay"]
    windows = BucketLoader if backbone.trims else TrainDataLoader
    loader = (RowLoader if model.frozen else windows)(stage, train, splits.train._sampler, shuffle=True)
    texts = [splits.train._dataset.item_features.mark] if hasattr(model, "text") and model.text.shape[1] else []
    mark = fingerprint(
        config.training_options(), splits.fingerprint, base.fingerprint, *version_of(config["model"]), *texts
    )
    manifest = {
        "options": config.explain(),
        "backbone": base.name,
        "backbone_options": inner.explain(),
        "validation_in_memory": True,
    }
    init_seed(config["seed"], config["reproducibility"])
    name = "retrieval_regenerated" if config["regeneration"] else "retrieval"
    return run_stage(stage, splits, model, loader, mark, manifest, hooks, trial, name)
