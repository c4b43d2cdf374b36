"""Retrieval-augmented sequential recommendation for RecBole."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from recbole_raserec.compat import apply

if importlib.util.find_spec("recbole") is None:
    # No dependency on Python 3.12 or later: its metadata ask for a ray that has no wheel there.
    raise ModuleNotFoundError("RecBole is not installed; pip install --no-deps recbole==1.2.1", name="recbole")

apply()

__version__ = "0.2.0"

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
    "prepare": "recbole_raserec.data.preparation",
    "run_recbole_raserec": "recbole_raserec.quick_start",
    "tune_hyper_parameters": "recbole_raserec.tuning",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # the same for type checkers
    from recbole_raserec.comparison import compare as compare
    from recbole_raserec.config import Config as Config
    from recbole_raserec.data.preparation import prepare as prepare
    from recbole_raserec.quick_start import run_recbole_raserec as run_recbole_raserec
    from recbole_raserec.recommendation import NARM as NARM
    from recbole_raserec.recommendation import BERT4Rec as BERT4Rec
    from recbole_raserec.recommendation import BSARec as BSARec
    from recbole_raserec.recommendation import DuoRec as DuoRec
    from recbole_raserec.recommendation import FEARec as FEARec
    from recbole_raserec.recommendation import GRU4Rec as GRU4Rec
    from recbole_raserec.recommendation import SASRec as SASRec
    from recbole_raserec.retrieval import MemoryBank as MemoryBank
    from recbole_raserec.retrieval import RaSeRec as RaSeRec
    from recbole_raserec.serving import Recommender as Recommender
    from recbole_raserec.serving import load_checkpoint as load_checkpoint
    from recbole_raserec.tuning import tune_hyper_parameters as tune_hyper_parameters


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'recbole_raserec' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
