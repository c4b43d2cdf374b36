"""What the tests of the page share: explanations, and titles that try to break out of it."""

from __future__ import annotations

from recbole_raserec.serving.explain import Explanation, Item, Memory, Reason

HOSTILE = [
    "<script>document.documentElement.dataset.broken='yes'</script>",
    "</script><script>document.documentElement.dataset.broken='yes'</script>",
    "</style><img src=x onerror=\"document.documentElement.dataset.broken='yes'\">",
    "\" onmouseover=\"document.documentElement.dataset.broken='yes'\" x='",
    "' autofocus onfocus='alert(1)",
    "--><!-- <![CDATA[ &amp; &#60; &lt;b&gt;",
    "💿 film 👩‍👩‍👧‍👦 🏳️‍🌈",
    "שלום עולם (2001) \u202e desrever",
    "\x00\x1b[31m \ud800 \uffff",
    "long " * 60,
    "W" * 300,
    "https://example.org/a.js",
    "$& ${x} `x` {{x}} %s {0}",
    "   ",
]


def example(titles=None, *, items=4, memories=5, history=12, unit="score", retrieval=(0.5,), backbone=(1.25,), **more):
    """An explanation. titles: of all items, in turn; `retrieval` and `backbone` of the items, in turn."""

    def item(number):
        return Item(f"i{number}", titles[number % len(titles)] if titles else None)

    held = [
        Memory(
            100 + n, item(n + 3), 0.98 - n / 50, 1 / memories, None if n % 3 == 2 else f"u{n}", 7 if n % 3 == 2 else 1,
            [] if n % 3 == 2 else [item(n + place) for place in range(n % 6)],
        )
        for n in range(memories)
    ]  # fmt: skip
    reasons = []
    for n in range(items):
        own, found = backbone[n % len(backbone)], retrieval[n % len(retrieval)]
        effects = [((-1) ** (n + m)) * (m + 1) * (n + 2) / 1000 for m in range(memories)]
        reasons.append(Reason(item(n + 1), n + 1, own + found, own, found, (1, 9, 2, 60)[n % 4], own * 2, effects))
    given = {"model": "RaSeRec", "dataset": "tiny", "alpha": 0.5, "dropped": 0, **more}
    return Explanation(unit=unit, history=[item(n) for n in range(history)], memories=held, items=reasons, **given)
