"""What an approximate index has learned, as plain arrays: stored beside the entries, so that a reopened memory searches
at once instead of finding centroids and lists, or linking its graph, again.

faiss's own files are not read: its reader trusts them. Here every number is checked before it is used.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import numpy as np

from recbole_raserec.retrieval.index import HNSWIndex, IVFIndex, IVFPQIndex, faiss

#: Arrays of a state and their types: centroids [L, H]; list of each of the first M entries [M], -1 for a removed one;
#: of a product quantiser its code books [pieces, codes, H / pieces] and each entry's code [M, bytes]; of a graph the
#: number of levels of each entry [M], and its neighbours, twice as many on the lowest level as on the others, -1: none.
ARRAYS = {
    "index_centroids": "<f4", "index_lists": "<i4", "index_codebooks": "<f4", "index_codes": "|u1",
    "index_levels": "<i4", "index_links": "<i4",
}  # fmt: skip
_LISTS, _GRAPH = {"index_centroids", "index_lists"}, {"index_levels", "index_links"}

State = dict[str, np.ndarray]


def state_of(index: Any) -> Optional[tuple[State, dict[str, Any]]]:
    """Arrays and description of an index; None for one that has nothing to store: exact search, and a graph whose links
    tell something of a removed entry.
    """
    if isinstance(index, HNSWIndex) and not index.overwritten:
        hnsw = index._index.hnsw
        levels, links = (faiss.vector_to_array(x).astype(np.int32) for x in (hnsw.levels, hnsw.neighbors))
        about = {"kind": index.kind, "trained_on": index.trained_on, "recall": index.recall}
        about.update(links=index.links, effort=index.effort, start=int(hnsw.entry_point))
        return {"index_levels": levels, "index_links": links}, about
    if not isinstance(index, IVFIndex):
        return None
    inner, size = index._index, len(index)
    quantiser: Any = faiss.downcast_index(inner.quantizer)
    centroids = faiss.rev_swig_ptr(quantiser.get_xb(), index.lists * inner.d).reshape(index.lists, inner.d).copy()
    lists = np.full(size, -1, np.int32)
    arrays = {"index_centroids": centroids, "index_lists": lists}
    coded = isinstance(index, IVFPQIndex)
    if coded:
        pq = inner.pq
        arrays["index_codebooks"] = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        arrays["index_codes"] = np.zeros((size, inner.code_size), np.uint8)
    for number in range(index.lists):
        count = inner.invlists.list_size(number)
        if not count:
            continue
        ids = faiss.rev_swig_ptr(inner.invlists.get_ids(number), count)
        lists[ids] = number
        if coded:
            codes = faiss.rev_swig_ptr(inner.invlists.get_codes(number), count * inner.code_size)
            arrays["index_codes"][ids] = codes.reshape(count, -1)
    return arrays, {"kind": index.kind, "trained_on": index.trained_on, "recall": index.recall}


def scrub(arrays: State, ids: np.ndarray) -> Optional[State]:
    """A copy of a state without anything of these entries; None for a graph, which cannot do without their links."""
    if "index_links" in arrays:
        return arrays if len(ids) == 0 or ids.min() >= len(arrays["index_levels"]) else None
    arrays = dict(arrays)
    for name, empty in (("index_lists", -1), ("index_codes", 0)):
        if name in arrays:
            arrays[name] = np.array(arrays[name])
            arrays[name][ids[ids < len(arrays[name])]] = empty
    return arrays


def restore(arrays: State, about: Any, vectors: np.ndarray, probes: int) -> Union[IVFIndex, HNSWIndex]:
    """The index that :func:`state_of` described, over the first of `vectors` [N, H].

    Raises:
        ValueError: the arrays do not describe an index over these vectors.
    """
    kinds: dict[str, type[IVFIndex]] = {kind.kind: kind for kind in (IVFIndex, IVFPQIndex)}
    known = isinstance(about, dict) and about.get("kind") in (*kinds, HNSWIndex.kind) and set(arrays) <= set(ARRAYS)
    if not known or not isinstance(about.get("trained_on"), int) or not isinstance(about.get("recall"), float):
        raise ValueError(f"its index is described by {about!r}")
    if about["kind"] == HNSWIndex.kind:
        return _restore_graph(arrays, about, vectors)
    coded = about["kind"] == IVFPQIndex.kind
    if set(arrays) != (_LISTS | {"index_codebooks", "index_codes"} if coded else _LISTS):
        raise ValueError(f"its index has the arrays {sorted(arrays)}")
    centroids, lists = arrays["index_centroids"], arrays["index_lists"]
    count, width = len(centroids), vectors.shape[1]
    if centroids.shape != (count, width) or not count or not np.isfinite(centroids).all():
        raise ValueError("its centroids do not fit the keys")
    if lists.ndim != 1 or len(lists) > len(vectors) or not len(lists) or lists.min() < -1 or lists.max() >= count:
        raise ValueError("its lists do not fit the entries")
    pieces = bits = 0
    if coded:
        books, codes = arrays["index_codebooks"], arrays["index_codes"]
        pieces, size, _ = books.shape if books.ndim == 3 else (0, 0, 0)
        bits = size.bit_length() - 1
        if not pieces or width % pieces or not 1 <= bits <= 8 or books.shape != (pieces, 1 << bits, width // pieces):
            raise ValueError("its code books do not fit the keys")
        if codes.shape != (len(lists), (pieces * bits + 7) // 8) or not np.isfinite(books).all():
            raise ValueError("its codes do not fit the entries")
    index: IVFIndex = kinds[about["kind"]].empty(width, count, probes, pieces, bits)
    inner = index._index
    index._quantizer.add(np.ascontiguousarray(centroids))
    inner.is_trained = True
    if coded:
        faiss.copy_array_to_vector(np.ascontiguousarray(arrays["index_codebooks"]).ravel(), inner.pq.centroids)
    order = np.argsort(lists, kind="stable")
    bounds = np.searchsorted(lists[order], np.arange(count + 1))
    for number in range(count):
        ids = order[bounds[number] : bounds[number + 1]]
        if len(ids):
            rows = arrays["index_codes"][ids] if coded else vectors[ids].view(np.uint8)
            inner.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(rows))
    inner.ntotal = int(bounds[-1] - bounds[0])
    index._size, index.trained_on, index.recall = len(lists), about["trained_on"], about["recall"]
    return index


def _restore_graph(arrays: State, about: dict[str, Any], vectors: np.ndarray) -> HNSWIndex:
    """A graph whose every link leads to an entry that stands on the link's level: faiss follows them unchecked."""
    links, effort, start = (about.get(name) for name in ("links", "effort", "start"))
    if set(arrays) != _GRAPH or not all(type(number) is int for number in (links, effort, start)):
        raise ValueError(f"its graph is described by {about!r} and the arrays {sorted(arrays)}")
    assert isinstance(links, int)
    assert isinstance(effort, int)
    assert isinstance(start, int)
    levels, neighbours = arrays["index_levels"], arrays["index_links"]
    size = len(levels)
    if levels.ndim != 1 or neighbours.ndim != 1 or not 0 < size <= len(vectors) or not 2 <= links <= 1024:
        raise ValueError("its graph does not fit the entries")
    if levels.min() < 1 or levels.max() > 64 or not 0 <= start < size or levels[start] != levels.max() or effort < 1:
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
    index = HNSWIndex.empty(vectors.shape[1], links, effort)
    inner: Any = index._index
    faiss.downcast_index(inner.storage).add(np.ascontiguousarray(vectors[:size]))
    hnsw = inner.hnsw
    faiss.copy_array_to_vector(np.ascontiguousarray(levels), hnsw.levels)
    faiss.copy_array_to_vector(offsets.astype(np.uint64), hnsw.offsets)
    hnsw.neighbors.resize(len(neighbours))
    faiss.rev_swig_ptr(hnsw.neighbors.data(), len(neighbours))[:] = neighbours
    hnsw.entry_point, hnsw.max_level, inner.ntotal = start, int(levels.max()) - 1, size
    index._size, index.trained_on, index.recall = size, about["trained_on"], about["recall"]
    return index
