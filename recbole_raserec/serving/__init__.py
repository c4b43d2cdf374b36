"""A finished run at work: recommendations, explanations, a memory that lives on.

Names are imported when they are used, so that the options of `serve` are shown without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recbole_raserec.serving.loading import load_checkpoint
    from recbole_raserec.serving.recommender import Recommender

__all__ = [
    "Recommender",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "load_checkpoint":
        from recbole_raserec.serving import loading as module
    elif name == "Recommender":
        from recbole_raserec.serving import recommender as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
