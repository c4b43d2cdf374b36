"""Why an item is recommended: which memories were retrieved, and what they add to its score; as data, text or a page.

The model mixes `h~ = alpha h + (1 - alpha) h'`, and an item scores `h~ . v + b`; so a score is the sum of what the
backbone gives, `alpha h . v + b`, and what retrieval gives, `(1 - alpha) h' . v`. With the kNN or the transition head
it is the probability that is such a sum, to which transitions and texts give their parts. What a single memory does to
a score is measured by leaving it out, since attention and layer norms are not linear in it.

The page is one HTML document, page.html.j2: style, script and data stand in it, and its content security policy admits
these and no request to anywhere. The script only highlights a memory wherever it matters.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any, Optional

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from recbole_raserec.retrieval import neighbour_weights

SHOWN = 5  # items of a memory's prefix that are shown
SCORE_BYTES = 64 << 20  # of scores held at a time
#: Of the page: last items of the history that are shown at once, those before them are folded; memories shown below an
#: item, the table at the end has all of them; characters of a title within a sentence, its tooltip has the others.
RECENT, TOP, LONGEST = 8, 3, 60

#: Characters that no HTML document may contain.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


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
        entry: its number in the memory.
        next: what followed.
        similarity: of its key with the user's vector.
        text_similarity: of the texts of the last items of both; None where these are not searched.
        attention: share of the attention it gets, in [0, 1]; with the kNN head alone its share of the distribution.
        user: whose it is; None for a pattern of several users.
        support: users whose histories hold it.
        prefix: the last items before `next`, oldest first; empty where no histories are kept, and for patterns.
    """

    entry: int
    next: Item
    similarity: float
    attention: float
    user: Optional[str]
    support: int
    prefix: list[Item]
    text_similarity: Optional[float] = None

    @property
    def of_texts(self) -> str:
        """The texts' similarity in words, with a comma behind it; empty without one."""
        return "" if self.text_similarity is None else f"of texts {self.text_similarity:.3f}, "


