"""Retrieval-augmented sequential recommendation for RecBole."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from recbole_raserec.compat import apply

if importlib.util.find_spec("recbole") is None:
    # No dependency on Python 3.12 or later: its metadata ask for a ray that has no wheel there.
    raise ModuleNotFoundError("RecBole is not installed; pip install --no-deps recbole==1.2.1", name="recbole")

apply()

__version__ = "0.1.0"

#: Public name -> module; imported on first use, so that `recbole-raserec --help` need not load torch.
_PUBLIC = {
    "BERT4Rec": "recbole_raserec.recommendation",
    "BSARec": "recbole_raserec.recommendation",
    "Config": "recbole_raserec.config",
    "DuoRec": "recbole_raserec.recommendation",
    "FEARec": "recbole_raserec.recommendation",
    "GRU4Rec": "recbole_raserec.recommendation",
    "MemoryBank": "recbole_raserec.retrieval",
    "NARM": "recbole_raserec.recommendation",
    "Recommender": "recbole_raserec.serving",
    "RaSeRec": "recbole_raserec.retrieval",
    "SASRec": "recbole_raserec.recommendation",
    "compare": "recbole_raserec.comparison",
    "load_checkpoint": "recbole_raserec.serving",
    "run_recbole_raserec": "recbole_raserec.quick_start",
    "tune_hyper_parameters": "recbole_raserec.tuning",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recbole_raserec' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
