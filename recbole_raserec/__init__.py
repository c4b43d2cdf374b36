"""Retrieval-augmented sequential recommendation for RecBole."""

from __future__ import annotations

from typing import Any

from recbole_raserec import compat

compat.apply()

__version__ = "0.1.0"

#: Public name -> module; imported on first use, so that `recbole-raserec --help` need not load torch.
_PUBLIC = {
    "BERT4Rec": "recbole_raserec.recommendation.bert4rec",
    "BSARec": "recbole_raserec.recommendation.bsarec",
    "Config": "recbole_raserec.config",
    "DuoRec": "recbole_raserec.recommendation.duorec",
    "FEARec": "recbole_raserec.recommendation.fearec",
    "GRU4Rec": "recbole_raserec.recommendation.gru4rec",
    "MemoryBank": "recbole_raserec.retrieval.memory",
    "NARM": "recbole_raserec.recommendation.narm",
    "Recommender": "recbole_raserec.serving.recommender",
    "RaSeRec": "recbole_raserec.retrieval.raserec",
    "SASRec": "recbole_raserec.recommendation.sasrec",
    "compare": "recbole_raserec.comparison.driver",
    "load_checkpoint": "recbole_raserec.serving.checkpoint",
    "run_recbole_raserec": "recbole_raserec.quick_start",
    "tune_hyper_parameters": "recbole_raserec.tune",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recbole_raserec' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
