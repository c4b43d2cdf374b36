"""Softmax over all items without a [rows, items] tensor, and the contrastive loss between two views."""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from recbole_raserec.kernels import native

#: Bytes of the logit buffer: on a CPU small enough to stay in cache between its passes, elsewhere few, large kernels.
CHUNK_BYTES, DEVICE_CHUNK_BYTES = 4 << 20, 256 << 20
#: Below this probability the loss is taken from the logits.
TINY = 1e-30
_SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8 and later


class _SavedGradients(torch.autograd.Function):
    """A function of rows, items and three more, whose forward pass saves the gradients of the first two."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        """The saved gradients, None where none was asked for, times that of the loss."""
        whole = grads[0].device.type == "cpu" and grads[0] == 1.0  # elsewhere the question would wait for the device
        saved = iter([g if whole else g * grads[0] for g in ctx.saved_tensors])
        return (*(next(saved) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None)


class _LinearCrossEntropy(_SavedGradients):
    """Forward and both gradients in one sweep over row chunks; one buffer of `CHUNK_BYTES` is reused.

    `low`: dtype in which the two products of the gradients are computed, or None for that of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, low: Any
    ) -> Any:
        rows, n_items = len(h), len(items)
        step = max(1, min(rows, CHUNK_BYTES // (n_items * h.element_size())))
        logits = h.new_empty(step, n_items)
        grad_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_items = torch.zeros_like(items) if ctx.needs_input_grad[1] else None
        if low is not None:
            low_probs, low_items = logits.to(low), items.to(low)
        losses = h.new_empty(rows)
        transposed, weighted = items.t(), h * weights[:, None]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            size = part.stop - start
            hc, tc = h[part], targets[part, None]
            z = torch.mm(hc, transposed, out=logits[:size])  # [c, V]
            p = torch.softmax(z, dim=1, out=z)  # [c, V], over the logits
            likelihood = p.gather(1, tc)  # [c, 1]
            losses[part] = -likelihood.log().squeeze(1)
            tiny = (likelihood < TINY).squeeze(1)
            if tiny.any():  # p loses digits and underflows where the target is some 70 below the best logit
                far = hc[tiny] @ transposed
                losses[part][tiny] = far.logsumexp(dim=1) - far.gather(1, tc[tiny]).squeeze(1)
            if grad_h is None and grad_items is None:
                continue
            p.scatter_add_(1, tc, p.new_full((size, 1), -1.0))
            if low is not None:
                q = low_probs[:size].copy_(p)
                if grad_h is not None:
                    grad_h[part] = q @ low_items
                if grad_items is not None:
                    grad_items.add_(q.t() @ weighted[part].to(low))
                continue
            if grad_h is not None:
                torch.mm(p, items, out=grad_h[part])
            if grad_items is not None:
                grad_items.addmm_(p.t(), weighted[part])
        if grad_h is not None:
            grad_h.mul_(weights[:, None])
        ctx.save_for_backward(*(g for g in (grad_h, grad_items) if g is not None))
        return (losses * weights).sum()


class _DeviceCrossEntropy(_SavedGradients):
    """The same for a GPU: chunks of `DEVICE_CHUNK_BYTES`, and nothing that waits for the device.

    `low`: dtype of the factors of all three products, whose sums stay those of the inputs; None: that of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, low: Any
    ) -> Any:
        rows, n_items = len(h), len(items)
        step = max(1, min(rows, DEVICE_CHUNK_BYTES // (n_items * h.element_size())))
        needs_h, needs_items = ctx.needs_input_grad[:2]
        table = items if low is None else items.to(low)
        losses, grads, grad_items = [], [], torch.zeros_like(items) if needs_items else None
        for hc, tc, wc in zip(h.split(step), targets.split(step), weights.split(step)):
            z = _product(hc.to(table.dtype), table.t(), h.dtype)  # [c, V]
            total = z.logsumexp(dim=1, keepdim=True)  # [c, 1]
            losses.append((total - z.gather(1, tc[:, None])).squeeze(1))
            if not (needs_h or needs_items):
                continue
            p = z.sub_(total).exp_().scatter_add_(1, tc[:, None], z.new_full((len(hc), 1), -1.0))
            p = p.mul_(wc[:, None]).to(table.dtype)
            if needs_h:
                grads.append(_product(p, table, h.dtype))
            if grad_items is not None:
                grad_items += _product(p.t(), hc.to(table.dtype), h.dtype)
        saved = [torch.cat(grads) if grads else torch.zeros_like(h)] if needs_h else []
        ctx.save_for_backward(*saved, *([] if grad_items is None else [grad_items]))
        return (torch.cat(losses) * weights).sum() if losses else h.new_zeros(())


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b with its sums and result in `dtype`, whatever the factors are in."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and _SUMS_IN_FLOAT32 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _CompiledCrossEntropy(_SavedGradients):
    """The compiled kernel, see `native.cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, keep: bool
    ) -> Any:
        wanted = (keep and needed for needed in ctx.needs_input_grad[:2])
        losses, grad_h, grad_items = native.cross_entropy(h, items, targets, weights, *wanted)
        ctx.save_for_backward(*(g for g in (grad_h, grad_items) if g is not None))
        return (losses * weights).sum()


def linear_cross_entropy(
    h: torch.Tensor, items: torch.Tensor, targets: torch.Tensor, weights: Optional[torch.Tensor] = None,
    precision: str = "float32",
) -> torch.Tensor:  # fmt: skip
    """Mean of `-log softmax(h @ items.T)[target]` over the rows (report, loss L).

    Equal to `F.cross_entropy(h @ items.T, targets)` and its gradients to float rounding; holds a buffer of
    `CHUNK_BYTES` instead of several [B, V] tensors. Where `items` needs no gradient none is computed.

    Args:
        h: user vectors [B, H].
        items: item vectors [V, H].
        targets: int64 [B].
        weights: [B], non-negative; the loss is their weighted mean. None weighs all rows alike.
        precision: `float32`: that of the inputs. `bfloat16`: float32 inputs are rounded to bfloat16 for the
            products, whose sums stay float32; the gradients are off by some .2 %, at random, and the loss by less than
            .1 %. With the compiled kernel this takes half the time. `auto`: bfloat16 where the inputs are float32, and
            the kernel is there (`has_cross_entropy`) or a GPU multiplies in it.

    Returns:
        scalar tensor.
    """
    h = h.to(items.dtype)  # autocast (`enable_amp`) may have made it shorter
    if weights is None:
        normalised = h.new_full((len(h),), 1.0 / max(len(h), 1))
    else:
        weights = weights.to(h.dtype)
        normalised = weights / weights.sum().clamp(min=torch.finfo(h.dtype).tiny)
    low = None
    with torch.autocast(h.device.type, enabled=False):
        if h.dtype == torch.float32 and precision != "float32":
            if h.device.type == "cpu" and native.has_cross_entropy():
                return _CompiledCrossEntropy.apply(h, items, targets, normalised, torch.is_grad_enabled())
            low = torch.bfloat16 if precision == "bfloat16" or _by_default(h.device) else None
        kind = _LinearCrossEntropy if h.device.type == "cpu" else _DeviceCrossEntropy
        return kind.apply(h.contiguous(), items, targets, normalised, low)


def _by_default(device: torch.device) -> bool:
    return _SUMS_IN_FLOAT32 and multiplies_in_bfloat16(device)


def multiplies_in_bfloat16(device: torch.device) -> bool:
    """Whether `device` is a GPU with units for it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def info_nce(
    first: torch.Tensor, second: torch.Tensor, tau: float = 1.0, sim: str = "dot",
    weights: Optional[torch.Tensor] = None,
) -> torch.Tensor:  # fmt: skip
    """InfoNCE between two views over the 2B batch (DuoRec, arXiv 2110.05730, eq. 9).

    Row i of `first` and row i of `second` are each other's positive; all other 2B - 2 vectors are negatives.

    Args:
        first: [B, H].
        second: [B, H].
        tau: temperature, > 0.
        sim: `dot` or `cos`.
        weights: [B], of the rows; None: 1. As negatives all rows count alike.

    Returns:
        scalar, mean over the 2B rows of the loss times the weight.
    """
    views = torch.cat([first, second])  # [2B, H]
    if sim == "cos":
        views = F.normalize(views, dim=1)
    logits = views @ views.t() / tau  # [2B, 2B]
    logits.fill_diagonal_(float("-inf"))
    size = len(first)
    positives = torch.arange(2 * size, device=views.device).roll(size)
    if weights is None:
        return F.cross_entropy(logits, positives)
    return (F.cross_entropy(logits, positives, reduction="none") * torch.cat([weights, weights])).mean()
