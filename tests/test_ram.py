"""The retrieval-augmented module against its formulas written out in float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import disturb, options
from torch import nn

from recbole_raserec.errors import ConfigError
from recbole_raserec.retrieval.heads import START_LOGIT, Channel, CrossAttention, RetrievalModule, fit_norm

SIZE, K = 8, 4
#: How many neighbours each row of a problem has.
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(len(MASK), SIZE, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, len(MASK), K, SIZE, generator=generator, dtype=torch.float64)
    return h, keys, values


def module(**changes):
    ram = RetrievalModule(options(**changes), SIZE).double().eval()
    alpha = options(**changes)["alpha"]
    assert ram.alpha.item() == pytest.approx(alpha, abs=1e-7)
    disturb(ram)
    with torch.no_grad():
        ram.alpha.fill_(alpha)  # to float64's last digit
    return ram


# -- the formulas, one row, one head, one neighbour at a time ---------------------------------------------------------


def linear(layer, x):
    return layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()


def layer_norm(layer, x):
    z = (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + layer.eps)
    return z * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def attention_loops(layer, heads, tau, q, keys, values):
    width = SIZE // heads
    joined = np.zeros(SIZE)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        query = linear(layer.query, q)[part]
        weights = [math.exp(query @ linear(layer.key, k)[part] / math.sqrt(width) / tau) for k in keys]
        for weight, v in zip(weights, values):
            joined[part] += weight / sum(weights) * linear(layer.value, v)[part]
    return layer_norm(layer.norm, q + linear(layer.out, joined))


def channel_loops(channel, heads, tau, h, keys, values):
    x = attention_loops(channel.first, heads, tau, h, keys, values)
    inner = [0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in linear(channel.feed_forward.inner, x)]
    x = layer_norm(channel.feed_forward.norm, x + linear(channel.feed_forward.outer, np.array(inner)))
    return attention_loops(channel.second, heads, tau, x, keys, values)


def ram_loops(ram, config, h, keys, values, mask):
    rows = []
    for row in range(len(h)):
        there = [k for k in range(K) if mask[row, k]]
        q, near, far = h[row].numpy(), keys[row].numpy()[there], values[row].numpy()[there]
        if not there:
            rows.append(q)
            continue
        if config["ram"] == "single":
            mixed = attention_loops(ram.channels[0], config["ram_heads"], config["attn_tau"], q, near, far)
        else:
            beta, mixed = config["beta"], np.zeros(SIZE)
            for share, channel, k, v in ((beta, ram.channels[0], near, far), (1 - beta, ram.channels[1], far, near)):
                if share:
                    mixed += share * channel_loops(channel, config["ram_heads"], config["attn_tau"], q, k, v)
        rows.append(config["alpha"] * q + (1 - config["alpha"]) * mixed)
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize(
    "changes",
    [
        {"ram": "single"},
        {"ram": "single", "ram_heads": 4, "attn_tau": 0.3, "alpha": 0.1},
        {"ram": "single", "beta": 0.3},
        {"ram": "dual", "beta": 1.0},
        {"ram": "dual", "beta": 0.0, "ram_heads": 1},
        {"ram": "dual", "beta": 0.3, "ram_heads": 4, "attn_tau": 2.0, "alpha": 0.8},
        {"ram": "dual", "beta": 0.3, "alpha": 0.0, "ram_heads": 8},
        {"ram": "dual", "beta": 0.7, "alpha": 0.25, "learnable_alpha": True},
    ],
    ids=str,
)
def test_module_against_loops(changes):
    ram, inputs = module(**changes), problem()
    wanted = ram_loops(ram, options(**changes), *inputs, MASK)
    with torch.no_grad():
        assert torch.allclose(ram(*inputs, MASK), wanted, rtol=0, atol=1e-10)
        single = ram.float()(*(x.float() for x in inputs), MASK)
    assert torch.allclose(single.double(), wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(wanted[:3], inputs[0][:3], atol=1e-2)


@pytest.mark.parametrize("form", ["single", "dual"])
def test_masked_neighbours_have_no_influence(form):
    ram, (h, keys, values) = module(ram=form, beta=0.4), problem()
    before = ram(h, keys, values, MASK)
    moved = torch.where(MASK[:, :, None], 0.0, 1e3)
    assert torch.equal(ram(h, keys + moved, values - moved, MASK), before)
    inputs = [x.clone().requires_grad_() for x in (keys, values)]
    ram(h, *inputs, MASK).square().sum().backward()
    for x in inputs:
        assert not x.grad[~MASK].any()
        assert torch.isfinite(x.grad).all()
    assert inputs[1].grad[MASK].any(dim=1).all()


def test_order_of_neighbours_does_not_matter():
    ram, (h, keys, values) = module(beta=0.4), problem()
    turn = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(ram(h, keys[:, turn], values[:, turn], MASK[:, turn]), ram(h, keys, values, MASK))


@pytest.mark.parametrize("form", ["single", "dual"])
@pytest.mark.parametrize("training", [False, True])
def test_a_row_without_neighbours_keeps_its_vector(form, training):
    ram, (h, keys, values) = module(ram=form, ram_dropout=0.5).train(training), problem()
    alone = ~MASK.any(dim=1)
    assert alone.any()
    out = ram(h, keys, values, MASK)
    assert torch.equal(out[alone], h[alone])
    ram(h, keys, values, torch.zeros_like(MASK)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in ram.parameters())


def test_alpha_one_keeps_every_vector():
    h, keys, values = problem()
    assert torch.equal(module(alpha=1.0)(h, keys, values, MASK), h)


def test_a_channel_without_share_is_not_built():
    sizes = {beta: [isinstance(c, Channel) for c in module(beta=beta).channels] for beta in (0.0, 0.3, 1.0)}
    assert sizes == {0.0: [False, True], 0.3: [True, True], 1.0: [True, False]}
    single = module(ram="single", beta=0.3)
    assert [type(c) for c in single.channels] == [CrossAttention, nn.Identity]


def test_channels_exchange_keys_and_values():
    h, keys, values = problem()
    first, second = module(beta=1.0), module(beta=0.0)
    second.channels[1].load_state_dict(first.channels[0].state_dict())
    assert torch.equal(first(h, keys, values, MASK), second(h, values, keys, MASK))
    assert not torch.allclose(first(h, keys, values, MASK), second(h, keys, values, MASK))


def test_learnable_alpha():
    h, keys, values = problem()
    fixed, learned = module(), module(learnable_alpha=True)
    assert "alpha" not in dict(fixed.named_parameters())
    assert "alpha" in fixed.state_dict()
    assert "alpha" in dict(learned.named_parameters())
    learned(h, keys, values, MASK).square().sum().backward()
    assert float(learned.alpha.grad) != 0
    with torch.no_grad():
        learned.alpha.fill_(1.5)
        assert torch.equal(learned(h, keys, values, MASK), h)
        learned.alpha.fill_(-0.5)
        outside = learned(h, keys, values, MASK)
        learned.alpha.fill_(0.0)
        assert torch.equal(outside, learned(h, keys, values, MASK))


@pytest.mark.parametrize("form", ["single", "dual"])
def test_dropout_only_in_training(form):
    h, keys, values = problem()
    ram = module(ram=form, ram_dropout=0.5)
    assert torch.equal(ram(h, keys, values, MASK), ram(h, keys, values, MASK))
    ram.train()
    assert not torch.equal(ram(h, keys, values, MASK), ram(h, keys, values, MASK))


@pytest.mark.parametrize("heads", [3, 5, 16])
def test_heads_that_do_not_divide(heads):
    with pytest.raises(ConfigError, match=rf"ram_heads: {heads} .*length {SIZE}; choose"):
        RetrievalModule(options(ram_heads=heads), SIZE)


# -- the start on the scale of the data -------------------------------------------------------------------------------


def test_fit_norm_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, SIZE + 1, dtype=torch.float64)
    x = torch.randn(200, SIZE, generator=generator, dtype=torch.float64) * scale + 3
    norm = nn.LayerNorm(SIZE).double()
    fit_norm(norm, x)
    plain = nn.functional.layer_norm(x, (SIZE,)).numpy()
    for dim in range(SIZE):
        line = np.stack([plain[:, dim], np.ones(len(x))], axis=1)
        gain, bias = np.linalg.lstsq(line, x[:, dim].numpy(), rcond=None)[0]
        assert norm.weight[dim].item() == pytest.approx(gain, abs=1e-8)
        assert norm.bias[dim].item() == pytest.approx(bias, abs=1e-8)


def test_fit_norm_recovers_vectors_of_one_length():
    x = nn.functional.layer_norm(torch.randn(50, SIZE, generator=torch.Generator().manual_seed(0)), (SIZE,)) * 7
    norm = nn.LayerNorm(SIZE, eps=1e-12)
    assert not torch.allclose(norm(x), x, atol=1)
    fit_norm(norm, x)
    assert torch.allclose(norm(x), x, atol=1e-4)


def test_fit_norm_of_constant_vectors_stays_finite():
    norm, x = nn.LayerNorm(SIZE), torch.arange(float(SIZE)).repeat(10, 1)
    fit_norm(norm, x)
    assert torch.allclose(norm(x), x, atol=1e-4)


@pytest.mark.parametrize("form", ["single", "dual"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_calibrated_module_starts_on_the_scale_of_the_data(form, tau):
    """User vectors of length 20, item vectors of length 0.5: as many neighbours, their mean is as long as h."""
    generator = torch.Generator().manual_seed(0)
    h, key = (20 * nn.functional.normalize(torch.randn(300, SIZE, generator=generator), dim=1) for _ in range(2))
    value = 0.5 * nn.functional.normalize(torch.randn(300, SIZE, generator=generator), dim=1)
    ram = RetrievalModule(options(ram=form, beta=0.5, attn_tau=tau), SIZE).eval()
    ram.calibrate(h, key, value)
    for channel, near, far in zip(ram.channels, (key, value), (value, key)):
        if isinstance(channel, nn.Identity):
            continue
        for layer in (channel,) if form == "single" else (channel.first, channel.second):
            assert layer.value(far).norm(dim=1).mean().item() == pytest.approx(20, rel=1e-4)
            width = SIZE // layer.heads
            heads = (layer.query(h) * layer.key(near)).view(300, layer.heads, width).sum(dim=2)
            logits = heads.mean(dim=1) / math.sqrt(width)  # the mean over heads; tau divides it as an option of its own
            assert torch.allclose(logits, START_LOGIT * torch.cosine_similarity(h, near), atol=1e-3)
            assert (layer.norm(h) - h).norm(dim=1).mean() < 0.5 * (nn.LayerNorm(SIZE)(h) - h).norm(dim=1).mean()
    out = ram(h, key[:, None], value[:, None], torch.ones(300, 1, dtype=torch.bool)).norm(dim=1)
    assert 10 < out.mean().item() < 40
