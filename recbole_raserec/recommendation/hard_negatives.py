"""Items that are alike and that nobody had together: what DARec's third task tells apart."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

#: Items compared with all others at a time.
BLOCK = 512


def _histories(items: np.ndarray, offsets: np.ndarray, n_items: int) -> sp.csr_matrix:
    """Histories (items ``offsets[u]:offsets[u + 1]``) as a boolean matrix [users, V], for the products below."""
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return sp.csr_matrix((np.ones(len(items), dtype=np.float32), (owner, items)), shape=(len(offsets) - 1, n_items))


def mine_hard_negatives(vectors: torch.Tensor, items: np.ndarray, offsets: np.ndarray, count: int) -> torch.Tensor:
    """For each item the `count` most similar (cosine) of those that stand in no history together with it.

    Args:
        vectors: [V, D]. items, offsets: training histories.

    Returns:
        int64 [V, count], 0 where there are fewer; row 0 is empty.
    """
    n_items = len(vectors)
    had = _histories(items, offsets, n_items)
    unit = F.normalize(vectors.float(), dim=1)
    found = torch.zeros(n_items, count, dtype=torch.int64)
    transposed = had.T.tocsr()
    for start in range(0, n_items, BLOCK):
        rows = np.arange(start, min(start + BLOCK, n_items))
        together = (transposed[rows] @ had).toarray() > 0  # [b, V]
        together[:, 0] = True
        together[np.arange(len(rows)), rows] = True
        cosine = unit[rows] @ unit.T
        cosine[torch.from_numpy(together)] = -torch.inf
        best, place = cosine.topk(min(count, n_items), dim=1)
        found[rows, : place.shape[1]] = torch.where(best > -torch.inf, place, 0)
    found[0] = 0
    return found


def hard_contrast(
    h: torch.Tensor, targets: torch.Tensor, items: torch.Tensor, negatives: torch.Tensor, tau: float
) -> torch.Tensor:
    """InfoNCE of user vectors against their targets and the targets' hard negatives alone.

    ``-log exp(h v_t / tau) / (exp(h v_t / tau) + sum_n exp(h v_n / tau))``, mean over the rows that have a negative.

    Args:
        h: [N, H]. targets: int64 [N]. items: [V, H]. negatives: int64 [V, K], 0: none.
    """
    others = negatives[targets]  # [N, K]
    rows = (others > 0).any(dim=1)
    if not rows.any():
        return h.sum() * 0
    h, others, targets = h[rows], others[rows], targets[rows]
    candidates = torch.cat([targets[:, None], others], dim=1)  # [n, 1 + K]
    logits = torch.einsum("nh,nkh->nk", h, F.embedding(candidates, items)) / tau
    logits = logits.masked_fill(candidates == 0, float("-inf"))
    return F.cross_entropy(logits, torch.zeros_like(targets))
