"""A memory that changes: removal, expiry, merging, concurrent searches, the scope `past`, patterns and their owners."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from recbole_raserec.retrieval.memory import MemoryBank

HIDDEN = 16
INDEXES = ["flat", "ivf", "ivfpq", "hnsw"]


def rows(rng, size, n_users=8, patterns=False):
    """Random entries; patterns come with owners."""
    keys = rng.standard_normal((size, HIDDEN)).astype(np.float32)
    targets, positions = rng.integers(1, 40, size), rng.integers(1, 9, size)
    times = rng.integers(0, 20, size).astype(float)
    if not patterns:
        return {"keys": keys, "targets": targets, "users": rng.integers(0, n_users, size), "positions": positions,
                "times": times}  # fmt: skip
    held = [rng.choice(n_users, rng.integers(2, min(n_users, 4) + 1), replace=False) for _ in range(size)]
    owners = (
        np.repeat(np.arange(size), [len(users) for users in held]), np.concatenate(held),
        rng.integers(1, 9, sum(len(users) for users in held)),
    )  # fmt: skip
    return {"keys": keys, "targets": targets, "users": np.full(size, -1), "positions": positions, "times": times,
            "support": np.array([len(users) for users in held]), "owners": owners}  # fmt: skip


class Model:
    """What a bank ought to hold: a list of entries, None where one was removed."""

    def __init__(self):
        self.entries = []

    def add(self, block):
        for i in range(len(block["keys"])):
            entry = {name: block[name][i] for name in ("keys", "targets", "users", "positions", "times")}
            entry["owners"] = {}
            if "owners" in block:
                of = block["owners"][0] == i
                entry["owners"] = dict(zip(block["owners"][1][of].tolist(), block["owners"][2][of].tolist()))
            self.entries.append(entry)

    def remove(self, gone):
        before = sum(e is not None for e in self.entries)
        self.entries = [None if e is None or gone(e) else e for e in self.entries]
        return before - sum(e is not None for e in self.entries)

    def forget(self, user):
        for entry in self.entries:
            if entry is not None:
                entry["owners"].pop(user, None)
        return self.remove(lambda e: e["users"] == user or (e["users"] < 0 and len(e["owners"]) < 2))

    def allowed(self, user, position, time):
        found = []
        for i, e in enumerate(self.entries):
            if e is None or (e["users"] == user >= 0 and e["positions"] >= position):
                continue
            if len(e["owners"]) == 2 and e["owners"].get(user, -1) >= position:
                continue
            if time is not None and not e["times"] < time:
                continue
            found.append(i)
        return found

    def best(self, query, top_k, user, position, time=None):
        found = self.allowed(user, position, time)
        unit = query.astype(np.float64) / np.linalg.norm(query)
        unit = unit.astype(np.float32).astype(np.float64)
        scores = []
        for i in found:
            key = self.entries[i]["keys"].astype(np.float64)
            key = (key / np.linalg.norm(key)).astype(np.float32).astype(np.float64)
            scores.append((-np.float32((unit * key).sum()), i))
        return [i for _, i in sorted(scores)[:top_k]]


@settings(max_examples=40, stateful_step_count=25, deadline=None)
class Life(RuleBasedStateMachine):
    """Adds, removals, merges, saves and searches in any order: always what a list of entries would give."""

    @initialize(scope=st.sampled_from(["history", "past"]), seed=st.integers(0, 10**6))
    def begin(self, scope, seed):
        self.rng, self.scope = np.random.default_rng(seed), scope
        self.bank, self.model = self.empty(), Model()

    def empty(self):
        return MemoryBank(HIDDEN, index="flat", scope=self.scope)

    @rule(size=st.integers(0, 6), patterns=st.booleans())
    def add(self, size, patterns):
        if patterns and not size:
            return
        block = rows(self.rng, size, patterns=patterns)
        ids = self.bank.add(**block)
        assert ids.tolist() == list(range(len(self.model.entries), len(self.model.entries) + size))
        self.model.add(block)

    @rule(user=st.integers(-1, 8))
    def forget(self, user):
        assert self.bank.forget(user) == (0 if user < 0 else self.model.forget(user))

    @rule(time=st.integers(0, 20))
    def expire(self, time):
        assert self.bank.expire(time) == self.model.remove(lambda e: e["times"] < time)

    @rule(size=st.integers(1, 5), user=st.integers(0, 7))
    def merge(self, size, user):
        other, block, more = self.empty(), rows(self.rng, size, patterns=True), rows(self.rng, size)
        single = Model()
        for part in (block, more):
            other.add(**part)
            single.add(part)
        other.forget(user)
        single.forget(user)
        ids = self.bank.merge(other)
        left = [e for e in single.entries if e is not None]
        assert len(ids) == len(left)
        self.model.entries += left

    @rule()
    def search(self):
        queries = self.rng.standard_normal((4, HIDDEN)).astype(np.float32)
        users, positions = self.rng.integers(-1, 9, 4), self.rng.integers(0, 10, 4)
        times = self.rng.integers(0, 22, 4).astype(float) if self.rng.random() < 0.7 else None
        found = self.bank.search(queries, 3, users, positions, times=times)
        for q in range(4):
            time = times[q] if times is not None and self.scope == "past" else None
            wanted = self.model.best(queries[q], 3, users[q], positions[q], time)
            assert found.ids[q][found.mask[q]].tolist() == wanted

    @precondition(lambda self: len(self.model.entries))
    @rule()
    def reload(self):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.bank.save(folder)
            self.bank = MemoryBank.load(folder)
            self.bank.search(np.ones((1, HIDDEN)), 1, None, None)
            self.bank._entries.wipe(np.zeros(0, dtype=np.int64))  # copies the maps before the files go

    @invariant()
    def same_entries(self):
        if not hasattr(self, "bank"):
            return
        assert len(self.bank) == len(self.model.entries)
        assert self.bank.live == sum(e is not None for e in self.model.entries)
        for i, entry in enumerate(self.model.entries):
            if entry is None:
                assert self.bank.gone[i]
                assert not self.bank.keys[i].any()
                assert (self.bank.targets[i], self.bank.users[i]) == (0, -1)
            else:
                np.testing.assert_array_equal(self.bank.keys[i], entry["keys"])
                assert self.bank.support[i] == max(len(entry["owners"]), 1)


TestLife = Life.TestCase


@pytest.mark.parametrize("index", INDEXES)
def test_removed_entries_are_never_returned_and_new_ones_are_found(index):
    rng = np.random.default_rng(0)
    bank = MemoryBank(HIDDEN, index=index, ivf_lists=8, ivf_probes=8)
    first = rows(rng, 900, n_users=30)
    bank.add(**first)
    found = bank.search(first["keys"], 1, None, None)
    assert (found.ids[:, 0] == np.arange(900)).mean() > 0.95
    for user in (3, 7, 11):
        assert bank.forget(user) == (first["users"] == user).sum()
    second = rows(rng, 300, n_users=30)
    ids = bank.add(**second)
    assert ids[0] == 900
    found = bank.search(np.concatenate([first["keys"], second["keys"]]), 5, None, None)
    assert not np.isin(bank.users[found.ids[found.mask]], -1).any()
    assert not bank.gone[found.ids[found.mask]].any()
    kept = np.flatnonzero(~bank.gone)
    assert (found.ids[kept, 0] == kept).mean() > 0.95
    assert not bank.keys[bank.gone].any()
    assert not bank._vectors.values[bank.gone].any()
    if index == "hnsw":
        import faiss

        inner = bank._index._index
        stored = faiss.rev_swig_ptr(faiss.downcast_index(inner.storage).get_xb(), inner.ntotal * HIDDEN)
        assert not stored.reshape(-1, HIDDEN)[bank.gone].any()
    elif index != "flat":
        assert bank._index._index.ntotal == bank.live


def test_forgotten_entries_are_gone_from_the_file(tmp_path):
    rng = np.random.default_rng(1)
    bank = MemoryBank(HIDDEN)
    block = rows(rng, 50, n_users=5)
    bank.add(**block)
    bank.save(tmp_path)
    secret = block["keys"][block["users"] == 2][0].tobytes()
    assert any(secret in path.read_bytes() for path in tmp_path.iterdir())
    loaded = MemoryBank.load(tmp_path)
    loaded.forget(2)
    loaded.save(tmp_path)
    assert not any(secret in path.read_bytes() for path in tmp_path.iterdir())
    again = MemoryBank.load(tmp_path)
    assert again.live == 50 - (block["users"] == 2).sum()
    assert len(again) == 50


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 12), index=st.sampled_from(["flat", "ivf"]))
def test_nothing_of_the_present_or_later_is_seen_with_the_scope_past(seed, top_k, index):
    rng = np.random.default_rng(seed)
    bank = MemoryBank(HIDDEN, index=index, ivf_lists=3, ivf_probes=3, scope="past")
    block = rows(rng, 150)
    block["times"][rng.random(150) < 0.1] = np.nan
    bank.add(**block)
    times = rng.integers(0, 22, 60).astype(float)
    queries = rng.standard_normal((60, HIDDEN))
    found = bank.search(queries, top_k, np.full(60, -1), np.zeros(60, int), times=times)
    query, rank = np.nonzero(found.mask)
    assert (bank.times[found.ids[query, rank]] < times[query]).all()
    with np.errstate(invalid="ignore"):
        open_ = (block["times"] < times[:, None]).sum(1)
    if index == "flat":
        np.testing.assert_array_equal(found.mask.sum(1), np.minimum(open_, top_k))
    assert bank.search(queries, 1, None, None).mask.all()  # asked now


def test_a_hundred_thousand_adds_and_a_thousand_forgets_under_search():
    """Searches run while entries come and go: none fails, none returns what was forgotten before it began."""
    rng = np.random.default_rng(2)
    bank = MemoryBank(HIDDEN, index="flat")
    n_users, forgotten, errors, searches = 4000, set(), [], [0]
    bank.add(**rows(rng, 1000, n_users))
    done = threading.Event()

    def read(seed):
        own = np.random.default_rng(seed)
        try:
            while not done.is_set():
                before = set(forgotten)
                queries = own.standard_normal((8, HIDDEN)).astype(np.float32)
                found = bank.search(queries, 10, None, None)
                ids = found.ids[found.mask]
                users = owner[ids]
                assert not before & set(users.tolist())
                assert found.mask.all()
                assert (np.abs(found.similarity) <= 1 + 1e-6).all()
                assert (np.diff(found.similarity, axis=1) <= 0).all()
                searches[0] += 1
        except Exception as error:  # what a thread raises is lost otherwise
            errors.append(error)

    blocks = [rows(rng, 1000, 40) for _ in range(100)]
    for step, block in enumerate(blocks):
        block["users"] += n_users + 40 * step
    owner = np.concatenate([bank.users, *(block["users"] for block in blocks)])
    threads = [threading.Thread(target=read, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for step, block in enumerate(blocks):
        bank.add(**block)
        for user in range(n_users + 40 * step, n_users + 40 * step + 10):
            assert bank.forget(user) == (block["users"] == user).sum()
            forgotten.add(user)
    done.set()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert searches[0] > 10
    assert len(bank) == 101_000
    fresh = MemoryBank(HIDDEN, index="flat")
    left = np.flatnonzero(~bank.gone)
    fresh.add(bank.keys[left], bank.targets[left], bank.users[left], bank.positions[left])
    queries = rng.standard_normal((50, HIDDEN))
    a, b = bank.search(queries, 10, None, None), fresh.search(queries, 10, None, None)
    np.testing.assert_array_equal(a.ids, left[b.ids])
    np.testing.assert_array_equal(a.similarity, b.similarity)


def test_owners_must_name_entries_of_the_call():
    bank = MemoryBank(HIDDEN)
    block = rows(np.random.default_rng(0), 3, patterns=True)
    block["owners"] = (np.array([0, 3]), np.array([1, 2]), np.array([1, 1]))
    with pytest.raises(ValueError, match="owners"):
        bank.add(**block)
    assert len(bank) == 0


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("index", ["flat", "hnsw"])
def test_retrieval_by_target_compares_with_the_targets_vectors(similarity, index, tmp_path):
    rng = np.random.default_rng(5)
    bank = MemoryBank(HIDDEN, similarity, index, retrieve_by="target")
    block = rows(rng, 200)
    bank.add(**block)
    with pytest.raises(ValueError, match="set_target_vectors"):
        bank.search(np.ones((1, HIDDEN)), 1, None, None)
    items = rng.standard_normal((41, HIDDEN)).astype(np.float32)
    bank.set_target_vectors(items)
    queries = rng.standard_normal((20, HIDDEN)).astype(np.float32)
    bank.forget(4)
    found = bank.search(queries, 5, None, None)
    if similarity == "cosine":
        items = items / np.linalg.norm(items, axis=1, keepdims=True)
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores = queries @ items[bank.targets].T
    scores[:, bank.gone] = -np.inf
    best = -np.sort(-scores, axis=1)[:, :5]
    if index == "flat":
        np.testing.assert_allclose(found.similarity, best, rtol=1e-5, atol=1e-6)
    else:
        assert np.isclose(found.similarity, best, rtol=1e-4, atol=1e-5).mean() > 0.9
    assert not bank.gone[found.ids[found.mask]].any()
    bank.save(tmp_path)
    assert MemoryBank.load(tmp_path).retrieve_by == "target"
