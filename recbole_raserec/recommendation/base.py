"""What this package's models that score by user vector times item vector share: batches, the softmax over all items."""

from __future__ import annotations

from typing import Any, Optional

import torch

from recbole_raserec.data import PACKED_TARGETS, WEIGHT
from recbole_raserec.kernels import linear_cross_entropy, use_fast_dropout


class SoftmaxOverItems:
    """Goes in front of a RecBole sequential model with ``forward(item_seq, item_seq_len)`` and ``item_embedding``.

    The loss is RecBole's, from either kind of batch (windows with one target each, or packed) and with weighted rows;
    the [B, V] scores behind it are never held. The model may also have ``encode_positions(item_seq)``, which serves
    ``training: packed``. Options: `loss_type`, `softmax_precision`.
    """

    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    POS_ITEM_ID: str
    loss_type: str
    forward: Any
    encode_positions: Any
    item_embedding: Any
    softmax_precision = "auto"

    def __init__(self, config: Any, dataset: Any):
        super().__init__(config, dataset)  # type: ignore[call-arg]
        use_fast_dropout(self)  # type: ignore[arg-type]
        self.softmax_precision = config["softmax_precision"] or "auto"

    def item_vectors(self) -> torch.Tensor:
        """Item table as it enters the dot product, [V, H]."""
        return self.item_embedding.weight

    def full_sort_vectors(self, interaction: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        """What ``full_sort_predict`` multiplies: user vectors [B, H], item vectors [V, H], no bias."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), self.item_vectors(), None

    def calculate_loss(self, interaction: Any) -> torch.Tensor:
        """The loss of a training batch, a scalar: by `loss_type` cross-entropy over all items, or BPR (RecBole's)."""
        if self.loss_type != "CE":
            return super().calculate_loss(interaction)  # type: ignore[misc]
        return self.weighted_loss(*self.encode_batch(interaction), row_weights(interaction))

    def weighted_loss(self, h: torch.Tensor, targets: torch.Tensor, weights: Optional[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of user vectors [N, H] over all items, times `weights` [N] (None: 1), as a mean over the rows.

        Not over the sum of the batch's weights: batches hold windows of like length, and a factor that all short ones
        share would be lost.
        """
        loss = linear_cross_entropy(h, self.item_vectors(), targets, weights, self.softmax_precision)
        return loss if weights is None else loss * (weights.sum() / max(len(h), 1))

    def encode_batch(self, interaction: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """User vectors [N, H] and target items [N] of a training batch: N rows of windows, or, packed, all targets."""
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if PACKED_TARGETS not in interaction.columns:
            return self.forward(item_seq, lengths), interaction[self.POS_ITEM_ID]
        targets = interaction[PACKED_TARGETS]  # [U, L]
        predicted = targets > 0
        return self.encode_predicted(item_seq, lengths, predicted), targets[predicted]

    def encode_predicted(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        """User vectors [N, H] at the N places of `predicted`, bool [U, L], in one pass over the rows [U, L]."""
        return self.encode_positions(item_seq)[predicted]


def row_weights(interaction: Any) -> Optional[torch.Tensor]:
    """Weights of the rows that `encode_batch` gives for this batch, [N]; None where the data have none."""
    if WEIGHT not in interaction.columns:
        return None
    weights = interaction[WEIGHT]
    return weights[interaction[PACKED_TARGETS] > 0] if PACKED_TARGETS in interaction.columns else weights
