"""Exact inner-product search over the memory's vectors with faiss."""

from __future__ import annotations

import numpy as np

import torch  # isort: skip
import faiss  # isort: skip
import logging
from typing import Any, Union


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
        share_threads()
        # What IndexFlatIP.search runs, without IndexFlatIP's own copy of the vectors.
        return faiss.knn(queries, self._vectors, fetch, metric=faiss.METRIC_INNER_PRODUCT)


def share_threads() -> None:
    """Let faiss use as many threads as torch: imported before torch, faiss has a count of its own, kept per thread."""
    faiss.omp_set_num_threads(torch.get_num_threads())


# Approximate inner-product indexes for large memories: inverted files, product quantisation, navigable graphs.


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


# Which index a memory gets.


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
