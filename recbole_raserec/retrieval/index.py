"""Inner-product indexes over the memory's vectors, with faiss: exact, inverted files, product quantisation, graphs.

The state of an approximate index is stored beside the entries as plain arrays, so that a reopened memory searches at
once. faiss's own files are not read: its reader trusts them; here every number is checked before it is used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Optional

import numpy as np

import torch  # isort: skip  faiss comes after torch: imported first, it has a thread count of its own
import faiss  # isort: skip

logger = logging.getLogger(__name__)

INDEXES = ("auto", "flat", "ivf", "hnsw", "ivfpq")
AUTO_FLAT_LIMIT = 1_000_000
"""`auto` searches exactly up to this many entries."""

_MIN_POINTS_PER_LIST = 39  # below this, faiss warns that k-means has too few points per centroid
_MAX_POINTS_PER_LIST = 256  # more do not make better centroids
_RECALL_SAMPLE = 1_000
_RECALL_AT = 20
_RECALL_ENOUGH = 0.95
_DEVICE_SCORES = 1 << 28  # a GiB of scores at a time on a GPU

#: Arrays of a state and their types: centroids [L, H]; list of each of the first M entries [M], -1 for a removed one;
#: of a product quantiser its code books [pieces, codes, H / pieces] and each entry's code [M, bytes]; of a graph the
#: number of levels of each entry [M], and its neighbours, twice as many on the lowest level as on the others, -1: none.
STATE_ARRAYS = {
    "index_centroids": "<f4", "index_lists": "<i4", "index_codebooks": "<f4", "index_codes": "|u1",
    "index_levels": "<i4", "index_links": "<i4",
}  # fmt: skip

#: Arrays, and a JSON-able description.
State = tuple[dict[str, np.ndarray], dict[str, Any]]


def share_threads() -> None:
    """Let faiss use as many threads as torch: its own count is kept per thread."""
    faiss.omp_set_num_threads(torch.get_num_threads())


class Index:
    """What the indexes share: entries are added in order, removed by number, recall is measured.

    Attributes:
        exact: whether it finds the nearest entries for certain.
        coarse: whether its scores are only roughly those of the vectors.
        recall: share of the exact 20 nearest entries it finds, measured on up to 1,000 of its vectors as queries.
        trained_on: number of vectors it was built for.
    """

    kind, exact, coarse = "", False, False
    recall, trained_on = 0.0, 0
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
        """Whether a new index would serve `size` entries better."""
        return False

    def state(self) -> Optional[State]:
        """What is worth storing."""
        return None

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """The `fetch` best entries of each query.

        Args:
            queries: [Q, H] float32.
            fetch: at most N.

        Returns:
            inner products [Q, fetch] float32, falling, and entries [Q, fetch] int64; -1 where nothing was found, or
            fewer entries were looked at.
        """
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

    def _about(self) -> dict[str, Any]:
        return {"kind": self.kind, "trained_on": self.trained_on, "recall": self.recall}


class FlatIndex(Index):
    """Exact search: one blocked matrix product, and the best of each row; by faiss, or by torch on a GPU.

    Args:
        vectors: [N, H] float32, searched in place, without a copy.
        on_device: the same as a tensor of the device that is to search; None: faiss does.
    """

    kind, exact, recall = "flat", True, 1.0

    def __init__(self, vectors: np.ndarray, on_device: Optional[torch.Tensor] = None):
        self._vectors, self._size, self.on_device = vectors, len(vectors), on_device

    def remove(self, ids: np.ndarray) -> None:
        """Nothing to do: the owner of the vectors overwrites them, and the guard bars them."""

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """What faiss's IndexFlatIP.search runs, without its own copy of the vectors."""
        if self.on_device is not None:
            return self._search_on_device(queries, fetch, self.on_device)
        share_threads()
        return faiss.knn(queries, self._vectors, fetch, metric=faiss.METRIC_INNER_PRODUCT)

    @torch.no_grad()
    def _search_on_device(
        self, queries: np.ndarray, fetch: int, vectors: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same by torch, in products of `_DEVICE_SCORES` numbers."""
        scores, ids = np.empty((len(queries), fetch), np.float32), np.empty((len(queries), fetch), np.int64)
        rows = max(1, _DEVICE_SCORES // max(len(vectors), 1))
        with full_float32(vectors.device):
            for start in range(0, len(queries), rows):
                part = slice(start, start + rows)
                asked = torch.from_numpy(queries[part]).to(vectors.device)
                best = torch.topk(asked @ vectors.t(), fetch)
                scores[part], ids[part] = best.values.cpu().numpy(), best.indices.cpu().numpy()
        return scores, ids


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products in float32 within, neither in bfloat16 (autocast) nor in tf32: the guard's error bound rests on it."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


class IVFIndex(Index):
    """Vectors are grouped around centroids, a query looks into the nearest groups only.

    Args:
        vectors: [N, H] float32, N >= 1; copied into the index.
        lists: number of groups; fewer are made when N is too small to train that many.
        probes: groups a query looks into.
        seed: of the k-means that finds the centroids.
    """

    kind = "ivf"
    state_arrays = frozenset({"index_centroids", "index_lists"})

    def __init__(self, vectors: np.ndarray, lists: int = 128, probes: int = 8, seed: int = 0):
        size = len(vectors)
        used = max(1, min(lists, size // _MIN_POINTS_PER_LIST))
        if used < lists:
            logger.info(
                "index %s: %d entries are too few for ivf_lists=%d (%d entries a list are needed); using %d lists",
                *(self.kind, size, lists, _MIN_POINTS_PER_LIST, used),
            )
        self._open(vectors.shape[1], used, probes, *self._codes(vectors.shape[1], size))
        self._index.cp.seed = seed
        self._index.cp.min_points_per_centroid = 1  # the number of lists was chosen above; no second warning
        most, sample = _MAX_POINTS_PER_LIST * max(self.lists, 256), vectors
        if size > most:
            sample = vectors[np.sort(np.random.default_rng(seed).choice(size, most, replace=False))]
        self._index.train(sample)
        self.extend(vectors)
        self._finish(vectors, f"{self.lists} lists, {self.probes} probed")

    def _open(self, width: int, lists: int, probes: int, pieces: int, bits: int) -> None:
        """Begin without training and vectors."""
        share_threads()
        self.lists, self.probes = lists, min(probes, lists)
        quantizer = self._quantizer = faiss.IndexFlatIP(width)
        if pieces:
            self._index = faiss.IndexIVFPQ(quantizer, width, lists, pieces, bits, faiss.METRIC_INNER_PRODUCT)
            self._index.pq.cp.min_points_per_centroid = 1
        else:
            self._index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.nprobe = self.probes

    def _codes(self, width: int, size: int) -> tuple[int, int]:
        """Pieces a vector is cut into, and bits of each piece's code, for `size` vectors; 0: stored as they are."""
        return 0, 0

    def outgrown(self, size: int) -> bool:
        """Whether `size` is over twice what the index was trained on."""
        return size > 2 * self.trained_on

    def state(self) -> Optional[State]:
        """Centroids, the list of each entry, and of coded ones the code."""
        inner, lists = self._index, np.full(len(self), -1, np.int32)
        centroids = faiss.rev_swig_ptr(self._quantizer.get_xb(), self.lists * inner.d).reshape(self.lists, inner.d)
        arrays = {"index_centroids": centroids.copy(), "index_lists": lists}
        if self.coarse:
            pq = inner.pq
            arrays["index_codebooks"] = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
            arrays["index_codes"] = np.zeros((len(self), inner.code_size), np.uint8)
        for number in range(self.lists):
            if not (count := inner.invlists.list_size(number)):
                continue
            ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), count)
            lists[ids] = number
            if "index_codes" in arrays:
                codes = faiss.rev_swig_ptr(inner.invlists.get_codes(number), count * inner.code_size)
                arrays["index_codes"][ids] = codes.reshape(count, -1)
        return arrays, self._about()

    @classmethod
    def restored(cls, arrays: dict[str, np.ndarray], about: dict[str, Any], vectors: np.ndarray, probes: int) -> Index:
        """See `restore`."""
        if set(arrays) != cls.state_arrays:
            raise ValueError(f"its index has the arrays {sorted(arrays)}")
        centroids, lists, width = arrays["index_centroids"], arrays["index_lists"], vectors.shape[1]
        count = len(centroids)
        if centroids.shape != (count, width) or not count or not np.isfinite(centroids).all():
            raise ValueError("its centroids do not fit the keys")
        if lists.ndim != 1 or len(lists) > len(vectors) or not len(lists) or lists.min() < -1 or lists.max() >= count:
            raise ValueError("its lists do not fit the entries")
        index = cls.__new__(cls)
        index._open(width, count, probes, *cls._stored_codes(arrays, width))
        inner = index._index
        index._quantizer.add(np.ascontiguousarray(centroids))
        inner.is_trained = True
        if "index_codebooks" in arrays:
            faiss.copy_array_to_vector(np.ascontiguousarray(arrays["index_codebooks"]).ravel(), inner.pq.centroids)
        order = np.argsort(lists, kind="stable")
        bounds = np.searchsorted(lists[order], np.arange(count + 1))
        for number in range(count):
            ids = order[bounds[number] : bounds[number + 1]]
            if len(ids):
                rows = arrays["index_codes"][ids] if "index_codes" in arrays else vectors[ids].view(np.uint8)
                inner.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(rows))
        inner.ntotal = int(bounds[-1] - bounds[0])
        index._size, index.trained_on, index.recall = len(lists), about["trained_on"], about["recall"]
        return index

    @staticmethod
    def _stored_codes(arrays: dict[str, np.ndarray], width: int) -> tuple[int, int]:
        """Pieces and bits, as `_codes`, of a state whose code books and codes fit."""
        return 0, 0


