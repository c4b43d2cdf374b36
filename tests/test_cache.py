"""Neighbours kept on disk: the same as searched ones, for the same question only, and nothing worse than lost time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_raserec.retrieval import memory
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.queries import NeighbourCache, Queries
from recbole_raserec.storage import read_tensors

SIZE, WIDTH, TOP_K = 60, 8, 6


def queries_of(seed: int = 0) -> Queries:
    rng = np.random.default_rng(seed)
    users, positions = np.repeat(np.arange(1, 7), 10), np.tile(np.arange(10), 6)
    h = torch.from_numpy(rng.standard_normal((SIZE, WIDTH)).astype(np.float32))
    return Queries(users, positions, rng.integers(1, 9, SIZE), positions.astype(float), h, 10)


def bank_of(queries: Queries, **options) -> MemoryBank:
    bank = MemoryBank(WIDTH, **options)
    bank.add(queries.h, queries.targets, queries.users, queries.positions, queries.times)
    return bank


@pytest.fixture
def searches(monkeypatch):
    """The searches that were made, by K."""
    made: list[int] = []
    search = MemoryBank.search

    def counted(self, queries, top_k, *args, **options):
        made.append(top_k)
        return search(self, queries, top_k, *args, **options)

    monkeypatch.setattr(MemoryBank, "search", counted)
    return made


def found(cache, queries, bank, top_k):
    cache.search(queries, bank, top_k)
    return queries.ids.tolist(), queries.mask.tolist()


@pytest.mark.parametrize("scope", ["history", "past"])
def test_looked_up_is_searched(tmp_path, searches, scope):
    queries = queries_of()
    bank, cache = bank_of(queries, scope=scope), NeighbourCache(tmp_path / "n")
    for top_k in (TOP_K, TOP_K, 3, 1):
        looked_up = found(cache, queries, bank, top_k)
        queries.search(bank, top_k)
        assert looked_up == (queries.ids.tolist(), queries.mask.tolist())
        assert queries.ids.dtype == torch.int64
    assert searches == [TOP_K, TOP_K, TOP_K, 3, 1]  # the first by the cache, the others by this test
    found(cache, queries, bank, TOP_K + 1)
    assert searches[-1] == TOP_K + 1


CHANGES = {
    "another query": lambda queries, bank: queries.h[3].neg_(),
    "another user of a query": lambda queries, bank: queries.users.__setitem__(0, 2),
    "another position": lambda queries, bank: queries.positions.__setitem__(0, 9),
    "another time": lambda queries, bank: queries.times.__setitem__(0, 9.5),
    "one memory more": lambda queries, bank: bank.add(np.ones((1, WIDTH)), [1], [1], [1], [1.0]),
    "a user forgotten": lambda queries, bank: bank.forget(3),
    "older ones expired": lambda queries, bank: bank.expire(2.0),
    "other keys": lambda queries, bank: bank.set_keys(-np.array(bank.keys)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_is_searched(tmp_path, searches, change):
    queries = queries_of()
    bank, cache = bank_of(queries), NeighbourCache(tmp_path)
    cache.search(queries, bank, TOP_K)
    CHANGES[change](queries, bank)
    looked_up = found(cache, queries, bank, TOP_K)
    assert searches == [TOP_K, TOP_K]
    queries.search(bank, TOP_K)
    assert looked_up == (queries.ids.tolist(), queries.mask.tolist())


def test_other_options_are_another_question(tmp_path, searches):
    queries, cache = queries_of(), NeighbourCache(tmp_path)
    for options in ({}, {"similarity": "dot"}, {"scope": "past"}, {"min_support": 3}):
        cache.search(queries, bank_of(queries, **options), TOP_K)
    bank = bank_of(queries, retrieve_by="target")
    for sign in (1, -1):
        bank.set_target_vectors(sign * np.arange(9 * WIDTH, dtype=np.float32).reshape(9, WIDTH))
        cache.search(queries, bank, TOP_K)
    assert len(searches) == 6


def test_owners_of_patterns_are_part_of_the_question(tmp_path, searches):
    queries, cache = queries_of(), NeighbourCache(tmp_path)
    for user in (1, 2):
        bank = bank_of(queries)
        bank.add(np.ones((1, WIDTH)), [1], [-1], [1], [1.0], [2], ([0, 0], [user, 5], [4, 4]))
        cache.search(queries, bank, TOP_K)
    assert len(searches) == 2


def test_an_approximate_index_is_not_cached(tmp_path, searches):
    queries = queries_of()
    bank, cache = bank_of(queries, index="hnsw"), NeighbourCache(tmp_path)
    cache.search(queries, bank, TOP_K)
    cache.search(queries, bank, TOP_K)
    assert len(searches) == 2
    assert not list(tmp_path.iterdir())
    assert bank.index_recall is not None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "of another search", "out of range"])
def test_a_damaged_file_is_searched_again_and_replaced(tmp_path, searches, caplog, damage):
    queries = queries_of()
    bank, cache = bank_of(queries), NeighbourCache(tmp_path)
    wanted = found(cache, queries, bank, TOP_K)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(good[:-7])
    elif damage == "of another search":
        path.write_bytes(b"\x80\x04cos\nsystem\n")
    else:
        place = len(good) - 4
        byte = good[place] ^ 1 if damage == "flipped" else 0x7F
        path.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
    assert found(cache, queries, bank, TOP_K) == wanted
    assert searches == [TOP_K, TOP_K]
    assert "searched again" in caplog.text
    assert path.read_bytes() == good


def test_the_oldest_go_first(tmp_path, searches):
    import os

    cache = NeighbourCache(tmp_path, keep=2)
    for seed in range(3):
        queries = queries_of(seed)
        cache.search(queries, bank_of(queries), TOP_K)
        for path in tmp_path.iterdir():
            os.utime(path, (path.stat().st_atime - 10, path.stat().st_mtime - 10))
        queries = queries_of(0)
        cache.search(queries, bank_of(queries), TOP_K)  # used again: it stays
    assert len(list(tmp_path.iterdir())) == 2
    assert len(searches) == 3


def test_a_search_finds_more_than_is_asked_for_where_later_ones_ask_for_more(tmp_path, searches):
    queries = queries_of()
    bank, cache = bank_of(queries), NeighbourCache(tmp_path / "n", least=TOP_K)
    for top_k in (2, 4, TOP_K):
        looked_up = found(cache, queries, bank, top_k)
        queries.search(bank, top_k)
        assert looked_up == (queries.ids.tolist(), queries.mask.tolist())
    assert searches == [TOP_K, 2, 4, TOP_K]  # the first by the cache, the others by this test
    found(cache, queries, bank, TOP_K + 1)
    assert searches[-1] == TOP_K + 1


@pytest.mark.parametrize("harm", [None, "truncated"])
def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch, caplog, harm):
    """Version 0.1.0 kept nothing of a search before its end."""
    queries, searched = queries_of(), []
    bank, cache = bank_of(queries, scope="past"), NeighbourCache(tmp_path)
    monkeypatch.setattr(memory, "PART_SECONDS", 0.0)
    monkeypatch.setattr(memory, "PART_SCORES", 0)
    monkeypatch.setattr(memory, "PART_ROWS", 64)
    rows = 200
    asked = Queries(*(np.resize(x, rows) for x in (queries.users, queries.positions, queries.targets, queries.times)),
                    torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)), 10)  # fmt: skip
    run = memory.GuardedSearch.run

    def killed(self, vectors, *args):
        if len(searched) == 2:
            raise KeyboardInterrupt
        searched.append(len(vectors))
        return run(self, vectors, *args)

    with monkeypatch.context() as patch:
        patch.setattr(memory.GuardedSearch, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.search(asked, bank, TOP_K)
    assert searched == [64, 64]
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".partial"
    kept = len(read_tensors(path)[0]["codes"])
    if harm:
        path.write_bytes(path.read_bytes()[:-3])
    monkeypatch.setattr(memory.GuardedSearch, "run", lambda self, *a: [searched.append(len(a[0])), run(self, *a)][1])
    with caplog.at_level("INFO"):
        looked_up = found(cache, asked, bank, TOP_K)
    assert kept in (64, 128)
    assert sum(searched[2:]) == (rows if harm else rows - kept)
    assert ("All is searched again" if harm else f"{kept} of 200 queries were searched before") in caplog.text
    asked.search(bank, TOP_K)
    assert looked_up == (asked.ids.tolist(), asked.mask.tolist())
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
