"""RaSeRec as a whole: scores, look-ups, gradients, and that nothing of the future ever reaches a query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raserec_helpers import ITEM_SEQ, close, histories_of, raserec, splits
from tiny_models import LENGTH, N_ITEMS, Ids, build, cross_entropy_loops, options

from recbole_raserec.data.dataset import POSITION
from recbole_raserec.recommendation.backbone import Backbone
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.queries import PairBuilder, Queries
from recbole_raserec.retrieval.raserec import RaSeRec

# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", ["single", "dual"])
def test_scores_and_loss(biased, form):
    model, _, parts = raserec(biased=biased, ram=form, beta=0.4)
    interaction = parts[1].batch()
    h = model(*(interaction[name] for name in (ITEM_SEQ, "item_length", "user_id", POSITION)))
    bias = torch.linspace(-1, 1, N_ITEMS) if biased else torch.zeros(N_ITEMS)
    wanted = h @ model.backbone.model.item_embedding.weight.T + bias
    scores = model.full_sort_predict(interaction)
    assert close(scores, wanted)
    rows = torch.arange(len(interaction))
    for item in (1, 7, N_ITEMS - 1):
        interaction["item_id"][:] = item
        assert close(model.predict(interaction), scores[rows, item])
    interaction = parts[1].batch()
    ones = torch.cat([h, torch.ones(len(h), 1)], dim=1)
    table = torch.cat([model.item_vectors(), bias[:, None]], dim=1)
    expected = cross_entropy_loops(ones, table, interaction["item_id"])
    assert model.calculate_loss(interaction).item() == pytest.approx(expected, rel=1e-5)
    assert not close(h, model.encode(interaction[ITEM_SEQ], interaction["item_length"]), 0.05)


def test_augmented_vector_is_the_module_on_the_found_memories():
    model, _, parts = raserec()
    interaction = parts[2].batch()
    seq, length, user, position = (interaction[name] for name in (ITEM_SEQ, "item_length", "user_id", POSITION))
    h = model.encode(seq, length)
    ids, mask = model.neighbours(h, user, position)
    memory = model.memory
    keys = torch.from_numpy(np.array(memory.keys))[ids]
    for row in range(len(ids)):  # keys are the encodings of the memories' prefixes
        user_, position_ = int(memory.users[ids[row, 0]]), int(memory.positions[ids[row, 0]])
        prefix, size = parts[0].store.windows(np.array([user_]), np.array([position_]), LENGTH)
        assert close(keys[row, 0], model.encode(torch.from_numpy(prefix), torch.from_numpy(size))[0])
        assert memory.targets[ids[row, 0]] == parts[0].store.items[parts[0].store.offsets[user_] + position_]
    values = model.item_vectors()[torch.from_numpy(np.array(memory.targets)).long()[ids]]
    assert close(model(seq, length, user, position), model.ram(h, keys, values, mask))


def test_an_empty_memory_leaves_the_backbone():
    model = RaSeRec(options(), Ids(), Backbone(build(SASRec), N_ITEMS)).eval()
    interaction = splits(histories_of(0))[2].batch()
    assert close(model.full_sort_predict(interaction), model.backbone.model.full_sort_predict(interaction))


def test_alpha_one_is_the_backbone():
    model, _, parts = raserec(alpha=1.0)
    interaction = parts[2].batch()
    assert close(model.full_sort_predict(interaction), model.backbone.model.full_sort_predict(interaction))


def test_an_unknown_user_may_see_everything():
    model, _, parts = raserec(top_k=1)
    interaction = parts[0].batch()
    h = model.encode(interaction[ITEM_SEQ], interaction["item_length"])
    ids, _ = model.neighbours(h)
    found = torch.from_numpy(np.array(model.memory.keys))[ids[:, 0]]
    assert close(torch.cosine_similarity(found, h), torch.ones(len(h)))  # each training window finds itself
    own, _ = model.neighbours(h, interaction["user_id"], interaction[POSITION])
    assert not torch.equal(own, ids)


def test_a_user_alone_with_later_memories_keeps_h():
    model, _, parts = raserec(histories=[np.array([3, 4, 5, 6, 7, 8])])
    interaction = parts[0].batch(slice(0, 1))
    assert int(interaction[POSITION]) == 1
    h = model.encode(interaction[ITEM_SEQ], interaction["item_length"])
    assert not model.neighbours(h, interaction["user_id"], interaction[POSITION])[1].any()
    assert torch.equal(model.full_sort_predict(interaction), h @ model.item_vectors().T)


def test_memory_holds_prefixes_of_at_least_min_length():
    model, _, parts = raserec(min_length=3)
    users, positions, targets = parts[0].windows()
    kept = positions >= 3
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(model.memory.positions, positions[kept])
    assert np.array_equal(model.memory.users, users[kept])
    assert np.array_equal(model.memory.targets, targets[kept])


# -- look-ups ----------------------------------------------------------------------------------------------------------


def test_looked_up_rows_equal_direct_ones():
    model, hooks, parts = raserec()
    hooks.before_test()
    direct = [[model.calculate_loss(part.batch()).detach(), model.full_sort_predict(part.batch())] for part in parts]
    hooks.before_epoch(0)
    hooks.before_evaluation()
    model.known["test"] = hooks.search(hooks.encode(parts[2], ""), "")
    for part, (loss, scores) in zip(parts, direct):
        turn = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        rows = part.batch(turn.numpy())
        for field in (ITEM_SEQ, "item_length"):
            del rows.interaction[field]  # so that nothing can be encoded
        assert close(model.full_sort_predict(rows), scores[turn])
        assert close(model.calculate_loss(rows), loss)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1), st.integers(0, 2**31))
def test_find_gives_the_row_or_nothing(windows, seed):
    """Rows in any order; a window that is not there is never taken for another."""
    windows = [sorted(windows)[k] for k in np.random.default_rng(seed).permutation(len(windows))]
    users, positions = np.array(windows).T
    size = len(windows)
    queries = Queries(users, positions, np.ones(size, int), None, torch.zeros(size, 2))
    assert queries.find(torch.tensor([users[0]]), torch.tensor([positions[0]]), 1) is None  # not searched yet
    queries.ids, queries.mask = torch.arange(size)[:, None].repeat(1, 2), torch.ones(size, 2).bool()
    rows = np.random.default_rng(seed).integers(0, size, 7)
    h, ids, mask = queries.find(torch.from_numpy(users[rows]), torch.from_numpy(positions[rows]), 1)
    assert ids[:, 0].tolist() == rows.tolist()
    assert (h.shape, ids.shape, mask.shape) == ((7, 2), (7, 1), (7, 1))
    for user in range(7):
        for position in range(1, 20):
            found = queries.find(torch.tensor([user, users[0]]), torch.tensor([position, positions[0]]), 1)
            known = (user, position) in windows
            assert (found is not None) == known
            assert not known or found[1][:, 0].tolist() == [windows.index((user, position)), 0]


def test_unknown_rows_are_encoded():
    model, hooks, parts = raserec()
    wanted = model.full_sort_predict(parts[2].batch())
    hooks.before_epoch(0)
    assert "train" in model.known
    assert close(model.full_sort_predict(parts[2].batch()), wanted)
    late = hooks.encode(parts[1], "")
    model.remember(late.h, PairBuilder(late).rows)
    assert "train" not in model.known


def test_validation_pairs_join_the_memory():
    model, hooks, parts = raserec()
    hooks.before_epoch(0)
    hooks.before_evaluation()
    before = len(model.memory)
    scores = model.full_sort_predict(parts[2].batch())
    hooks.test = parts[2]
    hooks.before_test()
    users, positions, targets = parts[1].windows()
    assert len(model.memory) == before + len(users)
    assert np.array_equal(model.memory.users[before:], users)
    assert np.array_equal(model.memory.positions[before:], positions)
    assert np.array_equal(model.memory.targets[before:], targets)
    wanted = model.encode(parts[1].batch()[ITEM_SEQ], parts[1].batch()["item_length"])
    assert close(torch.from_numpy(np.array(model.memory.keys[before:])), wanted)
    assert "train" not in model.known
    assert "valid" not in model.known
    assert not close(model.full_sort_predict(parts[2].batch()), scores)  # the test queries find them
