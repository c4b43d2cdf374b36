"""Why an item is recommended: which memories were retrieved, and what they add to its score.

The model mixes ``h~ = alpha h + (1 - alpha) h'``, and an item scores ``h~ . v + b``; so a score is the sum of what the
backbone gives, ``alpha h . v + b``, and what retrieval gives, ``(1 - alpha) h' . v``. With the kNN head it is the
probability that is such a sum. What a single memory does to a score is measured by leaving it out, since attention and
layer norms are not linear in it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Optional

import numpy as np
import torch

from recbole_raserec.retrieval import neighbour_weights

#: Items of a memory's prefix that are shown.
SHOWN = 5

#: Bytes of scores held at a time.
SCORE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Item:
    """An item as people know it: external id, and a title where the data have one."""

    id: str
    title: Optional[str] = None

    def __str__(self) -> str:
        return self.title or self.id


@dataclasses.dataclass(frozen=True)
class Memory:
    """A retrieved memory.

    Attributes:
        entry: its number in the memory. next: what followed. similarity: of its key with the user's vector.
        attention: share of the attention it gets, in [0, 1]; with the kNN head alone its share of the distribution.
        user: whose it is; None for a pattern of several users. support: users whose histories hold it.
        prefix: the last items before `next`, oldest first; empty where no histories are kept, and for patterns.
    """

    entry: int
    next: Item
    similarity: float
    attention: float
    user: Optional[str]
    support: int
    prefix: list[Item]


@dataclasses.dataclass(frozen=True)
class Reason:
    """A recommended item.

    Attributes:
        score: the sum of `backbone` and `retrieval`; a probability with the kNN head, see :class:`Explanation`.
        rank, rank_without_memory: from 1 on, among the items not in the history.
        score_without_memory: of the backbone alone.
        effects: for each memory what the score loses without it.
    """

    item: Item
    rank: int
    score: float
    backbone: float
    retrieval: float
    rank_without_memory: int
    score_without_memory: float
    effects: list[float]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The items recommended for a history and their reasons.

    Attributes:
        unit: what scores are: ``score`` (the dot product), or ``probability`` with the kNN head.
        dropped: unknown items that were left out of the history.
    """

    model: str
    dataset: Optional[str]
    unit: str
    alpha: float
    history: list[Item]
    dropped: int
    memories: list[Memory]
    items: list[Reason]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries."""
        return dataclasses.asdict(self)

    def to_json(self, indent: Optional[int] = None) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent, allow_nan=False)

    def to_text(self) -> str:
        """For a terminal."""
        lines = ["after " + " > ".join(str(item) for item in self.history[-SHOWN:]), ""]
        for reason in self.items:
            lines.append(
                f"{reason.rank:>3}. {reason.item}  {self.unit} {reason.score:.4f} = backbone {reason.backbone:.4f} "
                f"+ retrieval {reason.retrieval:+.4f}; without memory rank {reason.rank_without_memory}"
            )
            order = np.argsort([-abs(effect) for effect in reason.effects], kind="stable")
            for number in order[:3]:
                memory = self.memories[number]
                before = " > ".join(str(item) for item in memory.prefix) or f"{memory.support} users"
                lines.append(
                    f"       {reason.effects[number]:+.4f}  {before} => {memory.next} "
                    f"(similarity {memory.similarity:.3f}, attention {memory.attention:.3f})"
                )
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page that needs nothing beside itself."""
        from recbole_raserec.serving.page import page

        return page(self)


