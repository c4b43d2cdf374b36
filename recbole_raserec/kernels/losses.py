"""Softmax over all items without a [rows, items] tensor, and the contrastive loss between two views."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

#: Bytes of the logit buffer: small enough to stay in cache between its passes.
CHUNK_BYTES = 4 << 20

#: Below this probability the loss is taken from the logits.
TINY = 1e-30


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward and both gradients in one sweep over row chunks; two buffers of :data:`CHUNK_BYTES` are reused."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Any:
        rows, n_items = len(h), len(items)
        step = max(1, min(rows, CHUNK_BYTES // (n_items * h.element_size())))
        logits, probs = h.new_empty(step, n_items), h.new_empty(step, n_items)
        need_h, need_items = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_h = torch.empty_like(h) if need_h else None
        grad_items = torch.zeros_like(items) if need_items else None
        losses = h.new_empty(rows)
        transposed = items.t()
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            size = part.stop - start
            hc, tc, wc = h[part], targets[part], weights[part]
            z = torch.mm(hc, transposed, out=logits[:size])  # [c, V]
            p = torch.softmax(z, dim=1, out=probs[:size])  # [c, V]
            row = torch.arange(size, device=h.device)
            likelihood = p[row, tc]
            losses[part] = -likelihood.log()
            tiny = likelihood < TINY
            if tiny.any():  # p loses digits and underflows where the target is some 70 below the best logit
                losses[part][tiny] = z[tiny].logsumexp(dim=1) - z[tiny, tc[tiny]]
            if grad_h is None and grad_items is None:
                continue
            p[row, tc] -= 1.0
            if grad_h is not None:
                torch.mm(p, items, out=grad_h[part]).mul_(wc[:, None])
            if grad_items is not None:
                grad_items.addmm_(p.t(), hc * wc[:, None])
        ctx.save_for_backward(*(g for g in (grad_h, grad_items) if g is not None))
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (scale,) = grads
        saved = list(ctx.saved_tensors)
        if scale != 1.0:
            saved = [g * scale for g in saved]
        grad_h = saved.pop(0) if ctx.needs_input_grad[0] else None
        grad_items = saved.pop(0) if ctx.needs_input_grad[1] else None
        return grad_h, grad_items, None, None


def linear_cross_entropy(
    h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Mean of ``-log softmax(h @ items.T)[target]`` over the rows (report, loss L).

    Equal to ``F.cross_entropy(h @ items.T, targets)`` and its gradients to float rounding; holds two buffers of
    :data:`CHUNK_BYTES` instead of several [B, V] tensors. Where `items` needs no gradient none is computed.

    Args:
        h: [B, H] user vectors.
        items: [V, H] item vectors.
        targets: int64 [B].
        weights: [B], non-negative; the loss is their weighted mean. None weighs all rows alike.

    Returns:
        scalar tensor.
    """
    if weights is None:
        normalised = h.new_full((len(h),), 1.0 / max(len(h), 1))
    else:
        weights = weights.to(h.dtype)
        normalised = weights / weights.sum().clamp(min=torch.finfo(h.dtype).tiny)
    return _LinearCrossEntropy.apply(h.contiguous(), items, targets, normalised)


def info_nce(first: torch.Tensor, second: torch.Tensor, tau: float = 1.0, sim: str = "dot") -> torch.Tensor:
    """InfoNCE between two views over the 2B batch (DuoRec, arXiv 2110.05730, eq. 9).

    Row i of `first` and row i of `second` are each other's positive; all other 2B - 2 vectors are negatives.

    Args:
        first, second: [B, H].
        tau: temperature, > 0.
        sim: ``dot`` or ``cos``.

    Returns:
        scalar, mean over the 2B rows.
    """
    views = torch.cat([first, second])  # [2B, H]
    if sim == "cos":
        views = F.normalize(views, dim=1)
    logits = views @ views.t() / tau  # [2B, 2B]
    logits.fill_diagonal_(float("-inf"))
    size = len(first)
    positives = torch.arange(2 * size, device=views.device).roll(size)
    return F.cross_entropy(logits, positives)
