"""The transition head against dense sums in float64; what it may know; tuned, kept, reloaded, explained and changed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from item_text_helpers import ITEMS, TEXT, row, write_data
from live_helpers import load
from pipeline_helpers import run
from raserec_helpers import histories_of, raserec
from tiny_models import N_ITEMS

from recbole_raserec.errors import ConfigError, InputError
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.transitions import GRID, TransitionHead, _Sample, mixed, pairs_of, tune_transitions
from recbole_raserec.serving import write_programs, write_vectors

RUN = {
    "training": "packed", "hidden_size": 16, "inner_size": 16, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 8, "top_k": 4,
    "train_batch_size": 64, "backbone": "SASRec", "ram_inner_size": 16, "ram_epochs": 1, "transition_head": True,
    "transition_neighbours": 5,
}  # fmt: skip


def texts(rng, bare=(0, 3)):
    """Unit vectors of the items' texts; some have none."""
    text = torch.from_numpy(rng.normal(size=(N_ITEMS, 4)).astype(np.float32))
    text /= text.norm(dim=1, keepdim=True)
    text[list(bare)] = 0
    return text


def dense(histories, text, weights, neighbours, seq):
    """What transitions and texts give after the history `seq`, by loops over the formula."""
    share, text_share, tau, text_tau, second, repeats = weights
    counts = np.zeros((2, N_ITEMS, N_ITEMS))
    for history in histories:
        for gap in (1, 2):
            for a, b in zip(history[:-gap], history[gap:]):
                counts[gap - 1, a, b] += 1
    cosine = (text @ text.T).double().numpy()
    out = np.zeros((2, N_ITEMS))
    for gap, weight in ((1, 1 - second), (2, second)):
        if len(seq) < gap:
            continue
        item = seq[-gap]
        near = [a for a in range(1, N_ITEMS) if a != item and text[a].any() and text[item].any()]
        near = sorted(near, key=lambda a: -cosine[item, a])[: neighbours - 1]
        pooled = counts[gap - 1, item] + sum(np.exp((cosine[item, a] - 1) / tau) * counts[gap - 1, a] for a in near)
        out[0] += weight * pooled / max(pooled.sum(), 1e-300)
        falling = np.zeros(N_ITEMS)
        falling[near] = [np.exp((cosine[item, a] - 1) / text_tau) for a in near]
        out[1] += weight * falling / max(falling.sum(), 1e-300)
    if not repeats:
        out[:, seq] = 0
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-300) * np.array([[share], [text_share]])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.sampled_from([1, 4, 40]))
def test_against_dense_sums(seed, second, repeats, neighbours):
    rng = np.random.default_rng(seed)
    histories, text = histories_of(seed, 6), texts(rng)
    head = TransitionHead(N_ITEMS, neighbours)
    for history in histories:
        places = np.arange(1, len(history))
        head.add(*pairs_of(history, places, np.zeros_like(places)))
    weights = [0.3, 0.25, 0.2, 0.5, second, float(repeats)]
    head.weights.copy_(torch.tensor(weights))
    rows = [rng.integers(1, N_ITEMS, length).tolist() for length in (1, 2, 5)] + [[3], [2, 3]]
    seq = torch.zeros(len(rows), 5, dtype=torch.int64)
    for number, items in enumerate(rows):
        seq[number, : len(items)] = torch.tensor(items)
    found = torch.stack(head(seq, torch.tensor([len(items) for items in rows]), text), dim=1)
    wanted = np.stack([dense(histories, text, weights, neighbours, items) for items in rows])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    assert found.sum(dim=2).max() <= 0.3 + 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_probabilities_sum_to_one_and_underflow_keeps_the_order(seed):
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(4, 9)) * 5)
    spread = torch.from_numpy(rng.random((4, 9)) * (rng.random((4, 9)) < 0.4))
    spread *= 0.6 / spread.sum(dim=1, keepdim=True).clamp(min=0.6)
    found = mixed(torch.log_softmax(scores, dim=1), spread)
    wanted = (1 - spread.sum(dim=1, keepdim=True)) * torch.softmax(scores, dim=1) + spread
    torch.testing.assert_close(found.exp(), wanted)
    assert found.exp().sum(dim=1).tolist() == pytest.approx([1.0] * 4)
    low = mixed(torch.tensor([[0.0, -200.0, -300.0, -250.0]]), torch.tensor([[0.0, 0.0, 0.2, 0.0]]))
    assert low.argsort(descending=True).tolist() == [[0, 2, 1, 3]]


