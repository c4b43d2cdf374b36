"""The page of an explanation in a browser, where there is one."""

from __future__ import annotations

import shutil

import pytest
from browser import Browser, binary
from page_helpers import HOSTILE, example

from recbole_raserec.serving.explain import page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if binary() is None:
        pytest.skip("no Chromium or Chrome is installed")
    try:
        found = Browser(tmp_path_factory.mktemp("profile"))
    except (RuntimeError, OSError, TimeoutError) as error:
        pytest.skip(f"{binary()} does not start: {error}")
    yield found
    found.close()


@pytest.fixture
def shown(browser, tmp_path):
    """Opens the page of an explanation, and checks what must hold of every one."""

    def show(explanation, width=1280, scheme="light", medium="", script=True):
        path = tmp_path / "page.html"
        path.write_text(page(explanation), encoding="utf-8")
        browser.media(width, scheme, medium)
        browser.call("Emulation.setScriptExecutionDisabled", value=not script)
        browser.open(path)
        requests = [event["params"]["request"]["url"] for event in browser.events
                    if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        bad = ("Runtime.exceptionThrown", "Log.entryAdded")
        assert [event for event in browser.events if event["method"] in bad] == []
        if script:
            assert browser.ask("document.documentElement.dataset.ready") == "yes"
            assert browser.ask("document.documentElement.dataset.broken || ''") == ""
            assert browser.ask("document.documentElement.scrollWidth") <= width
        return browser

    yield show
    shutil.rmtree(tmp_path, ignore_errors=True)


def count(browser, selector):
    return browser.ask(f"document.querySelectorAll({selector!r}).length")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light"), (320, "dark")])
def test_hostile_titles_in_a_browser(shown, width, scheme):
    explanation = example(HOSTILE, items=len(HOSTILE), memories=6, history=20, retrieval=[0.5, -0.5])
    found = shown(explanation, width, scheme)
    assert count(found, ".card") == len(HOSTILE)
    assert count(found, "tbody tr") == 6
    assert count(found, "script") == 2
    assert count(found, "img, iframe") == 0
    found.ask("document.querySelector('details').open = true")
    assert found.ask("document.documentElement.scrollWidth") <= width
    titles = found.ask("Array.from(document.querySelectorAll('h3 .item')).map(e => e.textContent)")
    for title, reason in zip(titles, explanation.items):
        if "\x00" not in reason.item.title and reason.item.title.strip():
            assert title == reason.item.title.strip()
    dark = found.ask("getComputedStyle(document.documentElement).backgroundColor")
    assert dark == {"dark": "rgb(21, 20, 19)", "light": "rgb(251, 250, 247)"}[scheme]


def test_a_memory_is_traced(shown):
    found = shown(example(memories=6, items=3))
    lit = "Array.from(document.querySelectorAll('.lit')).map(e => e.tagName + e.dataset.memory).join()"
    spot = "document.querySelectorAll('.card')[1].querySelector('[data-memory=\"4\"]')"
    found.ask(f"{spot}.scrollIntoView({{block: 'center'}})")
    box = found.ask(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({spot}.getBoundingClientRect())")
    found.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert found.ask(lit) == "LI4,LI4,LI4,TR4"
    told = found.ask("Array.from(document.querySelectorAll('.traced')).map(e => e.textContent)")
    assert told == ["memory 5: +0.0100", "memory 5: −0.0150", "memory 5: +0.0200"]
    listed = found.ask("document.querySelector('.card [data-memory=\"4\"] .amount').textContent")
    assert told[0].endswith(listed)
    found.call("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert found.ask(lit) == ""
    found.ask("document.querySelector('.card .badge').focus()")
    assert found.ask(lit) == "LI5,LI5,LI5,TR5"
    found.ask("document.activeElement.blur()")
    assert found.ask(lit) == ""


def test_every_link_is_reached_by_the_keyboard(shown):
    found = shown(example(items=2, memories=2))
    links = "Array.from(document.querySelectorAll('summary, a'))"
    reached = []
    for _ in range(found.ask(f"{links}.length")):
        for kind in ("keyDown", "keyUp"):
            found.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(found.ask(f"{links}.indexOf(document.activeElement)"))
    assert reached == list(range(1 + 2 * 2 + 2))


def test_without_script_and_on_paper(shown):
    found = shown(example(HOSTILE, retrieval=[-0.5]), script=False)
    tree = found.call("DOM.getDocument", depth=0)["root"]["nodeId"]
    assert len(found.call("DOM.querySelectorAll", nodeId=tree, selector=".card .story")["nodeIds"]) == 12
    found = shown(example(HOSTILE), medium="print")
    assert found.ask("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert found.ask("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    paper = found.call("Page.printToPDF", printBackground=False)["data"]
    assert len(paper) > 10_000


def test_nothing_but_the_page_s_own_script_runs(browser, tmp_path):
    """Its policy holds even if a text were not escaped."""
    path = tmp_path / "page.html"
    added = "<main><script>document.documentElement.dataset.broken='yes'</script><img src=http://localhost/x onerror=x>"
    path.write_text(page(example()).replace("<main>", added), encoding="utf-8")
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    browser.open(path)
    assert browser.ask("document.documentElement.dataset.ready") == "yes"
    assert browser.ask("document.documentElement.dataset.broken || ''") == ""
