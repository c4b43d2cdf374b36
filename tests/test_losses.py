"""The chunked softmax loss and InfoNCE against the plain formulas."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import nce_loops

from recbole_raserec.kernels import losses, native
from recbole_raserec.kernels.losses import info_nce, linear_cross_entropy

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def problem(rows, n_items, size, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale
    items = torch.randn(n_items, size, generator=generator, dtype=torch.float64) * scale
    targets = torch.randint(0, n_items, (rows,), generator=generator)
    return h.to(dtype).requires_grad_(), items.to(dtype).requires_grad_(), targets


def plain(h, items, targets, weights=None):
    """Loss and gradients in float64 through the whole [B, V] tensor."""
    h, items = (x.detach().double().requires_grad_() for x in (h, items))
    each = F.cross_entropy(h @ items.T, targets, reduction="none")
    loss = each.mean() if weights is None else (each * weights.double()).sum() / weights.double().sum()
    return (loss, *torch.autograd.grad(loss, (h, items)))


def check(h, items, targets, weights=None, chunk=None, tolerance=None):
    with mock.patch.object(losses, "CHUNK_BYTES", chunk or losses.CHUNK_BYTES):
        loss = linear_cross_entropy(h, items, targets, weights)
    found = (loss, *torch.autograd.grad(loss, (h, items)))
    for mine, wanted in zip(found, plain(h, items, targets, weights)):
        scale = max(1.0, float(wanted.detach().abs().max()))
        assert float((mine.double() - wanted).detach().abs().max()) <= (tolerance or TOLERANCE[h.dtype]) * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows_per_chunk", [0, 1, 3, 10, 11, 1000])
def test_value_and_gradients_for_every_chunking(dtype, rows_per_chunk):
    h, items, targets = problem(10, 17, 5, dtype=dtype)
    check(h, items, targets, chunk=max(rows_per_chunk * 17 * h.element_size(), 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 15), st.integers(1, 6), st.integers(1, 4000), st.integers(0, 2**31),
    st.sampled_from([0.1, 1.0, 5.0]), st.booleans(),
)  # fmt: skip
def test_any_shape(rows, n_items, size, chunk, seed, scale, weighted):
    h, items, targets = problem(rows, n_items, size, seed, scale=scale)
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    check(h, items, targets, weights if weighted else None, chunk)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_weight_zero_do_not_exist(dtype):
    h, items, targets = problem(9, 13, 4, dtype=dtype)
    weights = torch.tensor([1, 0, 2, 0.5, 0, 1, 3, 0, 1], dtype=dtype)
    check(h, items, targets, weights, chunk=4 * 13 * h.element_size())
    kept = weights > 0
    loss = linear_cross_entropy(h, items, targets, weights)
    shorter = linear_cross_entropy(h[kept], items, targets[kept], weights[kept])
    assert abs((loss - shorter).item()) <= TOLERANCE[dtype]
    loss.backward()
    assert h.grad is not None
    assert not h.grad[~kept].any()
    assert h.grad[kept].any(dim=1).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_no_weight_at_all_gives_zero(dtype):
    h, items, targets = problem(3, 5, 2, dtype=dtype)
    loss = linear_cross_entropy(h, items, targets, torch.zeros(3))
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()
    assert not items.grad.any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gap", [50.0, 120.0, 1500.0, 1e5])
def test_targets_whose_probability_underflows(dtype, gap):
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    items = torch.tensor([[gap, 0.0], [0.0, gap], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([2, 0])
    assert torch.softmax(h @ items.T, dim=1)[0, 2] < 1e-20
    check(h, items, targets, tolerance=1e-6 if dtype == torch.float32 else 1e-10)
    assert linear_cross_entropy(h, items, targets).item() == pytest.approx(gap, rel=1e-6)


@pytest.mark.parametrize("frozen", ["h", "items", "both"])
def test_no_gradient_is_computed_where_none_is_wanted(frozen):
    h, items, targets = problem(6, 7, 3)
    wanted = plain(h, items, targets)
    h.requires_grad_(frozen == "items")
    items.requires_grad_(frozen == "h")
    loss = linear_cross_entropy(h, items, targets)
    assert torch.allclose(loss, wanted[0], rtol=0, atol=1e-10)
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        assert len(loss.grad_fn.saved_tensors) == 1
        loss.backward()
        free, gradient = (h, wanted[1]) if frozen == "items" else (items, wanted[2])
        assert torch.allclose(free.grad, gradient, rtol=0, atol=1e-10)
    assert (h.grad is None) == (frozen != "items")
    assert (items.grad is None) == (frozen != "h")


@pytest.mark.parametrize("scale", [1.0, -0.25, 3.0])
def test_upstream_gradient_and_repeated_backward(scale):
    h, items, targets = problem(6, 7, 3)
    wanted = plain(h, items, targets)
    loss = linear_cross_entropy(h, items, targets) * scale
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert torch.allclose(h.grad, times * scale * wanted[1], rtol=0, atol=1e-10)
        assert torch.allclose(items.grad, times * scale * wanted[2], rtol=0, atol=1e-10)


def test_vectors_need_not_be_contiguous():
    h, items, targets = problem(6, 7, 3)
    wanted = plain(h, items, targets)
    base = h.detach().T.contiguous().requires_grad_()
    table = items.detach().T.contiguous().requires_grad_()
    linear_cross_entropy(base.T, table.T, targets).backward()
    assert torch.allclose(base.grad.T, wanted[1], rtol=0, atol=1e-10)
    assert torch.allclose(table.grad.T, wanted[2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("sim", ["dot", "cos"])
@pytest.mark.parametrize("tau", [1.0, 0.2, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_info_nce_against_loops(sim, tau, rows):
    generator = torch.Generator().manual_seed(rows)
    first, second = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    wanted = nce_loops(first, second, tau, sim)
    assert float(info_nce(first, second, tau, sim)) == pytest.approx(wanted, abs=1e-10)
    assert float(info_nce(first.float(), second.float(), tau, sim)) == pytest.approx(wanted, abs=2e-5)
    if rows == 1:
        assert wanted == pytest.approx(0, abs=1e-12)  # the positive is the only candidate


def test_info_nce_gradient():
    first, second = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for sim in ("dot", "cos"):
        inputs = (first.clone().requires_grad_(), second.clone().requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b, sim=sim: info_nce(a, b, 0.5, sim), inputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_bfloat16_without_the_kernel_rounds_the_gradients_alone(weighted, monkeypatch):
    monkeypatch.setattr(native, "has_cross_entropy", lambda: False)
    h, items, targets = problem(40, 300, 16, dtype=torch.float32)
    weights = torch.rand(40) if weighted else None
    wanted = plain(h, items, targets, weights)
    with mock.patch.object(losses, "CHUNK_BYTES", 7 * 300 * 4):
        loss = linear_cross_entropy(h, items, targets, weights, "bfloat16")
    assert abs(loss.item() - wanted[0].item()) < 1e-5
    loss.backward()
    for found, exact in ((h.grad, wanted[1]), (items.grad, wanted[2])):
        apart = (found.double() - exact).norm() / exact.norm()
        assert 1e-5 < apart < 2**-7


def test_double_precision_is_never_lowered():
    h, items, targets = problem(4, 9, 3)
    found = torch.autograd.grad(linear_cross_entropy(h, items, targets, precision="bfloat16"), items)[0]
    assert torch.allclose(found, plain(h, items, targets)[2], rtol=0, atol=1e-10)
