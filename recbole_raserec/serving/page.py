"""An explanation as a page that needs nothing beside itself.

The page is one HTML document: style, script and data stand in it, and its content security policy admits these and no
request to anywhere. It can be read without the script, which only highlights a memory wherever it matters.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from functools import cache
from importlib.resources import files
from typing import Any, Optional

# Pieces of HTML: escaped texts, figures, bars.


#: Characters that no HTML document may contain.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def escape(text: Any) -> str:
    """Any text as HTML, in elements and in attributes."""
    return html.escape(_UNFIT.sub("\ufffd", str(text)))


def as_json(explanation: Any) -> str:
    """JSON in which nothing can end the script element that holds it."""
    text = json.dumps(explanation.to_dict(), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def decimals_of(values: Iterable[float], significant: int) -> int:
    """Decimals that show the largest of `values` with so many digits."""
    largest = max(map(abs, values), default=0)
    return min(max(significant - 1 - math.floor(math.log10(largest)), 0), 15) if largest else significant - 1


def rounded(value: float, decimals: int, percent: bool = False) -> Decimal:
    """Decimal, because sums and differences of decimals are exact."""
    return round(Decimal(value) * (100 if percent else 1), decimals)


def figure(value: Decimal, signed: bool = False) -> str:
    """With a minus sign instead of a hyphen."""
    sign = "−" if value < 0 else "+" if signed and value > 0 else ""
    return f"{sign}{abs(value):f}"


def count(number: int, singular: str, plural: Optional[str] = None) -> str:
    """A number and what it counts."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def bar(name: str, label: str, shapes: list[tuple[str, float, float]], low: float, high: float) -> str:
    """A picture of values between `low` and `high`: a rectangle for each of `shapes`, (class, from, to).

    Without a label it is for the eye alone, where the figure stands beside it.
    """
    span = (high - low) or 1.0
    drawn = [
        f'<rect class="{kind}" x="{100 * (min(start, stop) - low) / span:.3f}%" '
        f'width="{100 * abs(stop - start) / span:.3f}%"/>'
        for kind, start, stop in shapes
    ]
    zero = f'<rect class="zero" x="{-100 * low / span:.3f}%"/>' if low < 0 < high else ""
    told = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    return f'<svg class="bar {name}" {told}>{"".join(drawn)}{zero}</svg>'


def name_of(item: Any, longest: Optional[int] = None, tag: str = "bdi") -> str:
    """An item's title, its id at hand; a title of another direction does not disturb what stands beside it."""
    title = (item.title or "").strip()
    hint = f"{title} · id {item.id}" if title and title != item.id else f"id {item.id}"
    text = title or item.id
    if longest is not None and len(text) > longest:
        text = text[: longest - 1].rstrip(" \u200d") + "…"
    return f'<{tag} class="item" dir="auto" title="{escape(hint)}">{escape(text)}</{tag}>'


def id_of(item: Any) -> str:
    """An item's id as small print where its title is not the id."""
    known = item.title and item.title.strip() and item.title != item.id
    return f' <small class="id">id&nbsp;<bdi>{escape(item.id)}</bdi></small>' if known else ""


#: Last items of the history that are shown at once; those before them are folded.
RECENT = 8
#: Memories shown below an item; the table at the end has all of them.
TOP = 3
#: Characters of a title within a sentence; its tooltip has the others.
LONGEST = 60

#: The hatching of retrieval that takes from a score; all bars share it.
_HATCHING = (
    '<svg class="defs" aria-hidden="true" width="0" height="0"><defs><pattern id="hatching" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="ground" width="6" height="6"/>'
    '<rect class="line" width="3" height="6"/></pattern></defs></svg>'
)
_UP, _DOWN, _LEVEL = "M5 1 9 9 1 9Z", "M1 1 9 1 5 9Z", "M1 4h8v2H1Z"


def page(explanation: Any) -> str:
    """HTML of an :class:`~recbole_raserec.serving.explain.Explanation`."""
    return _Page(explanation).document()


@cache
def _asset(name: str) -> str:
    """Text of a file beside this one."""
    return files("recbole_raserec.serving").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Of inline style and script, as a content security policy names them: nothing else in the page can run."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


