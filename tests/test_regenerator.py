"""The regenerator: its likelihood written out, hybrid inference against one-by-one decoding."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from regeneration_helpers import ITEMS, model_of, pairs_of, random_rows, sequences_of

from recbole_raserec.regeneration.inference import LEAST, Decoder, best_two, generate, uniform
from recbole_raserec.regeneration.pairs import pieces
from recbole_raserec.regeneration.regenerator import Regenerator, first_occurrences


def logits_one_by_one(model: Regenerator, row: list[int], way: int, written: list[int]) -> torch.Tensor:
    """All V + 2 logits after `written`, the whole decoder over all steps, one sequence, no cache."""
    items = torch.tensor([row])
    source = model.encode(items)
    memory = source.spaces[:, way]
    steps = torch.tensor([[model.start, *written]])
    x = model.pattern_norm(model.items(steps) + model.pattern_positions.weight[: steps.shape[1]])
    mask = (items > 0)[:, None, None]
    for layer, keys_values in zip(model.decoder_layers(), model.keys_values(memory)):
        x = layer.together(x, partial(layer.source, source=keys_values, mask=mask))
    return x[0, -1] @ model.items.weight.t()


def decoded_one_by_one(model: Regenerator, row: list[int], way: int, restrictive: bool) -> list[int]:
    """Greedy decoding as one would write it down."""
    written: list[int] = []
    while len(written) < model.pattern_length:
        logits = logits_one_by_one(model, row, way, written)
        allowed = set(row) if restrictive else set(range(1, ITEMS))
        allowed -= set(written)
        if len(written) >= LEAST or not allowed:
            allowed.add(model.end)
        best = max(sorted(allowed), key=lambda item: float(logits[item]))
        if best == model.end:
            break
        written.append(best)
    return written


# -- likelihood -------------------------------------------------------------------------------------------------------


def test_first_occurrences():
    items = torch.tensor([[3, 5, 3, 3, 0], [1, 0, 0, 0, 0], [2, 4, 6, 8, 2]])
    wanted = [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert first_occurrences(items).int().tolist() == wanted


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_against_one_step_at_a_time(seed):
    model = model_of(seed).double()
    rows = [[3, 5, 3, 7, 9], [2, 4], [1, 6, 8, 10, 11, 2, 2]]
    patterns = [[5, 7], [2, 4], [6, 8, 11, 2]]
    shares = torch.eye(3, dtype=torch.float64)[[0, 2, 1]]
    items, longest = torch.zeros(3, 7, dtype=torch.int64), 4
    padded = torch.zeros(3, longest, dtype=torch.int64)
    for number, (row, pattern) in enumerate(zip(rows, patterns)):
        items[number, : len(row)], padded[number, : len(pattern)] = torch.tensor(row), torch.tensor(pattern)
    with torch.no_grad():
        found = model.log_likelihood(model.encode(items), torch.arange(3), padded, shares)
    for number, (row, pattern, way) in enumerate(zip(rows, patterns, (0, 2, 1))):
        total = 0.0
        for step in range(len(pattern) + 1):
            with torch.no_grad():
                logits = logits_one_by_one(model, row, way, pattern[:step])
            open_ = [*sorted(set(row) - set(pattern[:step])), model.end]
            norm = math.log(sum(math.exp(float(logits[item])) for item in open_))
            total += float(logits[pattern[step] if step < len(pattern) else model.end]) - norm
        assert float(found[number]) == pytest.approx(total, rel=1e-10)


def test_the_mixture_is_the_mean_of_the_conditions():
    model = model_of()
    pairs = pairs_of()
    items, owner, patterns = pairs.batch(np.flatnonzero(np.diff(pairs.offsets))[:5])
    source = model.encode(items)
    with torch.no_grad():
        each = [model.log_likelihood(source, owner, patterns, row.expand(len(owner), -1)) for row in torch.eye(3)]
        wanted = torch.stack(each).exp().mean(0).log()
        torch.testing.assert_close(model.mixture_log_likelihood(items, owner, patterns), wanted)


def test_padding_changes_nothing():
    model = model_of()
    items, patterns, shares = torch.tensor([[3, 5, 7]]), torch.tensor([[5, 7]]), torch.tensor([[0.2, 0.5, 0.3]])
    wide = torch.nn.functional.pad(items, (0, 5)), torch.nn.functional.pad(patterns, (0, 2))
    with torch.no_grad():
        narrow_ = model.log_likelihood(model.encode(items), torch.tensor([0]), patterns, shares)
        wide_ = model.log_likelihood(model.encode(wide[0]), torch.tensor([0]), wide[1], shares)
    torch.testing.assert_close(narrow_, wide_)


def test_item_vectors_are_taken_over():
    model = model_of()
    vectors = torch.randn(ITEMS, 8)
    model.use_item_vectors(vectors)
    assert torch.equal(model.items.weight[:ITEMS], vectors)
    lengths = model.items.weight[ITEMS:].norm(dim=1)
    torch.testing.assert_close(lengths, vectors[1:].norm(dim=1).mean().expand(2))
    with pytest.raises(ValueError, match=r"expected \[12, 8\], got \[12, 9\]"):
        model.use_item_vectors(torch.randn(ITEMS, 9))


# -- inference --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_decoding_against_one_by_one(gamma, seed):
    model = model_of(seed)
    rows = random_rows(seed, 25)
    found = generate(model, sequences_of(rows), gamma, batch_size=7)
    exact = Decoder(model, gamma).exact
    for row, patterns in zip(rows, found):
        for way in range(3):
            with torch.no_grad():
                wanted = decoded_one_by_one(exact, row, way, gamma == 1)
            assert patterns[way][patterns[way] > 0].tolist() == wanted


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.7, 2.0]), st.integers(1, 40)
)
def test_what_generated_patterns_keep_to(seed, gamma, temperature, batch_size):
    model = model_of(seed % 5)
    rows = random_rows(seed, 30)
    found = generate(model, sequences_of(rows), gamma, temperature, seed, batch_size)
    np.testing.assert_array_equal(found, generate(model, sequences_of(rows), gamma, temperature, seed, 256))
    assert found.shape == (30, 3, 4)
    for row, patterns in zip(rows, found):
        for pattern in patterns:
            items = pattern[pattern > 0]
            assert (pattern[len(items) :] == 0).all()  # nothing after the end
            assert len(set(items.tolist())) == len(items)
            assert items.max(initial=0) < ITEMS
            if gamma == 1:
                assert set(items.tolist()) <= set(row)
                assert len(items) >= min(LEAST, len(set(row)))
            elif gamma == 0:
                assert len(items) >= LEAST


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([5, 128, 300, 512]))
def test_best_two_against_sorting(seed, columns):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.integers(-4, 5, (7, columns)).astype(np.float64))  # with ties
    logits[rng.random((7, columns)) < 0.3] = -torch.inf
    place, best, second = best_two(logits)
    for row in range(7):
        ordered = sorted(logits[row].tolist(), reverse=True)
        assert (float(best[row]), float(second[row])) == (ordered[0], ordered[1])
        assert int(place[row]) == logits[row].tolist().index(ordered[0])


def test_close_choices_are_made_in_float64():
    """Two items whose vectors differ by less than float32 can tell in a product."""
    model = model_of()
    with torch.no_grad():
        model.items.weight[7] = model.items.weight[5] * (1 + 2e-7)
    rows = sequences_of([[5, 7], [7, 5], [5, 7, 3]] * 20)
    found = generate(model, rows, 1.0, batch_size=7)
    exact = Decoder(model, 1.0).exact
    for row, patterns in zip([[5, 7], [7, 5], [5, 7, 3]], found):
        for way in range(3):
            with torch.no_grad():
                assert patterns[way][patterns[way] > 0].tolist() == decoded_one_by_one(exact, row, way, True)
    decoder = Decoder(model, 1.0)
    coins = torch.ones(1, 3, 4, dtype=torch.bool)
    assert decoder._rough.run(torch.tensor([[5, 7]]), coins, torch.zeros(1, 3, 4))[1].any()
    assert not decoder._rough.run(torch.tensor([[3, 9]]), coins, torch.zeros(1, 3, 4))[1].any()


def test_a_sequence_is_written_for_alike_whatever_stands_beside_it():
    """Coins and draws belong to the sequence's number, results to its items."""
    model = model_of()
    rows = random_rows(3, 20)
    whole = generate(model, sequences_of(rows), 0.5, 1.0, 9)
    decoder = Decoder(model, 0.5, 1.0, 9)
    for number in (0, 7, 19):
        alone = decoder.decode(torch.tensor([rows[number]]), np.array([number]))
        np.testing.assert_array_equal(alone[0].numpy(), whole[number])