def test_it_knows_the_training_split_alone_and_the_validation_pairs_before_the_test():
    histories = histories_of(1)
    changed = [[*history[:-2], *(1 + (item % (N_ITEMS - 1)) for item in history[-2:])] for history in histories]
    models = [raserec([np.array(row) for row in rows], transition_head=True) for rows in (histories, changed)]
    counts = [[x.toarray() for x in model.transitions._counts] for model, _, _ in models]
    np.testing.assert_array_equal(counts[0], counts[1])
    assert all(counts[0][0][history[0], history[1]] for history in histories)
    model, hooks, _ = models[0]
    hooks.before_test()
    wanted = np.zeros((2, N_ITEMS, N_ITEMS))
    for history in histories:
        for gap in (1, 2):
            np.add.at(wanted[gap - 1], (history[: -gap - 1], history[gap:-1]), 1)
    np.testing.assert_array_equal([x.toarray() for x in model.transitions._counts], wanted)
    for history in histories:
        places = np.arange(1, len(history) - 1)
        model.observe(history, places, np.zeros_like(places), -1)
    assert not any(x.nnz for x in model.transitions._counts)


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("head", ["ram", "knn"])
def test_the_sample_ranks_as_the_model_does_and_what_is_found_is_validated(head, removed):
    model, _, parts = raserec(transition_head=True, head=head)
    model.text = texts(np.random.default_rng(0))
    batch = parts[1].batch()
    targets, rows = batch["item_id"], torch.arange(len(batch))

    def ndcg():
        scores = model.full_sort_predict(batch)
        scores[:, 0] = -torch.inf
        own = scores[rows, targets].clone()
        if removed:
            scores.scatter_(1, batch[model.ITEM_SEQ], -torch.inf)
        rank = 1 + (scores > own[:, None]).sum(dim=1)
        return float(((1 / torch.log2(rank + 1.0)) * (rank <= 3)).mean())

    setting = {"share": 0.3, "text_share": 0.2, "tau": 0.15, "text_tau": 0.3, "second": 0.35, "knn_share": 0.0}
    if head == "knn":
        model.knn_tau.fill_(0.1)
    with torch.no_grad():
        sample = _Sample(model, [(batch, targets)], removed, "ndcg@3")
        setting["knn_share"] = 0.2 if head == "knn" else 0.0
        model.transitions.weights.copy_(torch.tensor([*(setting[name] for name in GRID), 0.0]))
        if head == "knn":
            model.knn_share.fill_(0.2)
        assert sample.value(setting) == pytest.approx(ndcg(), abs=1e-6)
        model.transitions.weights[:2] = 0
        off = ndcg()
        best = tune_transitions(model, [(batch, targets)], removed, "ndcg@3", ndcg, off)
        assert best >= off
        assert ndcg() == pytest.approx(best)
        assert tune_transitions(model, [(batch, targets)], removed, "ndcg@3", lambda: -1.0, 0.0) == 0.0
        assert model.transitions.weights[:2].tolist() == [0, 0]


@pytest.mark.parametrize("head", ["ram", "knn"])
def test_items_of_the_history_get_the_share_that_they_have_in_training(head):
    histories = histories_of(2)
    model, _, parts = raserec(histories, repeat_share=True, head=head)
    windows = [(row[:place], row[place]) for row in map(list, histories) for place in range(1, len(row) - 2)]
    again = sum(target in before for before, target in windows)
    assert float(model.repeat_share) == pytest.approx((again + 1) / (len(windows) + 2))
    batch = parts[1].batch()
    with torch.no_grad():
        found = model.full_sort_predict(batch).exp()
        model.shares_repeats = False
        plain = torch.log_softmax(model.full_sort_predict(batch), dim=1).exp()
    assert found.sum(dim=1).tolist() == pytest.approx([1.0] * len(found), abs=1e-5)
    for after, seq, before in zip(found, batch[model.ITEM_SEQ], plain):
        seen = sorted({int(item) for item in seq} - {0})
        assert float(after[seen].sum()) == pytest.approx(float(model.repeat_share), abs=1e-5)
        others = [item for item in range(N_ITEMS) if item not in seen]
        torch.testing.assert_close(after[others] / after[others].sum(), before[others] / before[others].sum())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """RaSeRec with the transition head over a SASRec with texts."""
    folder = tmp_path_factory.mktemp("transitions")
    write_data(folder)
    return folder, run(folder, dataset="tiny", data_path=str(folder), **RUN, **TEXT, head="both")


