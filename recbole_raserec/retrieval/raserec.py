"""RaSeRec (arXiv 2412.18378): a trained backbone, a memory of <prefix, next item> pairs, and the module mixing both."""

from __future__ import annotations

from typing import Any, Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender

from recbole_raserec.config import (
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
    option,
)
from recbole_raserec.data import POSITION
from recbole_raserec.kernels import linear_cross_entropy
from recbole_raserec.retrieval.builders import Rows
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import Queries
from recbole_raserec.retrieval.ram import build_ram


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
        None, "directory of a trained backbone; null: train, or reuse one in checkpoint_dir", training=False
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
    memory_scope: Literal["history", "past"] = option(
        "history", "history: no query sees what its own user does later; past: nor what any user does later or at that "
        "moment (stricter than the papers; needs true timestamps)",
    )  # fmt: skip
    memory_regenerated: bool = option(True, "with regeneration: what it generated joins the memory")
    memory_refresh: Count = option(1, "epochs between two encodings of the memory when the backbone is not frozen")
    top_k: Count = option(20, "neighbours per query; K in the paper, 20 in its Beauty run")
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


class RaSeRec(SequentialRecommender):
    """Retrieval-augmented sequential recommender over any backbone.

    The user vector h of the backbone retrieves the K most similar memories; their keys h_k and the vectors v_k of their
    next items are attended to, and the outcome h' is mixed in: ``h~ = alpha h + (1 - alpha) h'``. A user without any
    admissible memory keeps ``h~ = h``. Items are scored by ``h~ . v_i`` (plus the backbone's item bias if it has one).

    Args:
        config: options of ``properties/model/RaSeRec.yaml``.
        dataset: RecBole data set, or anything with ``num(field)``.
        backbone: a :class:`~recbole_raserec.recommendation.backbone.Backbone`.

    With ``freeze_backbone: true`` the backbone stays in evaluation mode and keeps its weights; what it computes for the
    training windows is computed once and looked up afterwards.
    """

    options = RaSeRecOptions

    def __init__(self, config: Any, dataset: Any, backbone: Any):
        super().__init__(config, dataset)
        self.backbone = backbone
        self.n_users = int(dataset.num(self.USER_ID))
        self.top_k = config["top_k"]
        self.time_field = config["TIME_FIELD"]
        self.frozen = config["freeze_backbone"]
        self.softmax_precision = config["softmax_precision"] or "auto"
        self.ram = build_ram(config, backbone.hidden_size)
        self.memory = MemoryBank(
            backbone.hidden_size, config["similarity"], config["index"], config["ivf_lists"], config["ivf_probes"],
            config["seed"], config["memory_scope"], config["memory_min_support"], config["retrieve_by"],
        )  # fmt: skip
        self.frequency_weight = float(config["memory_frequency_weight"])
        self._copy: Optional[tuple[Any, ...]] = None  # of the memory, for the device
        self._known: dict[str, Queries] = {}
        if self.frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> RaSeRec:
        """As of any module, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    # -- encoding and retrieval -------------------------------------------------------------------------------------

    def encode(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, user: Any = None) -> torch.Tensor:
        """The backbone's user vectors.

        Args:
            item_seq: int64 [B, L], oldest item first, padded with 0 on the right.
            item_seq_len: int64 [B], at least 1.
            user: int64 [B], internal ids, for a backbone that needs them.

        Returns:
            h, [B, H].
        """
        return self.backbone.encode(item_seq, item_seq_len, user)

    def item_vectors(self) -> torch.Tensor:
        """Item vectors as they enter the dot product, [V, H]."""
        return self.backbone.item_vectors()

    def neighbours(
        self, h: torch.Tensor, user: Any = None, position: Any = None, time: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Admissible memories of each row.

        Args:
            h: user vectors [B, H].
            user: int [B], whose history it is; None for users the memory does not know.
            position: int [B], index of the item to predict in that history; None where `user` is.
            time: float [B], read with ``memory_scope: past``; None: now.

        Returns:
            ids int64 [B, K], 0 where there is none, and mask bool [B, K], True where there is one.
        """
        found = self.memory.search(
            h.detach().cpu().numpy(), self.top_k, _numpy(user), _numpy(position), times=_numpy(time)
        )
        ids, mask = torch.from_numpy(found.ids), torch.from_numpy(found.mask)
        return ids.clamp(min=0).to(h.device), mask.to(h.device)

    def augment(self, h: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mix what was retrieved into the user vectors.

        Args:
            h: user vectors [B, H].
            ids: int64 [B, K], of memories.
            mask: bool [B, K], True where there is one.

        Returns:
            h~, [B, H].
        """
        if not len(self.memory):
            return h
        keys, targets, bias = self.entries(ids)
        values = self.item_vectors()[targets]  # [B, K, H]
        return self.ram(h, keys, values, mask, bias)

    def forward(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, user: Any = None, position: Any = None,
        time: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """Augmented user vectors.

        Args:
            item_seq, item_seq_len: as of :meth:`encode`.
            user, position, time: as of :meth:`neighbours`.

        Returns:
            h~, [B, H].
        """
        h = self.encode(item_seq, item_seq_len, user)
        return self.augment(h, *self.neighbours(h, user, position, time))

    def entries(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """Keys [B, K, H], targets int64 [B, K], and what their support adds to the attention's logits [B, K] or None.

        Args:
            ids: int64 [B, K], of memories.
        """
        if ids.device.type == "cpu" and not self.training:  # a memory that lives need not be copied for each query
            rows = ids.numpy()
            return self._on_device(self.memory.keys[rows], self.memory.targets[rows], self.memory.support[rows], "cpu")
        copy = self._copy
        if copy is None or copy[0] != (self.memory, self.memory.version, ids.device):
            memory = self.memory
            now = memory, memory.version, ids.device
            copy = now, *self._on_device(np.array(memory.keys), memory.targets, memory.support, ids.device)
            self._copy = copy
        _, keys, targets, frequency = copy
        return keys[ids], targets[ids], None if frequency is None else frequency[ids]

    def _on_device(
        self, keys: np.ndarray, targets: np.ndarray, support: np.ndarray, device: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        frequency = None
        if self.frequency_weight:
            counts = torch.from_numpy(np.maximum(support, 1).astype(np.float32)).to(device)
            frequency = self.frequency_weight * counts.log()
        return torch.from_numpy(keys).to(device), torch.from_numpy(targets.astype(np.int64)).to(device), frequency

    # -- the memory -------------------------------------------------------------------------------------------------

    def remember(self, queries: Queries) -> None:
        """Add <prefix, next item> pairs to the memory; looked-up neighbours of other queries are forgotten."""
        rows = Rows(queries.targets, queries.users, queries.positions, queries.times)
        self.remember_rows(queries.h, rows)

    def remember_rows(self, keys: torch.Tensor, rows: Rows) -> None:
        """Add entries with these keys [N, H] to the memory; looked-up neighbours are forgotten."""
        self.memory.add(
            keys.cpu().numpy(), rows.targets, rows.users, rows.positions, rows.times, rows.support, rows.owners
        )
        self.show_items()
        self.forget_known()

    def refresh_memory(self, keys: torch.Tensor) -> None:
        """Replace the memory's keys [N, H] after the backbone changed."""
        self.memory.set_keys(keys.cpu().numpy())
        self.show_items()
        self.forget_known()

    def show_items(self) -> None:
        """Give the memory the item vectors, which it searches with ``retrieve_by: target``."""
        if self.memory.retrieve_by == "target":
            self.memory.set_target_vectors(self.item_vectors().detach().cpu().numpy())

    def use_memory(self, memory: MemoryBank) -> None:
        """Search this bank from now on; the weights stay as they are.

        Raises:
            ValueError: its keys have another length than the backbone's user vectors.
        """
        if memory.hidden_size != self.backbone.hidden_size:
            raise ValueError(
                f"the memory's keys have length {memory.hidden_size}, user vectors {self.backbone.hidden_size}."
            )
        self.memory, self._copy = memory, None
        self.show_items()
        self.forget_known()

    def know(self, name: str, queries: Queries) -> None:
        """Keep vectors and neighbours of `queries`: rows asked for again (same user and position) are looked up."""
        self._known[name] = queries

    def knows(self, name: str) -> bool:
        """Whether :meth:`know` was called for `name` since the memory last changed."""
        return name in self._known

    def forget_known(self) -> None:
        """Drop what :meth:`know` keeps."""
        self._known.clear()

    # -- RecBole's interface ----------------------------------------------------------------------------------------

    def retrieved(self, interaction: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h [B, H] of the rows, ids and mask [B, K] of their memories: looked up, or encoded and searched."""
        user, position = interaction[self.USER_ID], interaction[POSITION]
        for known in self._known.values():
            rows = known.find(user, position)
            if rows is not None:
                return known.rows(rows, self.top_k)
        trained = torch.where(user < self.n_users, user, 0)  # the memory may know users whom the backbone does not
        h = self.encode(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], trained)
        time = interaction[self.time_field] if self.time_field in interaction.columns else None
        return (h, *self.neighbours(h, user, position, time))

    def _augmented(self, interaction: Any) -> torch.Tensor:
        return self.augment(*self.retrieved(interaction))

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        """Cross-entropy of h~ over all items (report, loss L)."""
        targets = interaction[self.POS_ITEM_ID]
        if self.frozen:
            h = self._augmented(interaction)
        else:
            user, position = interaction[self.USER_ID], interaction[POSITION]
            h = self.encode(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], user)
            known = self._known["train"]
            rows = known.find(user, position)
            assert rows is not None
            _, ids, mask = known.rows(rows, self.top_k)
            h = self.augment(h, ids, mask)
        items, bias = self.item_vectors(), self.backbone.item_bias()
        if bias is not None:  # the bias as one more dimension
            items = torch.cat([items, bias[:, None]], dim=1)
            h = F.pad(h, (0, 1), value=1.0)
        return linear_cross_entropy(h, items, targets, precision=self.softmax_precision)

    def full_sort_vectors(self, interaction: Any) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """What ``full_sort_predict`` multiplies: h~ [B, H], item vectors [V, H], item bias [V] or None."""
        return self._augmented(interaction), self.item_vectors(), self.backbone.item_bias()

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """Scores of all items, [B, V]."""
        h, items, bias = self.full_sort_vectors(interaction)
        scores = h @ items.t()  # [B, V]
        return scores if bias is None else scores + bias

    def predict(self, interaction: Any) -> torch.Tensor:
        """Scores of one item a row, that of the field ``item_id``: [B]."""
        items = interaction[self.ITEM_ID]
        scores = (self._augmented(interaction) * self.item_vectors()[items]).sum(dim=1)  # [B]
        bias = self.backbone.item_bias()
        return scores if bias is None else scores + bias[items]


def _numpy(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else values
