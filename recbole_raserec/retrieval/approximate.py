"""Approximate inner-product indexes for large memories: inverted files, product quantisation, navigable graphs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from recbole_raserec.retrieval.index import FlatIndex, faiss, share_threads

logger = logging.getLogger(__name__)

_MIN_POINTS_PER_LIST = 39  # below this, faiss warns that k-means has too few points per centroid
_MAX_POINTS_PER_LIST = 256  # more do not make better centroids
_RECALL_SAMPLE = 1_000
_RECALL_AT = 20
_RECALL_ENOUGH = 0.95


class ApproximateIndex:
    """What the approximate indexes share: entries are added in order, removed by number, recall is measured.

    Attributes:
        recall: share of the exact 20 nearest entries it finds, measured on up to 1,000 of its vectors as queries.
        trained_on: number of vectors it was built for.
    """

    kind = ""
    exact = False
    coarse = False  # whether its scores are only roughly those of the vectors
    recall = 0.0
    trained_on = 0
    _index: Any
    _size = 0

    def __len__(self) -> int:
        """Vectors added, removed ones included."""
        return self._size

    def extend(self, vectors: np.ndarray) -> None:
        """Add those of `vectors` [M, H] that come after the N known so far."""
        share_threads()
        self._index.add_with_ids(vectors[self._size :], np.arange(self._size, len(vectors)))
        self._size = len(vectors)

    def remove(self, ids: np.ndarray) -> None:
        """Take vectors out; their numbers are not used again."""
        if len(ids):
            self._index.remove_ids(np.asarray(ids, dtype=np.int64))

    def outgrown(self, size: int) -> bool:
        """Whether `size` is over twice what the index was trained on."""
        return size > 2 * self.trained_on

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`FlatIndex.search`; -1 also where fewer than `fetch` entries were looked at."""
        share_threads()
        return self._index.search(queries, fetch)

    def _finish(self, vectors: np.ndarray, what: str) -> None:
        """Measure and report the recall."""
        self.trained_on = len(vectors)
        sample = np.linspace(0, len(vectors) - 1, min(len(vectors), _RECALL_SAMPLE)).astype(np.int64)
        fetch = min(_RECALL_AT, len(vectors))
        scores, _exact = FlatIndex(vectors).search(vectors[sample], fetch)
        found = self.search(vectors[sample], fetch)[1]  # [S, fetch]
        # By the exact score, not by entry: of entries with equal vectors any one is as good.
        reached = np.einsum("sh,sfh->sf", vectors[sample], vectors[np.maximum(found, 0)])
        floor = scores.min(axis=1, keepdims=True)
        self.recall = float(((found >= 0) & (reached >= floor - 1e-5 * np.abs(floor))).mean())
        logger.info(
            "index %s: %d entries, %s: recall@%d %.4f against exact search on %d sampled entries",
            *(self.kind, len(vectors), what, _RECALL_AT, self.recall, len(sample)),
        )


