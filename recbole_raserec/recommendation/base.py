"""What this package's models share: user vectors times item vectors as scores, a softmax over all items as loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

from recbole_raserec.config import Config
from recbole_raserec.data import PACKED_TARGETS, WEIGHT
from recbole_raserec.evaluation import scores
from recbole_raserec.kernels import linear_cross_entropy, use_fast_dropout


class DotProduct:
    """Goes in front of a RecBole sequential model with `forward(item_seq, item_seq_len)` and `item_embedding`.

    Option: `softmax_precision`, of the loss, see `recbole_raserec.kernels.linear_cross_entropy`.
    """

    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    forward: Any
    item_embedding: Any
    softmax_precision: str

    def __init__(self, config: Config | Mapping[str, Any], dataset: Any):
        super().__init__(config, dataset)  # type: ignore[call-arg]
        use_fast_dropout(self)  # type: ignore[arg-type]
        self.softmax_precision = config["softmax_precision"] or "auto"

    def item_vectors(self) -> Tensor:
        """Item table as it enters the dot product, [V, H]."""
        return self.item_embedding.weight

    def full_sort_vectors(self, interaction: Any) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        """User vectors [B, H], item vectors [V, H] and item bias [V] or None, of which the scores are made."""
        return self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]), self.item_vectors(), None

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of all items, [B, V]."""
        return scores(*self.full_sort_vectors(interaction))


class SoftmaxOverItems(DotProduct):
    """A `DotProduct` model trained by next items: windows with one target each, or packed rows with many.

    The loss is RecBole's, also with weighted rows; the [B, V] scores behind it are never held. A model that also has
    `encode_positions(item_seq)` can be trained with `training: packed`. Option: `loss_type`.
    """

    POS_ITEM_ID: str
    loss_type: str
    encode_positions: Any

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The loss of a training batch, a scalar: by `loss_type` cross-entropy over all items, or BPR (RecBole's)."""
        if self.loss_type != "CE":
            return super().calculate_loss(interaction)  # type: ignore[misc]
        return self.weighted_loss(*self.encode_batch(interaction), row_weights(interaction))

    def weighted_loss(self, h: Tensor, targets: Tensor, weights: Optional[Tensor]) -> Tensor:
        """Cross-entropy over all items times `weights`, as a mean over the rows.

        Not over the sum of the weights: batches hold windows of like length, and a factor that all short ones share
        would be lost. User vectors h are [N, H], targets int64 [N], weights [N], or None: 1.
        """
        loss = linear_cross_entropy(h, self.item_vectors(), targets, weights, self.softmax_precision)
        return loss if weights is None else loss * (weights.sum() / max(len(h), 1))

    def encode_batch(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """User vectors [N, H] and target items [N] of a training batch: N windows, or all targets of packed rows."""
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        if PACKED_TARGETS not in interaction.columns:
            return self.forward(item_seq, lengths), interaction[self.POS_ITEM_ID]
        targets = interaction[PACKED_TARGETS]  # [U, L]
        predicted = targets > 0
        return self.encode_predicted(item_seq, lengths, predicted), targets[predicted]

    def encode_predicted(self, item_seq: Tensor, item_seq_len: Tensor, predicted: Tensor) -> Tensor:
        """User vectors [N, H] at the N positions of `predicted`, bool [U, L], in one pass over the rows [U, L]."""
        return self.encode_positions(item_seq)[predicted]


def row_weights(interaction: Any) -> Optional[Tensor]:
    """Weights of the rows that `encode_batch` gives for this batch, [N]; None where the data have none."""
    if WEIGHT not in interaction.columns:
        return None
    weights = interaction[WEIGHT]
    return weights[interaction[PACKED_TARGETS] > 0] if PACKED_TARGETS in interaction.columns else weights
