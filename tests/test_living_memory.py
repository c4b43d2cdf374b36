"""A memory that changes: removal, files, concurrent searches, the scope `past`, owners, retrieval by target."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from living_memory_helpers import HIDDEN, rows

from recbole_raserec.retrieval.memory import MemoryBank

INDEXES = ["flat", "ivf", "ivfpq", "hnsw"]


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
        before = searches[0]
        while step % 5 == 0 and searches[0] == before and not errors:  # neither outruns the other
            time.sleep(0.001)
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
