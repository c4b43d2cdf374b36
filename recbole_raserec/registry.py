"""Where RecBole looks things up by name: ours first, RecBole's otherwise."""

from __future__ import annotations

import importlib
from typing import Any

import recbole.data.dataset
from recbole.utils import ModelType
from recbole.utils import get_model as recbole_get_model
from recbole.utils import get_trainer as recbole_get_trainer

#: Model name -> module that defines the class of that name.
MODELS = {
    "SASRec": "recbole_raserec.recommendation.sasrec",
    "DuoRec": "recbole_raserec.recommendation.duorec",
    "BSARec": "recbole_raserec.recommendation.bsarec",
    "GRU4Rec": "recbole_raserec.recommendation.gru4rec",
    "NARM": "recbole_raserec.recommendation.narm",
    "FEARec": "recbole_raserec.recommendation.fearec",
    "BERT4Rec": "recbole_raserec.recommendation.bert4rec",
    "DARec": "recbole_raserec.recommendation.darec",
    "RaSeRec": "recbole_raserec.retrieval.raserec",
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


def get_dataset_class(config: Any) -> Any:
    """Data set class for the configured model: the lazy one where RecBole would use its SequentialDataset."""
    special = getattr(recbole.data.dataset, f"{config['model']}Dataset", None)
    if special is not None:
        return special
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        from recbole_raserec.data.dataset import SequenceDataset

        return SequenceDataset
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        return recbole.data.dataset.KnowledgeBasedDataset
    return recbole.data.dataset.Dataset
