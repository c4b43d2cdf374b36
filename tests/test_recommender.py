"""Recommendations from a checkpoint alone: equal to the training process, and what is asked of them."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from recbole_raserec import Recommender
from recbole_raserec.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def loaded(planted_run, tmp_path_factory):
    """A copy of the checkpoint, loaded: the recommender and the run."""
    directory = tmp_path_factory.mktemp("copy") / "checkpoint"
    shutil.copytree(planted_run.ours.directory, directory)
    return Recommender.load(directory, "cpu"), planted_run.ours


def test_stored_histories_give_the_scores_of_the_test(loaded):
    recommender, outcome = loaded
    batch = next(iter(outcome.splits.test))[0]
    with torch.no_grad():
        wanted = outcome.model.full_sort_predict(batch).view(len(batch), -1).numpy()
    users = [recommender.users[number] for number in batch["user_id"].tolist()]
    found = recommender.score(users=users)
    np.testing.assert_allclose(found, wanted[:, 1:], rtol=1e-5, atol=1e-5)
    ranked = recommender.recommend(users=users, k=5)
    seen = [set(recommender.histories.of(recommender.live.numbers[user]).tolist()) for user in users]
    for row, items, values in zip(range(len(users)), ranked, ranked.scores):
        admissible = [n for n in np.argsort(-wanted[row], kind="stable") if n and n not in seen[row]]
        assert items == [recommender.items[n] for n in admissible[:5]]
        np.testing.assert_allclose(values, wanted[row][admissible[:5]], rtol=1e-5, atol=1e-5)


def test_a_user_who_never_existed(loaded):
    """The same history without its user: the memory of everybody, barred by nothing."""
    recommender, outcome = loaded
    model, items = outcome.model, recommender.items
    row = torch.tensor([[5, 9, 3, 17]])
    with torch.no_grad():
        h = model.encode(row, torch.tensor([4]))
        wanted = model.augment(h, *model.neighbours(h)) @ model.item_vectors().t()
    found = recommender.score([[items[n] for n in row[0]]])
    np.testing.assert_allclose(found, wanted[:, 1:].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model", ["SASRec", "DuoRec", "GRU4Rec", "BERT4Rec", "FEARec", "FPMC", "HGN", "NARM", "Caser", "LightSANs"]
)
def test_sequential_models(tiny_run, model):
    outcome = tiny_run(model).base
    recommender = Recommender.load(outcome.directory, "cpu")
    batch = next(iter(outcome.splits.test))[0]
    with torch.no_grad():
        wanted = outcome.model.full_sort_predict(batch).view(len(batch), -1).numpy()[:, : len(recommender.items)]
    users = [recommender.users[number] for number in batch["user_id"].tolist()]
    np.testing.assert_allclose(recommender.score(users=users), wanted[:, 1:], rtol=1e-5, atol=1e-5)
    vectors = recommender.encode(users=users)
    table = recommender.backbone.item_vectors().detach().numpy()
    bias = recommender.backbone.item_bias()
    dots = vectors @ table.T + (0 if bias is None else bias.detach().numpy())
    np.testing.assert_allclose(dots[:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-4)
    assert len(recommender.recommend([["nothing"], [recommender.items[1]]], k=3)[1]) == 3


def test_general_models_are_refused(tiny_run):
    with pytest.raises(CheckpointError, match="holds a BPR, which reads no histories"):
        Recommender.load(tiny_run("BPR").base.directory)


@pytest.mark.parametrize("head", ["knn", "both"])
def test_the_knn_head(tiny_run, head):
    outcome = tiny_run(head=head).ours
    recommender = Recommender.load(outcome.directory, "cpu")
    batch = next(iter(outcome.splits.test))[0]
    with torch.no_grad():
        wanted = outcome.model.full_sort_predict(batch).numpy()
    users = [recommender.users[number] for number in batch["user_id"].tolist()]
    np.testing.assert_allclose(recommender.score(users=users), wanted[:, 1:], rtol=1e-5, atol=1e-5)


def test_batches_change_nothing(loaded, monkeypatch):
    recommender, _ = loaded
    rng = np.random.default_rng(0)
    rows = [rng.choice(recommender.items[1:], rng.integers(0, 70)).tolist() for _ in range(40)]
    whole = recommender.score(rows)
    monkeypatch.setattr("recbole_raserec.serving.recommender.SCORE_BYTES", 4 * len(recommender.items) * 7)
    np.testing.assert_allclose(recommender.score(rows), whole, rtol=1e-5, atol=1e-5)
    for number in (0, 13, 39):
        np.testing.assert_allclose(recommender.score([rows[number]])[0], whole[number], rtol=1e-5, atol=1e-5)


def test_candidates_exclusions_and_seen_items(loaded):
    recommender, _ = loaded
    a, b, c, d, *_ = recommender.items[1:]
    (first,) = recommender.recommend([[a, b, c]], k=2, candidates=[c, d, b, "unknown"], exclude_seen=False)
    assert set(first) <= {b, c, d}
    assert len(first) == 2
    (seen,) = recommender.recommend([[a, b, c]], k=10, candidates=[a, b, c, d])
    assert seen == [d]
    (none,) = recommender.recommend([[a]], k=10, candidates=[d], exclude=[d])
    assert none == []
    everything = recommender.recommend([[a]], k=10**6)
    assert len(everything[0]) == len(recommender.items) - 2
    values = recommender.score([[a, b]], candidates=[d, a])
    np.testing.assert_array_equal(values[0], recommender.score([[a, b]])[0, [3, 0]])
    with pytest.raises(InputError, match=r"candidates: 'x' is no item"):
        recommender.score([[a]], candidates=[a, "x"])


def test_histories_of_which_nothing_is_known(loaded):
    recommender, _ = loaded
    found = recommender.recommend([[], ["x", "y"], [recommender.items[1], "x"]], k=3)
    assert found.popular.tolist() == [True, True, False]
    assert found.dropped.tolist() == [0, 2, 1]
    order = np.argsort(-recommender.catalogue.counts[1:], kind="stable") + 1
    assert recommender.catalogue.counts[[recommender._number[i] for i in found[0]]].tolist() == (
        recommender.catalogue.counts[order[:3]].tolist()
    )
    assert found[0] == found[1] != found[2]
    assert recommender.recommend([[]], k=3).items == [found[0]]
    assert recommender.recommend([], k=3).items == []
    assert recommender.score([]).shape == (0, len(recommender.items) - 1)
    with pytest.raises(InputError, match=r"history 1 has 2 unknown items, such as 'x'"):
        recommender.recommend([[], ["x", "y"]], strict=True)


def test_a_long_history_is_read_from_its_end_and_wholly_excluded(loaded):
    recommender, _ = loaded
    longest, items = recommender.longest, recommender.items[1:]
    history = [items[n % len(items)] for n in range(longest + 10)]
    np.testing.assert_allclose(recommender.score([history]), recommender.score([history[10:]]), rtol=1e-5, atol=1e-5)
    assert not set(recommender.recommend([history], k=5)[0]) & set(history)


def test_numpy_pandas_and_polars(loaded):
    recommender, _ = loaded
    items = recommender.items[1:]
    rows = [[items[0], items[4]], [items[2], items[7]]]
    wanted = recommender.recommend(rows, k=3)
    for given in (
        np.array(rows),
        pd.Series(rows),
        pl.Series(rows),
        tuple(map(tuple, rows)),
        np.array(rows, dtype=object),
    ):
        assert recommender.recommend(given, k=3).items == wanted.items
    log = {
        "user_id": ["b", "a", "b", "a"],
        "item_id": [items[7], items[0], items[2], items[4]],
        "timestamp": [2, 1, 1, 5],
    }
    for frame in (pd.DataFrame(log), pl.DataFrame(log)):
        found = recommender.recommend(frame, k=3)
        assert found.labels == ["b", "a"]
        assert found.items == wanted.items[::-1]
    table = found.to_pandas()
    assert table.columns.tolist() == ["query", "rank", "item", "score", "popular"]
    assert table["item"].tolist() == [*found[0], *found[1]]
    assert found.to_polars()["rank"].to_list() == [1, 2, 3, 1, 2, 3]
    names, scores = recommender.recommend(rows, k=2, candidates=items[:1], exclude_seen=True).to_numpy()
    assert names.tolist() == [[None], [items[0]]]
    assert np.isnan(scores[0, 0])


def test_similar_items(loaded):
    recommender, outcome = loaded
    vectors = outcome.model.item_vectors().detach()
    cosine = torch.nn.functional.cosine_similarity(vectors[3:4], vectors).numpy()
    order = [n for n in np.argsort(-cosine, kind="stable") if n not in (0, 3)]
    found = recommender.similar_items([recommender.items[3]], k=4)
    assert found[0] == [recommender.items[n] for n in order[:4]]
    np.testing.assert_allclose(found.scores[0], cosine[order[:4]], rtol=1e-5)
    with pytest.raises(InputError, match="items: 'x' is no item"):
        recommender.similar_items(["x"])


WRONG = {
    "a history instead of a list of them": ({"sequences": ["1", "2"]}, "is not a history"),
    "text": ({"sequences": "12"}, "no list of histories"),
    "a number": ({"sequences": 5}, "no list of histories"),
    "nothing": ({}, "nothing is given"),
    "k of 0": ({"sequences": [["1"]], "k": 0}, "k: 0"),
    "k below": ({"sequences": [["1"]], "k": -3}, "k: -3"),
    "half a k": ({"sequences": [["1"]], "k": 1.5}, "k: 1.5"),
    "a truth as k": ({"sequences": [["1"]], "k": True}, "k: True"),
    "not a number": ({"sequences": [[float("nan")]]}, "nan is no id"),
    "none": ({"sequences": [[None]]}, "None is no id"),
    "a list as id": ({"sequences": [[["1"]]]}, "is no id"),
    "too few users": ({"sequences": [["1"], ["2"]], "users": ["1"]}, "users: 1 for 2"),
    "candidates as text": ({"sequences": [["1"]], "candidates": "12"}, "candidates: '12'"),
    "a table without items": ({"sequences": pd.DataFrame({"user_id": [1]})}, "no column item_id"),
    "a time that is missing": (
        {"sequences": pd.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1.0, None]})},
        "a value is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_questions_without_sense(loaded, case):
    given, words = WRONG[case]
    with pytest.raises(InputError, match=words):
        loaded[0].recommend(**given)