class _Page:
    """The parts of the page; scales and decimals are common to all items, so that they can be compared."""

    def __init__(self, explanation: Any):
        self.found, self.percent = explanation, explanation.unit == "probability"
        reasons, memories = explanation.items, explanation.memories
        self.total = len(reasons)
        self.points = ' <abbr title="percentage points">pp</abbr>' if self.percent else ""
        self.title = "Why this item" if self.total == 1 else f"Why these {self.total} items"
        if not self.total:
            self.title = "No item is left to recommend"
        scale = 100 if self.percent else 1
        ends = [end for reason in reasons for end in (reason.backbone, reason.score)]
        effects = [effect for reason in reasons for effect in reason.effects]
        self.low, self.high = min([0.0, *ends]), max([0.0, *ends])
        self.strongest = max(map(abs, effects), default=0.0)
        self.decimals = decimals_of([scale * end for end in ends], 4)
        self.effect_decimals = decimals_of([scale * effect for effect in effects], 3)
        self.nearest = max([1.0, *(memory.similarity for memory in memories)])
        self.busiest = max((memory.attention for memory in memories), default=0.0)

    def document(self) -> str:
        style, script = _asset("page.css"), _asset("page.js")
        policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:"
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
            f"<title>{self.title}</title>\n<style>{style}</style>\n</head>\n<body>\n{_HATCHING}\n"
            f"{self.header()}\n<main>\n{self.cards()}\n{self.table()}\n{self.notes()}\n</main>\n"
            f'<script type="application/json" id="explanation">{as_json(self.found)}</script>\n'
            f"<script>{script}</script>\n</body>\n</html>\n"
        )

    # -- numbers ----------------------------------------------------------------------------------------------------

    def value(self, value: float) -> Decimal:
        return rounded(value, self.decimals, self.percent)

    def score(self, value: Decimal) -> str:
        return figure(value) + (" %" if self.percent else "")

    def effect(self, value: float) -> str:
        return figure(rounded(value, self.effect_decimals, self.percent), signed=True)

    # -- parts ------------------------------------------------------------------------------------------------------

    def header(self) -> str:
        found, length = self.found, len(self.found.history)
        source = escape(found.model) + (f" on <bdi>{escape(found.dataset)}</bdi>" if found.dataset else "")
        memories = count(len(found.memories), "memory", "memories")
        helped = f", with the help of {memories} of what followed in histories like it" if found.memories else ""
        left_out = f", {count(found.dropped, 'unknown item')} left out" if found.dropped else ""
        steps = "".join(f"<li>{name_of(item)}{id_of(item)}</li>" for item in found.history[-RECENT:])
        earlier = found.history[:-RECENT]
        fold = ""
        if earlier:
            rows = "".join(f"<li>{name_of(item)}</li>" for item in earlier)
            fold = (
                f'<details class="earlier"><summary>{count(len(earlier), "earlier item")}</summary>'
                f"<ol>{rows}</ol></details>"
            )
        return (
            f'<header class="top"><p class="source">{source}</p><h1>{self.title}</h1>'
            f"<p>Recommended after a history of {count(length, 'item')}{left_out}{helped}.</p>"
            f'<section aria-labelledby="history"><h2 id="history">The history</h2>{fold}'
            f'<ol class="trail" start="{len(earlier) + 1}">{steps}</ol></section></header>'
        )

    def cards(self) -> str:
        cards = "\n".join(self.card(reason) for reason in self.found.items)
        taken = any(reason.retrieval < 0 for reason in self.found.items)
        keys = [("backbone", "the backbone gives"), ("retrieval", "retrieval gives")]
        if taken:
            keys.append(("taken", "retrieval takes"))
        legend = "".join(
            f'<li><svg class="key" aria-hidden="true"><rect class="{kind}" width="100%"/></svg>{text}</li>'
            for kind, text in keys
        )
        return (
            f'<section aria-labelledby="items"><h2 id="items">{count(self.total, "recommended item")}</h2>'
            f'<ul class="legend">{legend}</ul>\n<ol class="cards" data-decimals="{self.effect_decimals}">\n{cards}\n'
            "</ol></section>"
        )

    def card(self, reason: Any) -> str:
        score, backbone = self.value(reason.score), self.value(reason.backbone)
        retrieval = score - backbone  # not rounded by itself, so that what is shown adds up
        kind = "taken" if reason.retrieval < 0 else "retrieval"
        sign = "−" if reason.retrieval < 0 else "+"
        # Where retrieval leads back over the backbone's bar it is drawn on its lower half.
        back = " back" if reason.backbone * reason.retrieval < 0 else ""
        shapes = [("backbone", 0.0, reason.backbone), (kind + back, reason.backbone, reason.score)]
        shapes.append(("end", reason.score, reason.score))
        label = (
            f"Score {self.score(score)}: backbone {self.score(backbone)}, retrieval {sign}{self.score(abs(retrieval))}"
        )
        order = sorted(range(len(reason.effects)), key=lambda number: -abs(reason.effects[number]))[:TOP]
        why = "".join(self.because(number, reason.effects[number]) for number in order)
        why = f'<h4>What mattered most</h4><ol class="why">{why}</ol>' if why else ""
        return (
            f'<li class="card" id="item-{reason.rank}"><article aria-labelledby="name-{reason.rank}">'
            f'<div class="what"><p class="rank">{reason.rank}</p><h3 id="name-{reason.rank}">{name_of(reason.item)}'
            f'{id_of(reason.item)}</h3><p class="score"><data value="{reason.score!r}">{self.score(score)}</data></p>'
            f"{bar('sum', label, shapes, self.low, self.high)}"
            f'<p class="parts"><span class="backbone">{self.score(backbone)} backbone</span> '
            f'<span class="{kind}">{sign} {self.score(abs(retrieval))} retrieval</span></p>'
            f'{self.before(reason)}<p class="traced" aria-hidden="true"></p></div>'
            f'<div class="memories">{why}</div></article></li>'
        )

    def before(self, reason: Any) -> str:
        """Where the item would stand without memories, and how far it has moved from there."""
        moved = reason.rank_without_memory - reason.rank
        kind, path, text = ("up", _UP, f"up {moved}") if moved > 0 else ("down", _DOWN, f"down {-moved}")
        if not moved:
            kind, path, text = "level", _LEVEL, "same"
        elif reason.rank_without_memory > self.total:
            kind, text = "up new", f"new, up {moved}"
        alone = self.score(self.value(reason.score_without_memory))
        return (
            f'<p class="before"><span class="moved {kind}"><svg aria-hidden="true" viewBox="0 0 10 10">'
            f'<path d="{path}"/></svg>{text}</span> without memory: rank {reason.rank_without_memory:,}'
            f' <small class="id">score {alone}</small></p>'
        )

    def story(self, memory: Any) -> str:
        """What a memory holds, as a sentence."""
        who = "somebody" if memory.user is not None else count(memory.support, "user")
        had = '&nbsp;<i class="then">›</i> '.join(name_of(item, LONGEST) for item in memory.prefix)
        had = f" had {had} and" if had else ""
        owner = (
            f' <small class="id">user&nbsp;<bdi>{escape(memory.user)}</bdi></small>' if memory.user is not None else ""
        )
        return f"{who}{had} went on to {name_of(memory.next, LONGEST, 'b')}{owner}"

    def measures(self, memory: Any) -> list[tuple[str, str, str]]:
        """Name, bar and figure of a memory's similarity and attention."""
        similarity, attention = rounded(memory.similarity, 3), rounded(memory.attention, 1, percent=True)
        near = bar("mini", "", [("plain", 0.0, max(memory.similarity, 0.0))], 0.0, self.nearest)
        busy = bar("mini", "", [("plain", 0.0, memory.attention)], 0.0, self.busiest)
        return [("similarity", near, figure(similarity)), ("attention", busy, f"{figure(attention)} %")]

    def because(self, number: int, effect: float) -> str:
        memory, kind = self.found.memories[number], "loss" if effect < 0 else "gain"
        strength = bar("effect", "", [(kind, 0.0, effect)], -self.strongest, self.strongest)
        measures = "".join(f"<span>{name} {mini}{text}</span> " for name, mini, text in self.measures(memory))
        return (
            f'<li data-memory="{number}"><a class="badge" href="#memory-{number + 1}" aria-label="memory {number + 1}">'
            f'{number + 1}</a><p class="story">{self.story(memory)}</p><p class="{kind} amount">{strength}'
            f'{self.effect(effect)}{self.points}</p><p class="measures">{measures}</p></li>'
        )

    def table(self) -> str:
        memories = self.found.memories
        if not memories:
            return (
                '<section aria-labelledby="all"><h2 id="all">No memory was retrieved</h2>'
                "<p>The scores are those of the backbone alone.</p></section>"
            )
        names = ["Memory", "What happened", "Similarity", "Attention", "Effect on each item", "Matters most for"]
        head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in names)
        rows = "\n".join(self.row(number, memory) for number, memory in enumerate(memories))
        title = "The memory" if len(memories) == 1 else f"All {len(memories)} memories"
        return (
            f'<section aria-labelledby="all"><h2 id="all">{title}</h2>\n<table role="table" aria-labelledby="all">'
            f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>\n<tbody role="rowgroup">\n{rows}\n</tbody>'
            "</table></section>"
        )

    def row(self, number: int, memory: Any) -> str:
        effects = [reason.effects[number] for reason in self.found.items]
        cells = [f'<td role="cell" class="story"><span>{self.story(memory)}</span></td>']
        for name, mini, text in self.measures(memory):
            cells.append(f'<td role="cell" class="figure" data-label="{name}">{mini}{text}</td>')
        strip, most = "", ""
        if effects:
            best = max(range(len(effects)), key=lambda place: abs(effects[place]))
            reason, width = self.found.items[best], 100 / len(effects)
            for place, effect in enumerate(effects):
                height = 50 * abs(effect) / (self.strongest or 1.0)
                strip += (
                    f'<rect class="{"loss" if effect < 0 else "gain"}" x="{place * width + width / 10:.2f}%" '
                    f'y="{50 - height if effect > 0 else 50:.2f}%" width="{width * 0.8:.2f}%" height="{height:.2f}%"/>'
                )
            label = f"Effects from {self.effect(min(effects))} to {self.effect(max(effects))}"
            strip = f'<svg class="strip" role="img" aria-label="{label}">{strip}<rect class="zero" y="50%"/></svg>'
            kind = "loss" if effects[best] < 0 else "gain"
            most = (
                f'<a href="#item-{reason.rank}">{reason.rank}. {name_of(reason.item, LONGEST)}</a> '
                f'<span class="{kind}">{self.effect(effects[best])}{self.points}</span>'
            )
        cells.append(f'<td role="cell" data-label="effect on each item">{strip}</td>')
        cells.append(f'<td role="cell" data-label="matters most for"><span>{most}</span></td>')
        return (
            f'<tr role="row" id="memory-{number + 1}" data-memory="{number}"><th scope="row" role="rowheader">'
            f'<span class="badge">{number + 1}</span></th>{"".join(cells)}</tr>'
        )

    def notes(self) -> str:
        if self.percent:
            how = (
                "A score is the probability that the item comes next. It is the sum of the probability that the model "
                "gives, and of the share of the memories that were followed by the item."
            )
        else:
            how = (
                "A score is the sum of two products with the item's vector: of the user's own vector, which the "
                f"backbone makes of the history (weight {self.found.alpha:.2f}), and of what the model reads from the "
                f"memories (weight {1 - self.found.alpha:.2f})."
            )
        return (
            f'<section class="notes" aria-labelledby="how"><h2 id="how">How to read this</h2><p>{how} Without memory '
            "the backbone decides alone and with its whole weight; that score is not its part of this one.</p>"
            "<p>A memory is a moment in somebody's history, or a sequence that several users share, and what "
            "came next. Similarity compares it with this history, attention is its share among the memories, and its "
            "effect is what the item's score loses when this memory alone is left out. Effects do not sum to "
            "retrieval's part: memories stand in for each other.</p></section>"
        )
