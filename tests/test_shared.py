"""Attention of pairs to shared sequences against the mixture built for each pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.regeneration.regenerator import Attention, PairsOfSources

SIZE, SPACES, STEPS = 8, 3, 4


def case(seed: int, owners: list[int], sources: int, length: int):
    """(attention, hidden, filled, owner, shares, projections, x) in float64; every sequence holds an item."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    attention = Attention(SIZE, 2, 0.0).double()
    with torch.no_grad():
        for weight in attention.parameters():
            weight.copy_(draw(*weight.shape))
    ends = torch.randint(1, length + 1, (sources,), generator=generator)
    filled = torch.arange(length) < ends[:, None]
    shares = torch.softmax(draw(len(owners), SPACES), dim=1)
    x = draw(len(owners), STEPS, SIZE).requires_grad_()
    hidden, projections = draw(sources, length, SIZE).requires_grad_(), draw(SPACES, SIZE, SIZE).requires_grad_()
    return attention, hidden, filled, torch.tensor(owners), shares, projections, x


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), owners=st.lists(st.integers(0, 4), min_size=1, max_size=12), length=st.integers(1, 6))
def test_values_and_gradients_are_those_of_the_mixture(seed, owners, length):
    attention, hidden, filled, owner, shares, projections, x = case(seed, owners, 5, length)
    inputs = [hidden, shares.requires_grad_(), projections, x, *attention.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    memory = torch.einsum("pk,khg,psh->psg", shares, projections, hidden[owner])
    wanted = attention(x, attention.keys_values(memory), filled[owner][:, None, None])
    found = PairsOfSources.of(hidden, filled, owner, shares, projections).attend(attention, x)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True) for out in (found, wanted)]
    for ours, theirs in zip(*gradients):  # the keys' bias shifts all logits of a query alike
        torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, atol=1e-9, rtol=1e-7)


def test_logits_are_products_with_the_vectors_of_the_sequence():
    _, hidden, filled, owner, shares, projections, x = case(0, [3, 0, 3, 1], 4, 5)
    pairs = PairsOfSources.of(hidden, filled, owner, shares, projections)
    logits = pairs.take_up(pairs.lay_out(x) @ hidden.transpose(1, 2))
    torch.testing.assert_close(logits, torch.einsum("pth,psh->pts", x, hidden[owner]))


def test_rows_are_taken_up_where_they_were_laid_out():
    _, hidden, filled, owner, shares, projections, x = case(0, [2, 2, 0, 2], 4, 5)
    pairs = PairsOfSources.of(hidden, filled, owner, shares, projections)
    grid = pairs.lay_out(x)
    assert grid.shape == (4, 3 * STEPS, SIZE)
    assert torch.equal(pairs.take_up(grid), x)
    assert not grid[[1, 3]].any()


def test_dropout_falls_on_the_weights_in_training_alone():
    attention, hidden, filled, owner, shares, projections, x = case(0, [0, 1], 2, 6)
    attention.dropout.p = 0.5
    pairs = PairsOfSources.of(hidden, filled, owner, shares, projections)
    torch.manual_seed(0)
    draws = torch.stack([pairs.attend(attention, x).detach() for _ in range(4000)])
    attention.eval()
    kept = pairs.attend(attention, x).detach()
    assert torch.equal(pairs.attend(attention, x), kept)
    assert draws.std(0).max() > 0.1
    spread = (draws.std(0) / len(draws) ** 0.5).clamp(min=1e-6)
    assert ((draws.mean(0) - kept).abs() / spread).max() == pytest.approx(0, abs=5)  # the mean of all draws
