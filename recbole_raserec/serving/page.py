"""An explanation as a page that needs nothing beside itself."""

from __future__ import annotations

from typing import Any


def page(explanation: Any) -> str:
    """HTML of an :class:`~recbole_raserec.serving.explain.Explanation`."""
    return f"<!doctype html><pre>{explanation.to_text()}</pre>"