class IVFIndex(ApproximateIndex):
    """Vectors are grouped around centroids, a query looks into the nearest groups only.

    Args:
        vectors: [N, H] float32, N >= 1; copied into the index.
        lists: number of groups; fewer are made when N is too small to train that many.
        probes: groups a query looks into.
        seed: of the k-means that finds the centroids.

    Attributes:
        lists, probes: as really used.
    """

    kind = "ivf"

    def __init__(self, vectors: np.ndarray, lists: int = 128, probes: int = 8, seed: int = 0):
        share_threads()
        size = len(vectors)
        self.lists = max(1, min(lists, size // _MIN_POINTS_PER_LIST))
        if self.lists < lists:
            logger.info(
                "index %s: %d entries are too few for ivf_lists=%d (%d entries a list are needed); using %d lists",
                *(self.kind, size, lists, _MIN_POINTS_PER_LIST, self.lists),
            )
        self.probes = min(probes, self.lists)
        self._index = self._make(vectors.shape[1], *self._codes(vectors.shape[1], size))
        self._index.nprobe = self.probes
        self._index.cp.seed = seed
        self._index.cp.min_points_per_centroid = 1  # the number of lists was chosen above; no second warning
        self._index.train(_sample(vectors, _MAX_POINTS_PER_LIST * max(self.lists, 256), seed))
        self.extend(vectors)
        self._finish(vectors, f"{self.lists} lists, {self.probes} probed")

    @classmethod
    def empty(cls, width: int, lists: int, probes: int, pieces: int = 0, bits: int = 0) -> IVFIndex:
        """An index that was not trained and holds nothing; `pieces` and `bits` of a product quantiser."""
        share_threads()
        index = cls.__new__(cls)
        index.lists, index.probes = lists, min(probes, lists)
        index._index = index._make(width, pieces, bits)
        index._index.nprobe = index.probes
        return index

    def _codes(self, width: int, size: int) -> tuple[int, int]:
        """Pieces a vector is cut into, and bits of each piece's code, for `size` vectors; 0: stored as they are."""
        return 0, 0

    def _make(self, width: int, pieces: int, bits: int) -> Any:
        self._quantizer = faiss.IndexFlatIP(width)
        return faiss.IndexIVFFlat(self._quantizer, width, self.lists, faiss.METRIC_INNER_PRODUCT)


class IVFPQIndex(IVFIndex):
    """An inverted file whose vectors are stored as product-quantised codes: a byte for every few dimensions.

    Its scores are coarse; the memory scores what it returns again with the vectors themselves.
    """

    kind = "ivfpq"
    coarse = True

    def _codes(self, width: int, size: int) -> tuple[int, int]:
        pieces = next(m for m in range(max(1, width // 2), 0, -1) if width % m == 0)
        bits = 8 if size >= 256 * _MIN_POINTS_PER_LIST else max(1, (size // _MIN_POINTS_PER_LIST).bit_length() - 1)
        return pieces, bits

    def _make(self, width: int, pieces: int, bits: int) -> Any:
        self._quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(self._quantizer, width, self.lists, pieces, bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1
        return index


class HNSWIndex(ApproximateIndex):
    """A hierarchical navigable small-world graph: no training, fast queries, more memory, slow to build.

    Args:
        vectors: [N, H] float32, copied. links: neighbours of a vector in the graph. effort: candidates kept while
            searching, at least the number of entries asked for; doubled, up to 16 times over, while the measured recall
            is below .95.

    Attributes:
        links, effort: as used. overwritten: whether a vector was removed, whose links still tell what it was like.
    """

    kind = "hnsw"

    def __init__(self, vectors: np.ndarray, links: int = 32, effort: int = 128):
        self._make(vectors.shape[1], links)
        self.extend(vectors)
        for self.effort in (effort * times for times in (1, 2, 4, 8, 16)):
            self._finish(vectors, f"{links} links, {self.effort} candidates")
            if self.recall >= _RECALL_ENOUGH:
                break

    @classmethod
    def empty(cls, width: int, links: int, effort: int) -> HNSWIndex:
        """A graph without vectors."""
        index = cls.__new__(cls)
        index._make(width, links)
        index.effort = effort
        return index

    def _make(self, width: int, links: int) -> None:
        share_threads()
        self.links, self.overwritten = links, False
        self._index = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = max(80, links * 2)

    def extend(self, vectors: np.ndarray) -> None:
        """See :meth:`ApproximateIndex.extend`."""
        share_threads()
        self._index.add(vectors[self._size :])
        self._size = len(vectors)

    def remove(self, ids: np.ndarray) -> None:
        """Overwrite vectors with zeros; the graph's links through them stay, and searches may return them."""
        if len(ids):
            storage: Any = faiss.downcast_index(self._index.storage)
            stored = faiss.rev_swig_ptr(storage.get_xb(), self._size * self._index.d).reshape(self._size, -1)
            self.overwritten |= bool(stored[ids].any())
            stored[ids] = 0

    def outgrown(self, size: int) -> bool:
        """Never: the graph grows with its entries."""
        return False

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`FlatIndex.search`."""
        share_threads()
        self._index.hnsw.efSearch = max(self.effort, fetch)
        return self._index.search(queries, fetch)


def _sample(vectors: np.ndarray, size: int, seed: int) -> np.ndarray:
    if len(vectors) <= size:
        return vectors
    return vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), size, replace=False))]
