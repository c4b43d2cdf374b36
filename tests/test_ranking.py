"""Ranks counted in chunks against sorting in float64: ties, repeats, memory, wrong scores."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_helpers import sorted_rank

from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import ranking
from recbole_raserec.evaluation.ranking import csr_pairs, rank_in_chunks, target_ranks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@st.composite
def ranking_cases(draw):
    n_rows, n_items = draw(st.integers(1, 6)), draw(st.integers(2, 12))
    # Few distinct values, so that ties are the rule; infinities are scores too.
    value = st.sampled_from([-np.inf, -1.5, 0.0, 0.25, 2.0, np.inf])
    scores = draw(st.lists(st.lists(value, min_size=n_items, max_size=n_items), min_size=n_rows, max_size=n_rows))
    target = st.integers(1, n_items - 1)
    targets = draw(st.lists(target, min_size=n_rows, max_size=n_rows))
    seen = draw(st.lists(st.lists(st.integers(0, n_items - 1), max_size=8), min_size=n_rows, max_size=n_rows))
    return np.array(scores), targets, seen


@settings(max_examples=200, deadline=None)
@given(case=ranking_cases(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_counted_ranks_equal_sorted_ranks_ties_and_repeats_included(case, dtype):
    scores, targets, seen = case
    owners = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
    pairs = (owners, np.array(list(chain.from_iterable(seen)), dtype=np.int64))
    kept, removed = target_ranks(torch.tensor(scores, dtype=dtype), torch.tensor(targets), pairs)
    assert kept.tolist() == [sorted_rank(row, target, set()) for row, target in zip(scores, targets)]
    assert removed.tolist() == [
        sorted_rank(row, target, set(items)) for row, target, items in zip(scores, targets, seen)
    ]


def generic_case(seed: int = 0, n: int = 57, n_items: int = 301, width: int = 16):
    """Random vectors whose scores lie far apart in float32, with seen items that repeat and include targets."""
    rng = np.random.default_rng(seed)
    h, items = rng.standard_normal((n, width)), rng.standard_normal((n_items, width))
    targets = rng.integers(1, n_items, n)
    lengths = rng.integers(0, 40, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    seen = rng.integers(1, n_items, offsets[-1])
    seen[offsets[1] : offsets[2]] = targets[1]  # a user who has seen nothing but the target
    return h, items, targets, (offsets, seen)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_mb", [0.01, 512])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_ranks_equal_whole_matrix_and_float64(device, memory_mb, with_bias):
    h, items, targets, seen = generic_case()
    bias = np.linspace(-2, 2, len(items)) if with_bias else np.zeros(len(items))
    exact = h @ items.T + bias
    wanted_kept = [sorted_rank(row, target, set()) for row, target in zip(exact, targets)]
    lists = [set(seen[1][a:b]) for a, b in zip(seen[0][:-1], seen[0][1:])]
    wanted_removed = [sorted_rank(row, target, out) for row, target, out in zip(exact, targets, lists)]

    single = {"dtype": torch.float32, "device": device}
    chunked = rank_in_chunks(
        torch.tensor(h, **single),
        torch.tensor(items, **single),
        torch.tensor(targets),
        seen,
        item_bias=torch.tensor(bias, **single) if with_bias else None,
        memory_mb=memory_mb,
    )
    whole = target_ranks(
        torch.tensor(exact, **single), torch.tensor(targets), csr_pairs(*seen, np.arange(len(targets)))
    )
    for kept, removed in (chunked, whole):
        assert kept.tolist() == wanted_kept
        assert removed.tolist() == wanted_removed


def test_the_chunk_buffers_stay_under_the_bound(monkeypatch):
    h, items, targets, seen = generic_case(n=200)
    used = []

    def spy(a, b, out):
        used.append(out.untyped_storage().nbytes() * 2)  # the mask is as large as the scores
        return torch.matmul(a, b, out=out)

    monkeypatch.setattr(ranking.torch, "mm", spy)
    rank_in_chunks(torch.tensor(h).float(), torch.tensor(items).float(), torch.tensor(targets), seen, memory_mb=0.05)
    assert len(used) > 1
    assert max(used) <= 0.05 * ranking.MIB


def test_a_bound_below_one_row_names_option_value_and_remedy():
    h, items, targets, _ = generic_case()
    with pytest.raises(ConfigError, match=r"eval_memory_mb: 0\.001 MiB .* set it to 1 or more"):
        rank_in_chunks(torch.tensor(h), torch.tensor(items), torch.tensor(targets), memory_mb=0.001)


@pytest.mark.parametrize("column", [3, 5])
def test_nan_scores_are_an_error_in_the_target_and_beside_it(column):
    scores = torch.zeros(4, 9)
    scores[2, column] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        target_ranks(scores, torch.full((4,), 5))


def test_nan_for_the_padding_item_is_ignored():
    scores = torch.arange(6.0).repeat(2, 1)
    scores[:, 0] = float("nan")
    assert target_ranks(scores, torch.tensor([5, 2]))[0].tolist() == [1, 4]


@pytest.mark.parametrize("target", [0, 9, -1])
def test_a_target_that_is_no_item_is_an_error(target):
    with pytest.raises(ValueError, match=f"target {target} is not an item"):
        target_ranks(torch.zeros(1, 9), torch.tensor([target]))


def test_scores_are_left_unchanged():
    scores = torch.randn(5, 7)
    before = scores.clone()
    target_ranks(scores, torch.arange(1, 6), (np.array([0, 1]), np.array([2, 2])))
    assert torch.equal(scores, before)
