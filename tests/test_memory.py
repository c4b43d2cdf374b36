"""The memory bank: what it stores, what a search may return, what survives on disk."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_raserec import stored_arrays as arrays_module
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.retrieval import search as search_module
from recbole_raserec.retrieval.memory import MemoryBank

HIDDEN = 4


def log_of(seed, n_users, length, distinct=None):
    """Entries (keys, targets, users, positions) of `n_users` histories; few distinct keys make many ties."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, n_users)
    users = np.repeat(np.arange(1, n_users + 1), lengths)
    positions = np.concatenate([np.arange(1, n + 1) for n in lengths])
    keys = rng.standard_normal((len(users), HIDDEN)).astype(np.float32)
    if distinct:
        keys = keys[rng.integers(0, min(distinct, len(keys)), len(keys))]
    order = rng.permutation(len(users))
    return keys, rng.integers(1, 50, len(users)), users[order], positions[order]


def bank_of(entries, **options):
    bank = MemoryBank(HIDDEN, **options)
    bank.add(*entries)
    return bank


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


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    bank = bank_of(log_of(11, 20, 8), similarity="dot", index="flat", ivf_lists=5, ivf_probes=2)
    bank.save(tmp_path / "memory", {"model": "abc"})
    return bank, tmp_path / "memory"


def same(left, right):
    return all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "times")
        for name in ("keys", "targets", "users", "positions", "times")
    )


def reseal(directory, change):
    """Write a manifest whose own checksum is right, as a forger would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": arrays_module._seal(manifest)}))


def test_round_trip(saved):
    bank, directory = saved
    loaded = MemoryBank.load(directory, {"model": "abc"})
    assert same(loaded, bank)
    assert (loaded.similarity, loaded.index, loaded.ivf_lists, loaded.ivf_probes) == ("dot", "flat", 5, 2)
    a = loaded.search(bank.keys, 4, bank.users, bank.positions)
    b = bank.search(bank.keys, 4, bank.users, bank.positions)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.similarity, b.similarity)


def test_a_loaded_bank_grows_and_replaces_the_one_it_was_read_from(saved):
    bank, directory = saved
    loaded = MemoryBank.load(directory)
    more = log_of(12, 9, 9)
    loaded.add(*more)
    bank.add(*more)
    loaded.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory, {"model": "abc"}), bank)
    assert same(loaded, bank)
    assert len(list(directory.iterdir())) == 11  # nothing of the old one is left behind


def test_empty_bank_round_trip(tmp_path):
    MemoryBank(HIDDEN).save(tmp_path / "memory")
    assert len(MemoryBank.load(tmp_path / "memory")) == 0


def test_another_fingerprint_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"fingerprint is {'model': 'abc'}, expected {'model': 'xyz'}"):
        MemoryBank.load(saved[1], {"model": "xyz"})


def test_a_missing_bank_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*does not exist"):
        MemoryBank.load(tmp_path / "nowhere")


def test_every_bit_flip_and_truncation_is_refused(saved):
    _, directory = saved
    rng = np.random.default_rng(0)
    for path in sorted(directory.iterdir()):
        intact = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(intact)
            damaged[rng.integers(len(intact))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(directory)):
                MemoryBank.load(directory)
        for size in (0, 1, len(intact) // 2, len(intact) - 2):
            path.write_bytes(intact[:size])
            with pytest.raises(CheckpointError, match=path.name):
                MemoryBank.load(directory, verify=False)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            MemoryBank.load(directory)
        path.write_bytes(intact)
    MemoryBank.load(directory)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def pickled():
    return pickle.dumps(Bomb())


def object_array():
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("targets.npy", bytes(10**6))
    return stream.getvalue()


def huge_shape():
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (10**15,)})
    return stream.getvalue()


@pytest.mark.parametrize("forge", [pickled, object_array, archive, huge_shape, lambda: b""])
def test_a_forged_array_file_is_refused_even_with_the_right_checksums(saved, forge):
    _, directory = saved
    path = next(directory.glob("targets-*.npy"))
    path.write_bytes(forge())

    def change(manifest):
        manifest["arrays"]["targets"].update(bytes=path.stat().st_size, sha256=arrays_module.sha256(path))

    reseal(directory, change)
    with pytest.raises(CheckpointError, match=r"targets-.*not a plain \.npy array"):
        MemoryBank.load(directory)


def swap(manifest):
    arrays = manifest["arrays"]
    arrays["users"], arrays["targets"] = arrays["targets"], arrays["users"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(kind="recipe"), "does not describe"),
        (lambda m: m.update(version=99), "version is 99"),
        (lambda m: m["arrays"]["users"].update(file="../../secret.npy"), "names the file"),
        (lambda m: m["arrays"].pop("users"), "lists the arrays"),
        (lambda m: m.update(arrays=[]), "checksum"),
        (lambda m: m["meta"].pop("similarity"), "incomplete"),
        (lambda m: m["meta"].update(similarity="euclid"), "cannot be used"),
        (lambda m: m["meta"].update(hidden_size=10**30), "do not fit together"),
        (swap, "names the file"),
    ],
)
def test_a_forged_manifest_is_refused(saved, change, message):
    reseal(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        MemoryBank.load(saved[1])


@pytest.mark.parametrize("text", ["[]", "null", "{}", "not json", "[" * 100_000, "\udcff"])
def test_a_foreign_manifest_is_refused(saved, text):
    (saved[1] / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        MemoryBank.load(saved[1])


@pytest.mark.parametrize("stage", ["write_array", "manifest", "tidy"])
def test_an_interrupted_save_leaves_a_whole_bank(saved, stage):
    bank, directory = saved
    (directory / "notes.txt").write_text("not ours")
    grown = MemoryBank.load(directory)
    grown.add(*log_of(13, 5, 5))
    target = {
        "write_array": (np.lib.format, "write_array"),
        "manifest": (arrays_module, "write_json"),
        "tidy": (arrays_module, "_OWN_PART"),
    }[stage]
    with mock.patch.object(*target, side_effect=KeyboardInterrupt) as patched:
        patched.fullmatch.side_effect = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            grown.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory), grown if stage == "tidy" else bank)
    grown.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory), grown)
    assert len(list(directory.iterdir())) == 12
    assert (directory / "notes.txt").read_text() == "not ours"
