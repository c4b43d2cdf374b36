"""The page of an explanation: well-formed, escaped, figures that add up."""

from __future__ import annotations

import dataclasses
import json
import re
from decimal import Decimal
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_helpers import HOSTILE, example

from recbole_raserec import Recommender
from recbole_raserec.serving.explain import RECENT, TOP, _asset, page

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Reader(HTMLParser):
    """Elements as (tag, attributes, text below it); errors where tags do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.stack, self.errors = [], [], []
        self.feed(text)
        self.close()
        if self.stack:
            self.errors.append(f"left open: {[element['tag'] for element in self.stack]}")

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.errors.append(f"<{tag}> has an attribute twice")
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop()["tag"] != tag:
            self.errors.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def of(self, tag=None, **wanted):
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [
            element
            for element in self.elements
            if tag in (None, element["tag"])
            and all(value in (element.get(name) or "").split() for name, value in wanted.items())
        ]


def check(explanation):
    """What must hold of every page."""
    text = page(explanation)
    text.encode("utf-8")
    found = Reader(text)
    assert not found.errors
    names = [element["id"] for element in found.elements if "id" in element]
    assert len(set(names)) == len(names)
    for element in found.elements:
        assert not any(name.startswith("on") or name in ("style", "src") for name in element)
        assert element["tag"] not in ("img", "iframe", "object", "base", "form", "input")
        if "href" in element:
            assert element["href"] == "data:," or element["href"][1:] in names, element["href"]
        assert element.get("aria-labelledby", names[0]) in names
    (data,) = found.of("script", id="explanation")
    assert data["type"] == "application/json"
    assert json.loads(data["text"]) == json.loads(json.dumps(explanation.to_dict()))
    assert len(found.of("script")) == 2
    assert len(found.of("style")) == 1
    assert len(found.of("li", class_="card")) == len(explanation.items)
    assert len(found.of("tr", role="row")) == (1 + len(explanation.memories) if explanation.memories else 0)
    assert len(found.of("h1")) == 1
    return found


def number(text):
    return Decimal(re.sub(r"[ %]|pp", "", text).replace("−", "-"))


def check_sums(found, explanation):
    """Shown figures: the parts sum to the score, each within a unit of its last digit."""
    scale = 100 if explanation.unit == "probability" else 1
    scores = [number(element["text"]) for element in found.of("data")]
    parts = [re.findall(r"[−+]? ?[\d.]+", element["text"]) for element in found.of("p", class_="parts")]
    assert len(scores) == len(parts) == len(explanation.items)
    for reason, score, (backbone, retrieval) in zip(explanation.items, scores, parts):
        assert number(backbone) + number(retrieval) == score
        unit = 10.0 ** score.as_tuple().exponent
        shown = (score, reason.score), (number(backbone), reason.backbone), (number(retrieval), reason.retrieval)
        for value, exact in shown:
            assert abs(float(value) - scale * exact) <= 1.01 * unit


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text() | st.sampled_from(HOSTILE), min_size=1, max_size=8),
    st.integers(0, 4),
    st.sampled_from(["score", "probability"]),
)
def test_any_title_is_only_text(titles, memories, unit):
    explanation = example(titles, items=3, memories=memories, unit=unit)
    found = check(explanation)
    shown = [element["text"] for element in found.of("h3")]
    for reason, text in zip(explanation.items, shown):
        title = reason.item.title.strip()
        if title.isascii() and title.isprintable() and title:
            assert text.replace("\xa0", " ") in (title, f"{title} id {reason.item.id}")


@pytest.mark.parametrize("text", HOSTILE)
def test_any_id_and_name_is_only_text(text):
    explanation = example(items=2, memories=3, model=text, dataset=text)
    item = dataclasses.replace(explanation.items[0].item, id=text)
    memories = [dataclasses.replace(memory, user=text, next=item, prefix=[item]) for memory in explanation.memories]
    items = [dataclasses.replace(reason, item=item) for reason in explanation.items]
    found = check(dataclasses.replace(explanation, memories=memories, items=items, history=[item] * 12))
    if text.isascii() and text.isprintable():
        (source,) = found.of("p", class_="source")
        assert source["text"] == f"{text} on {text}"
        assert {element["text"] for element in found.of("bdi") if "class" not in element} == {text}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=4),
    st.lists(st.floats(-10, 10) | st.floats(-1e-6, 1e-6), min_size=1, max_size=4),
    st.sampled_from(["score", "probability"]),
)
def test_figures_add_up(backbone, retrieval, unit):
    explanation = example(items=4, memories=1, unit=unit, backbone=backbone, retrieval=retrieval)
    check_sums(check(explanation), explanation)


@pytest.mark.parametrize(
    ("backbone", "retrieval", "kind", "drawn"),
    [
        (1.0, 1.0, "retrieval", [(0, 50), (50, 50)]),
        (2.0, -1.0, "taken back", [(0, 100), (50, 50)]),
        (-2.0, 1.0, "retrieval back", [(0, 100), (0, 50)]),
        (1.0, -2.0, "taken back", [(50, 50), (0, 100)]),
        (-1.0, -1.0, "taken", [(50, 50), (0, 50)]),
    ],
)
def test_the_bar_shows_both_parts(backbone, retrieval, kind, drawn):
    found = check(example(items=1, memories=0, backbone=[backbone], retrieval=[retrieval]))
    (bar,) = found.of("svg", class_="sum")
    at = found.elements.index(bar)
    own, added, end = found.elements[at + 1 : at + 4]
    assert (own["class"], added["class"], end["class"]) == ("backbone", kind, "end")
    for rect, (left, width) in zip((own, added), drawn):
        assert (float(rect["x"][:-1]), float(rect["width"][:-1])) == (left, width)
    sign = "−" if retrieval < 0 else "+"
    assert f"retrieval {sign}{abs(retrieval):.3f}" in bar["aria-label"]
    legend = found.of("ul", class_="legend")[0]["text"]
    assert ("retrieval takes" in legend) == (retrieval < 0)


def test_where_an_item_comes_from():
    found = check(example(items=4))
    texts = [" ".join(element["text"].split()) for element in found.of("p", class_="before")]
    assert [text.split(" without memory: ")[0] for text in texts] == ["same", "new, up 7", "down 1", "new, up 56"]
    assert texts[2].split(": ")[1].startswith("rank 2 ")


def test_the_memories_that_matter_most():
    explanation = example(memories=5)
    found = check(explanation)
    shown = [element for element in found.of("li") if "data-memory" in element]
    assert [element["data-memory"] for element in shown] == ["4", "3", "2"] * len(explanation.items)
    assert len(shown) == TOP * len(explanation.items)
    stories = [element["text"].replace("\xa0", " ") for element in found.of("td", class_="story")]
    assert stories == [
        "somebody went on to i3 user u0",
        "somebody had i1 and went on to i4 user u1",
        "7 users went on to i5",
        "somebody had i3 › i4 › i5 and went on to i6 user u3",
        "somebody had i4 › i5 › i6 › i7 and went on to i7 user u4",
    ]
    amounts = [number(element["text"]) for element in found.of("p", class_="amount")]
    effects = [reason.effects[n] for reason in explanation.items for n in (4, 3, 2)]
    assert [float(amount) for amount in amounts] == pytest.approx(effects, abs=1e-9)
    assert all(("gain" in e["class"]) == (effect > 0) for e, effect in zip(found.of("p", class_="amount"), effects))


def test_the_history_is_a_trail():
    found = check(example(["One", "Two"], history=12, dropped=3))
    assert found.of("ol", class_="trail")[0]["text"].count("id\xa0") == RECENT
    assert found.of("summary")[0]["text"] == "4 earlier items"
    assert "history of 12 items, 3 unknown items left out" in found.of("header")[0]["text"]
    assert "One · id i0" in [element.get("title") for element in found.of("bdi", class_="item")]
    assert not check(example(history=RECENT)).of("summary")


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({"items": 1, "memories": 0, "history": 1, "dataset": None}, "Why this item"),
        ({"items": 1, "memories": 1}, "Why this item"),
        ({"items": 50, "memories": 20, "titles": ["Alien"]}, "Why these 50 items"),
        ({"items": 0, "memories": 2}, "No item is left to recommend"),
        ({"backbone": [0.0], "retrieval": [0.0]}, "Why these 4 items"),
        ({"backbone": [0.0004], "retrieval": [0.00001], "unit": "probability"}, "Why these 4 items"),
    ],
)
def test_sizes(options, title):
    explanation = example(**options)
    found = check(explanation)
    check_sums(found, explanation)
    assert found.of("h1")[0]["text"] == found.of("title")[0]["text"] == title
    assert ("No memory was retrieved" in found.of("main")[0]["text"]) == (not explanation.memories)


def test_a_probability_is_shown_as_percent():
    found = check(example(unit="probability", backbone=[0.04], retrieval=[0.0123]))
    assert found.of("data")[0]["text"] == "5.230 %"
    assert found.of("p", class_="parts")[0]["text"] == "4.000 % backbone + 1.230 % retrieval"
    assert found.of("p", class_="amount")[0]["text"] == "+1.00 pp"


@pytest.mark.parametrize("head", ["ram", "knn"])
def test_of_a_model(tiny_run, head):
    recommender = Recommender.load(tiny_run(head=head).ours.directory, "cpu")
    explanation = recommender.explain(None, 6, user=recommender.users[3])
    check_sums(check(explanation), explanation)
    assert explanation.to_html() == page(explanation)


def test_style_and_script_stay_in_their_elements():
    for name in ("page.css", "page.js"):
        text = _asset(name)
        assert "</" not in text
        assert "\r" not in text
        assert not re.search(r"https?:|//\w+\.|@import|eval\(|innerHTML", text)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """Text 4.5 to 1 on whatever it stands on, marks 3 to 1 (WCAG 2, level AA)."""
    roots = re.findall(r":root \{(.*?)\}", _asset("page.css"), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", roots[scheme == "dark"]))

    def contrast(one, other):
        low, high = sorted([luminance(colours[one]), luminance(colours[other])])
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "card", "lit"):
        for text in ("ink", "soft", "backbone", "retrieval", "taken", "gain", "loss", "link"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for mark in ("backbone", "retrieval", "taken", "gain", "loss", "soft", "ink"):
        assert contrast(mark, "track") >= 3, mark
