"""The documentation: what the reference names is there, and nothing public is missing from it."""

from __future__ import annotations

import importlib
import re

import pytest
import yaml
from conftest import ROOT

import recbole_raserec

REFERENCE = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.md"))}
DIRECTIVES = sorted({name for text in REFERENCE.values() for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)})


def found(dotted):
    """The object of a dotted name."""
    module, rest = dotted, []
    while True:
        try:
            thing = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            rest.insert(0, name)
    for name in rest:
        thing = getattr(thing, name)
    return thing


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are MkDocs's own."""


Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


@pytest.fixture(scope="module")
def site():
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


@pytest.mark.parametrize("name", recbole_raserec.__all__)
def test_every_public_name_is_in_the_reference(name):
    assert f"`{name}`" in REFERENCE["index"]
    if name != "__version__":
        assert any(found(directive) is getattr(recbole_raserec, name) for directive in DIRECTIVES)


@pytest.mark.parametrize("directive", DIRECTIVES)
def test_what_the_reference_names_exists_and_is_documented(directive):
    assert found(directive).__doc__


def test_members_that_the_reference_names_exist():
    for text in REFERENCE.values():
        for directive, names in re.findall(r"^::: ([\w.]+)\n(?: .*\n)*?      members: \[(.*)\]$", text, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(found(directive), name), f"{directive}.{name}"


def test_navigation_names_pages_that_are_there_each_once(site):
    def pages(entries):
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(value) if isinstance(value, list) else [value]

    named = list(pages(site["nav"]))
    made = {"examples/tutorial.md"}  # by docs/hooks.py
    assert len(set(named)) == len(named)
    assert all((ROOT / page).is_file() for page in named if page not in made)
    assert {f"docs/reference/{name}.md" for name in REFERENCE} <= set(named)


def test_the_site_fetches_nothing_from_elsewhere(site):
    assert site["theme"]["font"] is False
    assert "analytics" not in site.get("extra", {})
    assert not site.get("extra_javascript")
    assert not site.get("extra_css")