@torch.no_grad()
def explain(recommender: Any, query: Any, interaction: Any, k: int) -> Explanation:
    """The explanation of one history.

    Args:
        recommender: of a RaSeRec model; its lock is held. query, interaction: of one history. k: items.
    """
    model = recommender.model
    h, ids, mask = model.retrieved(interaction)
    kept = mask[0].nonzero().squeeze(1)
    both = _parts(model, h.repeat(2, 1), ids.repeat(2, 1), torch.cat([mask, torch.zeros_like(mask)]))
    whole, alone = both.sum(dim=1)  # [V] each: with all memories, and with none
    for scores in (whole, alone):
        scores[0] = -torch.inf
        scores[np.unique(query.rows[0])] = -torch.inf
    best = whole.topk(min(k, int(whole.isfinite().sum()))).indices
    effects: list[torch.Tensor] = []  # without one memory after the other, as many at a time as memory allows
    for places in kept.split(max(1, SCORE_BYTES // (32 * len(whole)))):
        without = mask.repeat(len(places), 1)
        without[torch.arange(len(places)), places] = False
        parts = _parts(model, h.expand(len(places), -1), ids.expand(len(places), -1), without)
        effects += list(whole[best] - parts.sum(dim=1)[:, best])
    attention, similarity = _attention(model, h, ids, mask)

    def item(number: int) -> Item:
        return Item(recommender.items[number], recommender.titles[number] if recommender.titles else None)

    reasons = []
    for rank, number in enumerate(best.tolist(), start=1):
        backbone, retrieval = both[0, :, number].tolist()
        value = float(alone[number])
        lost = [float(effect[rank - 1]) for effect in effects]
        rank_alone = 1 + int((alone > value).sum())
        score = backbone + retrieval
        reasons.append(Reason(item(number), rank, score, backbone, retrieval, rank_alone, value, lost))
    memories = []
    for place in kept.tolist():
        entry = int(ids[0, place])
        user, position = int(model.memory.users[entry]), int(model.memory.positions[entry])
        stored = recommender.catalogue.histories
        prefix = stored.of(user)[max(position - SHOWN, 0) : position] if stored is not None and user > 0 else []
        memories.append(Memory(
            entry, item(int(model.memory.targets[entry])), float(similarity[0, place]), float(attention[0, place]),
            recommender.users[user] if user > 0 else None, int(model.memory.support[entry]),
            [item(int(number)) for number in prefix],
        ))  # fmt: skip
    unit = "probability" if model.knn else "score"
    alpha = float(model.ram.alpha.clamp(0, 1)) if model.augments else 1.0
    history = [item(int(number)) for number in query.rows[0]]
    name, dataset, dropped = recommender.name, recommender.dataset, int(query.dropped[0])
    return Explanation(name, dataset, unit, alpha, history, dropped, memories, reasons)


def _parts(model: Any, h: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What backbone and retrieval give to each item: float64 [B, 2, V]; their sum is its score, or its probability."""
    table, bias = model.item_vectors().double().t(), model.backbone.item_bias()
    mixed = model.augment(h, ids, mask).double() if model.augments else h.double()
    some = mask.any(dim=1, keepdim=True)
    alpha = (
        torch.where(some, model.ram.alpha.clamp(0, 1).double(), 1.0)
        if model.augments
        else torch.ones_like(some).double()
    )
    own = alpha * h.double()
    backbone, retrieval = own @ table, (mixed - own) @ table  # [B, V]
    if bias is not None:
        backbone = backbone + bias.double()
    if not model.knn:
        return torch.stack([backbone, retrieval], dim=1)
    scores = backbone + retrieval
    targets, similarity = model.neighbour_similarity(h, ids)
    weights = neighbour_weights(similarity, mask, float(model.knn_tau)).double()
    spread = torch.zeros_like(scores).scatter_add_(1, targets, weights)
    share = torch.where(some, model.knn_share.double(), 0.0)
    return torch.stack([(1 - share) * torch.softmax(scores, dim=1), share * spread], dim=1)


def _attention(model: Any, h: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and similarity of the memories, [B, K] each."""
    keys, targets, bias = model.entries(ids)
    compared = model.item_vectors()[targets] if model.memory.retrieve_by == "target" else keys
    if model.memory.similarity == "cosine":
        similarity = torch.cosine_similarity(h[:, None], compared, dim=2)
    else:
        similarity = (compared @ h[:, :, None]).squeeze(2)
    if not model.augments:
        return neighbour_weights(model.neighbour_similarity(h, ids)[1], mask, float(model.knn_tau)), similarity
    return model.ram.attention(h, keys, model.item_vectors()[targets], mask, bias), similarity