@pytest.fixture
def checkpoint(finished, tmp_path):
    copy = shutil.copytree(finished[1].ours.directory, tmp_path / "checkpoint")
    recommender = load(copy)
    recommender.model.transitions.weights.copy_(torch.tensor([0.3, 0.2, 0.2, 0.2, 0.35, 0.0]))
    return recommender


def test_a_loaded_model_scores_as_the_trained_one(finished):
    model, loaded = finished[1].ours.model, load(finished[1].ours.directory)
    for ours, theirs in zip(model.transitions._counts, loaded.model.transitions._counts):
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray())
    assert torch.equal(model.text, loaded.model.text)
    assert model.text.any()
    rows = next(iter(finished[1].ours.splits.test))[0]
    torch.testing.assert_close(loaded.model.full_sort_predict(rows), model.full_sort_predict(rows), atol=1e-5, rtol=0)
    again = run(finished[0], dataset="tiny", data_path=str(finished[0]), **RUN, **TEXT, head="both")
    assert again.trained == []
    assert again.record["metrics"] == finished[1].record["metrics"]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw", "ivfpq"])
def test_both_similarities_are_searched_by_every_index(tmp_path, index, similarity):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(400, 7)).astype(np.float32)
    keys[5, 4:] = 0  # without text
    numbers = np.arange(1, 401)
    bank = MemoryBank(7, similarity, index, 8, 8, text_size=3, text_weight=0.6)
    bank.add(keys, numbers, numbers, numbers)
    queries = rng.normal(size=(30, 7)).astype(np.float32)

    def unit(x):
        return x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True), 1e-30)

    own = [unit(x[:, :4]) if similarity == "cosine" else x[:, :4] for x in (queries, keys)]
    fused = own[0] @ own[1].T + 0.6 * unit(queries[:, 4:]) @ unit(keys[:, 4:]).T
    for searched in (bank, None):
        if searched is None:
            bank.save(tmp_path / "bank")
            searched = MemoryBank.load(tmp_path / "bank")
        found = searched.search(queries, 5, None, None)
        np.testing.assert_allclose(found.similarity, np.take_along_axis(fused, found.ids, axis=1), atol=1e-5)
        if index == "flat":
            np.testing.assert_array_equal(found.ids, np.argsort(-fused, axis=1)[:, :5])
        else:
            assert np.mean(found.similarity) > np.sort(fused, axis=1)[:, -10:].mean()


@pytest.mark.parametrize("head", ["ram", "knn"])
def test_texts_join_the_keys_of_the_memory(finished, tmp_path, head):
    folder = finished[0]
    options = {**RUN, **TEXT, "transition_head": False, "memory_text": 0.5, "head": head}
    ours = run(folder, dataset="tiny", data_path=str(folder), **options).ours
    recommender = load(shutil.copytree(ours.directory, tmp_path / "checkpoint"))
    model, history = recommender.model, [4, 9, 7, 5]
    assert model.memory.keys.shape[1] == 16 + 12
    rows = next(iter(ours.splits.test))[0]
    torch.testing.assert_close(model.full_sort_predict(rows), ours.model.full_sort_predict(rows), atol=1e-5, rtol=0)
    with torch.no_grad():
        h = model.encode(torch.tensor([[*history, 0]]), torch.tensor([4]))
    texts = sum(0.5**back * model.text[item] for back, item in enumerate(reversed(history)))
    torch.testing.assert_close(h[0, 16:], texts)
    names = [recommender.items[n] for n in history]
    found = recommender.explain(names, k=3)
    keys = torch.from_numpy(np.array(model.memory.keys))
    for memory in found.memories:
        assert memory.similarity == pytest.approx(
            float(torch.cosine_similarity(h[0, :16], keys[memory.entry, :16], dim=0)), abs=1e-5
        )
        assert memory.text_similarity == pytest.approx(
            float(torch.cosine_similarity(h[0, 16:], keys[memory.entry, 16:], dim=0)), abs=1e-5
        )
    fused = [memory.similarity + 0.5 * memory.text_similarity for memory in found.memories]
    assert fused == sorted(fused, reverse=True)
    assert "of texts" in found.to_text()
    assert "(texts" in found.to_html()
    recommender.add_items([{**row(7), "item_id": "new"}])
    assert recommender.update([("somebody", "i3"), ("somebody", "new"), ("somebody", "i4")]).memories == 2
    wanted = model.text[-1] + 0.5 * model.text[recommender._number["i3"]]
    np.testing.assert_allclose(model.memory.keys[-1, 16:], wanted, atol=1e-5)
    wanted = recommender.score([["new", "i3"]])
    recommender.save()
    np.testing.assert_allclose(load(recommender.live.directory).score([["new", "i3"]]), wanted, atol=1e-5)
    assert any("module.pt2" in line for line in write_programs(recommender, tmp_path / "out", ["torch_export"]))
    with pytest.raises(ConfigError, match="memory_scope: past bars what others did later"):
        run(folder, dataset="tiny", data_path=str(folder), **RUN, **TEXT, memory_scope="past")
    with pytest.raises(ConfigError, match="memory_text: retrieve_by: target"):
        run(folder, dataset="tiny", data_path=str(folder), **options, retrieve_by="target")
    with pytest.raises(ConfigError, match=r"memory_text: 0\.5 compares the items' texts, and there are none"):
        run(tmp_path, **RUN, memory_text=0.5)