@dataclasses.dataclass(frozen=True)
class Reason:
    """A recommended item.

    Attributes:
        rank: from 1 on, among the items not in the history.
        score: the sum of `backbone`, `retrieval`, `transitions` and `texts`; a probability with the kNN or the
            transition head, see `Explanation`.
        rank_without_memory: as `rank`, of the backbone alone.
        score_without_memory: of the backbone alone.
        effects: for each memory what the score loses without it.
        transitions: of the transition head, what followed the last two items.
        texts: of the transition head, how near their texts are.
    """

    item: Item
    rank: int
    score: float
    backbone: float
    retrieval: float
    rank_without_memory: int
    score_without_memory: float
    effects: list[float]
    transitions: float = 0.0
    texts: float = 0.0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The items recommended for a history and their reasons.

    Attributes:
        unit: what scores are: `score` (the dot product), or `probability` with the kNN or the transition head.
        alpha: weight of the backbone's own vector.
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

    def without_users(self) -> Explanation:
        """The same with numbers instead of the users' ids, in the order in which they come: `user #1`, `user #2`."""
        users = dict.fromkeys(memory.user for memory in self.memories if memory.user is not None)
        names: dict[Any, str] = {user: f"user #{number}" for number, user in enumerate(users, start=1)}
        memories = [dataclasses.replace(memory, user=names.get(memory.user)) for memory in self.memories]
        return dataclasses.replace(self, memories=memories)

    @property
    def follows(self) -> bool:
        """Whether the transition head gives something."""
        return any(reason.transitions or reason.texts for reason in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dictionaries; of texts and transitions where the model has them."""
        found = dataclasses.asdict(self)
        for reason in [] if self.follows else found["items"]:
            del reason["transitions"], reason["texts"]
        for memory in found["memories"]:
            if memory["text_similarity"] is None:
                del memory["text_similarity"]
        return found

    def to_json(self, indent: Optional[int] = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=indent, allow_nan=False)

    def to_text(self) -> str:
        """For a terminal."""
        lines = ["after " + " > ".join(str(item) for item in self.history[-SHOWN:]), ""]
        for reason in self.items:
            more = f" + transitions {reason.transitions:+.4f} + texts {reason.texts:+.4f}" if self.follows else ""
            lines.append(
                f"{reason.rank:>3}. {reason.item}  {self.unit} {reason.score:.4f} = backbone {reason.backbone:.4f} "
                f"+ retrieval {reason.retrieval:+.4f}{more}; without memory rank {reason.rank_without_memory}"
            )
            for number in most(reason.effects)[:3]:
                memory = self.memories[number]
                before = " > ".join(str(item) for item in memory.prefix) or f"{memory.support} users"
                lines.append(
                    f"       {reason.effects[number]:+.4f}  {before} => {memory.next} "
                    f"(similarity {memory.similarity:.3f}, {memory.of_texts}attention {memory.attention:.3f})"
                )
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page that needs nothing beside itself."""
        return page(self)


@torch.no_grad()
def explain(recommender: Any, query: Any, interaction: Any, k: int) -> Explanation:
    """The best k items for a `query` of one history, of which the model reads `interaction`; the lock is held."""
    model = recommender.model
    h, ids, mask = model.retrieved(interaction)
    kept = mask[0].nonzero().squeeze(1)
    followed = None if model.transitions is None else torch.cat(model.followed(interaction)).double()  # [2, V]
    both = _parts(model, h.repeat(2, 1), ids.repeat(2, 1), torch.cat([mask, torch.zeros_like(mask)]), followed)
    scale = 1.0 if not model.shares_repeats else model.repeat_scale(both.sum(dim=1)[:1], interaction)
    both = both * scale
    found = both.sum(dim=1)
    found[:, np.append(0, query.rows[0])] = -torch.inf
    whole, alone = found  # [V] each: with all memories, and with none
    best = whole.topk(min(k, int(whole.isfinite().sum()))).indices
    effects: list[torch.Tensor] = []  # without one memory after the other, as many at a time as memory allows
    for columns in kept.split(max(1, SCORE_BYTES // (32 * len(whole)))):
        without = mask.repeat(len(columns), 1)
        without[torch.arange(len(columns)), columns] = False
        parts = _parts(model, h.expand(len(columns), -1), ids.expand(len(columns), -1), without, followed)
        effects += list(whole[best] - (parts * scale).sum(dim=1)[:, best])
    attention, similarity = _attention(model, h, ids, mask)
    texts = None
    if size := model.memory.text_size:
        texts = torch.cosine_similarity(h[:, None, -size:], model.entries(ids)[0][..., -size:], dim=2)

    def item(number: int) -> Item:
        return Item(recommender.items[number], recommender.titles[number] if recommender.titles else None)

    reasons = []
    for rank, number in enumerate(best.tolist(), start=1):
        backbone, retrieval, *more = both[0, :, number].tolist()
        value, lost = float(alone[number]), [float(effect[rank - 1]) for effect in effects]
        before = 1 + int((alone > value).sum())
        score = backbone + retrieval + sum(more)
        reasons.append(Reason(item(number), rank, score, backbone, retrieval, before, value, lost, *more))
    memories = []
    for column in kept.tolist():
        entry = int(ids[0, column])
        user, position = int(model.memory.users[entry]), int(model.memory.positions[entry])
        stored = recommender.catalogue.histories
        prefix = stored.of(user)[max(position - SHOWN, 0) : position] if stored is not None and user > 0 else []
        memories.append(Memory(
            entry, item(int(model.memory.targets[entry])), float(similarity[0, column]), float(attention[0, column]),
            recommender.users[user] if user > 0 else None, int(model.memory.support[entry]),
            [item(int(number)) for number in prefix], None if texts is None else float(texts[0, column]),
        ))  # fmt: skip
    unit = "probability" if model.gives_probabilities else "score"
    alpha = float(model.ram.alpha.clamp(0, 1)) if model.augments else 1.0
    return Explanation(
        recommender.name, recommender.dataset, unit, alpha, [item(int(number)) for number in query.rows[0]],
        int(query.dropped[0]), memories, reasons,
    )  # fmt: skip


def _parts(
    model: Any, h: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, followed: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """What backbone and retrieval give to each item, and transitions and texts where they are `followed` [2, V]:
    float64 [B, 2 or 4, V]; their sum is its score, or its probability.
    """
    table, bias = model.item_vectors().double().t(), model.backbone.item_bias()
    wide, h = h, model.own(h)
    mixed = model.augment(wide, ids, mask).double() if model.augments else h.double()
    some = mask.any(dim=1, keepdim=True)
    share = model.ram.alpha.clamp(0, 1).double() if model.augments else 1.0
    alpha = torch.where(some, share, 1.0).double()
    own = alpha * h.double()
    backbone, retrieval = own @ table, (mixed - own) @ table  # [B, V]
    if bias is not None:
        backbone = backbone + bias.double()
    if not model.gives_probabilities:
        return torch.stack([backbone, retrieval], dim=1)
    scores = backbone + retrieval
    if not model.knn:
        alone = h.double() @ table + (0 if bias is None else bias.double())
        both = [torch.softmax(alone, dim=1), torch.softmax(scores, dim=1) - torch.softmax(alone, dim=1)]
        return _with(both, followed)
    targets, similarity = model.neighbour_similarity(wide, ids)
    weights = neighbour_weights(similarity, mask, float(model.knn_tau)).double()
    spread = torch.zeros_like(scores).scatter_add_(1, targets, weights)
    share = torch.where(some, model.knn_share.double(), 0.0)
    return _with([(1 - share) * torch.softmax(scores, dim=1), share * spread], followed)


def _with(parts: list[torch.Tensor], followed: Optional[torch.Tensor]) -> torch.Tensor:
    """Parts of a probability, [B, V] each, beside what the transition head gives: [B, 2 or 4, V]."""
    if followed is None:
        return torch.stack(parts, dim=1)
    left = 1 - followed.sum()
    return torch.stack([*(left * part for part in parts), *followed[:, None].expand(-1, len(parts[0]), -1)], dim=1)


def _attention(model: Any, h: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and similarity of the memories, [B, K] each."""
    keys, targets, bias = model.entries(ids)
    values = model.item_vectors()[targets]
    own, users = model.own(h), model.own(keys)
    similarity = model.compared(own, values if model.memory.retrieve_by == "target" else users)
    if not model.augments:
        return neighbour_weights(model.compared(h, keys), mask, float(model.knn_tau)), similarity
    return model.ram.attention(own, users, values, mask, bias), similarity


def page(found: Explanation) -> str:
    """An explanation as HTML; scales and decimals are common to all items, so that they can be compared."""
    percent = found.unit == "probability"
    scale = 100 if percent else 1
    ends = [end for reason in found.items for end in (reason.backbone, reason.score)]
    effects = [effect for reason in found.items for effect in reason.effects]
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:"
    decimals = _decimals([scale * end for end in ends], 4)
    effect_decimals = _decimals([scale * effect for effect in effects], 3)
    data = json.dumps(found.to_dict(), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # so that nothing in it can end the script element that holds it
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return _template().render(
        found=found, percent=percent, data=data, style=style, script=script,
        policy=f"{policy}; base-uri 'none'; form-action 'none'",
        low=min([0.0, *ends]), high=max([0.0, *ends]), strongest=max(map(abs, effects), default=0.0),
        value=lambda value: rounded(value, decimals, percent),
        score=lambda value: figure(value) + (" %" if percent else ""),
        effect=lambda value: figure(rounded(value, effect_decimals, percent), signed=True),
        effect_decimals=effect_decimals, takes=any(reason.retrieval < 0 for reason in found.items),
        nearest=max([1.0, *(memory.similarity for memory in found.memories)]),
        busiest=max((memory.attention for memory in found.memories), default=0.0),
    )  # fmt: skip


def most(effects: Sequence[float]) -> list[int]:
    """Numbers of the effects, the largest first."""
    return sorted(range(len(effects)), key=lambda number: -abs(effects[number]))


def rounded(value: float, decimals: int, percent: bool = False) -> Decimal:
    """Decimal, because sums and differences of decimals are exact."""
    return round(Decimal(value) * (100 if percent else 1), decimals)


def figure(value: Decimal, signed: bool = False) -> str:
    """With a minus sign instead of a hyphen."""
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    return f"{sign}{abs(value):f}"


def _decimals(values: Iterable[float], significant: int) -> int:
    """Decimals that show the largest of `values` with so many digits."""
    largest = max(map(abs, values), default=0)
    return min(max(significant - 1 - math.floor(math.log10(largest)), 0), 15) if largest else significant - 1


@cache
def _asset(name: str) -> str:
    """Text of a file beside this one."""
    return files("recbole_raserec.serving").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    def fit(value: Any) -> Any:
        """Any text without what HTML may not contain; autoescape comes after."""
        return value if isinstance(value, Markup) else _UNFIT.sub("\ufffd", str(value))

    environment = Environment(autoescape=True, finalize=fit, undefined=StrictUndefined)
    environment.globals.update(rounded=rounded, figure=figure, most=most, RECENT=RECENT, TOP=TOP, LONGEST=LONGEST)
    return environment.from_string(_asset("page.html.j2"))


def _digest(text: str) -> str:
    """Of inline style and script, as a content security policy names them: nothing else in the page can run."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
