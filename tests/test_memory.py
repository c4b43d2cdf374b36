"""The memory bank: what it stores, and what a search may return."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_helpers import HIDDEN, bank_of, log_of

from recbole_raserec.errors import ConfigError
from recbole_raserec.retrieval import search as search_module
from recbole_raserec.retrieval.memory import MemoryBank


def brute_force(bank, queries, top_k, users, positions):
    """Definition of the search, one query and one entry at a time, in float64."""

    def vector(row):
        row = np.asarray(row, np.float64)
        length = np.sqrt((row * row).sum())
        return (row / length if bank.similarity == "cosine" and length else row).astype(np.float32).astype(np.float64)

    keys = [vector(key) for key in bank.keys]
    ids = np.full((len(queries), top_k), -1)
    similarity = np.zeros((len(queries), top_k), np.float32)
    for q, query in enumerate(queries):
        found = []
        for i, key in enumerate(keys):
            if bank.users[i] == users[q] and bank.positions[i] >= positions[q] and users[q] >= 0:
                continue
            found.append((-np.float32((vector(query) * key).sum()), i))
        for rank, (negative, i) in enumerate(sorted(found)[:top_k]):
            ids[q, rank], similarity[q, rank] = i, -negative
    return ids, similarity


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_users=st.integers(1, 8),
    length=st.integers(1, 12),
    distinct=st.sampled_from([None, 1, 3]),
    top_k=st.integers(1, 9),
    similarity=st.sampled_from(["cosine", "dot"]),
    slack=st.sampled_from([0, 2, 12]),
    widest=st.sampled_from([1, 4, 64]),
)
def test_search_is_the_brute_force_search(seed, n_users, length, distinct, top_k, similarity, slack, widest):
    bank = bank_of(log_of(seed, n_users, length, distinct), similarity=similarity, index="flat")
    rng = np.random.default_rng(seed)
    queries = np.concatenate([bank.keys, rng.standard_normal((3, HIDDEN)).astype(np.float32)])
    users = np.concatenate([bank.users, [-1, n_users + 5, 1]])
    positions = np.concatenate([bank.positions, [1, 1, 0]])
    with mock.patch.multiple(search_module, _SLACK=slack, _WIDEST=widest, _BLOCK_ENTRIES=7, _BLOCK_PAIRS=5):
        found = bank.search(queries, top_k, users, positions)
    ids, similarity_expected = brute_force(bank, queries, top_k, users, positions)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.mask, ids >= 0)
    np.testing.assert_array_equal(found.similarity, similarity_expected)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_users=st.integers(1, 30),
    length=st.integers(1, 40),
    top_k=st.integers(1, 40),
    index=st.sampled_from(["flat", "ivf"]),
)
def test_no_entry_of_the_own_future_is_returned(seed, n_users, length, top_k, index):
    bank = bank_of(log_of(seed, n_users, length), index=index, ivf_lists=4, ivf_probes=2)
    found = bank.search(bank.keys, top_k, bank.users, bank.positions)
    query, rank = np.nonzero(found.mask)
    entry = found.ids[query, rank]
    leaked = (bank.users[entry] == bank.users[query]) & (bank.positions[entry] >= bank.positions[query])
    assert not leaked.any()
    assert ((found.ids >= 0) == found.mask).all()
    if index == "flat":
        barred = (bank.users[:, None] == bank.users) & (bank.positions[:, None] <= bank.positions)
        np.testing.assert_array_equal(found.mask.sum(1), np.minimum(top_k, len(bank) - barred.sum(1)))


def test_the_guard_would_otherwise_be_passed():
    """The unguarded nearest neighbour of an entry's own key is that entry: the property above is no empty one."""
    bank = bank_of(log_of(0, 20, 10))
    open_search = bank.search(bank.keys, 1, None, None)
    np.testing.assert_array_equal(open_search.ids[:, 0], np.arange(len(bank)))
    guarded = bank.search(bank.keys, 1, bank.users, bank.positions)
    assert (guarded.ids[:, 0] != np.arange(len(bank))).all()


def test_the_same_position_is_barred_and_the_one_before_is_not():
    bank = bank_of((np.eye(3, HIDDEN), [7, 8, 9], [1, 1, 2], [2, 3, 3]))
    found = bank.search(np.eye(3, HIDDEN)[[0]], 3, [1], [3])
    assert found.ids.tolist() == [[0, 2, -1]]
    found = bank.search(np.eye(3, HIDDEN)[[0]], 3, [1], [2])
    assert found.ids.tolist() == [[2, -1, -1]]
    assert found.mask.tolist() == [[True, False, False]]
    assert found.similarity[0, 1:].tolist() == [0.0, 0.0]


