"""SASRec (arXiv 1808.09781) with RecBole's parameters and results, computed without the work nobody reads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec

from recbole_raserec.config import EncoderOptions, Loss, SequentialOptions
from recbole_raserec.kernels import Architecture, Ragged, encode
from recbole_raserec.recommendation.base import SoftmaxOverItems


class SASRecOptions(EncoderOptions, SequentialOptions):
    """SASRec (arXiv 1808.09781), with the sizes the RaSeRec and DuoRec papers use for it."""

    loss_type: Loss = "CE"


class SASRec(SoftmaxOverItems, RecBoleSASRec):
    """RecBole's SASRec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    What differs is the cost. Batches may be trimmed to their longest row; the last layer is evaluated at the last
    position alone, the only one that reaches the loss; the softmax over items runs in reused buffers. On a CPU for
    which the compiled kernels were built (see :mod:`recbole_raserec.kernels.native`) sequences are encoded without
    padding.

    Options beside those of RecBole's SASRec:

    - `training`: ``prefix`` or ``packed``, see :mod:`recbole_raserec.data.loaders`.
    - `softmax_precision`: of the loss, see :func:`~recbole_raserec.kernels.losses.linear_cross_entropy`.
    - `native_kernels`: whether to use the compiled kernels where they can be.
    """

    options = SASRecOptions

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        self._architecture = Architecture(
            self.hidden_size, self.inner_size, self.n_heads, self.n_layers, float(self.layer_norm_eps)
        )
        self._compiled = (
            config["native_kernels"] is not False and self.hidden_act == "gelu" and self._architecture.fits()
        )

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Encode histories.

        Args:
            item_seq: int64 [B, L], left-aligned, padded with 0.
            item_seq_len: int64 [B], at least 1.

        Returns:
            user vectors h, [B, H].
        """
        if self.compiled():
            return self._encode(Ragged.of_rows(item_seq, item_seq_len))
        hidden = self._embed(item_seq)  # [B, L, H]
        layers = self.trm_encoder.layer
        for layer in layers[:-1]:
            hidden = _layer(layer, hidden, hidden, causal=True)
        last = self.gather_indexes(hidden, item_seq_len - 1).unsqueeze(1)  # [B, 1, H]
        return _layer(layers[-1], last, hidden, key_length=item_seq_len).squeeze(1)

    def compiled(self) -> bool:
        """Whether the compiled kernels encode: they are there, and the weights are float32 on a CPU."""
        table = self.item_embedding.weight
        return self._compiled and table.device.type == "cpu" and table.dtype == torch.float32

    def _encode(self, ragged: Ragged) -> torch.Tensor:
        weights: list[torch.Tensor] = []
        for layer in self.trm_encoder.layer:
            a, f = layer.multi_head_attention, layer.feed_forward
            for part in (a.query, a.key, a.value, a.dense, a.LayerNorm, f.dense_1, f.dense_2, f.LayerNorm):
                weights += [part.weight, part.bias]
        weights += [self.LayerNorm.weight, self.LayerNorm.bias]
        dropout = (self.hidden_dropout_prob, self.attn_dropout_prob) if self.training else (0.0, 0.0)
        table, positions = self.item_embedding.weight, self.position_embedding.weight
        return encode(ragged, self._architecture, table, positions, weights, *dropout)

    def encode_positions(self, item_seq: torch.Tensor) -> torch.Tensor:
        """User vector after every prefix of each row in one causal pass: [B, L] -> [B, L, H]."""
        hidden = self._embed(item_seq)
        for layer in self.trm_encoder.layer:
            hidden = _layer(layer, hidden, hidden, causal=True)
        return hidden

    def _embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        positions = self.position_embedding.weight[: item_seq.size(1)]  # [L, H]
        return self.dropout(self.LayerNorm(self.item_embedding(item_seq) + positions))

    def encode_predicted(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        if self.compiled():
            return self._encode(Ragged.of_rows(item_seq, item_seq_len, predicted))
        return super().encode_predicted(item_seq, item_seq_len, predicted)


def _layer(layer: Any, query: torch.Tensor, hidden: torch.Tensor, *, causal: bool = False, key_length: Any = None):
    """One post-norm transformer layer for the positions in `query` [B, Q, H] over `hidden` [B, L, H].

    `causal`: query position i sees positions <= i (Q = L). Otherwise each row sees its first `key_length` positions.
    Right padding needs no mask under `causal`: no real position looks to its right.
    """
    return feed_forward_branch(layer, attention_branch(layer, query, hidden, causal, key_length))


def attention_branch(
    layer: Any, query: torch.Tensor, hidden: torch.Tensor, causal: bool, key_length: Any
) -> torch.Tensor:
    """Attention of `query` [B, Q, H] over `hidden` [B, L, H], dropout, residual connection and layer norm."""
    attention = layer.multi_head_attention
    context = _attend(attention, query, hidden, causal, key_length)
    return attention.LayerNorm(attention.out_dropout(attention.dense(context)) + query)


def feed_forward_branch(layer: Any, mixed: torch.Tensor) -> torch.Tensor:
    """The second half of a layer: [B, Q, H] -> [B, Q, H]."""
    feed_forward = layer.feed_forward
    inner = feed_forward.dense_1(mixed)
    # RecBole spells GELU with five elementwise operations; the fused one is the same function
    exact_gelu = feed_forward.intermediate_act_fn == feed_forward.gelu
    inner = F.gelu(inner) if exact_gelu else feed_forward.intermediate_act_fn(inner)
    return feed_forward.LayerNorm(feed_forward.dropout(feed_forward.dense_2(inner)) + mixed)


def _attend(attention: Any, query: torch.Tensor, hidden: torch.Tensor, causal: bool, key_length: Any) -> torch.Tensor:
    batch, length, size = hidden.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size

    def split(x: torch.Tensor) -> torch.Tensor:  # [B, T, H] -> [B, heads, T, H / heads]
        return x.view(batch, -1, heads, head_size).transpose(1, 2)

    weight = torch.cat([attention.key.weight, attention.value.weight])
    bias = torch.cat([attention.key.bias, attention.value.bias])
    keys, values = F.linear(hidden, weight, bias).split(size, dim=-1)
    q = split(attention.query(query) / attention.sqrt_attention_head_size)
    scores = q @ split(keys).transpose(2, 3)  # [B, heads, Q, L]
    if causal:
        scores = scores + torch.full((length, length), float("-inf"), device=scores.device).triu(1)
    elif key_length is not None:
        beyond = torch.arange(length, device=scores.device) >= key_length[:, None]  # [B, L]
        scores = scores.masked_fill(beyond[:, None, None, :], float("-inf"))
    weights = attention.attn_dropout(torch.softmax(scores, dim=-1))
    return (weights @ split(values)).transpose(1, 2).reshape(batch, -1, size)
