"""DARec (arXiv 2408.07427): a frozen language model with adapters reads items as text and predicts the next one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from logging import getLogger
from typing import Any, Literal, Optional

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import SequentialRecommender
from torch import Tensor, nn

from recbole_raserec.config import (
    Config,
    Count,
    Dropout,
    Names,
    Natural,
    Numbers,
    Options,
    Positive,
    Precision,
    Several,
    Sizes,
    Text,
    Weight,
    option,
)
from recbole_raserec.data import PACKED_TARGETS, computes_in_bfloat16, item_tokens, model_source
from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import linear_cross_entropy
from recbole_raserec.recommendation.base import DotProduct
from recbole_raserec.recommendation.darec.injection import CollaborativeModel, Injection
from recbole_raserec.recommendation.darec.language_model import (
    AttentionView,
    LanguageModel,
    TokenLayout,
    load_pretrained,
    load_tokenizer,
)


class DARecOptions(Options):
    """DARec (arXiv 2408.07427): a frozen language model reads the items as text; adapters, an item head and three tasks
    are trained. docs/darec.md says what is the paper's and what is this package's choice."""

    llm: Optional[Text] = option(
        None, "directory or hub name of an encoder or causal decoder; null: the MiniLM of the extra",
        heading="The language model and what it reads",
    )  # fmt: skip
    llm_precision: Precision = option(
        "auto", "of its products: float32, bfloat16, or auto: bfloat16 where the hardware multiplies in it"
    )
    item_text_fields: Optional[Names] = option(
        None, "columns of the .item file, in this order; null: all of text or tokens but the id"
    )
    item_text_length: Count = option(24, "tokens of an item's text, at most")
    history: Literal["items", "tokens"] = option(
        "items", "items: an item of the history is its text's state at [ALIGN]; tokens: its text"
    )
    text_items: Several = option(128, "items of a training step whose text is read again; others: in earlier steps")
    token_budget: Count = option(4096, "tokens of a batch, at most (but one history at least)")
    adapter_sizes: Sizes = option(
        32, "inner sizes of the adapters: one for all; or for each layer a number, or a pair (after attention, after "
        "feed-forward); 0: none", heading="What is trained",
    )  # fmt: skip
    adapter_dropout: Dropout = option(0.1, "in [0, 1)")
    head_dropout: Dropout = option(0.2, "of the states that the item head scores, in [0, 1)")
    item_head: Literal["table", "text"] = option(
        "table", "table: a trained vector for each item; text: a trained map of its text's vector, for data where many "
        "items have few interactions",
    )  # fmt: skip
    head_from_text: bool = option(True, "the vectors of `table` start from the texts'")
    head_min_interactions: Natural = option(
        0, "items with fewer in the training split are no wrong answers when the next item is linked: what no user "
        "could choose is not learned to be never chosen",
    )  # fmt: skip
    context_mask: Literal["off", "bias", "dual"] = option(
        "off", "off; bias: a learned bias between tokens of different items; dual: the average of the usual view and "
        "one in which item tokens see their own item's alone",
    )  # fmt: skip
    align_weight: Weight = option(
        0.1,
        "an item's text -> its id, at [ALIGN]",
        heading="The tasks; linking the next item at [SEQ] has weight 1",
    )
    hard_weight: Weight = option(0.1, "contrast with similar items that no user had together with the target")
    hard_similarity: Literal["text", "collaborative"] = option(
        "text", "similar by: text or collaborative (needs `collaborative`)"
    )
    hard_negatives: Count = option(10, "of them, for each item at most")
    hard_tau: Positive = option(1.0, "temperature of the contrast, > 0")
    collaborative: Optional[Text] = option(
        "SASRec", "SASRec, DuoRec, BSARec, GRU4Rec or NARM (trained or found first), or a checkpoint directory; null: "
        "none",
        heading="Collaborative knowledge: vectors of a trained model as keys and values of the attention",
    )  # fmt: skip
    collaborative_layers: Optional[Numbers] = option(
        None, "layers, counted from 0, that receive them; null: the upper half"
    )
    initializer_range: Positive = option(0.02, "standard deviation of the initial weights", heading="")
    loss_type: Literal["CE"] = option("CE", "softmax over all items")
    training: Literal["packed"] = option("packed", "all targets of a sequence in one pass")
    packed_copies: Count = option(1, "rows among which a sequence's targets are distributed in each epoch")
    learning_rate: Positive = option(0.001, "Adam")
    train_batch_size: Count = option(2048, "targets in a batch, about; token_budget may make it less")
    eval_batch_size: Count = option(256, "histories in an evaluation batch", training=False)
    epochs: Count = option(10, "at most")
    stopping_step: Natural = option(2, "stop after more than that many evaluations without a better valid_metric")
    MAX_ITEM_LIST_LENGTH: Count = option(50, "the model sees the last that many items of a history")


#: Norm of the item head's rows at the start, per square root of their length: that of normally drawn ones.
START = 0.02
BLOCK = 512  # items compared with all others at a time


class DARec(DotProduct, SequentialRecommender):
    """User vectors are a language model's states at [SEQ] after the items' texts; an item head scores all items.

    From the paper's public description: items as "key: value" text, the tokens [ALIGN] and [SEQ], two adapters in each
    frozen layer, an item projection, the three tasks, context masking, collaborative vectors in the attention. Ours are
    the forms these take here, the short history (`history: items`) and the start of the head; see docs/darec.md.

    With `history: tokens` a history is its items' texts one after the other, each with its [SEQ]. With `history: items`
    each text is read on its own, and its state at [ALIGN] stands for it in the history. In a training step the texts of
    `text_items` items are read with gradient (`fresh_items`); the other items have the state they had when last read,
    at the latest at the epoch's start (`known_items`).

    Raises:
        MissingExtraError: `transformers` or the default language model is not installed.
        ConfigError: options and language model do not fit.
    """

    options = DARecOptions
    trims = True
    #: one pass gives the states of all prefixes, and many passes would be expensive: retrieval encodes a split that way
    shares_prefixes = True

    item_tokens: Tensor
    item_lengths: Tensor
    hard: Tensor
    rank_among: Tensor
    head_texts: Tensor

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)
        model, tokenizer = load_pretrained(config["llm"])
        self.context_mask, self.history = config["context_mask"], config["history"]
        self.token_budget, self.text_items = config["token_budget"], config["text_items"]
        self.align_weight, self.hard_weight = config["align_weight"], config["hard_weight"]
        self.hard_tau, self._hard_negatives = config["hard_tau"], config["hard_negatives"]
        self._similarity, self.by_text = config["hard_similarity"], config["item_head"] == "text"
        self.longest, std = int(config["MAX_ITEM_LIST_LENGTH"]), config["initializer_range"]
        self.language = LanguageModel(
            model, config["adapter_sizes"], config["adapter_dropout"], std, self.context_mask == "bias"
        )
        self.language.autocast = computes_in_bfloat16(config["llm_precision"], config["device"])
        words = self.language.embed(torch.arange(model.config.vocab_size))  # [W, D]
        self.scale, size = float(words.norm(dim=1).mean()), self.language.hidden_size
        self.special = nn.Embedding(2, size)  # [ALIGN], [SEQ]
        with torch.no_grad():  # new tokens begin as a word that means nothing in particular
            self.special.weight.copy_(words.mean(dim=0) + torch.randn_like(self.special.weight) * words.std())
        # with its texts a checkpoint is whole; without a data set there are none yet
        ids, lengths = np.zeros((self.n_items, config["item_text_length"]), np.int32), np.ones(self.n_items, np.int32)
        if hasattr(dataset, "field2id_token"):
            ids, lengths = item_tokens(config, dataset, tokenizer)
        self.register_buffer("item_tokens", torch.from_numpy(ids))
        self.register_buffer("item_lengths", torch.from_numpy(lengths))
        self._known: Optional[tuple[Any, Tensor]] = None
        #: the collaborative model; named so in checkpoints
        self.collaborator: Optional[CollaborativeModel] = None
        self.item_position = nn.Embedding(self.longest, size)
        self.item_input = nn.Linear(size, size)
        self.head, self.head_dropout = nn.Linear(size, size), nn.Dropout(config["head_dropout"])
        if self.by_text:
            self.text_head = nn.Linear(size, size, bias=False)
            self.register_buffer("head_texts", torch.zeros(self.n_items, size))
        else:
            self.item_embedding = nn.Embedding(self.n_items, size, padding_idx=0)
        if self.context_mask == "dual":
            self.mix = nn.Parameter(torch.tensor(0.5))
        with torch.no_grad():  # maps start as the identity, positions at zero, trained item vectors at random
            nn.init.zeros_(self.item_position.weight)
            for square in (self.item_input, self.head):
                nn.init.eye_(square.weight)
                nn.init.zeros_(square.bias)
            if self.by_text:
                nn.init.eye_(self.text_head.weight)
            else:
                nn.init.normal_(self.item_embedding.weight, std=std)
                self.item_embedding.weight[0] = 0
        self._split = dataset if hasattr(dataset, "windows") else None
        self.register_buffer("hard", torch.zeros(0, 1, dtype=torch.int64), persistent=False)
        self.register_buffer("rank_among", torch.zeros(0, dtype=torch.int64), persistent=False)
        if self._split is not None and config["head_min_interactions"]:
            self.rank_among = self._frequent(config["head_min_interactions"])
        self._texts: Optional[Tensor] = None
        head_from_text = self.by_text or config["head_from_text"]
        if self._split is not None and (head_from_text or (self.hard_weight and self._similarity == "text")):
            self._texts = self.text_vectors()
            if head_from_text:
                with torch.no_grad():
                    vectors = F.normalize(self._texts, dim=1) * START * size**0.5
                    (self.head_texts if self.by_text else self.item_embedding.weight)[1:] = vectors[1:]
        self.extra_options: dict[str, Any] = {}
        given = config["collaborative_options"]
        if given:
            self.extra_options["collaborative_options"] = dict(given)
            self.collaborator = CollaborativeModel(defaultdict(lambda: None, given), dataset)
            self.language.injection = Injection(
                self.collaborator.hidden_size, self.language, config["collaborative_layers"], std
            )

    @staticmethod
    def check_installed(config: Config | Mapping[str, Any]) -> None:
        """Called before any data is read; raises MissingExtraError where what the model reads is not installed."""
        model_source(config["llm"])

    @staticmethod
    def token_costs(config: Config | Mapping[str, Any], dataset: Any) -> np.ndarray:
        """Tokens of each item in a history, its [SEQ] included: int64 [V]; the loader bounds a batch's by it."""
        if config["history"] == "items":
            return np.full(dataset.item_num, 2)
        return item_tokens(config, dataset, load_tokenizer(config["llm"]))[1].astype(np.int64) + 1

    def costs(self) -> Tensor:
        """As `token_costs`, of the texts that the model holds."""
        return torch.full_like(self.item_lengths, 2).long() if self.history == "items" else self.item_lengths.long() + 1

    def fingerprint_parts(self) -> list[str]:
        """What of the data and the language model decides the result, beside the log: for the run's fingerprint."""
        digest = hashlib.sha256()
        for part in (self.item_tokens, self.item_lengths, self.language.frozen.mark):
            digest.update(part.cpu().numpy().tobytes())
        return [digest.hexdigest()]

    def train(self, mode: bool = True) -> DARec:
        if mode:  # RecBole calls it at the start of each epoch
            self._known = None
        return super().train(mode)

    def _inputs(self, embedded: Tensor, layout: TokenLayout, special: int) -> Tensor:
        """Word embeddings [N, D], and at special tokens those of [ALIGN] (`special` 0) or [SEQ] (1)."""
        return torch.where(layout.special[:, None], self.special.weight[special], embedded)

    # Items: their texts, read one by one

    def _read_texts(self, numbers: Tensor) -> tuple[Tensor, TokenLayout]:
        """States [N, D] of the texts of items [n], each followed by [ALIGN] and on its own."""
        layout = TokenLayout.of_texts(self.item_lengths[numbers].long())
        ids = self.item_tokens[numbers[layout.row], layout.position.clamp(max=self.item_tokens.shape[1] - 1)].long()
        view = AttentionView(layout, layout.visible(self.language.causal))
        if self.collaborator is not None:
            view.extra, view.sees_extra = self.collaborator.items(numbers), layout.sees_items(1)
        return self.language(self._inputs(self.language.embed(ids), layout, 0), view), layout

    def _text_blocks(self) -> list[Tensor]:
        """All items in parts of about `token_budget` tokens."""
        ends = (self.item_lengths.long() + 1).cumsum(0)
        parts = torch.bincount((ends - 1) // self.token_budget).tolist()
        numbers = torch.arange(self.n_items, device=self.item_tokens.device)
        return [part for part in numbers.split(parts) if len(part)]

    @torch.no_grad()
    def text_vectors(self) -> Tensor:
        """The items' texts as the language model has them, means of its states over the tokens, centred: [V, D].

        Called while the adapters are at zero, so that the vectors are the frozen model's.
        """
        parts = []
        for numbers in self._text_blocks():
            states, layout = self._read_texts(numbers)
            words = ~layout.special
            total = states.new_zeros(len(numbers), states.shape[1]).index_add(0, layout.row[words], states[words])
            parts.append(total / self.item_lengths[numbers][:, None])
        vectors = torch.cat(parts)
        return vectors - vectors[1:].mean(dim=0)

    def read_items(self, numbers: Tensor) -> Tensor:
        """States at [ALIGN] of the texts of items [n]: [n, D]."""
        states, layout = self._read_texts(numbers)
        return states[layout.special]

    @torch.no_grad()
    def known_items(self) -> Tensor:
        """States at [ALIGN] of all items, [V, D]: while training those last read, otherwise the present ones."""
        marks = "epoch" if self.training else [(p.data_ptr(), p._version) for p in self.parameters()]
        if self._known is None or self._known[0] != marks:
            was_training = self.training
            self.language.eval()
            found = torch.cat([self.read_items(part) for part in self._text_blocks()])
            self.language.train(was_training)
            self._known = marks, found
        return self._known[1]

    def fresh_items(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Items whose texts a training step reads with gradient, and their states.

        Half of them are of the batch, half of all, so that rare ones are aligned too.
        """
        here = torch.unique(items)
        some = here[torch.randperm(len(here), device=items.device)[: -(-self.text_items // 2)]]
        any_ = torch.randint(1, self.n_items, (self.text_items // 2,), device=items.device)
        numbers = torch.unique(torch.cat([some, any_]))
        states = self.read_items(numbers)
        if self.training and self._known is not None:
            self._known[1].index_copy_(0, numbers, states.detach())
        return numbers, states

    def item_vectors(self) -> Tensor:
        """The item head, [V, H]: a trained vector for each item, or a trained map of its text's vector."""
        return self.text_head(self.head_texts) if self.by_text else self.item_embedding.weight

    # Histories

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """User vectors [B, H] of histories [B, L], left-aligned, of lengths [B]."""
        found = self.encode_positions(item_seq, item_seq_len)
        return found[torch.arange(len(found), device=found.device), item_seq_len - 1]

    def encode_positions(self, item_seq: Tensor, item_seq_len: Optional[Tensor] = None) -> Tensor:
        """User vector after every item of each row, in one pass: [B, L] -> [B, L, H], zeros behind the last item.

        Without gradients at most `token_budget` tokens are in memory at a time.
        """
        if item_seq_len is None:
            item_seq_len = (item_seq > 0).sum(dim=1)
        if torch.is_grad_enabled():
            items = item_seq[_inside(item_seq, item_seq_len)]  # [M]
            return self._encode(item_seq, item_seq_len, self.fresh_items(items) if self.training else None)
        h = self.head.weight.new_zeros(*item_seq.shape, self.head.out_features)
        order = torch.argsort(item_seq_len, stable=True)
        for rows in self._history_blocks(item_seq[order], item_seq_len[order]):
            part = order[rows]
            width = int(item_seq_len[part].max())
            h[part, :width] = self._encode(item_seq[part, :width], item_seq_len[part], None)
        return h

    def _history_blocks(self, item_seq: Tensor, counts: Tensor) -> list[Tensor]:
        """Rows of histories in parts of at most `token_budget` tokens, one history at least."""
        costs = self.costs()[item_seq] * _inside(item_seq, counts)
        parts, start, total = [], 0, 0
        for row, cost in enumerate(costs.sum(dim=1).tolist()):
            if row > start and total + cost > self.token_budget:
                parts.append(torch.arange(start, row, device=item_seq.device))
                start, total = row, 0
            total += cost
        return [*parts, torch.arange(start, len(item_seq), device=item_seq.device)] if len(item_seq) else []

    def _encode(self, item_seq: Tensor, counts: Tensor, fresh: Any) -> Tensor:
        """See `encode_positions`; `fresh`: what `fresh_items` gives, in place of the known ones."""
        by_items = self.history == "items"
        inside = _inside(item_seq, counts)  # [B, L]
        items = item_seq[inside]  # [M]
        lengths = torch.ones_like(items) if by_items else self.item_lengths[items].long()
        layout = TokenLayout.of_histories(counts, lengths)
        entry = torch.repeat_interleave(lengths + 1)  # [N]
        if not by_items:
            column = layout.position.clamp(max=self.item_tokens.shape[1] - 1)
            embedded = self.language.embed(self.item_tokens[items[entry], column].long())
        else:
            states = self.known_items()
            if fresh is not None:
                states = states.index_copy(0, *fresh)
            states = F.normalize(self.item_input(states), dim=1) * self.scale
            embedded = states[items[entry]]
        inputs = self._inputs(embedded, layout, 1) + self.item_position(layout.item.clamp(max=self.longest - 1))
        h = self.head(self.head_dropout(self._states(inputs, layout, item_seq)[layout.special]))  # [M, H]
        return h.new_zeros(*item_seq.shape, h.shape[1]).index_put(inside.nonzero(as_tuple=True), h)

    def _states(self, inputs: Tensor, layout: TokenLayout, item_seq: Tensor) -> Tensor:
        """States [N, D] under the view, or the two views, of `context_mask`."""
        causal = self.language.causal
        view = AttentionView(layout, layout.visible(causal))
        if self.context_mask == "bias":
            view.across_items = layout.across_items()
        if self.collaborator is not None:
            view.extra = self.collaborator.histories(item_seq)  # [R, 2 L, C]
            view.sees_extra = layout.sees_items(item_seq.shape[1]).repeat(1, 1, 2)
        states = self.language(inputs, view)
        if self.context_mask != "dual":
            return states
        view.visible = layout.visible(causal, own_item=True)
        return states + self.mix * (self.language(inputs, view) - states)

    # The three tasks

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Link next item + `align_weight` x alignment + `hard_weight` x hard samples, each a mean over its rows."""
        item_seq, counts = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = interaction[PACKED_TARGETS]  # [U, L]
        fresh = None
        if self.history == "items" or self.align_weight:
            fresh = self.fresh_items(item_seq[_inside(item_seq, counts)])
        h, targets = self._encode(item_seq, counts, fresh)[targets > 0], targets[targets > 0]
        table = self.item_vectors()
        loss = self._link(h, table, targets)
        if self.align_weight:
            assert fresh is not None
            aligned = self.head(self.head_dropout(fresh[1]))
            align = linear_cross_entropy(aligned, table, fresh[0], precision=self.softmax_precision)
            loss = loss + self.align_weight * align
        if self.hard_weight:
            loss = loss + self.hard_weight * hard_contrast(h, targets, table, self._negatives(), self.hard_tau)
        return loss

    def _link(self, h: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of user vectors [N, H] over all items, or over those of `head_min_interactions`."""
        if len(self.rank_among):
            rank = torch.full((len(table),), -1, device=targets.device)
            rank[self.rank_among] = torch.arange(len(self.rank_among), device=targets.device)
            counted = rank[targets] >= 0
            h, targets, table = h[counted], rank[targets][counted], table[self.rank_among]
        return linear_cross_entropy(h, table, targets, precision=self.softmax_precision)

    def _frequent(self, least: int) -> Tensor:
        """Items with at least so many interactions in the training split, int64 [M]."""
        counts = np.bincount(_histories(self._split)[0], minlength=self.n_items)
        found = np.flatnonzero(counts >= least)
        if len(found) < 2:
            left = f"leaves {len(found)} items; the most frequent has {counts.max()}"
            raise ConfigError([f"head_min_interactions: {least} {left}"])
        return torch.from_numpy(found)

    def _negatives(self) -> Tensor:
        """Hard negatives of each item, mined when the first batch asks for them: int64 [V, K]."""
        if not len(self.hard):
            vectors = self._texts
            if self._similarity == "collaborative":
                assert self.collaborator is not None
                vectors = self.collaborator.model.item_vectors().detach()
            assert vectors is not None
            mined = mine_hard_negatives(vectors.cpu(), *_histories(self._split), self._hard_negatives)
            self.hard = mined.to(self.item_tokens.device)
            without = int((self.hard[1:] == 0).all(dim=1).sum())
            getLogger().info(f"Hard samples: {without} of {self.n_items - 1} items have none")
        return self.hard

    def predict(self, interaction: Any) -> Tensor:
        h = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return (h * self.item_vectors()[interaction[self.ITEM_ID]]).sum(dim=1)


def hard_contrast(h: Tensor, targets: Tensor, items: Tensor, negatives: Tensor, tau: float) -> Tensor:
    """InfoNCE of user vectors h [N, H] against the `items` [V, H] of their targets [N] and of these targets' hard
    `negatives` [V, K], 0: none.

    `-log exp(h v_t / tau) / (exp(h v_t / tau) + sum_n exp(h v_n / tau))`, mean over the rows that have a negative.
    """
    others = negatives[targets]  # [N, K]
    rows = (others > 0).any(dim=1)
    if not rows.any():
        return h.sum() * 0
    h, others, targets = h[rows], others[rows], targets[rows]
    candidates = torch.cat([targets[:, None], others], dim=1)  # [n, 1 + K]
    logits = torch.einsum("nh,nkh->nk", h, F.embedding(candidates, items)) / tau
    logits = logits.masked_fill(candidates == 0, float("-inf"))
    return F.cross_entropy(logits, torch.zeros_like(targets))


def mine_hard_negatives(vectors: Tensor, items: np.ndarray, offsets: np.ndarray, count: int) -> Tensor:
    """For each item the `count` most similar (cosine) of those that stand in no history together with it.

    Args:
        vectors: [V, D].
        items: of all training histories; history u is `items[offsets[u]:offsets[u + 1]]`.
        offsets: int64 [U + 1].
        count: K.

    Returns:
        int64 [V, K], 0 where there are fewer; row 0 is empty.
    """
    n_items, n_users = len(vectors), len(offsets) - 1
    owner = np.repeat(np.arange(n_users), np.diff(offsets))
    had = sp.csr_matrix((np.ones(len(items), dtype=np.float32), (owner, items)), shape=(n_users, n_items))
    unit = F.normalize(vectors.float(), dim=1)
    found = torch.zeros(n_items, count, dtype=torch.int64)
    transposed = had.T.tocsr()
    for start in range(0, n_items, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n_items))
        together = (transposed[rows] @ had).toarray() > 0  # [b, V]
        together[:, 0] = True
        together[np.arange(len(rows)), rows] = True
        cosine = unit[rows] @ unit.T
        cosine[torch.from_numpy(together)] = -torch.inf
        best, similar = cosine.topk(min(count, n_items), dim=1)
        found[rows, : similar.shape[1]] = torch.where(best > -torch.inf, similar, 0)
    found[0] = 0
    return found


def _histories(split: Any) -> tuple[np.ndarray, np.ndarray]:
    """Items and offsets of the training histories, without regenerated rows."""
    split = split if split.original is None else split.original
    users, positions, _ = split.windows()
    return split.store.until(users, positions)


def _inside(item_seq: Tensor, counts: Tensor) -> Tensor:
    """Where rows [B, L] have items, of which there are `counts` [B]: bool [B, L]."""
    return torch.arange(item_seq.shape[1], device=item_seq.device) < counts[:, None]
