"""FastDropout is a dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recbole_raserec.kernels.dropout import FastDropout, use_fast_dropout

N = 200_003  # not a multiple of the words the mask is cut from


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_share_scale_and_mean(p):
    torch.manual_seed(0)
    out = FastDropout(p)(torch.ones(N, dtype=torch.float64))
    dropped = float((out == 0).double().mean())
    deviation = (p * (1 - p) / N) ** 0.5
    assert abs(dropped - p) < 4 * deviation + 1 / 65536
    assert float(out.mean()) == pytest.approx(1, abs=4 * deviation / (1 - p))
    kept = out[out != 0]
    assert float(kept.min()) == float(kept.max()) == pytest.approx(1 / (1 - p), rel=1e-5 / (1 - p))
    if p == 0.5:
        assert float(kept[0]) == 2


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64])
def test_elements_are_dropped_independently(lag):
    torch.manual_seed(1)
    keep = (FastDropout(0.5)(torch.ones(N)) > 0).double() - 0.5
    correlation = float((keep[:-lag] * keep[lag:]).mean() / 0.25)
    assert abs(correlation) < 4.5 / N**0.5


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4, 5), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_types(shape, dtype):
    out = FastDropout(0.4)(torch.ones(shape, dtype=dtype))
    assert out.shape == shape
    assert out.dtype == dtype


def test_same_mask_backward():
    x = (torch.rand(40, 30, dtype=torch.float64) + 0.5).T.requires_grad_()
    leaf = x.detach().requires_grad_()
    out = FastDropout(0.3)(leaf)
    out.sum().backward()
    assert 0 < int((out == 0).sum()) < out.numel()
    assert torch.allclose(out / leaf, leaf.grad)
    small = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)

    def seeded(value):
        torch.manual_seed(3)
        return FastDropout(0.5)(value)

    assert torch.autograd.gradcheck(seeded, (small,))


@pytest.mark.parametrize("p", [0.0, 1e-7])
def test_nothing_is_dropped(p):
    x = torch.randn(1000)
    assert torch.equal(FastDropout(p)(x), x)


@pytest.mark.parametrize("p", [1.0, 1 - 1e-7])
def test_everything_is_dropped(p):
    assert not FastDropout(p)(torch.randn(1000)).any()


def test_identity_in_evaluation():
    x = torch.randn(1000)
    dropout = FastDropout(0.5).eval()
    assert torch.equal(dropout(x), x)
    assert not torch.equal(dropout.train()(x), x)


def test_input_is_left_alone():
    x = torch.ones(100)
    FastDropout(0.5)(x)
    assert bool((x == 1).all())


def test_seed_reproduces_and_draws_differ():
    dropout, x = FastDropout(0.5), torch.ones(1000)
    torch.manual_seed(7)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(7)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout(x), second)
    assert not torch.equal(first, second)


def test_replacing_keeps_the_rest():
    class Other(nn.Dropout):
        pass

    model = nn.Sequential(
        nn.Linear(3, 3), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.7), nn.BatchNorm1d(3)), Other(0.1)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_fast_dropout(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [(type(part), part.p) for part in model.modules() if isinstance(part, nn.Dropout)] == [
        (FastDropout, 0.2), (FastDropout, 0.7), (Other, 0.1),
    ]  # fmt: skip
