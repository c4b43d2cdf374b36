"""Where RecBole looks things up by name: ours first, RecBole's otherwise."""

from __future__ import annotations

import importlib
from typing import Any

from recbole.utils import get_model as recbole_get_model
from recbole.utils import get_trainer as recbole_get_trainer

#: Model name -> folder whose face has the class of that name.
MODELS = {
    "SASRec": "recbole_raserec.recommendation",
    "DuoRec": "recbole_raserec.recommendation",
    "BSARec": "recbole_raserec.recommendation",
    "GRU4Rec": "recbole_raserec.recommendation",
    "NARM": "recbole_raserec.recommendation",
    "FEARec": "recbole_raserec.recommendation",
    "BERT4Rec": "recbole_raserec.recommendation",
    "DARec": "recbole_raserec.recommendation.darec",
    "RaSeRec": "recbole_raserec.retrieval",
}


def get_model(name: str) -> Any:
    """Model class by name.

    Raises:
        ValueError: neither this package nor RecBole has a model of that name.
    """
    if name in MODELS:
        return getattr(importlib.import_module(MODELS[name]), name)
    return recbole_get_model(name)


def get_trainer_class(config: Any) -> Any:
    """RecBole's trainer class for the configured model."""
    return recbole_get_trainer(config["MODEL_TYPE"], config["model"])


#: Models whose scores, loss and gradients stay the same when ``item_seq`` [B, L] is cut to the longest sequence of the
#: batch: padding never enters them. (In RecBole the padding row of an embedding is initialised like any other, so that
#: a model that sums over positions without a mask, STAMP for one, does depend on L.) A batch transform, such as the
#: masking of BERT4Rec, has to come after the cut.
TRIMMABLE: frozenset[str] = frozenset(
    {
        "BERT4Rec",
        "CORE",
        "FDSA",
        "FPMC",
        "GCSAN",
        "GRU4Rec",
        "GRU4RecF",
        "GRU4RecKG",
        "KSR",
        "NARM",
        "S3Rec",
        "SASRec",
        "SASRecF",
        "SRGNN",
        "TransRec",
    }
)


def trims(model: Any) -> bool:
    """Tells whether batches for ``model`` may be cut to their longest sequence without a change of any result.

    A model that :data:`TRIMMABLE` does not know says so itself with a class attribute ``trims = True``.

    Args:
        model: a model or its class.
    """
    kind = model if isinstance(model, type) else type(model)
    return bool(getattr(kind, "trims", kind.__name__ in TRIMMABLE))


#: What the option ``backbone`` may name.
SUPPORTED: tuple[str, ...] = (
    "BERT4Rec", "BSARec", "CORE", "Caser", "DARec", "DuoRec", "FEARec", "FOSSIL", "FPMC", "GCSAN", "GRU4Rec",
    "HGN", "HRM", "LightSANs", "NARM", "NPE", "NextItNet", "SASRec", "SHAN", "SINE", "SRGNN", "STAMP",
)  # fmt: skip

_FEATURES = "reads item features, which a checkpoint that reloads without the data set does not hold"
_KNOWLEDGE = "reads pre-trained knowledge-graph vectors that come with the data set"
_MIXTURE = "ranks by a mixture of probabilities (items seen, items near, all items), not by one dot product"

#: RecBole 1.2.1's sequential models that do not, and why.
REFUSED: dict[str, str] = {
    "DIEN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "DIN": "scores one (sequence, candidate) pair at a time; the user vector depends on the candidate",
    "FDSA": _FEATURES,
    "GRU4RecCPR": _MIXTURE,
    "GRU4RecF": _FEATURES,
    "GRU4RecKG": _KNOWLEDGE,
    "KSR": _KNOWLEDGE,
    "RepeatNet": "ranks by a mixture of two probabilities (repeat, explore), not by one dot product",
    "S3Rec": "reads item attributes, and is trained in two runs (pre-training, then fine-tuning)",
    "SASRecCPR": _MIXTURE,
    "SASRecF": _FEATURES,
    "TransRec": "ranks by a Euclidean distance, not by a dot product",
}
