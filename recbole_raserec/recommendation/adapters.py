"""RecBole's sequential models as backbones: one small adapter per deviation, and which models cannot be one, and why.

They differ in the arguments of ``forward``, in the table that holds the item vectors and in what is done to it first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_raserec.recommendation.interface import Backbone


class SequenceOnly(Backbone):
    """NextItNet: ``forward(item_seq)``."""

    arguments = ("item_seq",)


class UserThenSequence(Backbone):
    """Caser: ``forward(user, item_seq)``."""

    arguments = ("user", "item_seq")


class SequenceThenUser(Backbone):
    """SHAN: ``forward(item_seq, user)``."""

    arguments = ("item_seq", "user")


class BERT4RecBackbone(Backbone):
    """BERT4Rec: the vector at a mask token appended to the sequence; item table with a row for the mask; item bias."""

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        masked = F.pad(item_seq, (0, 1)).scatter(1, item_seq_len.unsqueeze(1), self.n_items)  # [B, L + 1]
        # The first item makes room for the mask in every sequence, short ones too: RecBole ranks this way.
        output = self.model(masked[:, 1:])  # [B, L, H]
        return output[torch.arange(len(output), device=output.device), item_seq_len - 1]  # [B, H]

    def item_bias(self) -> Tensor | None:
        return self.model.output_bias


class COREBackbone(Backbone):
    """CORE: cosine over a temperature.

    The temperature is shared out evenly, ``h / sqrt(temperature)`` and ``v / sqrt(temperature)``: CORE's user vectors
    are weighted sums of item vectors, and folding all of it into one side would give the two different lengths, which
    a mixture of user and item vectors would then weigh differently. In train mode the item vectors pass the model's
    item dropout, as in its loss.
    """

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        return self.model(item_seq) / self.model.temperature**0.5

    def item_vectors(self) -> Tensor:
        table = self.model.item_dropout(self.model.item_embedding.weight[: self.n_items])
        return F.normalize(table, dim=-1) / self.model.temperature**0.5


class FOSSILBackbone(Backbone):
    """FOSSIL: ``forward(item_seq, item_seq_len, user)``."""

    arguments = ("item_seq", "item_seq_len", "user")


class FPMCBackbone(Backbone):
    """FPMC: user . item + last item . item, two dot products written as one of twice the size."""

    arguments = ("user", "item_seq", "item_seq_len")

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        last = item_seq.gather(1, (item_seq_len - 1).unsqueeze(1)).squeeze(1)  # [B]
        return torch.cat([self.model.UI_emb(user), self.model.LI_emb(last)], dim=-1)  # [B, 2E]

    def item_vectors(self) -> Tensor:
        return torch.cat([self.model.IU_emb.weight, self.model.IL_emb.weight], dim=-1)[: self.n_items]


class HGNBackbone(SequenceThenUser):
    """HGN: ranks with a second item table."""

    item_table = "item_embedding_for_prediction"


class HRMBackbone(Backbone):
    """HRM: ``forward(item_seq, user, item_seq_len)``."""

    arguments = ("item_seq", "user", "item_seq_len")

    def _user_vectors(self, item_seq: Tensor, item_seq_len: Tensor, user: Tensor | None) -> Tensor:
        # With average pooling HRM writes into the lengths it is given; the caller's must stay as they are.
        return super()._user_vectors(item_seq, item_seq_len.clone(), user)


class NPEBackbone(SequenceThenUser):
    """NPE: ranks with the rectified item table."""

    def item_vectors(self) -> Tensor:
        return torch.relu(super().item_vectors())


#: RecBole 1.2.1's sequential models that work as a backbone.
ADAPTERS: dict[str, Callable[[nn.Module, int], Backbone]] = {
    "BERT4Rec": BERT4RecBackbone,
    "CORE": COREBackbone,
    "Caser": UserThenSequence,
    "FEARec": Backbone,
    "FOSSIL": FOSSILBackbone,
    "FPMC": FPMCBackbone,
    "GCSAN": Backbone,
    "GRU4Rec": Backbone,
    "HGN": HGNBackbone,
    "HRM": HRMBackbone,
    "LightSANs": Backbone,
    "NARM": Backbone,
    "NPE": NPEBackbone,
    "NextItNet": SequenceOnly,
    "SASRec": Backbone,
    "SHAN": SequenceThenUser,
    "SINE": Backbone,
    "SRGNN": Backbone,
    "STAMP": Backbone,
}

#: What the option ``backbone`` may name.
SUPPORTED: tuple[str, ...] = tuple(sorted([*ADAPTERS, "BSARec", "DARec", "DuoRec"]))

_FEATURES = "reads item features, which a checkpoint that reloads without the data set does not hold"
_KNOWLEDGE = "reads pre-trained knowledge-graph vectors that come with the data set"
_MIXTURE = "ranks by a mixture of probabilities (items seen, items near, all items), not by one dot product"

#: RecBole 1.2.1's sequential models that do not, and why.
REFUSED: dict[str, str] = {
    "DIEN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "DIN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "FDSA": _FEATURES,
    "GRU4RecCPR": _MIXTURE,
    "GRU4RecF": _FEATURES,
    "GRU4RecKG": _KNOWLEDGE,
    "KSR": _KNOWLEDGE,
    "RepeatNet": "ranks by a mixture of two probabilities (repeat, explore), not by one dot product",
    "S3Rec": "reads item attributes, and is trained in two runs (pre-training, then fine-tuning)",
    "SASRecCPR": _MIXTURE,
    "SASRecF": _FEATURES,
    "TransRec": "ranks by a Euclidean distance, not by a dot product",
}
