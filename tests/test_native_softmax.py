"""The compiled softmax over all items against float64: losses, gradients, targets out of range."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.kernels import native
from recbole_raserec.kernels.losses import linear_cross_entropy

pytestmark = pytest.mark.skipif(native.loaded() is None, reason="no compiled kernels here (no C compiler?)")


needs_bfloat16 = pytest.mark.skipif(not native.has_cross_entropy(), reason="no AVX512-BF16 here")


@needs_bfloat16
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 150), st.integers(1, 70), st.integers(0, 2**31), st.booleans(),
    st.sampled_from([200, 1 << 24]),
)  # fmt: skip
def test_cross_entropy_against_double(rows, n_items, size, seed, weighted, kept):
    generator = torch.Generator().manual_seed(seed)
    # numbers that bfloat16 holds: what is left is the rounding of the exponentials
    h = (torch.randint(-8, 9, (rows, size), generator=generator) / 8).requires_grad_()
    items = (torch.randint(-8, 9, (n_items, size), generator=generator) / 8).requires_grad_()
    targets = torch.randint(n_items, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) + 0.1 if weighted else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "KEPT_BYTES", kept)
        loss = linear_cross_entropy(h, items, targets, weights, "bfloat16")
    loss.backward()
    hd, itemsd = (x.detach().double().requires_grad_() for x in (h, items))
    each = F.cross_entropy(hd @ itemsd.T, targets, reduction="none")
    shares = torch.ones(rows, dtype=torch.float64) if weights is None else weights.double()
    wanted = (each * shares).sum() / shares.sum()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    for found, exact in ((h.grad, hd.grad), (items.grad, itemsd.grad)):
        # each probability is off by at most 2^-8 of itself
        bound = 2**-7 * (float(shares.max() / shares.sum()) * rows) + 1e-6
        assert (found - exact).abs().max() < bound


@needs_bfloat16
def test_cross_entropy_skips_frozen_sides_and_far_targets():
    h = torch.randn(9, 16, requires_grad=True)
    items = torch.randn(50, 16)
    targets = torch.arange(9)
    linear_cross_entropy(h, items, targets, precision="bfloat16").backward()
    assert h.grad is not None
    losses, grad_h, grad_items = native.cross_entropy(h.detach(), items, targets, torch.ones(9), False, True)
    assert grad_h is None
    assert grad_items is not None
    far = torch.zeros(1, 16)
    far[0, 0] = 256.0
    table = torch.zeros(50, 16)
    table[7, 0] = 1.0
    losses, _, _ = native.cross_entropy(far, table, torch.tensor([3]), torch.ones(1), True, True)
    assert losses.item() == pytest.approx(256.0)  # its probability is beyond float32


@needs_bfloat16
def test_auto_precision_uses_the_kernel_on_single_floats_alone():
    h, items, targets = torch.randn(5, 16), torch.randn(20, 16), torch.arange(5)
    exact = linear_cross_entropy(h, items, targets)
    assert linear_cross_entropy(h, items, targets, precision="auto") != exact
    double = linear_cross_entropy(h.double(), items.double(), targets, precision="auto")
    assert double.item() == pytest.approx(F.cross_entropy(h.double() @ items.double().T, targets).item(), abs=1e-12)


@needs_bfloat16
def test_targets_beyond_the_items_are_refused():
    with pytest.raises(IndexError, match="targets"):
        native.cross_entropy(torch.randn(2, 16), torch.randn(5, 16), torch.tensor([1, 5]), torch.ones(2), True, True)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 23, 25, 47])
def test_an_odd_number_of_rows_reads_nothing_that_was_not_written(rows):
    """What the allocator hands out is made not-a-number first."""
    h, items, targets = torch.randn(rows, 16), torch.randn(70, 16), torch.randint(70, (rows,))
    for _ in range(30):
        dirt = [torch.full((size,), float("nan")) for size in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 64 * 24, 128 * 24)]
        del dirt
        _, grad_h, grad_items = native.cross_entropy(h, items, targets, torch.ones(rows), True, True)
        assert grad_h.isfinite().all()
        assert grad_items.isfinite().all()


@needs_bfloat16
def test_gradients_stay_accurate_where_the_target_is_almost_certain():
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(200, 32, generator=generator)
    targets = torch.randint(200, (64,), generator=generator)
    h = items[targets] * 0.5 + 0.1 * torch.randn(64, 32, generator=generator)
    h = h.bfloat16().float().requires_grad_()
    items = items.bfloat16().float()
    linear_cross_entropy(h, items, targets, precision="bfloat16").backward()
    hd = h.detach().double().requires_grad_()
    logits = hd @ items.double().T
    assert torch.softmax(logits, 1).gather(1, targets[:, None]).mean() > 0.95
    F.cross_entropy(logits, targets).backward()
    assert (h.grad - hd.grad).norm() / hd.grad.norm() < 0.006
