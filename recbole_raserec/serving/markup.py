"""Pieces of HTML: escaped texts, figures, bars."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, Optional

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
