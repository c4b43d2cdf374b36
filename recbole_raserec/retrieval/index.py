"""Inner-product search over the memory's vectors with faiss: exact, or through an inverted file."""

from __future__ import annotations

import logging
from typing import Union

import numpy as np

# Before faiss: in this order the wheels of the two share one OpenMP runtime instead of loading two.
import torch  # isort: skip
import faiss  # isort: skip

logger = logging.getLogger(__name__)

INDEXES = ("auto", "flat", "ivf")
AUTO_FLAT_LIMIT = 1_000_000
"""`auto` searches exactly up to this many entries."""

_MIN_POINTS_PER_LIST = 39  # below this, faiss warns that k-means has too few points per centroid
_RECALL_SAMPLE = 1_000
_RECALL_AT = 20


class FlatIndex:
    """Exact search: one blocked matrix product, and the best of each row.

    Args:
        vectors: [N, H] float32, searched in place, without a copy.
    """

    kind = "flat"
    exact = True
    recall = 1.0

    def __init__(self, vectors: np.ndarray):
        self._vectors = vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def extend(self, vectors: np.ndarray) -> None:
        """Take over all `vectors` [M, H], of which the first N are those known so far."""
        self._vectors = vectors

    def outgrown(self, size: int) -> bool:
        """Whether an index built afresh would serve `size` entries better."""
        return False

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """The `fetch` best entries of each query.

        Args:
            queries: [Q, H] float32.
            fetch: at most N.

        Returns:
            inner products [Q, fetch] float32, falling, and entries [Q, fetch] int64; -1 where nothing was found.
        """
        _share_threads()
        # What IndexFlatIP.search runs, without IndexFlatIP's own copy of the vectors.
        return faiss.knn(queries, self._vectors, fetch, metric=faiss.METRIC_INNER_PRODUCT)


class IVFIndex:
    """Approximate search: vectors are grouped around centroids, a query looks into the nearest groups only.

    Args:
        vectors: [N, H] float32, N >= 1; copied into the index.
        lists: number of groups; fewer are made when N is too small to train that many.
        probes: groups a query looks into.
        seed: of the k-means that finds the centroids.

    Attributes:
        lists, probes: as really used.
        recall: share of the exact 20 nearest entries it finds, measured on up to 1,000 of `vectors` as queries.
    """

    kind = "ivf"
    exact = False

    def __init__(self, vectors: np.ndarray, lists: int = 128, probes: int = 8, seed: int = 0):
        _share_threads()
        size, width = vectors.shape
        self.lists = max(1, min(lists, size // _MIN_POINTS_PER_LIST))
        if self.lists < lists:
            logger.info(
                "index ivf: %d entries are too few for ivf_lists=%d (%d entries a list are needed); using %d lists",
                *(size, lists, _MIN_POINTS_PER_LIST, self.lists),
            )
        self.probes = min(probes, self.lists)
        self._quantizer = faiss.IndexFlatIP(width)
        self._index = faiss.IndexIVFFlat(self._quantizer, width, self.lists, faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = self.probes
        self._index.cp.seed = seed
        self._index.cp.min_points_per_centroid = 1  # the number of lists was chosen above; no second warning
        self._index.train(vectors)
        self._index.add(vectors)
        self._trained_on = size
        self.recall = self._measure(vectors)
        logger.info(
            "index ivf: %d entries in %d lists, %d probed: recall@%d %.4f against exact search on %d sampled entries",
            *(size, self.lists, self.probes, _RECALL_AT, self.recall, min(size, _RECALL_SAMPLE)),
        )

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def extend(self, vectors: np.ndarray) -> None:
        """Add those of `vectors` [M, H] that come after the N known so far."""
        _share_threads()
        self._index.add(vectors[len(self) :])

    def outgrown(self, size: int) -> bool:
        """Whether `size` is over twice what the centroids were trained on."""
        return size > 2 * self._trained_on

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`FlatIndex.search`; -1 also where the probed lists hold fewer than `fetch` entries."""
        _share_threads()
        return self._index.search(queries, fetch)

    def _measure(self, vectors: np.ndarray) -> float:
        sample = np.linspace(0, len(vectors) - 1, min(len(vectors), _RECALL_SAMPLE)).astype(np.int64)
        fetch = min(_RECALL_AT, len(vectors))
        exact = np.sort(FlatIndex(vectors).search(vectors[sample], fetch)[0], axis=1)  # [S, fetch]
        found = self.search(vectors[sample], fetch)[0]
        # By score, not by entry: of entries with equal vectors any one is as good.
        return float((found >= exact[:, :1] - 1e-5 * np.abs(exact[:, :1])).mean())


Index = Union[FlatIndex, IVFIndex]


def resolve_kind(kind: str, size: int) -> str:
    """The index that `kind` (`auto`, `flat`, `ivf`) stands for at `size` entries."""
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
    return IVFIndex(vectors, lists, probes, seed)


def _share_threads() -> None:
    """Let faiss use as many threads as torch: imported before torch, faiss has a count of its own, kept per thread."""
    faiss.omp_set_num_threads(torch.get_num_threads())
