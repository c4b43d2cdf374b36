"""SASRec (arXiv 1808.09781) with RecBole's parameters and results, computed without the work that nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from torch import Tensor

from recbole_raserec.config import Config, EncoderOptions, Loss, SequentialOptions
from recbole_raserec.kernels import Architecture, Ragged, encode
from recbole_raserec.recommendation.base import SoftmaxOverItems


class SASRecOptions(EncoderOptions, SequentialOptions):
    """SASRec (arXiv 1808.09781), with the sizes the RaSeRec and DuoRec papers use for it."""

    loss_type: Loss = "CE"


class SASRec(SoftmaxOverItems, RecBoleSASRec):
    """RecBole's SASRec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    What differs is the cost. Batches may be trimmed to their longest row; the last layer is evaluated at the last
    position alone, the only one that reaches the loss; the softmax over items runs in reused buffers. On a CPU for
    which the compiled kernels were built sequences are encoded without padding.
    """

    options = SASRecOptions

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)
        sizes = self.hidden_size, self.inner_size, self.n_heads, self.n_layers
        self._architecture = Architecture(*sizes, float(self.layer_norm_eps))
        wanted = config["native_kernels"] is not False
        self._compiled = wanted and self.hidden_act == "gelu" and self._architecture.fits()

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """User vectors h [B, H] of histories [B, L], left-aligned, padded with 0, of lengths [B]."""
        if self.compiled():
            return self._encode(Ragged.of_rows(item_seq, item_seq_len))
        return self._run_layers(item_seq, item_seq_len, at_last=True)

    def encode_positions(self, item_seq: Tensor) -> Tensor:
        """User vector after every prefix of each row in one causal pass: [B, L] -> [B, L, H]."""
        return self._run_layers(item_seq, (item_seq > 0).sum(dim=1), at_last=False)

    def encode_predicted(self, item_seq: Tensor, item_seq_len: Tensor, predicted: Tensor) -> Tensor:
        if self.compiled():
            return self._encode(Ragged.of_rows(item_seq, item_seq_len, predicted))
        return super().encode_predicted(item_seq, item_seq_len, predicted)

    def compiled(self) -> bool:
        """Whether the compiled kernels encode: they are there, and the weights are float32 on a CPU."""
        table = self.item_embedding.weight
        return self._compiled and table.device.type == "cpu" and table.dtype == torch.float32

    def _encode(self, ragged: Ragged) -> Tensor:
        """Outputs of the compiled encoder at the chosen positions, [N, H]."""
        weights: list[Tensor] = []
        for layer in self.trm_encoder.layer:
            a, f = layer.multi_head_attention, layer.feed_forward
            for part in (a.query, a.key, a.value, a.dense, a.LayerNorm, f.dense_1, f.dense_2, f.LayerNorm):
                weights += [part.weight, part.bias]
        weights += [self.LayerNorm.weight, self.LayerNorm.bias]
        dropout = (self.hidden_dropout_prob, self.attn_dropout_prob) if self.training else (0.0, 0.0)
        table, positions = self.item_embedding.weight, self.position_embedding.weight
        return encode(ragged, self._architecture, table, positions, weights, *dropout)

    def _run_layers(self, item_seq: Tensor, item_seq_len: Tensor, at_last: bool) -> Tensor:
        """States of rows [B, L] at every position, [B, L, H], or at the last item of each alone, [B, H]."""
        positions = self.position_embedding.weight[: item_seq.size(1)]  # [L, H]
        hidden = self.dropout(self.LayerNorm(self.item_embedding(item_seq) + positions))  # [B, L, H]
        for number, layer in enumerate(self.trm_encoder.layer):
            query, alone = hidden, at_last and number == self.n_layers - 1
            if alone:
                query = self.gather_indexes(hidden, item_seq_len - 1).unsqueeze(1)  # [B, 1, H]
            hidden = feed_forward_branch(layer, self._mix(number, query, hidden, item_seq_len, alone))
        return hidden.squeeze(1) if at_last else hidden

    def _mix(self, number: int, query: Tensor, hidden: Tensor, item_seq_len: Tensor, alone: bool) -> Tensor:
        """First half of layer `number` for `query`: all positions, [B, L, H]; `alone`: the last items, [B, 1, H]."""
        return attention_branch(self.trm_encoder.layer[number], query, hidden, item_seq_len if alone else None)


def attention_branch(layer: Any, query: Tensor, hidden: Tensor, key_length: Optional[Tensor] = None) -> Tensor:
    """The first half of a post-norm layer, [B, Q, H]: attention, dropout, residual connection and layer norm.

    Args:
        layer: RecBole's `TransformerLayer`.
        query: [B, Q, H].
        hidden: [B, L, H], what is attended to.
        key_length: int64 [B], each row sees its first so many positions. None: position i sees those up to i (Q = L),
            so that padding on the right needs no mask.
    """
    attention, (batch, length, size) = layer.multi_head_attention, hidden.shape
    heads, head_size = attention.num_attention_heads, attention.attention_head_size

    def split(x: Tensor) -> Tensor:  # [B, T, H] -> [B, heads, T, H / heads]
        return x.view(batch, -1, heads, head_size).transpose(1, 2)

    weight = torch.cat([attention.key.weight, attention.value.weight])
    bias = torch.cat([attention.key.bias, attention.value.bias])
    keys, values = F.linear(hidden, weight, bias).split(size, dim=-1)
    if fuses_attention(hidden):
        mask = None
        if key_length is not None:
            mask = (torch.arange(length, device=hidden.device) < key_length[:, None])[:, None, None, :]
        drop = attention.attn_dropout.p if attention.training else 0.0
        q, k, v = split(attention.query(query)), split(keys), split(values)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=key_length is None)
        context = mixed.transpose(1, 2).reshape(batch, -1, size)  # [B, Q, H]
        return attention.LayerNorm(attention.out_dropout(attention.dense(context)) + query)
    q = split(attention.query(query) / attention.sqrt_attention_head_size)
    logits = q @ split(keys).transpose(2, 3)  # [B, heads, Q, L]
    if key_length is None:
        logits = logits + torch.full((length, length), float("-inf"), device=logits.device).triu(1)
    else:
        beyond = torch.arange(length, device=logits.device) >= key_length[:, None]  # [B, L]
        logits = logits.masked_fill(beyond[:, None, None, :], float("-inf"))
    weights = attention.attn_dropout(torch.softmax(logits, dim=-1))
    context = (weights @ split(values)).transpose(1, 2).reshape(batch, -1, size)  # [B, Q, H]
    return attention.LayerNorm(attention.out_dropout(attention.dense(context)) + query)


def fuses_attention(x: Tensor) -> bool:
    """Whether attention goes through torch's fused kernel: not on the CPU, where it is slower with dropout."""
    return x.device.type != "cpu"


def feed_forward_branch(layer: Any, mixed: Tensor) -> Tensor:
    """The second half of a layer: [B, Q, H] -> [B, Q, H]."""
    feed_forward = layer.feed_forward
    inner = feed_forward.dense_1(mixed)
    # RecBole spells GELU with five elementwise operations; the fused one is the same function
    exact_gelu = feed_forward.intermediate_act_fn == feed_forward.gelu
    inner = F.gelu(inner) if exact_gelu else feed_forward.intermediate_act_fn(inner)
    return feed_forward.LayerNorm(feed_forward.dropout(feed_forward.dense_2(inner)) + mixed)
