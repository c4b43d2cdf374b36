"""GRU4Rec (Tan, Xu and Liu, DLRS 2016) with RecBole's parameters and results, in both forms of training."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.gru4rec import GRU4Rec as RecBoleGRU4Rec

from recbole_raserec.config import Count, Dropout, EncoderOptions, Loss, option
from recbole_raserec.recommendation.base import SoftmaxOverItems


class GRU4RecOptions(EncoderOptions):
    """GRU4Rec (Tan, Xu and Liu, DLRS 2016), with RecBole's sizes."""

    embedding_size: Count = option(64, "length of an item's and a user's vector")
    hidden_size: Count = option(128, "length of the recurrent state")
    num_layers: Count = option(1, "recurrent layers")
    dropout_prob: Dropout = option(0.3, "dropout of the items' vectors, in [0, 1)")
    loss_type: Loss = "CE"


class GRU4Rec(SoftmaxOverItems, RecBoleGRU4Rec):
    """RecBole's GRU4Rec: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    Batches may be trimmed to their longest row, only the states that are scored go through the output layer, and the
    softmax over items runs in reused buffers. A recurrent state knows nothing later than its item, so that one pass
    over a history gives the user vectors after all its prefixes (``training: packed``).

    Options beside those of RecBole's GRU4Rec: `training`, `packed_copies` and `softmax_precision`, see
    :class:`~recbole_raserec.recommendation.sasrec.SASRec`.
    """

    options = GRU4RecOptions
    trims = True

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """User vectors [B, E] of histories [B, L], left-aligned, padded with 0, of lengths [B]."""
        return self.dense(self.gather_indexes(self._states(item_seq), item_seq_len - 1))

    def encode_positions(self, item_seq: torch.Tensor) -> torch.Tensor:
        """User vector after every prefix of each row in one pass: [B, L] -> [B, L, E]."""
        return self.dense(self._states(item_seq))

    def encode_predicted(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        return self.dense(self._states(item_seq)[predicted])

    def _states(self, item_seq: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru_layers(self.emb_dropout(self.item_embedding(item_seq)))  # [B, L, H]
        return states
