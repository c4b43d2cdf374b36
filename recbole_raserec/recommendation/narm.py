"""NARM (Li et al., CIKM 2017, arXiv 1711.04725) with RecBole's parameters and results, in both forms of training."""

from __future__ import annotations

import torch
from recbole.model.sequential_recommender.narm import NARM as RecBoleNARM

from recbole_raserec.config import Count, Dropouts, EncoderOptions, Loss, option
from recbole_raserec.recommendation.base import SoftmaxOverItems


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
    go with the last one. States know nothing later than their item, so that one pass over a history serves the
    attention of all its prefixes (``training: packed``). The softmax over items runs in reused buffers.

    Options beside those of RecBole's NARM: `training`, `packed_copies` and `softmax_precision`, see
    :class:`~recbole_raserec.recommendation.sasrec.SASRec`.
    """

    options = NARMOptions
    trims = True

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """User vectors [B, E] of histories [B, L], left-aligned, padded with 0, of lengths [B]."""
        states = self._states(item_seq)
        rows = torch.arange(len(item_seq), device=item_seq.device)
        return self._user_vectors(states, rows, item_seq_len - 1)

    def encode_predicted(
        self, item_seq: torch.Tensor, item_seq_len: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        """User vectors [N, E] at the N places of `predicted`, bool [U, L], in one pass over the rows [U, L]."""
        return self._user_vectors(self._states(item_seq), *predicted.nonzero(as_tuple=True))

    def encode_positions(self, item_seq: torch.Tensor) -> torch.Tensor:
        """User vector after every prefix of each row in one pass: [B, L] -> [B, L, E]."""
        everywhere = torch.ones_like(item_seq, dtype=torch.bool)
        return self.encode_predicted(item_seq, (item_seq > 0).sum(dim=1), everywhere).view(*item_seq.shape, -1)

    def _states(self, item_seq: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(self.emb_dropout(self.item_embedding(item_seq)))  # [B, L, H]
        return states

    def _user_vectors(self, states: torch.Tensor, rows: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Of N prefixes, those of `rows` [N] that end at place `last` [N], over states [B, L, H]: [N, E]."""
        query = states[rows, last]  # [N, H]
        seen = torch.arange(states.shape[1], device=last.device) <= last[:, None]  # [N, L]
        alike = torch.sigmoid(self.a_1(states)[rows] + self.a_2(query).unsqueeze(1))  # [N, L, H]
        weights = self.v_t(alike).squeeze(2) * seen  # [N, L]
        attended = torch.bmm(weights.unsqueeze(1), states[rows]).squeeze(1)  # [N, H]
        return self.b(self.ct_dropout(torch.cat([attended, query], dim=1)))
