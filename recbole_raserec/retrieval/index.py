"""Exact inner-product search over the memory's vectors with faiss."""

from __future__ import annotations

import numpy as np

# Before faiss: in this order the wheels of the two share one OpenMP runtime instead of loading two.
import torch  # isort: skip
import faiss  # isort: skip


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
