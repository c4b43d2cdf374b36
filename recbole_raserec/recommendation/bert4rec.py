"""BERT4Rec (arXiv 1904.06690) with RecBole's parameters and results; only masked positions are scored."""

from __future__ import annotations

from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec
from torch import Tensor, nn

from recbole_raserec.config import Count, Dropout, LearningOptions, PositiveShare, SequentialOptions, Share, option
from recbole_raserec.kernels import linear_cross_entropy
from recbole_raserec.recommendation.base import DotProduct
from recbole_raserec.recommendation.item_table import ItemOptions
from recbole_raserec.recommendation.sasrec import attention_branch, feed_forward_branch


class BERT4RecOptions(ItemOptions, LearningOptions, SequentialOptions):
    """BERT4Rec (arXiv 1904.06690), with RecBole's sizes."""

    hidden_dropout_prob: Dropout = option(0.2, "dropout of the hidden states, in [0, 1)")
    attn_dropout_prob: Dropout = option(0.2, "dropout of the attention weights, in [0, 1)")
    loss_type: Literal["CE", "BPR"] = option(
        "CE", "CE (softmax over all items) or BPR (one sampled negative for each masked item)"
    )
    mask_ratio: PositiveShare = option(0.2, "share of a window's items that are masked")
    ft_ratio: Share = option(0.5, "share of the batches in which the last item alone is masked, as when ranking")
    transform: Literal["mask_itemseq"] = option("mask_itemseq", "RecBole's name of the masking")
    train_batch_size: Count = option(512, "windows in a batch, on average")


class BERT4Rec(DotProduct, RecBoleBERT4Rec):
    """RecBole's BERT4Rec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    What differs is the cost. The last layer is evaluated at the masked positions alone; the positions that RecBole
    scores and multiplies by 0 (it pads each window to as many as the longest may have) are left out; the softmax over
    items runs in reused buffers. A batch without a masked position that counts has the loss 0 (RecBole: not a number).
    """

    options = BERT4RecOptions
    trims = True
    output_bias: Any

    def forward(self, item_seq: Tensor) -> Tensor:
        """States of all positions of sequences [B, L], left-aligned, padded with 0: [B, L, H]."""
        return self._encode(item_seq)

    def _encode(self, item_seq: Tensor, positions: Optional[Tensor] = None) -> Tensor:
        """States at `positions`, int64 [B, M], of sequences [B, L]; None: at all of them. [B, M, H]."""
        lengths = (item_seq > 0).sum(dim=1).clamp(min=1)
        hidden = self.item_embedding(item_seq) + self.position_embedding.weight[: item_seq.shape[1]]
        hidden = self.dropout(self.LayerNorm(hidden))  # [B, L, H]
        layers = self.trm_encoder.layer
        for number, layer in enumerate(layers):
            query = hidden
            if positions is not None and number == len(layers) - 1:
                query = hidden.gather(1, positions.unsqueeze(2).expand(-1, -1, hidden.shape[2]))  # [B, M, H]
            hidden = feed_forward_branch(layer, attention_branch(layer, query, hidden, lengths))
        return self.output_ln(self.output_gelu(self.output_ffn(hidden)))

    def item_vectors(self) -> Tensor:
        """Item table without the row of the mask, [V, H]."""
        return self.item_embedding.weight[: self.n_items]

    def add_items(self, text: Tensor, numbers: Tensor) -> None:
        super().add_items(text, numbers)
        bias = self.output_bias.detach()
        self.output_bias = nn.Parameter(torch.cat([bias, bias.mean().expand(len(text))]))
        self.mask_token = self.n_items

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean cross-entropy over the masked positions, the first of a window never counted (RecBole), or its BPR."""
        masked = interaction[self.MASK_INDEX]  # [B, M], 0: none
        counted = masked > 0
        if not counted.any():
            return self.output_bias.sum() * 0
        if self.loss_type != "CE":
            return super().calculate_loss(interaction)
        h = self._encode(interaction[self.MASK_ITEM_SEQ], masked)[counted]  # [N, H]
        # The bias as two more dimensions of the item vectors, so that it keeps 16 bits where products are in bfloat16.
        rest = (self.output_bias - self.output_bias.bfloat16()).detach()
        table = torch.cat([self.item_vectors(), (self.output_bias - rest).unsqueeze(1), rest.unsqueeze(1)], dim=1)
        h, targets = torch.cat([h, h.new_ones(len(h), 2)], dim=1), interaction[self.POS_ITEMS][counted]
        return linear_cross_entropy(h, table, targets, precision=self.softmax_precision)

    def full_sort_vectors(self, interaction: Any) -> tuple[Tensor, Tensor, Tensor]:
        """User vectors [B, H], item vectors [V, H] and item bias [V], of which the scores are made."""
        lengths = interaction[self.ITEM_SEQ_LEN]
        item_seq = self.reconstruct_test_data(interaction[self.ITEM_SEQ], lengths)
        return self._encode(item_seq, (lengths - 1).unsqueeze(1)).squeeze(1), self.item_vectors(), self.output_bias

    def reconstruct_test_data(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Sequences [B, L] without their first item and with the mask behind their last, as RecBole ranks from them."""
        return F.pad(item_seq, (0, 1)).scatter(1, item_seq_len.unsqueeze(1), self.mask_token)[:, 1:]
