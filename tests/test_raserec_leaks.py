"""What RaSeRec trains with a frozen backbone and an unfrozen one, and what no neighbour may know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from raserec_helpers import ITEM_SEQ, Split, histories_of, raserec
from tiny_models import N_ITEMS, N_USERS, Ids, cross_entropy_loops, disturb, options

from recbole_raserec.data.dataset import SequenceDataset
from recbole_raserec.data.splits import prepare
from recbole_raserec.recommendation.backbone import wrap_backbone
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.raserec import RaSeRec
from recbole_raserec.retrieval.stage import RetrievalHooks


def _name(model, parameter):
    return next(name for name, p in model.named_parameters() if p is parameter)


def test_frozen_backbone_neither_learns_nor_drops():
    model, hooks, parts = raserec(hidden_dropout_prob=0.5, attn_dropout_prob=0.5, ram_dropout=0.5, learnable_alpha=True)
    model.train()
    assert model.training
    assert all(part.training for part in model.ram.modules())
    assert not any(part.training for part in model.backbone.modules())
    interaction = parts[0].batch()
    vectors = [model.encode(interaction[ITEM_SEQ], interaction["item_length"]) for _ in range(2)]
    assert torch.equal(*vectors)
    hooks.before_epoch(0)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.calculate_loss(interaction).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.ram.parameters() if "key.bias" not in _name(model, p))
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    model.eval()
    assert not any(part.training for part in model.modules())


def test_unfrozen_backbone_learns():
    model, hooks, parts = raserec(freeze_backbone=False, hidden_dropout_prob=0.5)
    model.train()
    assert all(part.training for part in model.modules())
    hooks.before_epoch(0)
    model.calculate_loss(parts[0].batch()).backward()
    quiet = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("key.bias" in name for name in quiet)  # a softmax does not see a shift of all its logits


def test_unfrozen_memory_follows_the_backbone():
    model, hooks, parts = raserec(freeze_backbone=False)
    hooks.before_epoch(0)
    first = np.array(model.memory.keys)
    disturb(model.backbone, seed=5)
    hooks.before_evaluation()
    moved = np.array(model.memory.keys)
    wanted = model.encode(parts[0].batch()[ITEM_SEQ], parts[0].batch()["item_length"]).detach().numpy()
    assert np.abs(moved - wanted).max() < 1e-5 < np.abs(moved - first).max()
    assert "train" not in model.known  # neighbours of the old weights
    hooks.test = parts[2]
    hooks.before_test()
    assert len(model.memory) == len(first) + len(parts[1].windows()[0])


def test_unfrozen_loss_uses_fresh_vectors_and_known_neighbours():
    model, hooks, parts = raserec(freeze_backbone=False)
    hooks.before_epoch(0)
    interaction = parts[0].batch()
    disturb(model.backbone, seed=5, scale=0.05)
    h = model.encode(interaction[ITEM_SEQ], interaction["item_length"])
    augmented = model.augment(h, model.known_ids.long(), model.known_mask)
    wanted = cross_entropy_loops(augmented, model.item_vectors(), interaction["item_id"])
    assert model.calculate_loss(interaction).item() == pytest.approx(wanted, rel=1e-5)


logs = st.lists(
    st.lists(st.integers(1, 4), min_size=3, max_size=9), min_size=1, max_size=N_USERS - 1
).filter(lambda histories: max(len(h) for h in histories) > 3)  # fmt: skip


def no_later_memory(model, queries):
    """No neighbour belongs to the query's user at the query's position or after."""
    ids, mask = queries.ids.numpy(), queries.mask.numpy()
    own = model.memory.users[ids] == queries.users[:, None]
    later = model.memory.positions[ids] >= queries.positions[:, None]
    assert not (mask & own & later).any()
    barred = (model.memory.users == queries.users[:, None]) & (model.memory.positions >= queries.positions[:, None])
    allowed = (~barred).sum(axis=1)
    assert np.array_equal(mask.sum(axis=1), np.minimum(allowed, model.top_k))  # and nothing else is kept away


@settings(max_examples=25, deadline=None)
@given(logs, st.sampled_from([1, 4, 50]), st.sampled_from(["cosine", "dot"]), st.booleans())
def test_no_neighbour_knows_the_answer(histories, top_k, similarity, frozen):
    """Few items, so that windows repeat: a user's own later windows are often the most similar of all."""
    histories = [np.array(h) for h in histories]
    model, hooks, parts = raserec(histories, top_k=top_k, similarity=similarity, freeze_backbone=frozen)
    hooks.before_epoch(0)
    no_later_memory(model, model.known["train"])
    no_later_memory(model, hooks.search(hooks.encode(parts[1], ""), ""))
    hooks.test = parts[2]
    hooks.before_test()
    no_later_memory(model, model.known["test"])
    for part in parts:  # the path without look-up, now that validation pairs are there too
        queries = hooks.encode(part, "")
        ids, mask = model.neighbours(queries.h, torch.from_numpy(queries.users), torch.from_numpy(queries.positions))
        queries.ids, queries.mask = ids, mask
        no_later_memory(model, queries)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, N_USERS - 1), st.integers(1, 9), st.booleans())
