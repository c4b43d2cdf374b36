"""BERT4Rec (arXiv 1904.06690) with RecBole's parameters and results; only masked places are scored."""

from __future__ import annotations

from typing import Any, Literal, Optional

import torch
from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec

from recbole_raserec.config import Count, Dropout, LearningOptions, PositiveShare, SequentialOptions, Share, option
from recbole_raserec.kernels import linear_cross_entropy, use_fast_dropout
from recbole_raserec.recommendation.sasrec import attention_branch, feed_forward_branch


class BERT4RecOptions(LearningOptions, SequentialOptions):
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


class BERT4Rec(RecBoleBERT4Rec):
    """RecBole's BERT4Rec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    What differs is the cost. The last layer is evaluated at the masked places alone; the places that RecBole scores and
    multiplies by 0 (it pads each window to as many as the longest may have) are left out; the softmax over items runs
    in reused buffers. A batch without a masked place that counts has the loss 0 (RecBole: not a number).

    Option beside those of RecBole's BERT4Rec: `softmax_precision`, see
    :func:`~recbole_raserec.kernels.losses.linear_cross_entropy`.
    """

    options = BERT4RecOptions
    trims = True

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)
        use_fast_dropout(self)
        self.softmax_precision = config["softmax_precision"] or "auto"

    def forward(self, item_seq: torch.Tensor) -> torch.Tensor:
        """Vectors of all places of sequences [B, L], left-aligned, padded with 0: [B, L, H]."""
        return self.encode_places(item_seq)

    def encode_places(self, item_seq: torch.Tensor, places: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Vectors at `places`, int64 [B, M], of sequences [B, L]; None: at all of them. [B, M, H]."""
        lengths = (item_seq > 0).sum(dim=1).clamp(min=1)
        positions = self.position_embedding.weight[: item_seq.shape[1]]  # [L, H]
        hidden = self.dropout(self.LayerNorm(self.item_embedding(item_seq) + positions))  # [B, L, H]
        layers = self.trm_encoder.layer
        for number, layer in enumerate(layers):
            query = hidden
            if places is not None and number == len(layers) - 1:
                query = hidden.gather(1, places.unsqueeze(2).expand(-1, -1, hidden.shape[2]))  # [B, M, H]
            hidden = feed_forward_branch(layer, attention_branch(layer, query, hidden, False, lengths))
        return self.output_ln(self.output_gelu(self.output_ffn(hidden)))

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        """Mean cross-entropy over the masked places, the first of a window never counted (RecBole), or its BPR."""
        places = interaction[self.MASK_INDEX]  # [B, M], 0: none
        counted = places > 0
        if not counted.any():
            return self.output_bias.sum() * 0
        if self.loss_type != "CE":
            return super().calculate_loss(interaction)
        h = self.encode_places(interaction[self.MASK_ITEM_SEQ], places)[counted]  # [N, H]
        items, bias = self.item_embedding.weight[: self.n_items], self.output_bias
        # The bias as two more dimensions of the item vectors, so that it keeps 16 bits where products are in bfloat16.
        rest = (bias - bias.bfloat16()).detach()
        table = torch.cat([items, (bias - rest).unsqueeze(1), rest.unsqueeze(1)], dim=1)
        ones = h.new_ones(len(h), 2)
        targets = interaction[self.POS_ITEMS][counted]
        return linear_cross_entropy(torch.cat([h, ones], dim=1), table, targets, precision=self.softmax_precision)

    def full_sort_vectors(self, interaction: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What ``full_sort_predict`` multiplies and adds: vectors of users [B, H] and items [V, H], item bias [V]."""
        lengths = interaction[self.ITEM_SEQ_LEN]
        item_seq = self.reconstruct_test_data(interaction[self.ITEM_SEQ], lengths)
        h = self.encode_places(item_seq, (lengths - 1).unsqueeze(1)).squeeze(1)
        return h, self.item_embedding.weight[: self.n_items], self.output_bias

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """Scores of all items, [B, V]."""
        h, items, bias = self.full_sort_vectors(interaction)
        return h @ items.t() + bias

    def reconstruct_test_data(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Sequences [B, L] without their first item and with the mask behind their last, as RecBole ranks from them."""
        longer = torch.nn.functional.pad(item_seq, (0, 1))
        return longer.scatter(1, item_seq_len.unsqueeze(1), self.mask_token)[:, 1:]
