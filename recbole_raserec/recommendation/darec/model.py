"""DARec (arXiv 2408.07427): a frozen language model with adapters reads items as text, beside what users did."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from logging import getLogger
from typing import Any, Literal, Optional

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_raserec.config import (
    Config,
    Count,
    Dropout,
    Natural,
    Options,
    Positive,
    Precision,
    Sizes,
    Text,
    Weight,
    option,
)
from recbole_raserec.data import PACKED_TARGETS, computes_in_bfloat16, item_features, item_tokens, model_source
from recbole_raserec.errors import ConfigError
from recbole_raserec.kernels import linear_cross_entropy
from recbole_raserec.recommendation.darec.language_model import (
    AttentionView,
    LanguageModel,
    TokenLayout,
    load_pretrained,
    load_tokenizer,
)
from recbole_raserec.recommendation.item_table import ItemTable
from recbole_raserec.recommendation.sasrec import SASRec, SASRecOptions


class LanguageOptions(Options):
    """The language model (`item_text_encoder`) and what it reads"""

    llm_precision: Precision = option(
        "auto", "of its products: float32, bfloat16, or auto: bfloat16 where the hardware multiplies in it", heading=""
    )
    item_text_length: Count = option(32, "tokens of an item's text that the adapted language model reads, at most")
    text_items: Natural = option(
        0, "items of a training step whose text is read again through the adapters; the others as last read; 0: none"
    )
    adapter_sizes: Sizes = option(
        32, "inner sizes of the adapters: one for all; or for each layer a number, or a pair (after attention, after "
        "feed-forward); 0: none",
    )  # fmt: skip
    adapter_dropout: Dropout = option(0, "in [0, 1)")
    adapter_learning_rate: Positive = option(0.0003, "Adam, of the adapters")
    history: Literal["off", "items", "tokens"] = option(
        "off", "what the language model reads of a history, beside the transformer: off: nothing; items: the items' "
        "vectors; tokens: their texts",
    )  # fmt: skip
    context_mask: Literal["off", "dual"] = option(
        "off", "of a history: off; dual: the average of the usual view and one in which an item's tokens see their own "
        "item's alone",
    )  # fmt: skip
    token_budget: Count = option(4096, "tokens of a batch of histories, at most (but one history at least)")
    align_weight: Weight = option(
        0, "an item's text -> its id", heading="The tasks beside the next item, which has weight 1"
    )
    hard_weight: Weight = option(0, "contrast with items of like text that no user had together with the target")
    hard_negatives: Count = option(10, "of them, for each item at most")
    hard_tau: Positive = option(1.0, "temperature of the contrast, > 0")


class DARecOptions(LanguageOptions, SASRecOptions):
    """DARec (arXiv 2408.07427): a frozen language model with adapters reads the items as text. docs/darec.md says what
    is the paper's and what is this package's choice."""

    hidden_size: Count = option(128, "length of an item's and a user's vector")
    inner_size: Count = option(512, "inner size of the feed-forward layers")
    hidden_dropout_prob: Dropout = option(0.3, "dropout of the hidden states, in [0, 1)")
    attn_dropout_prob: Dropout = option(0.3, "dropout of the attention weights, in [0, 1)")
    initializer_range: Positive = option(0.005, "standard deviation of the initial weights")
    item_vectors: Literal["text", "both"] = option(
        "both", "text: a trained map of its text's vector, and embeddings of its attributes; both: beside a trained "
        "vector for each item", heading="What an item's vector is made of",
    )  # fmt: skip
    item_text_size: Count = option(256, "principal components of the texts' vectors")
    item_text_encoder: Optional[Text] = option(
        None, "directory or hub name of an encoder or causal decoder; null: the MiniLM of the extra llm"
    )
    loss_type: Literal["CE"] = option("CE", "softmax over all items")
    weight_averaging: Dropout = option(
        0.999, "moving average of the weights that is validated and kept; 0: the last ones"
    )
    stopping_step: Natural = option(5, "stop after more than that many evaluations without a better valid_metric")
    training: Literal["packed"] = option("packed", "all targets of a sequence in one pass")


BLOCK = 512  # items compared with all others at a time


class DARec(SASRec):
    """Items are their own vectors plus a trained map of what an adapted language model reads in their texts; user
    vectors are SASRec's over these, plus a trained map of the language model's states after the history.

    From the paper's public description: items as text, two adapters in each frozen layer, an item projection, [SEQ],
    the three tasks, context masking. Ours are the forms these take here, docs/darec.md.

    In the place of collaborative vectors in the attention the model is a collaborative one with residuals: it starts as
    a SASRec with whitened vectors of the texts (`ItemTable`), of which the adapters, at zero, change nothing. In a
    training step the texts of `text_items` items are read with gradient; the item table keeps what was last read of
    each, and that is what is evaluated and saved.

    Raises:
        MissingExtraError: `transformers` or the default language model is not installed.
        ConfigError: options and language model do not fit.
    """

    options = DARecOptions
    trims = True
    reads_files = True  # the language model's, which are not in a checkpoint

    item_tokens: Tensor
    item_lengths: Tensor
    text_mean: Tensor
    text_projection: Tensor
    hard: Tensor
    item_embedding: ItemTable

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)
        if not isinstance(self.item_embedding, ItemTable):
            raise ConfigError(
                ["model: this DARec is of version 0.1.0, which read items in another way; train it again"]
            )
        model, tokenizer = load_pretrained(config["item_text_encoder"])
        self.history, self.context_mask = config["history"], config["context_mask"]
        self.token_budget, self.text_items = config["token_budget"], config["text_items"]
        self.align_weight, self.hard_weight = config["align_weight"], config["hard_weight"]
        self.hard_tau, self._hard_negatives = config["hard_tau"], config["hard_negatives"]
        self.longest, self._rate = int(config["MAX_ITEM_LIST_LENGTH"]), config["adapter_learning_rate"]
        #: one pass gives the states of all prefixes, and many would be expensive: retrieval encodes a split that way
        self.shares_prefixes = self.history != "off"
        std = config["initializer_range"]
        self.language = LanguageModel(model, config["adapter_sizes"], config["adapter_dropout"], std)
        self.language.autocast = computes_in_bfloat16(config["llm_precision"], config["device"])
        # with its texts a checkpoint is whole; without a data set there are none yet
        ids, lengths = np.zeros((self.n_items, config["item_text_length"]), np.int32), np.zeros(self.n_items, np.int32)
        if hasattr(dataset, "field2id_token"):
            ids, lengths = item_tokens(config, dataset, tokenizer)
        self.register_buffer("item_tokens", torch.from_numpy(ids))
        self.register_buffer("item_lengths", torch.from_numpy(lengths))
        features = item_features(config, dataset)
        self.register_buffer("text_mean", torch.tensor(features.mean))
        self.register_buffer("text_projection", torch.tensor(features.projection))
        if self.history != "off":
            size = self.language.hidden_size
            words = self.language.embed(torch.arange(model.config.vocab_size))  # [W, D]
            self.scale = float(words.norm(dim=1).mean())
            self.seq = nn.Parameter(words.mean(dim=0) + torch.randn(size) * words.std())  # a word of no meaning
            self.item_position = nn.Embedding(self.longest, size)
            self.head = nn.Linear(size, self.hidden_size)
            nn.init.zeros_(self.item_position.weight)
            nn.init.normal_(self.head.weight, std=std)
            nn.init.zeros_(self.head.bias)
            if self.history == "items":
                self.item_input = nn.Linear(self.hidden_size, size)
            if self.context_mask == "dual":
                self.mix = nn.Parameter(torch.tensor(0.5))
        self._reads = bool(self.text_items and len(self.language.adapters) and lengths.any())
        self._split: Any = dataset if hasattr(dataset, "windows") else None
        self._texts = torch.tensor(features.text if self.hard_weight else np.zeros((0, 1), np.float32))
        self.register_buffer("hard", torch.zeros(0, 1, dtype=torch.int64), persistent=False)

    @staticmethod
    def check_installed(config: Config | Mapping[str, Any]) -> None:
        """Called before any data is read.

        Raises:
            MissingExtraError: what the model reads is not installed.
            ConfigError: `item_text_encoder` is `tfidf`.
        """
        if config["item_text_encoder"] == "tfidf":
            raise ConfigError(["item_text_encoder: tfidf is no language model, which DARec needs; name one, or null"])
        model_source(config["item_text_encoder"])

    @staticmethod
    def token_costs(config: Config | Mapping[str, Any], dataset: Any) -> Optional[np.ndarray]:
        """Tokens of each item in a history, its [SEQ] included: int64 [V]; the loader bounds a batch's by it."""
        if config["history"] == "off":
            return None
        if config["history"] == "items":
            return np.full(dataset.item_num, 2)
        return item_tokens(config, dataset, load_tokenizer(config["item_text_encoder"]))[1].astype(np.int64) + 1

    def learning_rates(self) -> dict[nn.Parameter, float]:
        """Those that are not the option `learning_rate`."""
        return dict.fromkeys(self.language.adapters.parameters(), self._rate)

    def fingerprint_parts(self) -> list[str]:
        digest = hashlib.sha256()
        for part in (self.item_tokens, self.item_lengths, self.language.frozen.mark):
            digest.update(part.cpu().numpy().tobytes())
        return [*super().fingerprint_parts(), digest.hexdigest()]

    def add_items(self, text: Tensor, numbers: Tensor) -> None:
        super().add_items(text, numbers)
        self.item_tokens = F.pad(self.item_tokens, (0, 0, 0, len(text)))  # `history: tokens` reads their [SEQ] alone
        self.item_lengths = F.pad(self.item_lengths, (0, len(text)))

    # Items: their texts, read one by one

    def read_texts(self, numbers: Tensor) -> Tensor:
        """Whitened means [n, S] of the language model's states over the texts of items [n], all of which have one.

        While the adapters are at zero these are the item table's vectors, but for words beyond `item_text_length`.
        """
        lengths = self.item_lengths[numbers].long()
        layout = TokenLayout.of_texts(lengths)
        ids = self.item_tokens[numbers[layout.row], layout.position].long()
        view = AttentionView(layout, layout.visible(self.language.causal))
        states = self.language(self.language.embed(ids), view)  # [N, D]
        total = states.new_zeros(len(numbers), states.shape[1]).index_add(0, layout.row, states)
        return (total / lengths[:, None] - self.text_mean) @ self.text_projection

    def read_some(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Read the texts of `text_items` items again, with gradient, and put them into the item table.

        Half of them are of the batch, half of all, so that rare ones are read too: numbers [n], texts [n, S].
        """
        here, half = torch.unique(items), self.text_items // 2
        some = here[torch.randperm(len(here), device=items.device)[: self.text_items - half]]
        numbers = torch.unique(torch.cat([some, torch.randint(1, self.n_items, (half,), device=items.device)]))
        numbers = numbers[self.item_lengths[numbers] > 0]
        texts = self.read_texts(numbers) if len(numbers) else self.item_embedding.text[numbers]
        self.item_embedding.replace(numbers, texts)
        return numbers, texts

    # Histories

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        h = super().forward(item_seq, item_seq_len)
        if self.history == "off":
            return h
        return h + self.read_histories(item_seq, item_seq_len)[torch.arange(len(h), device=h.device), item_seq_len - 1]

    def encode_positions(self, item_seq: Tensor) -> Tensor:
        h = super().encode_positions(item_seq)
        return h if self.history == "off" else h + self.read_histories(item_seq, (item_seq > 0).sum(dim=1))

    def encode_predicted(self, item_seq: Tensor, item_seq_len: Tensor, predicted: Tensor) -> Tensor:
        h = super().encode_predicted(item_seq, item_seq_len, predicted)
        if self.history == "off" or not self.compiled():  # otherwise through `encode_positions`
            return h
        return h + self.read_histories(item_seq, item_seq_len)[predicted]

    def read_histories(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """What the language model adds to the user vectors after each item of the rows: [B, L] -> [B, L, H].

        Zeros behind the last item. Without gradients at most `token_budget` tokens are in memory at a time.
        """
        if torch.is_grad_enabled():
            return self._read_rows(item_seq, item_seq_len)
        h = self.head.weight.new_zeros(*item_seq.shape, self.hidden_size)
        order = torch.argsort(item_seq_len, stable=True)
        for rows in self._blocks(item_seq[order], item_seq_len[order]):
            part = order[rows]
            width = int(item_seq_len[part].max())
            h[part, :width] = self._read_rows(item_seq[part, :width], item_seq_len[part])
        return h

    def costs(self) -> Tensor:
        """As `token_costs`, of the texts that the model holds."""
        return (
            self.item_lengths.long() + 1 if self.history == "tokens" else torch.full_like(self.item_lengths, 2).long()
        )

    def _blocks(self, item_seq: Tensor, counts: Tensor) -> list[Tensor]:
        """Rows of histories in parts of at most `token_budget` tokens, one history at least."""
        costs = self.costs()[item_seq] * _inside(item_seq, counts)
        parts, start, total = [], 0, 0
        for row, cost in enumerate(costs.sum(dim=1).tolist()):
            if row > start and total + cost > self.token_budget:
                parts.append(torch.arange(start, row, device=item_seq.device))
                start, total = row, 0
            total += cost
        return [*parts, torch.arange(start, len(item_seq), device=item_seq.device)] if len(item_seq) else []

    def _read_rows(self, item_seq: Tensor, counts: Tensor) -> Tensor:
        by_items = self.history == "items"
        inside = _inside(item_seq, counts)  # [B, L]
        items = item_seq[inside]  # [M]
        lengths = torch.ones_like(items) if by_items else self.item_lengths[items].long()
        layout = TokenLayout.of_histories(counts, lengths)
        entry = torch.repeat_interleave(lengths + 1)  # [N]
        if by_items:
            embedded = F.normalize(self.item_input(self.item_embedding(items)), dim=1)[entry] * self.scale
        else:
            column = layout.position.clamp(max=self.item_tokens.shape[1] - 1)
            embedded = self.language.embed(self.item_tokens[items[entry], column].long())
        inputs = torch.where(layout.special[:, None], self.seq, embedded)
        inputs = inputs + self.item_position(layout.item.clamp(max=self.longest - 1))
        h = self.head(self.dropout(self._states(inputs, layout)[layout.special]))  # [M, H]
        return h.new_zeros(*item_seq.shape, h.shape[1]).index_put(inside.nonzero(as_tuple=True), h)

    def _states(self, inputs: Tensor, layout: TokenLayout) -> Tensor:
        """States [N, D] under the view, or the two views, of `context_mask`."""
        causal = self.language.causal
        states = self.language(inputs, AttentionView(layout, layout.visible(causal)))
        if self.context_mask == "off":
            return states
        own = self.language(inputs, AttentionView(layout, layout.visible(causal, own_item=True)))
        return states + self.mix * (own - states)

    # The three tasks

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Link next item + `align_weight` x alignment + `hard_weight` x hard samples, each a mean over its rows."""
        item_seq, targets = interaction[self.ITEM_SEQ], interaction[PACKED_TARGETS]  # [U, L]
        if self._reads:
            numbers, texts = self.read_some(torch.cat([item_seq[item_seq > 0], targets[targets > 0]]))
        loss = super().calculate_loss(interaction)
        if self._reads and self.align_weight:
            aligned = self.item_embedding.text_map(texts)
            align = linear_cross_entropy(aligned, self.item_vectors(), numbers, precision=self.softmax_precision)
            loss = loss + self.align_weight * align
        return loss

    def weighted_loss(self, h: Tensor, targets: Tensor, weights: Optional[Tensor]) -> Tensor:
        loss = super().weighted_loss(h, targets, weights)
        if self.hard_weight:
            hard = hard_contrast(h, targets, self.item_vectors(), self._negatives(), self.hard_tau)
            loss = loss + self.hard_weight * hard
        return loss

    def _negatives(self) -> Tensor:
        """Hard negatives of each item, mined when the first batch asks for them: int64 [V, K]."""
        if not len(self.hard):
            split = self._split if self._split.original is None else self._split.original  # no regenerated rows
            users, positions, _ = split.windows()
            items, offsets = split.store.until(users, positions)
            mined = mine_hard_negatives(self._texts, items, offsets, self._hard_negatives)
            self.hard = mined.to(self.item_tokens.device)
            without = int((self.hard[1:] == 0).all(dim=1).sum())
            getLogger().info(f"Hard samples: {without} of {self.n_items - 1} items have none")
        return self.hard


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


def _inside(item_seq: Tensor, counts: Tensor) -> Tensor:
    """Where rows [B, L] have items, of which there are `counts` [B]: bool [B, L]."""
    return torch.arange(item_seq.shape[1], device=item_seq.device) < counts[:, None]