def test_seeds_and_ways_differ():
    model, rows = model_of(), sequences_of(random_rows(1, 60))
    one, two = (generate(model, rows, 0.5, 1.0, seed) for seed in (1, 2))
    assert (one != two).any()
    greedy = generate(model, rows, 0.0)
    assert (greedy[:, 0] != greedy[:, 1]).any()
    np.testing.assert_array_equal(greedy, generate(model, rows, 0.0, seed=5))  # no coin, no draw, no seed


def test_drawing_follows_the_distribution():
    """First items of many sequences with the same content, against the softmax of the logits."""
    model = model_of(4)
    count = 4000
    found = generate(model, sequences_of([[3, 5, 7, 9]] * count), 1.0, 1.5, 0)
    with torch.no_grad():
        logits = logits_one_by_one(Decoder(model, 1.0).exact, [3, 5, 7, 9], 1, [])[[3, 5, 7, 9]]
    wanted = torch.softmax(logits / 1.5, dim=0).numpy()
    counts = np.array([(found[:, 1, 0] == item).mean() for item in (3, 5, 7, 9)])
    np.testing.assert_allclose(counts, wanted, atol=4 * np.sqrt(0.25 / count))


def test_uniform_numbers():
    u = uniform(7, np.arange(2000), 3, 4, 0)
    assert u.shape == (2000, 3, 4)
    assert 0 <= u.min() <= u.max() < 1
    histogram = np.histogram(u, 20, (0, 1))[0] / u.size
    np.testing.assert_allclose(histogram, 0.05, atol=0.005)
    flat = u.reshape(2000, -1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(12)).max() < 0.1
    assert len(np.unique(u)) == u.size
    np.testing.assert_array_equal(uniform(7, np.array([5, 9]), 3, 4, 0), u[[5, 9]])
    assert (uniform(8, np.arange(9), 3, 4, 0) != u[:9]).all()
    assert (uniform(7, np.arange(9), 3, 4, 1) != u[:9]).all()


