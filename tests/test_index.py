"""The faiss indexes behind the memory bank."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

from recbole_raserec.retrieval import index as index_module
from recbole_raserec.retrieval.index import FlatIndex, HNSWIndex, IVFIndex, make_index
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.retrieval.search import LeakageGuard, pack, unpack


def vectors_of(size, width=16, seed=0):
    """Unit vectors around 20 centres."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((20, width))[rng.integers(0, 20, size)] + 0.3 * rng.standard_normal((size, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_flat_is_exact_and_searches_in_place():
    vectors = vectors_of(500)
    vectors.flags.writeable = False
    index = FlatIndex(vectors)
    assert np.shares_memory(index._vectors, vectors)
    scores, found = index.search(vectors[:40], 5)
    products = vectors[:40] @ vectors.T
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :5], rtol=1e-5)
    np.testing.assert_array_equal(found[:, 0], np.arange(40))


def test_ivf_measures_its_recall(caplog):
    vectors = vectors_of(4000)
    with caplog.at_level(logging.INFO, logger="recbole_raserec.retrieval"):
        index = IVFIndex(vectors, lists=32, probes=8)
    assert f"recall@20 {index.recall:.4f}" in caplog.text
    assert "too few" not in caplog.text
    # Measured here by another way than the index does: shared ids with the exact result, on all vectors.
    exact = FlatIndex(vectors).search(vectors, 20)[1]
    found = index.search(vectors, 20)[1]
    shared = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(exact, found)])
    assert abs(index.recall - shared) < 0.02
    assert index.recall >= 0.9
    assert IVFIndex(vectors, lists=32, probes=1).recall < index.recall
    assert IVFIndex(vectors, lists=32, probes=32).recall == 1.0


def test_ivf_training_is_seeded():
    vectors = vectors_of(2000)
    first, again = (IVFIndex(vectors, lists=16, probes=1, seed=3).search(vectors, 10)[1] for _ in range(2))
    other = IVFIndex(vectors, lists=16, probes=1, seed=4).search(vectors, 10)[1]
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(("size", "lists"), [(1, 1), (100, 2), (1000, 25)])
def test_ivf_reduces_its_lists_and_says_so(caplog, size, lists):
    with caplog.at_level(logging.INFO, logger="recbole_raserec.retrieval"):
        index = IVFIndex(vectors_of(size), lists=128, probes=8)
    assert (index.lists, index.probes) == (lists, min(8, lists))
    assert f"{size} entries are too few for ivf_lists=128" in caplog.text


def test_ivf_reports_what_it_does_not_find_as_missing():
    index = IVFIndex(vectors_of(1000), lists=20, probes=1)
    found = index.search(vectors_of(5), 900)[1]
    assert (found[:, -1] == -1).all()


def test_auto_says_what_it_takes_and_changes_over_when_the_bank_grows(caplog, monkeypatch):
    monkeypatch.setattr(index_module, "AUTO_FLAT_LIMIT", 300)
    vectors = vectors_of(600)
    ones = np.ones(300, int)
    bank = MemoryBank(16, ivf_lists=4, ivf_probes=4)
    assert bank.index_recall is None
    with caplog.at_level(logging.INFO, logger="recbole_raserec.retrieval"):
        bank.add(vectors[:300], ones, ones, np.arange(300))
        bank.search(vectors[:3], 2, None, None)
        assert "index auto: flat, as 300 entries are within the limit of 300" in caplog.text
        bank.add(vectors[300:], ones, ones, np.arange(300, 600))
        found = bank.search(vectors[598:], 2, None, None)
    assert "index auto: ivf, as 600 entries are over the limit of 300" in caplog.text
    assert bank.index_recall == 1.0
    np.testing.assert_array_equal(found.ids[:, 0], [598, 599])


def test_ivf_follows_additions_and_is_trained_again_when_outgrown():
    vectors = vectors_of(1000)
    index = make_index("ivf", vectors[:400], 8, 8)
    assert not index.outgrown(800)
    assert index.outgrown(801)
    index.extend(vectors[:800])
    assert len(index) == 800
    np.testing.assert_array_equal(index.search(vectors[:800], 1)[1][:, 0], np.arange(800))


def test_ivf_that_probes_every_list_gives_the_flat_result_under_the_guard():
    vectors = vectors_of(1500)
    users = np.arange(1500) // 50
    entries = vectors, np.ones(1500, int), users, np.arange(1500) % 50
    results = []
    for kind in ("flat", "ivf"):
        bank = MemoryBank(16, index=kind, ivf_lists=10, ivf_probes=10)
        bank.add(*entries)
        results.append(bank.search(vectors, 8, users, entries[3]))
    np.testing.assert_array_equal(results[0].ids, results[1].ids)
    np.testing.assert_array_equal(results[0].similarity, results[1].similarity)


def test_the_guard_counts_what_it_bars():
    rng = np.random.default_rng(1)
    users, positions = rng.integers(-1, 9, 200).astype(np.int32), rng.integers(0, 12, 200).astype(np.int32)
    guard = LeakageGuard(users, positions)
    who, when = rng.integers(-2, 12, 500).astype(np.int32), rng.integers(-3, 20, 500).astype(np.int32)
    expected = (who[:, None] == users) & (positions >= when[:, None]) & (who >= 0)[:, None]
    np.testing.assert_array_equal(guard.barred(np.arange(200), who, when), expected)
    np.testing.assert_array_equal(guard.count(who, when), expected.sum(1))
    assert expected.any()


def test_codes_order_by_score_then_by_lower_id():
    scores = np.array([-np.inf, -2.5, -1e-30, -0.0, 0.0, 1e-30, 1.0, np.inf], np.float32)
    codes = pack(scores, np.zeros(8, int))
    assert (np.diff(codes.astype(object)) >= 0).all()
    assert codes[3] == codes[4]
    assert len(set(codes)) == 7
    assert pack(scores[:1], np.array([3]))[0] > pack(scores[:1], np.array([4]))[0] > 0
    ids, found, mask = unpack(np.append(pack(scores, np.arange(8)), np.uint64(0)))
    assert ids.tolist() == [*range(8), -1]
    assert mask.tolist() == [True] * 8 + [False]
    np.testing.assert_array_equal(found, np.append(scores, np.float32(0)))


@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_both_import_orders_work_and_share_the_thread_count(first):
    code = (
        f"import {first}\nimport faiss, torch, numpy as np\n"
        "from recbole_raserec.retrieval.index import FlatIndex\n"
        "x = torch.randn(300, 8)\n(x @ x.T).sum()\n"
        "for count in (2, 1):\n"
        "    torch.set_num_threads(count)\n"
        "    assert FlatIndex(x.numpy()).search(x.numpy(), 3)[1].shape == (300, 3)\n"
        "    assert faiss.omp_get_max_threads() == torch.get_num_threads() == count\n"
        "print('fine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("fine"), done.stderr


def test_hnsw_looks_wider_until_it_finds_enough(caplog):
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4000, 32)).astype(np.float32)  # no clusters: hard for a graph
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    narrow, wide = HNSWIndex(vectors, links=4, effort=4), HNSWIndex(vectors, links=32, effort=512)
    said = [record.getMessage() for record in caplog.records]
    assert [message.split(" links, ")[1].split()[0] for message in said] == ["4", "8", "16", "32", "64", "512"]
    assert narrow.recall < 0.95 <= wide.recall
    easy = HNSWIndex(vectors_of(2000), effort=64)
    assert easy.recall >= 0.95
