"""RaSeRec as a whole: scores, look-ups, gradients, and that nothing of the future ever reaches a query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from tiny_models import LENGTH, N_ITEMS, N_USERS, Ids, build, cross_entropy_loops, disturb, options

from recbole_raserec.data.dataset import POSITION, SequenceDataset
from recbole_raserec.data.sequences import SequenceStore
from recbole_raserec.data.splits import prepare
from recbole_raserec.recommendation.backbone import Backbone, wrap_backbone
from recbole_raserec.recommendation.sasrec import SASRec
from recbole_raserec.retrieval.keeper import MemoryKeeper
from recbole_raserec.retrieval.queries import Queries
from recbole_raserec.retrieval.raserec import RaSeRec

ITEM_SEQ = "item_id_list"


class Split:
    """Windows (user, position) of a store: what the memory's keeper reads of a data set."""

    max_item_list_len = LENGTH

    def __init__(self, store, users, positions):
        self.store, self._users, self._positions = store, users, positions

    def windows(self):
        return self._users, self._positions, self.store.items[self.store.offsets[self._users] + self._positions]

    def batch(self, rows=slice(None)):
        users, positions, targets = (x[rows] for x in self.windows())
        seq, lengths = self.store.windows(users, positions, LENGTH)
        fields = {"user_id": users, POSITION: positions, "item_id": targets, ITEM_SEQ: seq, "item_length": lengths}
        return Interaction({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in fields.items()})


def splits(histories):
    """Leave-one-out: train, valid, test of histories of three items and more."""
    users = np.repeat(np.arange(1, len(histories) + 1), [len(h) for h in histories])
    store = SequenceStore(users, np.concatenate(histories), N_USERS, N_ITEMS, np.arange(len(users)))
    lengths = store.lengths()
    owner, index = store.users(), np.arange(len(store)) - store.offsets[store.users()]
    left = lengths[owner] - index
    return [
        Split(store, owner[chosen], index[chosen])
        for chosen in ((index > 0) & (left > 2), (index > 0) & (left == 2), left == 1)
    ]


def histories_of(seed, users=N_USERS - 1, longest=11):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, N_ITEMS, rng.integers(4, longest + 1)) for _ in range(users)]


class Biased(Backbone):
    """A backbone whose items have a bias."""

    def __init__(self, model, n_items):
        super().__init__(model, n_items)
        self.bias = torch.nn.Parameter(torch.linspace(-1, 1, n_items))

    def item_bias(self):
        return self.bias


def raserec(histories=None, biased=False, min_length=1, **changes):
    """Model, keeper and splits; the module's weights are moved off their start."""
    sasrec = build(SASRec, **{name: changes.pop(name) for name in list(changes) if "dropout_prob" in name})
    config = options(**changes)
    backbone = Biased(sasrec, N_ITEMS) if biased else wrap_backbone(sasrec, config, Ids())
    model = RaSeRec(config, Ids(), backbone)
    parts = splits(histories_of(0) if histories is None else histories)
    config = {**config, "memory_min_length": min_length}
    keeper = MemoryKeeper(model, parts[0], parts[1], config)
    alpha = model.ram.alpha.detach().clone()
    disturb(model.ram)
    with torch.no_grad():
        model.ram.alpha.copy_(alpha)
    return model.eval(), keeper, parts


def close(a, b, tolerance=1e-5):
    return float((a - b).detach().abs().max()) <= tolerance


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
    model, keeper, parts = raserec()
    keeper.admit_validation()
    direct = [[model.calculate_loss(part.batch()).detach(), model.full_sort_predict(part.batch())] for part in parts]
    keeper.before_epoch(0)
    keeper.before_evaluation()
    model.know("test", keeper.search(keeper.encode(parts[2], ""), ""))
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
    assert queries.find(torch.tensor([users[0]]), torch.tensor([positions[0]])) is None  # not searched yet
    queries.ids, queries.mask = torch.zeros(size, 1).long(), torch.ones(size, 1).bool()
    rows = np.random.default_rng(seed).integers(0, size, 7)
    found = queries.find(torch.from_numpy(users[rows]), torch.from_numpy(positions[rows]))
    assert found.tolist() == rows.tolist()
    for user in range(7):
        for position in range(1, 20):
            found = queries.find(torch.tensor([user, users[0]]), torch.tensor([position, positions[0]]))
            known = (user, position) in windows
            assert (found is not None) == known
            assert not known or found.tolist() == [windows.index((user, position)), 0]


def test_unknown_rows_are_encoded():
    model, keeper, parts = raserec()
    wanted = model.full_sort_predict(parts[2].batch())
    keeper.before_epoch(0)
    assert model.knows("train")
    assert close(model.full_sort_predict(parts[2].batch()), wanted)
    model.remember(keeper.encode(parts[1], ""))
    assert not model.knows("train")