# -- sources ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_pieces_are_the_sequences(seed, longest):
    rows = random_rows(seed, 15, 30)
    found = pieces(sequences_of(rows), longest)
    assert found.lengths().max() <= longest
    for user, row in enumerate(rows, start=1):
        mine = np.flatnonzero(found.users == user)
        joined = [item for piece in mine for item in found.items[found.offsets[piece] : found.offsets[piece + 1]]]
        assert joined == row
        assert all(found.lengths()[piece] == longest for piece in mine[1:])  # what is left over comes first


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_pairs_are_patterns_in_their_sequences(seed):
    pairs = pairs_of(seed, 25)
    assert (np.diff(pairs.offsets) <= 5).all()
    assert len(pairs) == pairs.offsets[-1]
    sequences = pairs.sequences
    for sequence, pattern in zip(pairs.sequence, pairs.pattern):
        left = iter(sequences.items[sequences.offsets[sequence] : sequences.offsets[sequence + 1]].tolist())
        assert all(item in left for item in pairs.patterns[pattern])  # a subsequence
        assert len(set(pairs.patterns[pattern])) == len(pairs.patterns[pattern])
    rows = np.flatnonzero(np.diff(pairs.offsets))
    if len(rows):
        _, owner, patterns = pairs.batch(rows)
        assert len(owner) == len(pairs)
        for number in range(len(owner)):
            assert tuple(patterns[number][patterns[number] > 0].tolist()) == pairs.patterns[pairs.pattern[number]]
            row = rows[owner[number]]
            assert row == pairs.sequence[number]
