"""What the tests of a memory in use share; their fixture is in conftest.py."""

from __future__ import annotations

from recbole_raserec import Recommender


def load(directory, **options):
    return Recommender.load(directory, "cpu", **options)
