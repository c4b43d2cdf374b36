"""The kNN head against loops over the formula; in the pipeline; reloaded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_helpers import PLANTED, figures, run

from recbole_raserec import load_checkpoint
from recbole_raserec.retrieval.heads import SHARES, TAUS, interpolate, tune_knn


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([0.05, 1.0]))
def test_interpolation_against_loops(seed, k, share, tau):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 8, generator=generator, dtype=torch.float64) * 5
    targets = torch.randint(1, 8, (3, k), generator=generator)
    similarity = torch.rand(3, k, generator=generator, dtype=torch.float64)
    mask = torch.arange(k) < torch.randint(0, k + 1, (3, 1), generator=generator)
    found = interpolate(scores, targets, similarity, mask, share, tau).exp()
    for row in range(3):
        total = sum(math.exp(x) for x in scores[row])
        count = int(mask[row].sum())
        norm = sum(math.exp(float(s) / tau) for s in similarity[row, :count])
        for item in range(8):
            model = math.exp(scores[row, item]) / total
            near = sum(
                math.exp(float(similarity[row, n]) / tau) / norm for n in range(count) if targets[row, n] == item
            )
            wanted = (1 - share) * model + share * near if count else model
            assert float(found[row, item]) == pytest.approx(wanted, rel=1e-9, abs=1e-30)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 3)


def test_an_item_far_below_keeps_its_place():
    """In float32 probabilities underflow; the ranking must not."""
    scores = torch.tensor([[0.0, -200.0, -300.0, -250.0]])
    mixed = interpolate(scores, torch.tensor([[2]]), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.2, 0.1)
    assert mixed.argsort(descending=True).tolist() == [[0, 2, 1, 3]]


def test_tuning_takes_the_best_pair_and_the_smaller_share_of_equals():
    class Model:
        knn_share, knn_tau = torch.tensor(0.0), torch.tensor(0.0)

    model, seen = Model(), []

    def value():
        seen.append((round(float(model.knn_share), 4), round(float(model.knn_tau), 4)))
        return -abs(seen[-1][0] - 0.2) - abs(seen[-1][1] - 0.1)

    assert tune_knn(model, value, False) == 0
    assert seen[0] == (0.0, TAUS[0])
    assert len(seen) == len(set(seen)) == 1 + (len(SHARES) - 1) * len(TAUS)
    assert (float(model.knn_share), float(model.knn_tau)) == (pytest.approx(0.2), pytest.approx(0.1))
    assert tune_knn(model, lambda: 0.0, False) == 0
    assert float(model.knn_share) == 0


@pytest.mark.parametrize("head", ["knn", "both"])
def test_the_pipeline_tunes_keeps_and_reloads_it(tmp_path, head):
    options = {**PLANTED, "epochs": 3, "ram_epochs": 1, "head": head, "threads": 1}
    first = run(tmp_path, **options)
    stages = {name for name, _ in first.trained}
    assert ("RaSeRec" in stages) == (head == "both")
    model = first.ours.model
    assert model.knn
    assert model.augments == (head == "both")
    assert not hasattr(model, "full_sort_vectors")
    base, ours = (figures(first.record)[who]["valid"]["seen_kept"]["ndcg@10"] for who in ("base", "ours"))
    assert ours >= base - 1e-6 if head == "knn" else ours > 0  # share 0 is the backbone
    again = run(tmp_path, **options)
    assert again.trained == []
    assert again.record["metrics"] == first.record["metrics"]
    loaded = load_checkpoint(first.ours.directory)
    assert loaded.model.knn
    assert float(loaded.model.knn_share) == float(model.knn_share)
    rows = next(iter(first.ours.splits.test))[0]
    torch.testing.assert_close(
        loaded.model.full_sort_predict(rows), model.full_sort_predict(rows), atol=1e-5, rtol=1e-5
    )