def test_changes_are_those_of_a_checkpoint_saved_and_loaded(checkpoint):
    history = ["i4", "i7"]
    before = checkpoint.score([history])
    checkpoint.update([("somebody", "i7"), ("somebody", "i9"), ("somebody", "i4"), (checkpoint.users[1], "i9")])
    after = checkpoint.score([history])
    assert after[0, checkpoint._number["i9"] - 1] > before[0, checkpoint._number["i9"] - 1]
    checkpoint.forget(checkpoint.users[2])
    checkpoint.save()
    again = load(checkpoint.live.directory)
    for ours, theirs in zip(checkpoint.model.transitions._counts, again.model.transitions._counts):
        np.testing.assert_array_equal(ours.toarray(), theirs.toarray())
    checkpoint.forget("somebody")
    assert checkpoint.model.transitions._counts[0].sum() == again.model.transitions._counts[0].sum() - 2


def test_an_added_item_is_reached_by_its_text(checkpoint):
    checkpoint.add_items([{**row(7), "item_id": "new"}])
    scores = np.exp(checkpoint.score([["i3", "i12"]])[0])  # of the kind of item 7
    assert scores[-1] > 0.01
    assert len(checkpoint.explain(["i3", "new"], k=ITEMS).items) > ITEMS - 3
    checkpoint.save()
    again = load(checkpoint.live.directory)
    torch.testing.assert_close(again.model.text, checkpoint.model.text)


@pytest.mark.parametrize("head", ["both", "ram"])
def test_the_parts_of_an_explanation_add_up(checkpoint, finished, head):
    if head == "ram":
        options = {**RUN, **TEXT, "head": "ram", "repeat_share": True}
        checkpoint = load(run(finished[0], dataset="tiny", data_path=str(finished[0]), **options).ours.directory)
        checkpoint.model.transitions.weights.copy_(torch.tensor([0.3, 0.2, 0.2, 0.2, 0.35, 0.0]))
    history = ["i4", "i9", "i7"]
    found, scores = checkpoint.explain(history, k=6), checkpoint.score([history])[0]
    assert found.unit == "probability"
    assert found.follows
    for reason in found.items:
        parts = reason.backbone + reason.retrieval + reason.transitions + reason.texts
        assert parts == pytest.approx(reason.score, rel=1e-12)
        value = float(scores[checkpoint._number[reason.item.id] - 1])
        assert reason.score == pytest.approx(np.exp(value), rel=1e-4, abs=1e-6)
        assert min(reason.transitions, reason.texts) >= 0
    assert "texts +" in found.to_text()
    assert "what follows the last two items" in found.to_html()


def test_it_is_exported_as_far_as_neighbours_go(checkpoint, tmp_path):
    assert any("module.pt2" in line for line in write_programs(checkpoint, tmp_path / "a", ["torch_export"]))
    write_vectors(checkpoint, tmp_path / "b", "npy")


def test_texts_serve_a_backbone_of_ids_and_plain_transitions_serve_without_texts(finished, tmp_path):
    folder = finished[0]
    options = {**RUN, "head": "knn", "item_text_encoder": "tfidf", "item_text_size": 12}
    ids = load(run(folder, dataset="tiny", data_path=str(folder), **options).ours.directory)
    assert ids.model.text.any()
    with pytest.raises(InputError, match="train it with item_vectors: both"):
        ids.add_items([{**row(7), "item_id": "new"}])
    plain = run(tmp_path, **{**RUN, "head": "knn"})
    assert plain.ours.model.text.shape[1] == 0
    loaded = load(plain.ours.directory)
    rows = next(iter(plain.ours.splits.test))[0]
    torch.testing.assert_close(loaded.model.full_sort_predict(rows), plain.ours.model.full_sort_predict(rows))