def test_validation_pairs_join_the_memory():
    model, keeper, parts = raserec()
    keeper.before_epoch(0)
    keeper.before_evaluation()
    before = len(model.memory)
    scores = model.full_sort_predict(parts[2].batch())
    keeper.admit_validation(parts[2])
    users, positions, targets = parts[1].windows()
    assert len(model.memory) == before + len(users)
    assert np.array_equal(model.memory.users[before:], users)
    assert np.array_equal(model.memory.positions[before:], positions)
    assert np.array_equal(model.memory.targets[before:], targets)
    wanted = model.encode(parts[1].batch()[ITEM_SEQ], parts[1].batch()["item_length"])
    assert close(torch.from_numpy(np.array(model.memory.keys[before:])), wanted)
    assert not model.knows("train")
    assert not model.knows("valid")
    assert not close(model.full_sort_predict(parts[2].batch()), scores)  # the test queries find them


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_frozen_backbone_neither_learns_nor_drops():
    model, keeper, parts = raserec(
        hidden_dropout_prob=0.5, attn_dropout_prob=0.5, ram_dropout=0.5, learnable_alpha=True
    )
    model.train()
    assert model.training
    assert all(part.training for part in model.ram.modules())
    assert not any(part.training for part in model.backbone.modules())
    interaction = parts[0].batch()
    vectors = [model.encode(interaction[ITEM_SEQ], interaction["item_length"]) for _ in range(2)]
    assert torch.equal(*vectors)
    keeper.before_epoch(0)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.calculate_loss(interaction).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.ram.parameters() if "key.bias" not in _name(model, p))
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    model.eval()
    assert not any(part.training for part in model.modules())


def _name(model, parameter):
    return next(name for name, p in model.named_parameters() if p is parameter)


def test_unfrozen_backbone_learns():
    model, keeper, parts = raserec(freeze_backbone=False, hidden_dropout_prob=0.5)
    model.train()
    assert all(part.training for part in model.modules())
    keeper.before_epoch(0)
    model.calculate_loss(parts[0].batch()).backward()
    quiet = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("key.bias" in name for name in quiet)  # a softmax does not see a shift of all its logits


def test_unfrozen_memory_follows_the_backbone():
    model, keeper, parts = raserec(freeze_backbone=False)
    keeper.before_epoch(0)
    first = np.array(model.memory.keys)
    disturb(model.backbone, seed=5)
    keeper.before_evaluation()
    moved = np.array(model.memory.keys)
    wanted = model.encode(parts[0].batch()[ITEM_SEQ], parts[0].batch()["item_length"]).detach().numpy()
    assert np.abs(moved - wanted).max() < 1e-5 < np.abs(moved - first).max()
    assert not model.knows("train")  # neighbours of the old weights
    keeper.admit_validation(parts[2])
    assert len(model.memory) == len(first) + len(parts[1].windows()[0])


def test_unfrozen_loss_uses_fresh_vectors_and_known_neighbours():
    model, keeper, parts = raserec(freeze_backbone=False)
    keeper.before_epoch(0)
    interaction = parts[0].batch()
    disturb(model.backbone, seed=5, scale=0.05)
    h = model.encode(interaction[ITEM_SEQ], interaction["item_length"])
    augmented = model.augment(h, model.known_ids.long(), model.known_mask)
    wanted = cross_entropy_loops(augmented, model.item_vectors(), interaction["item_id"])
    assert model.calculate_loss(interaction).item() == pytest.approx(wanted, rel=1e-5)


# -- leakage -----------------------------------------------------------------------------------------------------------

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
    model, keeper, parts = raserec(histories, top_k=top_k, similarity=similarity, freeze_backbone=frozen)
    keeper.before_epoch(0)
    no_later_memory(model, model._known["train"])
    no_later_memory(model, keeper.search(keeper.encode(parts[1], ""), ""))
    keeper.admit_validation(parts[2])
    no_later_memory(model, model._known["test"])
    for part in parts:  # the path without look-up, now that validation pairs are there too
        queries = keeper.encode(part, "")
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
        model, keeper, parts = raserec(logs_, top_k=4)
        if weights is None:
            weights = model.ram.state_dict()
        model.ram.load_state_dict(weights)  # the module's start depends on the whole training split
        if not own:
            fresh = RaSeRec(options(top_k=4), Ids(), model.backbone).eval()
            fresh.ram.load_state_dict(weights)
            queries = keeper.encode(parts[0], "")
            fresh.remember(queries.take(np.flatnonzero(queries.users != user)))
            model = fresh
        else:
            keeper.admit_validation()
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
    keeper = MemoryKeeper(model, train, valid, config)
    keeper.before_epoch(0)
    no_later_memory(model, model._known["train"])
    assert len(model.memory) == len(train)
    assert torch.isfinite(model.train().calculate_loss(next(iter(data.train))))
    keeper.admit_validation(test)
    no_later_memory(model, model._known["test"])
    store = train.store
    lengths = store.lengths()
    assert (model.memory.positions < lengths[model.memory.users] - 1).all()  # no test target is in the memory
