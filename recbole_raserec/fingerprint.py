"""What decides a result, as one short hash: a run is reused or resumed only where nothing of it changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

#: Raised when the same options and data would train to something else than before.
TRAINING_VERSION = 2

#: The same for one model alone.
MODEL_VERSIONS = {"BERT4Rec": 3, "FEARec": 1, "GRU4Rec": 1, "NARM": 1, "RaSeRec": 1}


def data_fingerprint(dataset: Any) -> str:
    """Hash of the filtered, remapped interaction log and of the external ids behind it.

    Args:
        dataset: RecBole data set before its ``build()``.
    """
    digest = hashlib.sha256()
    log = dataset.inter_feat
    for field in (dataset.uid_field, dataset.iid_field, dataset.time_field):
        if field is not None and field in log:
            digest.update(field.encode())
            digest.update(np.ascontiguousarray(np.asarray(log[field], dtype=np.float64)).tobytes())
    for field in (dataset.uid_field, dataset.iid_field):
        digest.update("\x00".join(map(str, dataset.field2id_token[field])).encode())
    return digest.hexdigest()


def fingerprint(options: dict[str, Any], *parts: str) -> str:
    """Hash of training options and of anything else the result rests on."""
    payload = json.dumps([TRAINING_VERSION, options, list(parts)], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def version_of(model: str) -> list[str]:
    """What a fingerprint of `model` holds beside options and data."""
    return [str(MODEL_VERSIONS[model])] if model in MODEL_VERSIONS else []
