"""A finished run at work: recommendations, explanations, a memory that lives on.

Names are imported when they are used, so that the options of `serve` are shown without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_raserec.serving.export import write_programs, write_vectors
    from recbole_raserec.serving.journal import check_directory
    from recbole_raserec.serving.live import load_checkpoint
    from recbole_raserec.serving.recommender import Recommender

__all__ = ["Recommender", "check_directory", "load_checkpoint", "write_programs", "write_vectors"]

_MODULES = {"Recommender": "recommender", "check_directory": "journal", "load_checkpoint": "live"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'export')}"), name)