def test_the_future_does_not_change_a_score(seed, user, cut, own):
    """Items of `user` from index `cut` on are replaced; its queries up to there score as before, to the last bit."""
    histories = histories_of(seed)
    rng = np.random.default_rng(seed + 1)
    changed = list(histories)
    changed[user - 1] = histories[user - 1].copy()
    changed[user - 1][cut:] = rng.integers(1, N_ITEMS, len(histories[user - 1][cut:]))
    scores, weights = [], None
    for logs_ in (histories, changed):
        model, hooks, parts = raserec(logs_, top_k=4)
        if weights is None:
            weights = model.ram.state_dict()
        model.ram.load_state_dict(weights)  # the module's start depends on the whole training split
        if not own:
            fresh = RaSeRec(options(top_k=4), Ids(), model.backbone).eval()
            fresh.ram.load_state_dict(weights)
            queries = hooks.encode(parts[0], "")
            rows = np.flatnonzero(queries.users != user)
            fresh.memory.add(
                *(x[rows] for x in (queries.h, queries.targets, queries.users, queries.positions, queries.times))
            )
            model = fresh
        else:
            hooks.before_test()
        store = parts[0].store
        positions = np.arange(1, min(cut, len(histories[user - 1]) - 1) + 1)
        part = Split(store, np.full(len(positions), user), positions)
        scores.append(model.full_sort_predict(part.batch()))
    assert torch.equal(*scores)


def test_no_leak_through_the_real_data_set(small_config):
    """The same through RecBole's files, split and loaders."""
    config = small_config(
        "RaSeRec", log_seed=3, backbone="SASRec", freeze_backbone=False, hidden_size=8, inner_size=8, top_k=6,
        ram_inner_size=8,
    )  # fmt: skip
    data = prepare(config.for_backbone(), SequenceDataset, trim=True)
    torch.manual_seed(0)
    sasrec = disturb(SASRec(config.for_backbone(), data.dataset))
    model = RaSeRec(config, data.dataset, wrap_backbone(sasrec, config, data.dataset))
    train, valid, test = (part._dataset for part in (data.train, data.valid, data.test))
    hooks = RetrievalHooks(model, train, valid, config)
    hooks.before_epoch(0)
    no_later_memory(model, model.known["train"])
    assert len(model.memory) == len(train)
    assert torch.isfinite(model.train().calculate_loss(next(iter(data.train))))
    hooks.test = test
    hooks.before_test()
    no_later_memory(model, model.known["test"])
    store = train.store
    lengths = store.lengths()
    assert (model.memory.positions < lengths[model.memory.users] - 1).all()  # no test target is in the memory
