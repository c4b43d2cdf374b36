"""GRU4Rec (Tan, Xu and Liu, DLRS 2016) and NARM (Li et al., CIKM 2017, arXiv 1711.04725) with RecBole's results.

A recurrent state knows nothing later than its item, so that one pass over a history gives the user vectors after all
its prefixes (`training: packed`). Batches may be trimmed to their longest row, and the softmax over items runs in
reused buffers.
"""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.gru4rec import GRU4Rec as RecBoleGRU4Rec
from recbole.model.sequential_recommender.narm import NARM as RecBoleNARM
from torch import Tensor

from recbole_raserec.config import Count, Dropout, Dropouts, EncoderOptions, Loss, option
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

    Only the states that are scored go through the output layer.
    """

    options = GRU4RecOptions
    trims = True

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """User vectors [B, E] of histories [B, L], left-aligned, padded with 0, of lengths [B]."""
        return self.dense(self.gather_indexes(self._states(item_seq), item_seq_len - 1))

    def encode_positions(self, item_seq: Tensor) -> Tensor:
        """User vector after every prefix of each row in one pass: [B, L] -> [B, L, E]."""
        return self.dense(self._states(item_seq))

    def encode_predicted(self, item_seq: Tensor, item_seq_len: Tensor, predicted: Tensor) -> Tensor:
        return self.dense(self._states(item_seq)[predicted])

    def _states(self, item_seq: Tensor) -> Tensor:
        return self.gru_layers(self.emb_dropout(self.item_embedding(item_seq)))[0]  # [B, L, H]


class NARMOptions(EncoderOptions):
    """NARM (Li et al., CIKM 2017), with RecBole's sizes."""

    embedding_size: Count = option(64, "length of an item's and a user's vector")
    hidden_size: Count = option(128, "length of the recurrent state")
    n_layers: Count = option(1, "recurrent layers")
    dropout_probs: Dropouts = option(
        [0.25, 0.5], "dropout of the items' vectors, and of what the user's vector is made of, in [0, 1)"
    )
    loss_type: Loss = "CE"


class NARM(SoftmaxOverItems, RecBoleNARM):
    """RecBole's NARM: same parameters, same names, same initialisation, same scores and loss within 1e-5.

    A user vector is made of the last state of a recurrent network and of a sum of all its states, weighed by how they
    go with the last one; one pass over a history serves the attention of all its prefixes.
    """

    options = NARMOptions
    trims = True

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """User vectors [B, E] of histories [B, L], left-aligned, padded with 0, of lengths [B]."""
        rows = torch.arange(item_seq.shape[0], device=item_seq.device)
        return self._user_vectors(item_seq, rows, item_seq_len - 1)

    def encode_positions(self, item_seq: Tensor) -> Tensor:
        """User vector after every prefix of each row in one pass: [B, L] -> [B, L, E]."""
        everywhere = torch.ones_like(item_seq, dtype=torch.bool)
        return self._user_vectors(item_seq, *everywhere.nonzero(as_tuple=True)).view(*item_seq.shape, -1)

    def encode_predicted(self, item_seq: Tensor, item_seq_len: Tensor, predicted: Tensor) -> Tensor:
        return self._user_vectors(item_seq, *predicted.nonzero(as_tuple=True))

    def _user_vectors(self, item_seq: Tensor, rows: Tensor, last: Tensor) -> Tensor:
        """User vectors [N, E] of N prefixes: those of `rows` [N] of `item_seq` that end at position `last` [N]."""
        states, _ = self.gru(self.emb_dropout(self.item_embedding(item_seq)))  # [B, L, H]
        query = states[rows, last]  # [N, H]
        seen = torch.arange(states.shape[1], device=last.device) <= last[:, None]  # [N, L]
        alike = torch.sigmoid(self.a_1(states)[rows] + self.a_2(query).unsqueeze(1))  # [N, L, H]
        weights = self.v_t(alike).squeeze(2) * seen  # [N, L]
        attended = torch.bmm(weights.unsqueeze(1), states[rows]).squeeze(1)  # [N, H]
        return self.b(self.ct_dropout(torch.cat([attended, query], dim=1)))
