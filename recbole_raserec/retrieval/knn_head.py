"""A head that needs no training: what the nearest memories were followed by, mixed into the model's distribution.

As in nearest-neighbour language models (Khandelwal et al., arXiv 1911.00172):
``p(i) = (1 - share) softmax(h . v)_i + share sum_k softmax(similarity / tau)_k [target_k = i]``.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable

import torch
from tqdm import tqdm

from recbole_raserec.retrieval.raserec import RaSeRec

#: Values of the option `head`.
HEADS = ("ram", "knn", "both")

#: What is tried on the validation split.
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
TAUS = (0.02, 0.05, 0.1, 0.2)


def interpolate(
    scores: torch.Tensor, targets: torch.Tensor, similarity: torch.Tensor, mask: torch.Tensor, share: float, tau: float
) -> torch.Tensor:
    """Logarithm of the mixed distribution.

    Args:
        scores: [B, V], the model's. targets: int64 [B, K], what followed each neighbour. similarity: [B, K].
        mask: bool [B, K]; a row without any neighbour keeps the model's distribution.
        share: of the neighbours, in [0, 1). tau: temperature of their similarities, > 0.

    Returns:
        [B, V].
    """
    model = torch.log_softmax(scores, dim=1)
    if not share:
        return model
    spread = torch.zeros_like(scores).scatter_add_(1, targets, neighbour_weights(similarity, mask, tau))  # [B, V]
    some = mask.any(dim=1, keepdim=True)
    kept = torch.where(some, model + torch.log1p(torch.tensor(-share, dtype=scores.dtype)), model)
    mixed = torch.logaddexp(kept, spread.clamp(min=1e-37).log() + torch.log(torch.tensor(share, dtype=scores.dtype)))
    return torch.where(spread > 0, mixed, kept)


def neighbour_weights(similarity: torch.Tensor, mask: torch.Tensor, tau: float) -> torch.Tensor:
    """Shares of the neighbours in their distribution, [B, K], from their similarities; 0 where `mask` is False."""
    logits = (similarity / tau).masked_fill(~mask, torch.finfo(similarity.dtype).min)
    return torch.softmax(logits, dim=1) * mask


class KNNRaSeRec(RaSeRec):
    """RaSeRec whose scores are mixed with the nearest memories' targets.

    Option `head`: ``knn`` scores with the backbone's own user vectors, nothing is trained; ``both`` with those that
    the retrieval-augmented module gives. Share and temperature are chosen on the validation split, see :func:`tune`,
    and are part of the weights.
    """

    def __init__(self, config: Any, dataset: Any, backbone: Any):
        super().__init__(config, dataset, backbone)
        self.augments = config["head"] == "both"
        self.register_buffer("knn_share", torch.tensor(0.0))
        self.register_buffer("knn_tau", torch.tensor(TAUS[0]))

    @property
    def full_sort_vectors(self) -> Any:
        """Not there: these scores are no dot product."""
        raise AttributeError("full_sort_vectors")

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """Logarithms of the mixed probabilities, [B, V]."""
        h, ids, mask = self.retrieved(interaction)
        vectors = self.augment(h, ids, mask) if self.augments else h
        scores, bias = vectors @ self.item_vectors().t(), self.backbone.item_bias()
        scores = scores if bias is None else scores + bias
        if not len(self.memory):
            return scores
        targets, similarity = self.neighbour_similarity(h, ids)
        return interpolate(scores, targets, similarity, mask, float(self.knn_share), float(self.knn_tau))

    def neighbour_similarity(self, h: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets of the memories, and their keys' similarity with h: [B, K] each."""
        keys, targets, _ = self.entries(ids)  # [B, K, H], [B, K]
        if self.memory.similarity == "cosine":
            return targets, torch.cosine_similarity(h[:, None], keys, dim=2)
        return targets, (keys @ h[:, :, None]).squeeze(2)

    def predict(self, interaction: Any) -> torch.Tensor:
        """Logarithm of the mixed probability of one item a row, that of the field ``item_id``: [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID][:, None]).squeeze(1)


def tune(model: KNNRaSeRec, validate: Callable[[], float], progress: bool) -> float:
    """Set share and temperature to the pair of :data:`SHARES` and :data:`TAUS` that validates best.

    Args:
        model: with the memory of the training split. validate: the value to raise, with the model as it is.

    Returns:
        the best value; of equal ones that of the smaller share counts.
    """
    pairs = [(share, tau) for share, tau in itertools.product(SHARES, TAUS) if share or tau == TAUS[0]]
    best, chosen = float("-inf"), pairs[0]
    for share, tau in tqdm(pairs, desc="Tune kNN head", disable=not progress, dynamic_ncols=True):
        model.knn_share.fill_(share)
        model.knn_tau.fill_(tau)
        value = validate()
        if value > best:
            best, chosen = value, (share, tau)
    model.knn_share.fill_(chosen[0])
    model.knn_tau.fill_(chosen[1])
    return best


def raserec_class(config: Any) -> type[RaSeRec]:
    """The model class that the option `head` asks for."""
    return RaSeRec if config["head"] in (None, "ram") else KNNRaSeRec
