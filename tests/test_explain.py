"""Explanations: parts that add up, ranks and effects against scoring without memories."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec import Recommender
from recbole_raserec.errors import InputError


@pytest.fixture(scope="module")
def loaded(planted_run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("copy") / "checkpoint"
    shutil.copytree(planted_run.ours.directory, directory)
    return Recommender.load(directory, "cpu")


def check(recommender, history, k, user=None):
    """All that must hold of an explanation."""
    found = recommender.explain(history, k, user)
    users = None if user is None else [user]
    scores = recommender.score([history], users=users)[0]
    ranked = recommender.recommend([history], k, users=users)
    assert [reason.item.id for reason in found.items] == ranked[0]
    total = sum(memory.attention for memory in found.memories)
    assert total == pytest.approx(1, abs=1e-5) if found.memories else total == 0
    for reason in found.items:
        assert reason.backbone + reason.retrieval == reason.score  # to the last bit
        value = float(scores[recommender._number[reason.item.id] - 1])
        expected = np.exp(value) if found.unit == "probability" else value
        assert reason.score == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert len(reason.effects) == len(found.memories)
    assert json.loads(found.to_json()) == json.loads(json.dumps(found.to_dict()))
    text = found.to_text()
    assert all(str(reason.item) in text for reason in found.items)
    return found


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_parts_add_up(loaded, data):
    history = data.draw(st.lists(st.sampled_from(loaded.items[1:]), min_size=1, max_size=60))
    user = data.draw(st.none() | st.sampled_from(loaded.users[1:]))
    check(loaded, history, data.draw(st.integers(1, 12)), user)


@pytest.mark.parametrize(
    "options",
    [
        {"head": "knn"}, {"head": "both"}, {"ram": "single", "alpha": 0.0}, {"backbone": "BERT4Rec"},
        {"memory": "both", "memory_frequency_weight": 1.0}, {"retrieve_by": "target"}, {"similarity": "dot"},
        {"learnable_alpha": True, "beta": 1.0},
    ],
)  # fmt: skip
def test_other_heads_and_memories(tiny_run, options):
    recommender = Recommender.load(tiny_run(**options).ours.directory, "cpu")
    for user in recommender.users[1:6]:
        check(recommender, [recommender.items[n] for n in recommender.stored([user])[0]], 4, user)


def test_without_memory_is_the_backbone(loaded):
    history = loaded.items[3:9]
    found = loaded.explain(history, 5)
    model, numbers = loaded.model, [loaded._number[item] for item in history]
    with torch.no_grad():
        h = model.encode(torch.tensor([numbers]), torch.tensor([len(numbers)]))
        alone = (h @ model.item_vectors().t())[0].numpy()
    alone[[0, *numbers]] = -np.inf
    order = np.argsort(-alone, kind="stable").tolist()
    for reason in found.items:
        number = loaded._number[reason.item.id]
        assert reason.score_without_memory == pytest.approx(float(alone[number]), rel=1e-5)
        assert order[reason.rank_without_memory - 1] == number


def test_an_effect_is_what_the_score_loses(loaded):
    """Each memory in turn removed from the memory itself; what takes its place is left out by K - 1."""
    history = loaded.items[3:9]
    found = loaded.explain(history, 3)
    model, numbers = loaded.model, [loaded._number[item] for item in history]
    row, length = torch.tensor([numbers]), torch.tensor([len(numbers)])
    with torch.no_grad():
        h = model.encode(row, length)
        ids, mask = model.neighbours(h)
        for place in (0, 3, len(found.memories) - 1):
            kept = [n for n in range(ids.shape[1]) if n != place]
            scores = (model.augment(h, ids[:, kept], mask[:, kept]) @ model.item_vectors().t())[0]
            for reason in found.items:
                lost = reason.score - float(scores[loaded._number[reason.item.id]])
                assert reason.effects[place] == pytest.approx(lost, abs=1e-4)
    assert any(abs(effect) > 1e-4 for reason in found.items for effect in reason.effects)


def test_memories_are_named_by_what_happened(loaded):
    user = loaded.users[9]
    found = loaded.explain(None, 3, user)
    own = loaded.stored([user])[0]
    assert [item.id for item in found.history] == [loaded.items[n] for n in own]
    similarity = [memory.similarity for memory in found.memories]
    assert similarity == sorted(similarity, reverse=True)
    for memory in found.memories:
        history = [loaded.items[n] for n in loaded.stored([memory.user])[0]]
        position = int(loaded.model.memory.positions[memory.entry])
        assert [item.id for item in memory.prefix] == history[max(position - 5, 0) : position]
        if position < len(history):
            assert memory.next.id == history[position]
        if memory.user == user:
            assert position < len(own)


def test_questions_without_sense(loaded, tiny_run):
    with pytest.raises(InputError, match="nothing is known of this history"):
        loaded.explain(["unknown"])
    with pytest.raises(InputError, match="k: 0"):
        loaded.explain([loaded.items[1]], 0)
    plain = Recommender.load(tiny_run("SASRec").base.directory, "cpu")
    with pytest.raises(InputError, match="SASRec has no memory to explain by"):
        plain.explain([plain.items[1]])
