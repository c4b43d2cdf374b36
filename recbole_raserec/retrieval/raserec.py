"""RaSeRec (arXiv 2412.18378): a trained backbone, a memory of (prefix, next item), and the heads that mix both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Callable, Literal, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor

from recbole_raserec.config import (
    Bounded,
    Config,
    Count,
    Dropout,
    ModelName,
    Natural,
    Options,
    Positive,
    Several,
    Share,
    Text,
    Weight,
    get_model,
    option,
)
from recbole_raserec.data import POSITION, ItemFeatures
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import scores
from recbole_raserec.kernels import linear_cross_entropy
from recbole_raserec.recommendation import Backbone, wrap_backbone
from recbole_raserec.retrieval.heads import TAUS, RetrievalModule, interpolate
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import Queries, Rows
from recbole_raserec.retrieval.transitions import TransitionHead, mixed, pairs_of, text_of
from recbole_raserec.storage import load_weights, read_manifest, read_weights


class RaSeRecOptions(Options):
    """RaSeRec (arXiv 2412.18378): a memory of (prefix, next item) pairs, retrieval, and a module that learns to use it.
    Only the options of the retrieval stage are here. Those of the backbone (its sizes, learning_rate, epochs, ...) come
    from properties/model/BACKBONE.yaml and are set by their usual names."""

    backbone: ModelName = option(
        "DuoRec",
        "a sequential model of this package or of RecBole; the paper pre-trains DuoRec",
        heading="The backbone",
    )
    backbone_checkpoint: Optional[Text] = option(
        None,
        "directory of a trained backbone, or .pth of RecBole's; null: train, or reuse one in checkpoint_dir",
        training=False,
    )
    freeze_backbone: bool = option(True, "train the module alone, as the paper; false: the backbone too")
    memory: Literal["pairs", "patterns", "both"] = option(
        "pairs", "pairs: every (prefix, next item) of the training set; patterns: frequent sequential patterns of it "
        "as (pattern without its last item, last item); both", heading="The memory",
    )  # fmt: skip
    memory_min_length: Count = option(1, "shortest prefix that enters the memory, in items")
    memory_max_length: Optional[Count] = option(None, "longest prefix that enters the memory; null: any")
    memory_thin: Share = option(0, "leave out pairs whose key has this cosine with another of the same target; 0: none")
    memory_span: Several = option(5, "patterns: items of a history that a pattern may span (the DR4SR paper's alpha)")
    memory_min_support: Count = option(2, "patterns: users whose histories must hold it (the DR4SR paper's beta)")
    memory_frequency_weight: Weight = option(
        0, "this times the log of the number of users with the pattern is added to the attention's logits"
    )
    memory_text: Weight = option(
        0, "gamma: this times the cosine of the texts of the last items joins the similarity of the users' vectors; 0: "
        "texts are not searched (docs/item_text.md)", later=True,
    )  # fmt: skip
    memory_scope: Literal["history", "past"] = option(
        "history", "history: no query sees what its own user does later; past: nor what any user does later or at that "
        "moment (stricter than the papers; needs true timestamps)",
    )  # fmt: skip
    memory_regenerated: bool = option(True, "with regeneration: what it generated joins the memory")
    memory_refresh: Count = option(1, "epochs between two encodings of the memory when the backbone is not frozen")
    top_k: Bounded = option(20, "neighbours per query; K in the paper, 20 in its Beauty run")
    retrieve_by: Literal["sequence", "target"] = option(
        "sequence", "what the user's vector is compared with: the memories' prefixes (sequence) or next items (target)"
    )
    similarity: Literal["cosine", "dot"] = option("cosine", "cosine (the authors' normalised inner product) or dot")
    index: Literal["auto", "flat", "ivf", "hnsw", "ivfpq"] = option(
        "auto", "flat: exact; ivf, hnsw, ivfpq: approximate, for large memories; auto: by size"
    )
    cache_neighbours: bool = option(
        True, "keep the last exact searches in checkpoint_dir/neighbours, for runs that differ in what they make of "
        "them (alpha, beta, head, a smaller top_k, ...)", training=False,
    )  # fmt: skip
    ivf_lists: Count = option(128, "clusters of the ivf and ivfpq indexes, 128 in the authors' Beauty run")
    ivf_probes: Count = option(8, "clusters searched per query, at most ivf_lists; 1 in the authors' Beauty run")
    head: Literal["ram", "knn", "both"] = option(
        "ram", "ram: the module below; knn: their targets, weighed by similarity, are mixed into the model's "
        "distribution, nothing is trained; both: the module, then the mixture",
        heading="What is made of the neighbours",
    )  # fmt: skip
    transition_head: bool = option(
        False, "mix what followed the last two items in the training split, and items with texts like theirs, into the "
        "distribution; nothing is trained (docs/item_text.md)", later=True,
    )  # fmt: skip
    transition_neighbours: Count = option(100, "items with the nearest texts that stand for an item there", later=True)
    repeat_share: bool = option(
        False, "the items of the history together get the share that targets seen before have in the training split "
        "(next to none where people buy a thing once), the others the rest", later=True,
    )  # fmt: skip
    ram: Literal["dual", "single"] = option(
        "dual", "dual: two channels with feed-forward (the paper); single: one attention",
        heading="The retrieval module (RAM): h~ = alpha h + (1 - alpha) (beta channel_1 + (1 - beta) channel_2)",
    )  # fmt: skip
    alpha: Share = option(0.5, "share of the user's own vector in [0, 1]; 0.5 in the authors' Beauty run")
    learnable_alpha: bool = option(False, "let alpha be learned from that start")
    beta: Share = option(
        1.0, "share of channel 1 (keys sequences, values targets) in [0, 1]; 1 in the authors' Beauty run: the second "
        "channel is then not there",
    )  # fmt: skip
    attn_tau: Positive = option(1.0, "temperature of the cross attention, > 0")
    ram_heads: Count = option(2, "attention heads; must divide the length of the user's vector")
    ram_inner_size: Count = option(256, "inner size of the feed-forward layers")
    ram_dropout: Dropout = option(0.5, "dropout, in [0, 1); the paper's")
    ram_learning_rate: Positive = option(0.001, "Adam; the paper's", heading="Its training")
    ram_weight_averaging: Dropout = option(0, "`weight_averaging` of this training")
    ram_weight_decay: Optional[Weight] = option(None, "of this training; null: as `weight_decay`", later=True)
    ram_train_batch_size: Count = option(1024, "queries in a batch; the paper's")
    ram_epochs: Count = option(50, "at most")
    ram_stopping_step: Natural = option(
        5, "stop after more than that many evaluations without a better one (the paper: 10)"
    )
    ram_valid_metric: Text = option("NDCG@10", "one of metrics at one of topk (the paper: Recall@10)")


#: Buffers of a training model that a finished checkpoint does not need.
TRAINING_BUFFERS = ("known_ids", "known_mask")

RECENT = 5  # last items whose texts join a key

Vectors = tuple[Tensor, Tensor, Optional[Tensor]]


class RaSeRec(SequentialRecommender):
    """Retrieval-augmented sequential recommender over any backbone.

    The user vector h of the backbone retrieves the K most similar memories; their keys h_k and the vectors v_k of their
    next items are attended to, and the outcome h' is mixed in: `h~ = alpha h + (1 - alpha) h'`. A user without any
    admissible memory keeps `h~ = h`. Items are scored by `h~ . v_i` (plus the backbone's item bias if it has one).

    With the option `head: knn` the user vectors stay the backbone's own and nothing is trained: what followed the
    memories is mixed into the distribution over items, see `interpolate`. `head: both` does both. The kNN head's share
    and temperature are chosen on the validation split, and are part of the weights. With `transition_head: true`
    transitions and texts are mixed in behind it, see `TransitionHead`, whose weights are chosen in the same way.

    With `freeze_backbone: true` the backbone stays in evaluation mode and keeps its weights; what it computes for the
    training windows is computed once and looked up afterwards.

    Args:
        config: options of `properties/model/RaSeRec.yaml`.
        dataset: RecBole data set, or anything with `num(field)`.
        backbone: gives user and item vectors; None: one as the options name it, with the weights of
            `backbone_checkpoint`, or untrained: the trainer trains it.

    Attributes:
        known: vectors and neighbours of some splits, where rows (user and position) are looked up first; a change of
            the memory empties it.
        makes_backbone: whether the backbone is its own, to be trained.
        augments: whether user vectors are augmented.
        knn: whether the kNN head is there.
        transitions: the transition head; None: it is not there.
    """

    options = RaSeRecOptions

    knn_share: Tensor
    knn_tau: Tensor
    text: Tensor
    repeat_share: Tensor

    def __init__(self, config: Union[Config, Mapping[str, Any]], dataset: Any, backbone: Optional[Backbone] = None):
        super().__init__(config, dataset)
        self.makes_backbone = backbone is None
        if backbone is None:
            own = config.for_backbone()  # type: ignore[union-attr]
            model = get_model(own["model"])(own, dataset)
            path = config["backbone_checkpoint"]
            if path and os.path.isdir(path):
                load_weights(model, read_weights(path, read_manifest(path)), path)
            backbone = wrap_backbone(model, own, dataset)
        self.backbone = backbone
        self.n_users = int(dataset.num(self.USER_ID))
        self.top_k, self.time_field, self.frozen = config["top_k"], config["TIME_FIELD"], config["freeze_backbone"]
        self.softmax_precision = config["softmax_precision"] or "auto"
        self.augments, self.knn = config["head"] != "knn", config["head"] in ("knn", "both")
        self.ram = RetrievalModule(config, backbone.hidden_size)
        if self.knn:
            self.register_buffer("knn_share", torch.tensor(0.0))
            self.register_buffer("knn_tau", torch.tensor(TAUS[0]))
        self.transitions: Optional[TransitionHead] = None
        if config["transition_head"]:
            self.transitions = TransitionHead(self.n_items, config["transition_neighbours"])
        self.shares_repeats = bool(config["repeat_share"])
        if self.shares_repeats:
            self.register_buffer("repeat_share", torch.tensor(0.5))
        width = 0
        if config["transition_head"] or config["memory_text"]:
            self.register_buffer("text", text_of(config, dataset, self.n_items))
            width = self.text.shape[1] if config["memory_text"] else 0
            if config["memory_text"] and not width:
                problem = f"memory_text: {config['memory_text']} compares the items' texts, and there are none"
                raise ConfigError([f"{problem}; bring the item file (docs/item_text.md), or leave memory_text out"])
        self.memory = MemoryBank(
            backbone.hidden_size + width, config["similarity"], config["index"], config["ivf_lists"],
            config["ivf_probes"], config["seed"], config["memory_scope"], config["memory_min_support"],
            config["retrieve_by"], width, float(config["memory_text"] or 0) if width else 0.0,
        )  # fmt: skip
        self.frequency_weight = float(config["memory_frequency_weight"])
        self.known: dict[str, Queries] = {}
        self._copy: Optional[tuple[Any, ...]] = None  # of the memory, for the device
        if self.frozen:
            self.backbone.requires_grad_(False)

    @property
    def gives_probabilities(self) -> bool:
        """Whether scores are logarithms of probabilities instead of dot products."""
        return self.knn or self.shares_repeats or self.transitions is not None

    def train(self, mode: bool = True) -> RaSeRec:
        """As of any module, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def encode(self, item_seq: Tensor, item_seq_len: Tensor, user: Optional[Tensor] = None) -> Tensor:
        """The backbone's user vectors [B, H], see `Backbone.encode`; with `memory_text` the texts' [B, S] behind them.

        These are the sum of the last `RECENT` items' texts, each with half the weight of the one after it.
        """
        h = self.backbone.encode(item_seq, item_seq_len, user)
        if not self.memory.text_size:
            return h
        back = torch.arange(RECENT, device=item_seq.device)
        places = item_seq_len[:, None] - 1 - back  # [B, RECENT]
        weights = 0.5**back * (places >= 0)
        texts = self.text[item_seq.gather(1, places.clamp(min=0))]  # [B, RECENT, S]
        return torch.cat([h, (weights[:, None] @ texts).squeeze(1)], dim=1)

    @property
    def encoder(self) -> Any:
        """What encodes the memory's keys and the queries, as a backbone does: this one, where texts join the keys."""
        return self if self.memory.text_size else self.backbone

    @property
    def hidden_size(self) -> int:
        """Length of a key."""
        return self.memory.hidden_size

    @property
    def trims(self) -> bool:
        """As of the backbone."""
        return self.backbone.trims

    def own(self, h: Tensor) -> Tensor:
        """The users' part [B, H] of keys or of what `encode` gives."""
        return h[..., : self.backbone.hidden_size]

    def item_vectors(self) -> Tensor:
        """Item vectors as they enter the dot product, [V, H]."""
        return self.backbone.item_vectors()

    def neighbours(self, h: Tensor, user: Any = None, position: Any = None, time: Any = None) -> tuple[Tensor, Tensor]:
        """Admissible memories of each row: ids int64 [B, K], 0 where there is none, and mask bool [B, K].

        Args:
            h: user vectors [B, H].
            user: int [B], whose history it is; None for users the memory does not know.
            position: int [B], index of the item to predict in that history; None where `user` is.
            time: float [B], read with `memory_scope: past`; None: now.
        """
        found = self.memory.search(h, self.top_k, user, position, times=time)
        ids, mask = torch.from_numpy(found.ids), torch.from_numpy(found.mask)
        return ids.clamp(min=0).to(h.device), mask.to(h.device)

    def augment(self, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """User vectors h [B, H] mixed with the memories `ids` where `mask` is True, [B, K] each: h~ [B, H]."""
        if not len(self.memory):
            return self.own(h)
        keys, targets, bias = self.entries(ids)
        return self.ram(self.own(h), self.own(keys), self.item_vectors()[targets], mask, bias)

    def forward(
        self, item_seq: Tensor, item_seq_len: Tensor, user: Any = None, position: Any = None, time: Any = None
    ) -> Tensor:
        """Augmented user vectors h~ [B, H]; arguments as of `encode` and `neighbours`."""
        h = self.encode(item_seq, item_seq_len, user)
        return self.augment(h, *self.neighbours(h, user, position, time))

    def entries(self, ids: Tensor) -> Vectors:
        """Keys [B, K, H] and targets int64 [B, K] of the memories `ids`, int64 [B, K], and what their support adds to
        the attention's logits, [B, K] or None.
        """
        if ids.device.type == "cpu" and not self.training:  # a memory that lives need not be copied for each query
            rows = ids.numpy()
            return self._on_device(self.memory.keys[rows], self.memory.targets[rows], self.memory.support[rows], "cpu")
        copy, now = self._copy, (self.memory, self.memory.version, ids.device)
        if copy is None or copy[0] != now:
            memory = self.memory
            self._copy = copy = now, *self._on_device(np.array(memory.keys), memory.targets, memory.support, ids.device)
        _, keys, targets, frequency = copy
        return keys[ids], targets[ids], None if frequency is None else frequency[ids]

    def _on_device(self, keys: np.ndarray, targets: np.ndarray, support: np.ndarray, device: Any) -> Vectors:
        frequency = None
        if self.frequency_weight:
            counts = torch.from_numpy(np.maximum(support, 1).astype(np.float32)).to(device)
            frequency = self.frequency_weight * counts.log()
        return torch.from_numpy(keys).to(device), torch.from_numpy(targets.astype(np.int64)).to(device), frequency

    def neighbour_similarity(self, h: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of the memories, and their keys' similarity with h: [B, K] each."""
        keys, targets, _ = self.entries(ids)  # [B, K, H], [B, K]
        return targets, self.compared(h, keys)

    def compared(self, h: Tensor, vectors: Tensor) -> Tensor:
        """Similarity, as the memory has it, of h [B, H] with `vectors` [B, K, H]: [B, K]."""
        if (size := self.memory.text_size) and h.shape[1] == self.memory.hidden_size:
            texts = torch.cosine_similarity(h[:, None, -size:], vectors[..., -size:], dim=2)
            return self.compared(self.own(h), self.own(vectors)) + self.memory.text_weight * texts
        if self.memory.similarity == "cosine":
            return torch.cosine_similarity(h[:, None], vectors, dim=2)
        return (vectors @ h[:, :, None]).squeeze(2)

    def remember(self, keys: Tensor, rows: Rows) -> None:
        """Add entries with these keys [N, H] to the memory."""
        self.memory.add(keys, *rows)
        self._memory_changed()

    def refresh_memory(self, keys: Tensor) -> None:
        """Replace the memory's keys [N, H] after the backbone changed."""
        self.memory.set_keys(keys)
        self._memory_changed()

    def use_memory(self, memory: MemoryBank) -> None:
        """Search this bank from now on; the weights stay as they are.

        Raises:
            ValueError: its keys have another length than the backbone's user vectors.
        """
        size = self.memory.hidden_size
        if memory.hidden_size != size:
            raise ValueError(f"the memory's keys have length {memory.hidden_size}, user vectors {size}.")
        self.memory, self._copy = memory, None
        self._memory_changed()

    def load_other_parameter(self, para: Any) -> None:
        """The memory and the transition head of one of RecBole's checkpoints."""
        if para:
            self.transitions = para.get("transitions")
            self.use_memory(para["memory"])

    def _memory_changed(self) -> None:
        if self.memory.retrieve_by == "target":
            self.memory.set_target_vectors(self.item_vectors())
        self.known.clear()

    def retrieved(self, interaction: Any) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, H] of the rows, ids and mask [B, K] of their memories: looked up, or encoded and searched."""
        user, position = interaction[self.USER_ID], interaction[POSITION]
        for known in self.known.values():
            found = known.find(user, position, self.top_k)
            if found is not None:
                return found
        trained = torch.where(user < self.n_users, user, 0)  # the memory may know users whom the backbone does not
        h = self.encode(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], trained)
        time = interaction[self.time_field] if self.time_field in interaction.columns else None
        return (h, *self.neighbours(h, user, position, time))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Cross-entropy of h~ over all items (report, loss L); raises ValueError while the memory is empty."""
        if not len(self.memory):
            raise ValueError("RaSeRec: its memory is empty; train it with RaSeRecTrainer, whose fit builds it")
        if self.frozen:
            h, ids, mask = self.retrieved(interaction)
        else:
            user = interaction[self.USER_ID]
            h = self.encode(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], user)
            found = self.known["train"].find(user, interaction[POSITION], self.top_k)
            assert found is not None
            _, ids, mask = found
        h = self.augment(h, ids, mask)
        items, bias = self.item_vectors(), self.backbone.item_bias()
        if bias is not None:  # the bias as one more dimension
            items = torch.cat([items, bias[:, None]], dim=1)
            h = F.pad(h, (0, 1), value=1.0)
        return linear_cross_entropy(h, items, interaction[self.POS_ITEM_ID], precision=self.softmax_precision)

    @property
    def full_sort_vectors(self) -> Callable[[Any], Vectors]:
        """Gives h~ [B, H], item vectors [V, H] and item bias [V] or None, whose dot product the scores are.

        Raises:
            AttributeError: probabilities are mixed; their logarithms are no dot products.
        """
        if self.gives_probabilities:
            raise AttributeError("full_sort_vectors")
        return lambda interaction: (
            self.augment(*self.retrieved(interaction)), self.item_vectors(), self.backbone.item_bias()
        )  # fmt: skip

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of all items, [B, V]; where probabilities are mixed their logarithms."""
        found = self.scores_of(*self.retrieved(interaction))
        if not self.gives_probabilities:
            return found
        if not self.knn:
            found = torch.log_softmax(found, dim=1)
        if self.transitions is not None:
            transitions, texts = self.followed(interaction)
            found = mixed(found, transitions + texts)
        return found + self.repeat_scale(found.exp(), interaction).log() if self.shares_repeats else found

    def repeat_scale(self, probability: Tensor, interaction: Any) -> Tensor:
        """Factors of probabilities [B, V] by which the items of the history together get `repeat_share`."""
        seen = torch.zeros_like(probability).scatter_(1, interaction[self.ITEM_SEQ], 1)
        seen[:, 0] = 0
        inside, share = (probability * seen).sum(dim=1, keepdim=True), self.repeat_share.to(probability.dtype)
        return torch.where(seen > 0, share / inside.clamp(min=1e-30), (1 - share) / (1 - inside).clamp(min=1e-7))

    def followed(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """What the transition head's transitions and texts give to each item, [B, V] each."""
        assert self.transitions is not None
        return self.transitions(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], self.text)

    def observe(self, items: np.ndarray, places: np.ndarray, starts: np.ndarray, times: int = 1) -> None:
        """Count the transitions to the `places` of `items`, see `pairs_of`; with `times` -1 take them out again."""
        if self.transitions is not None:
            self.transitions.add(*pairs_of(items, places, starts), times)

    def add_texts(self, features: ItemFeatures) -> None:
        """Take up the texts of more items, behind the others."""
        self.n_items += len(features.text)
        if hasattr(self, "text"):
            self.text = torch.cat([self.text, torch.from_numpy(features.directions()).to(self.text.device)])
        if self.transitions is not None:
            self.transitions.grow(self.n_items)

    def scores_of(self, h: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The same, without the transition head, of user vectors h [B, H] and the memories `ids` where `mask` is True,
        [B, K] each.
        """
        augmented = self.augment(h, ids, mask) if self.augments else self.own(h)
        found = scores(augmented, self.item_vectors(), self.backbone.item_bias())
        if not self.knn or not len(self.memory):
            return found
        targets, similarity = self.neighbour_similarity(h, ids)
        return interpolate(found, targets, similarity, mask, float(self.knn_share), float(self.knn_tau))

    def predict(self, interaction: Any) -> Tensor:
        """Scores of one item a row, that of the field `item_id`: [B]; as `full_sort_predict` gives them."""
        items = interaction[self.ITEM_ID]
        if self.gives_probabilities:
            return self.full_sort_predict(interaction).gather(1, items[:, None]).squeeze(1)
        h = self.augment(*self.retrieved(interaction))
        found, bias = (h * self.item_vectors()[items]).sum(dim=1), self.backbone.item_bias()  # [B]
        return found if bias is None else found + bias[items]