def test_many_barred_entries_in_front():
    """A user's whole future is nearer than anything else; the few allowed entries are still found, in order."""
    size = 3000
    keys = np.zeros((size + 5, HIDDEN), np.float32)
    keys[:, 0] = 1
    keys[size:, 1] = [0.5, 0.4, 0.3, 0.2, 0.1]
    users = np.r_[np.full(size, 1), np.full(5, 2)]
    bank = bank_of((keys, np.ones(size + 5, int), users, np.r_[np.arange(1, size + 1), np.arange(1, 6)]))
    found = bank.search(np.tile([[1.0, 0, 0, 0]], (3, 1)), 4, [1, 1, 2], [1, 3, 1])
    top = size + np.array([4, 3, 2, 1])
    assert found.ids.tolist() == [top.tolist(), [0, 1, *top[:2]], [0, 1, 2, 3]]


@pytest.mark.parametrize("distinct", [None, 2])
def test_batching_does_not_change_the_result(distinct):
    bank = bank_of(log_of(3, 60, 30, distinct))
    whole = bank.search(bank.keys, 6, bank.users, bank.positions)
    for size in (1, 7, 64):
        for start in range(0, min(len(bank), 3 * size), size):
            part = slice(start, start + size)
            found = bank.search(bank.keys[part], 6, bank.users[part], bank.positions[part])
            np.testing.assert_array_equal(found.ids, whole.ids[part])
            np.testing.assert_array_equal(found.similarity, whole.similarity[part])


def test_empty_bank_and_empty_query():
    bank = MemoryBank(HIDDEN)
    found = bank.search(np.ones((2, HIDDEN)), 3, [1, 2], [1, 1])
    assert found.ids.tolist() == [[-1] * 3] * 2
    assert not found.mask.any()
    assert not found.similarity.any()
    bank.add(*log_of(0, 3, 3))
    assert bank.search(np.empty((0, HIDDEN)), 3, [], []).ids.shape == (0, 3)


def test_adding_in_parts_is_adding_at_once():
    keys, targets, users, positions = log_of(5, 40, 12)
    times = np.arange(len(users), dtype=float)
    whole = MemoryBank(HIDDEN)
    np.testing.assert_array_equal(whole.add(keys, targets, users, positions, times), np.arange(len(users)))
    parts = MemoryBank(HIDDEN)
    for start in range(0, len(users), 17):
        part = slice(start, start + 17)
        ids = parts.add(torch.from_numpy(keys[part]), *(a[part] for a in (targets, users, positions, times)))
        assert ids[0] == start
        parts.search(keys[:2], 3, users[:2], positions[:2])  # the index exists and has to follow
    for name in ("keys", "targets", "users", "positions", "times"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    a = whole.search(keys, 5, users, positions)
    b = parts.search(keys, 5, users, positions)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.similarity, b.similarity)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_set_keys_changes_what_is_searched(similarity):
    keys, targets, users, positions = log_of(6, 30, 10)
    bank = bank_of((keys, targets, users, positions), similarity=similarity)
    bank.search(keys, 3, users, positions)
    fresh = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    bank.set_keys(fresh)
    expected = bank_of((fresh, targets, users, positions), similarity=similarity).search(fresh, 3, users, positions)
    fresh.zero_()  # the bank keeps its own copy
    assert bank.keys.any()
    np.testing.assert_array_equal(bank.search(bank.keys, 3, users, positions).ids, expected.ids)


def test_views_are_read_only_and_keep_their_content():
    bank = bank_of(log_of(7, 5, 5))
    view, before = bank.targets, bank.targets.copy()
    bank.add(*log_of(8, 50, 5))
    np.testing.assert_array_equal(view, before)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("keys", lambda e: (np.full_like(e[0], np.nan), *e[1:])),
        ("keys", lambda e: (e[0][:, :3], *e[1:])),
        ("targets", lambda e: (e[0], e[1][:-1], *e[2:])),
        ("targets", lambda e: (e[0], e[1] + 2**31, *e[2:])),
        ("users", lambda e: (*e[:2], e[2] + 0.5, e[3])),
        ("positions", lambda e: (*e[:3], -e[3])),
        ("times", lambda e: (*e, [1.0])),
    ],
)
def test_bad_entries_are_refused_and_leave_the_bank_unchanged(name, change):
    bank = bank_of(log_of(9, 4, 4))
    size = len(bank)
    with pytest.raises(ValueError, match=f"^{name}:"):
        bank.add(*change(log_of(10, 4, 4)))
    assert len(bank) == len(bank.keys) == len(bank.targets) == size


def test_bad_options_are_named_together():
    with pytest.raises(ConfigError, match=r"similarity: 'euclid'(?s:.)*index: 'tree'(?s:.)*ivf_probes: 0"):
        MemoryBank(HIDDEN, similarity="euclid", index="tree", ivf_probes=0)
    bank = MemoryBank(HIDDEN)
    with pytest.raises(ValueError, match="top_k: 0"):
        bank.search(np.ones((1, HIDDEN)), 0, [1], [1])
    with pytest.raises(ValueError, match="users and positions"):
        bank.search(np.ones((1, HIDDEN)), 1, [1], None)
