"""What the tests of a memory in use share; their fixture is in conftest.py."""

from __future__ import annotations

from recbole_raserec import Recommender


def load(directory, **options):
    return Recommender.load(directory, "cpu", **options)


def journaled(directory) -> int:
    """Changes in the journal, by its lines; the first names it."""
    return len((directory / "journal.jsonl").read_bytes().splitlines()) - 1
