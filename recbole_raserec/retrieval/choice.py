"""Which index a memory gets."""

from __future__ import annotations

import logging
from typing import Union

import numpy as np

from recbole_raserec.retrieval.approximate import HNSWIndex, IVFIndex, IVFPQIndex
from recbole_raserec.retrieval.index import FlatIndex

logger = logging.getLogger(__name__)

INDEXES = ("auto", "flat", "ivf", "hnsw", "ivfpq")
AUTO_FLAT_LIMIT = 1_000_000
"""`auto` searches exactly up to this many entries."""

Index = Union[FlatIndex, IVFIndex, IVFPQIndex, HNSWIndex]


def resolve_kind(kind: str, size: int) -> str:
    """The index that `kind` (one of :data:`INDEXES`) stands for at `size` entries."""
    if kind != "auto":
        return kind
    return "flat" if size <= AUTO_FLAT_LIMIT else "ivf"


def make_index(kind: str, vectors: np.ndarray, lists: int, probes: int, seed: int = 0) -> Index:
    """Build the index over `vectors` [N, H]; with `auto`, log which one was taken and why."""
    chosen = resolve_kind(kind, len(vectors))
    if kind == "auto":
        logger.info(
            "index auto: %s, as %d entries are %s the limit of %d for exact search",
            *(chosen, len(vectors), "within" if chosen == "flat" else "over", AUTO_FLAT_LIMIT),
        )
    if chosen == "flat":
        return FlatIndex(vectors)
    if chosen == "hnsw":
        return HNSWIndex(vectors)
    return (IVFPQIndex if chosen == "ivfpq" else IVFIndex)(vectors, lists, probes, seed)