class IVFPQIndex(IVFIndex):
    """An inverted file whose vectors are stored as product-quantised codes: a byte for every few dimensions.

    Its scores are coarse; the memory scores what it returns again with the vectors themselves.
    """

    kind, coarse = "ivfpq", True
    state_arrays = IVFIndex.state_arrays | {"index_codebooks", "index_codes"}

    def _codes(self, width: int, size: int) -> tuple[int, int]:
        pieces = next(m for m in range(max(1, width // 2), 0, -1) if width % m == 0)
        bits = 8 if size >= 256 * _MIN_POINTS_PER_LIST else max(1, (size // _MIN_POINTS_PER_LIST).bit_length() - 1)
        return pieces, bits

    @staticmethod
    def _stored_codes(arrays: dict[str, np.ndarray], width: int) -> tuple[int, int]:
        books, codes = arrays["index_codebooks"], arrays["index_codes"]
        pieces, size, _ = books.shape if books.ndim == 3 else (0, 0, 0)
        bits = size.bit_length() - 1
        if not pieces or width % pieces or not 1 <= bits <= 8 or books.shape != (pieces, 1 << bits, width // pieces):
            raise ValueError("its code books do not fit the keys")
        if codes.shape != (len(arrays["index_lists"]), (pieces * bits + 7) // 8) or not np.isfinite(books).all():
            raise ValueError("its codes do not fit the entries")
        return pieces, bits


class HNSWIndex(Index):
    """A hierarchical navigable small-world graph: no training, fast queries, more memory, slow to build.

    Args:
        vectors: [N, H] float32, copied.
        links: neighbours of a vector in the graph.
        effort: candidates kept while searching, at least the number of entries asked for; doubled, up to 16 times over,
            while the measured recall is below .95.
    """

    kind = "hnsw"

    def __init__(self, vectors: np.ndarray, links: int = 32, effort: int = 128):
        self._open(vectors.shape[1], links)
        self.extend(vectors)
        for self.effort in (effort * times for times in (1, 2, 4, 8, 16)):
            self._finish(vectors, f"{links} links, {self.effort} candidates")
            if self.recall >= _RECALL_ENOUGH:
                break

    def _open(self, width: int, links: int) -> None:
        """Begin without vectors."""
        share_threads()
        self.links = links
        self.overwritten = False  # whether a vector was removed, whose links still tell what it was like
        self._index = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = max(80, links * 2)

    def extend(self, vectors: np.ndarray) -> None:
        """As of `Index`."""
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

    def search(self, queries: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `Index`."""
        self._index.hnsw.efSearch = max(self.effort, fetch)
        return super().search(queries, fetch)

    def state(self) -> Optional[State]:
        """Levels and links; None where the links tell something of a removed entry."""
        if self.overwritten:
            return None
        hnsw = self._index.hnsw
        levels, links = (faiss.vector_to_array(x).astype(np.int32) for x in (hnsw.levels, hnsw.neighbors))
        about = {**self._about(), "links": self.links, "effort": self.effort, "start": int(hnsw.entry_point)}
        return {"index_levels": levels, "index_links": links}, about

    @classmethod
    def restored(cls, arrays: dict[str, np.ndarray], about: dict[str, Any], vectors: np.ndarray, probes: int) -> Index:
        """See `restore`; faiss follows links unchecked, so each must lead to an entry that stands on its level."""
        stated: list[Any] = [about.get(name) for name in ("links", "effort", "start")]
        if set(arrays) != {"index_levels", "index_links"} or not all(type(number) is int for number in stated):
            raise ValueError(f"its graph is described by {about!r} and the arrays {sorted(arrays)}")
        links, effort, start = stated
        levels, neighbours = arrays["index_levels"], arrays["index_links"]
        size = len(levels)
        if levels.ndim != 1 or neighbours.ndim != 1 or not 0 < size <= len(vectors) or not 2 <= links <= 1024:
            raise ValueError("its graph does not fit the entries")
        highest = int(levels.max())
        if levels.min() < 1 or highest > 64 or not 0 <= start < size or levels[start] != highest or effort < 1:
            raise ValueError("its graph's levels do not fit")
        offsets = np.concatenate([[0], np.cumsum((levels.astype(np.int64) + 1) * links)])  # 2 links and then 1 a level
        if len(neighbours) != offsets[-1] or neighbours.min() < -1 or neighbours.max() >= size:
            raise ValueError("its graph's links do not fit the entries")
        first = np.repeat(offsets[:-1] // links, levels + 1)  # of the runs of `links` links that an entry has
        level = np.maximum(np.arange(len(first)) - first - 1, 0)  # that a run is on: 0, 0, 1, 2, ...
        blocks = neighbours.reshape(-1, links)
        for rows in np.array_split(np.arange(len(blocks)), max(1, len(blocks) // (1 << 16))):
            reached = blocks[rows]
            if ((reached >= 0) & (levels[np.maximum(reached, 0)] <= level[rows][:, None])).any():
                raise ValueError("its graph's links lead to entries that do not stand on their level")
        index = cls.__new__(cls)
        index._open(vectors.shape[1], links)
        inner: Any = index._index
        faiss.downcast_index(inner.storage).add(np.ascontiguousarray(vectors[:size]))
        hnsw = inner.hnsw
        faiss.copy_array_to_vector(np.ascontiguousarray(levels), hnsw.levels)
        faiss.copy_array_to_vector(offsets.astype(np.uint64), hnsw.offsets)
        hnsw.neighbors.resize(len(neighbours))
        faiss.rev_swig_ptr(hnsw.neighbors.data(), len(neighbours))[:] = neighbours
        hnsw.entry_point, hnsw.max_level, inner.ntotal = start, highest - 1, size
        index.effort = effort
        index._size, index.trained_on, index.recall = size, about["trained_on"], about["recall"]
        return index


def resolve_kind(kind: str, size: int) -> str:
    """The index that `kind` (one of `INDEXES`) stands for at `size` entries."""
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


def restore(arrays: dict[str, np.ndarray], about: Any, vectors: np.ndarray, probes: int) -> Index:
    """The index that its `state()` described, over the first of `vectors` [N, H]; a query looks into `probes` groups.

    Raises:
        ValueError: the arrays do not describe an index over these vectors.
    """
    kinds: dict[str, Any] = {kind.kind: kind for kind in (IVFIndex, IVFPQIndex, HNSWIndex)}
    kind = kinds.get(str(about.get("kind"))) if isinstance(about, dict) else None
    if kind is None or not isinstance(about.get("trained_on"), int) or not isinstance(about.get("recall"), float):
        raise ValueError(f"its index is described by {about!r}")
    return kind.restored(arrays, about, vectors, probes)


def without(state: State, ids: np.ndarray) -> Optional[State]:
    """A copy of a state without anything of these entries; None for a graph, which cannot do without their links."""
    arrays, about = state
    if "index_links" in arrays:
        return state if len(ids) == 0 or ids.min() >= len(arrays["index_levels"]) else None
    arrays = dict(arrays)
    for name, empty in (("index_lists", -1), ("index_codes", 0)):
        if name in arrays:
            arrays[name] = np.array(arrays[name])
            arrays[name][ids[ids < len(arrays[name])]] = empty
    return arrays, about
