"""Greedy decoding by the compiled kernels against the form in torch and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec.kernels import native
from recbole_raserec.regeneration.inference import Decoder, TorchSteps, compiled, generate, uniform
from recbole_raserec.regeneration.pairs import Sequences
from recbole_raserec.regeneration.regenerator import Regenerator

pytestmark = pytest.mark.skipif(native.loaded() is None, reason="no compiled kernels here (no C compiler?)")


def model_of(n_items: int, seed: int = 0, **options) -> Regenerator:
    torch.manual_seed(seed)
    given_ = {"size": 32, "inner_size": 48, "longest": 20, "conditions": 3, "pattern_length": 4, **options}
    model = Regenerator(n_items, **given_)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


def rows_of(n_items: int, count: int, seed: int = 0, longest: int = 20) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    items = rng.integers(1, n_items, lengths.sum()).astype(np.int64)
    return Sequences(items, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.arange(1, count + 1))


def compare(model: Regenerator, sequences: Sequences, gamma: float) -> None:
    """Patterns equal those of float64 in torch; and, but for those reported as close, without its help."""
    decoder = Decoder(model, gamma, seed=3)
    assert decoder._compiled is not None
    numbers = np.arange(len(sequences))
    items, coins = (
        sequences.padded(numbers),
        torch.from_numpy(uniform(3, numbers, model.conditions, model.pattern_length, 0) < gamma),
    )
    with torch.no_grad():
        wanted = TorchSteps(decoder.exact, 0.0).run(items, coins, torch.zeros(coins.shape))[0].view(coins.shape)
        found, close = decoder._compiled.run(items, coins)
    assert torch.equal(found[~close], wanted[~close])
    assert torch.equal(decoder.decode(items, numbers), wanted)
    assert float(close.double().mean()) < 0.2  # most of them are told apart


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n_items", [3, 64, 65, 300, 1500])
def test_patterns_equal_those_of_float64(flavour, n_items, gamma):
    compare(model_of(n_items), rows_of(n_items, 60), gamma)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 64, "heads": 1}, {"size": 64, "heads": 4, "layers": 1}, {"layers": 3, "inner_size": 16},
        {"conditions": 1, "pattern_length": 1}, {"conditions": 60, "pattern_length": 6}, {"conditions": 7},
    ],
)  # fmt: skip
def test_other_sizes(flavour, options):
    compare(model_of(200, **options), rows_of(200, 25), 0.3)


def test_items_that_bfloat16_cannot_tell_apart(flavour):
    """A thousand items in a hundred tight clusters, over all panels; the best is found by its float32 product."""
    model = model_of(1001, 1)
    with torch.no_grad():
        centres = torch.randn(100, 32)
        model.items.weight[1:1001] = centres.repeat(10, 1) * (1 + 2e-4 * torch.arange(1000)[:, None])
    compare(model, rows_of(1001, 60), 0.0)


def test_the_best_items_are_those_written_already(flavour):
    """Long vectors that every state prefers: the panels' peaks are barred items."""
    model = model_of(500, 2)
    with torch.no_grad():
        model.items.weight[[1, 70, 140, 499]] *= 4
        model.items.weight[0] = 50.0  # padding, never to be chosen
    compare(model, rows_of(500, 60), 0.0)


def test_equal_items_are_close_and_the_lower_number_wins(flavour):
    model = model_of(200)
    with torch.no_grad():
        model.items.weight[100:199] = model.items.weight[1:100]
    found = generate(model, rows_of(200, 40), 0.0)
    np.testing.assert_array_equal(found, generate(model, rows_of(200, 40), 0.0, native_kernels=False))
    assert found[:, :, 0].max() < 100


def test_without_kernels_the_patterns_are_the_same(flavour):
    model, rows = model_of(300), rows_of(300, 70)
    assert Decoder(model, 0.5, native_kernels=False)._compiled is None
    for gamma in (0.0, 0.5, 1.0):
        for batch_size in (1, 13, 256):
            wanted = generate(model, rows, gamma, native_kernels=False)
            np.testing.assert_array_equal(generate(model, rows, gamma, batch_size=batch_size), wanted)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 200), st.floats(0, 1), st.integers(1, 5), st.floats(0.01, 30))
def test_any_model_and_rows(seed, n_items, gamma, length, scale):
    model = model_of(n_items, seed % 7, pattern_length=length)
    with torch.no_grad():
        model.items.weight.mul_(scale)
    rows = rows_of(n_items, 15, seed)
    np.testing.assert_array_equal(
        generate(model, rows, gamma, seed=seed), generate(model, rows, gamma, seed=seed, native_kernels=False)
    )


def test_weights_that_are_not_numbers_end_patterns_and_harm_nothing(flavour):
    model = model_of(100)
    with torch.no_grad():
        model.items.weight[50:] = torch.nan
    steps = compiled(model, 1e-5)
    written, _ = steps.run(rows_of(100, 30).padded(np.arange(30)), torch.zeros(30, 3, 4, dtype=torch.bool))
    assert 0 <= int(written.min()) <= int(written.max()) < 100


def test_what_does_not_fit_is_left_to_torch(flavour):
    assert compiled(model_of(50, size=24, heads=2), 0.0) is None  # heads of 12
    assert compiled(model_of(50, inner_size=20), 0.0) is None
    assert compiled(model_of(50, conditions=61), 0.0) is None
    assert compiled(model_of(50).double(), 0.0) is None
    steps = compiled(model_of(50), 0.0)
    with pytest.raises(IndexError, match=r"\[0, 50\)"):
        steps.run(torch.tensor([[3, 50]]), torch.zeros(1, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="fit"):
        steps.run(torch.tensor([[3]]), torch.zeros(1, 2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="fit"):
        steps.run(torch.ones(1, 21, dtype=torch.int64), torch.zeros(1, 3, 4, dtype=torch.bool))
