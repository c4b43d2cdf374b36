"""Searches over options. They need the extra `tune`, and are imported when they are used."""

from __future__ import annotations

from typing import Any

__all__ = [
    "tune_hyper_parameters",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from recbole_raserec.tuning.tune import tune_hyper_parameters

    return tune_hyper_parameters
