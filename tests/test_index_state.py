"""A reopened memory searches with the index it was saved with: nothing is trained again, nothing forgotten is left."""

from __future__ import annotations

import numpy as np
import pytest
from test_index import vectors_of

from recbole_raserec.errors import CheckpointError
from recbole_raserec.retrieval import index as choice
from recbole_raserec.retrieval.index import STATE_ARRAYS, restore
from recbole_raserec.retrieval.memory import MemoryBank

WIDTH, SIZE = 16, 3000


def bank_of(kind: str, size: int = SIZE, similarity: str = "cosine") -> MemoryBank:
    bank = MemoryBank(WIDTH, similarity, kind, ivf_lists=12, ivf_probes=3)
    add(bank, size)
    return bank


def add(bank: MemoryBank, size: int, seed: int = 0) -> None:
    users = np.arange(size) % 50
    bank.add(2.5 * vectors_of(size, WIDTH, seed), np.arange(size) % 9 + 1, users, np.arange(size) // 50)


def refused(bank: MemoryBank, directory, name: str, change) -> None:
    """Stored with one array changed, the bank is refused when its index is opened."""
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    bank.save(directory)
    loaded = MemoryBank.load(directory)
    arrays = loaded._stored[0]
    arrays[name] = np.ascontiguousarray(change(np.array(arrays[name])))
    with pytest.raises(CheckpointError, match=r"is damaged: its .*Delete it and build it again"):
        loaded.search(vectors_of(1, WIDTH), 1, None, None)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args):
        raise AssertionError("an index was built")

    return lambda: (
        monkeypatch.setattr(choice, "make_index", refuse)
        or monkeypatch.setattr("recbole_raserec.retrieval.memory.make_index", refuse)
    )


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_the_same_results_without_training(tmp_path, kind, similarity, no_training):
    bank, queries = bank_of(kind, similarity=similarity), vectors_of(200, WIDTH, 3)
    wanted = bank.search(queries, 10, None, None)
    bank.forget(7)
    after = bank.search(queries, 10, None, None)
    bank.save(tmp_path)
    no_training()
    again = MemoryBank.load(tmp_path)
    found = again.search(queries, 10, None, None)
    np.testing.assert_array_equal(found.ids, after.ids)
    np.testing.assert_array_equal(found.similarity, after.similarity)
    assert (wanted.ids != after.ids).any()
    assert again.index_recall == bank.index_recall
    assert not (again.users[found.ids] == -1).any()

    for one in (bank, again):  # and it lives on
        add(one, 100, seed=5)
        one.forget(11)
    found, wanted = (one.search(vectors_of(100, WIDTH, 5), 5, None, None) for one in (again, bank))
    np.testing.assert_array_equal(found.ids, wanted.ids)
    again.save(tmp_path)
    found, wanted = (one.search(queries, 5, None, None) for one in (MemoryBank.load(tmp_path), again))
    np.testing.assert_array_equal(found.ids, wanted.ids)


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_forgotten_before_the_first_search_is_gone_from_the_file(tmp_path, kind):
    bank = bank_of(kind)
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    gone = np.flatnonzero(loaded.users == 3)
    loaded.forget(3)
    loaded.save(tmp_path)
    arrays = MemoryBank.load(tmp_path)._stored[0]
    assert (arrays["index_lists"][gone] == -1).all()
    assert (arrays["index_lists"][np.setdiff1d(np.arange(SIZE), gone)] >= 0).all()
    if kind == "ivfpq":
        assert not arrays["index_codes"][gone].any()
    found = MemoryBank.load(tmp_path).search(vectors_of(300, WIDTH), 10, None, None)
    assert not np.isin(found.ids[found.mask], gone).any()


def test_more_entries_than_the_stored_index_knows(tmp_path, no_training):
    bank = bank_of("ivf")
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    add(bank, 200, seed=8)
    bank.save(tmp_path)
    no_training()
    found = MemoryBank.load(tmp_path).search(2.5 * vectors_of(200, WIDTH, 8), 1, None, None)
    assert (found.ids[:, 0] == SIZE + np.arange(200)).all()


def test_an_outgrown_index_is_trained_again(tmp_path):
    bank = bank_of("ivf", 600)
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    bank.save(tmp_path)
    loaded = MemoryBank.load(tmp_path)
    add(loaded, 2000, seed=8)
    loaded.search(vectors_of(1, WIDTH), 1, None, None)
    assert loaded._index.trained_on == 2600


def test_nothing_is_stored_of_exact_search(tmp_path):
    bank = bank_of("flat", 300)
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    bank.save(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("index")]
    assert MemoryBank.load(tmp_path)._stored is None


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_graph_is_opened_as_it_was(tmp_path, similarity, no_training):
    bank, queries = bank_of("hnsw", similarity=similarity), vectors_of(200, WIDTH, 3)
    wanted = bank.search(queries, 10, None, None)
    bank.save(tmp_path)
    no_training()
    again = MemoryBank.load(tmp_path)
    found = again.search(queries, 10, None, None)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.similarity, wanted.similarity)
    assert (again.index_recall, again._index.effort) == (bank.index_recall, bank._index.effort)
    add(again, 400, seed=5)  # and it grows
    users, late = np.full(100, 99), np.zeros(100, int)
    found = again.search(vectors_of(400, WIDTH, 5)[:100], 1, users, late)
    assert (found.ids[:, 0] == SIZE + np.arange(100)).mean() > 0.95
    again.save(tmp_path / "grown")
    grown = MemoryBank.load(tmp_path / "grown")
    np.testing.assert_array_equal(grown.search(queries, 5, None, None).ids, again.search(queries, 5, None, None).ids)


def test_the_links_of_a_forgotten_entry_are_not_stored(tmp_path):
    bank = bank_of("hnsw")
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    bank.save(tmp_path / "whole")
    bank.forget(7)
    bank.save(tmp_path / "live")
    reopened = MemoryBank.load(tmp_path / "whole")
    reopened.forget(7)  # before its first search
    reopened.save(tmp_path / "reopened")
    for place in ("live", "reopened"):
        assert not [path for path in (tmp_path / place).iterdir() if path.name.startswith("index")]
        again = MemoryBank.load(tmp_path / place)
        found = again.search(vectors_of(50, WIDTH, 3), 5, None, None)  # linked again, from what is left
        assert not again.gone[found.ids].any()
    again.save(tmp_path / "linked")
    assert [path for path in (tmp_path / "linked").iterdir() if path.name.startswith("index_links")]


GRAPHS = {
    "a link to an entry that is not there": ("index_links", lambda a: np.where(np.arange(len(a)) == 3, SIZE, a)),
    "a link below none": ("index_links", lambda a: np.where(np.arange(len(a)) == 3, -2, a)),
    "links cut": ("index_links", lambda a: a[:-1]),
    "too many links": ("index_links", lambda a: np.concatenate([a, a[:32]])),
    "a table of links": ("index_links", lambda a: a[:, None]),
    "no level": ("index_levels", lambda a: a * 0),
    "levels without end": ("index_levels", lambda a: a + 1000),
    "an entry higher than its links": ("index_levels", lambda a: a + (np.arange(len(a)) == 5)),
    "more entries than the bank": ("index_levels", lambda a: np.concatenate([a, a])),
    "no entries": ("index_levels", lambda a: a[:0]),
    "upper links to anybody": ("index_links", lambda a: np.where(a < 0, 1, a)),
}


@pytest.mark.parametrize("wrong", GRAPHS)
def test_a_graph_that_does_not_fit_is_refused(wrong, tmp_path):
    refused(bank_of("hnsw"), tmp_path, *GRAPHS[wrong])


@pytest.mark.parametrize(
    "change",
    [{"start": SIZE}, {"start": -1}, {"start": "0"}, {"links": 16}, {"links": 0}, {"effort": 0}, {"effort": None}],
)
def test_a_graph_described_otherwise_is_refused(change):
    bank = bank_of("hnsw")
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    arrays, about = bank._index.state()
    lower = int(np.flatnonzero(arrays["index_levels"] == 1)[0])
    for wrong in (change, {"start": lower}):
        with pytest.raises(ValueError, match="its graph"):
            restore(arrays, {**about, **wrong}, bank._vectors.values, 2)
    assert len(restore(arrays, about, bank._vectors.values, 2)) == SIZE


WRONG = {
    "a list that is not there": ("index_lists", lambda a: np.where(np.arange(len(a)) == 5, 99, a)),
    "a list below -1": ("index_lists", lambda a: a - 9),
    "more lists than entries": ("index_lists", lambda a: np.concatenate([a, a])),
    "no lists": ("index_lists", lambda a: a[:0]),
    "a table of lists": ("index_lists", lambda a: a[:, None]),
    "centroids of another width": ("index_centroids", lambda a: a[:, :8]),
    "no centroids": ("index_centroids", lambda a: a[:0]),
    "centroids not finite": ("index_centroids", lambda a: a * np.nan),
    "flat code books": ("index_codebooks", lambda a: a.reshape(-1)),
    "code books of another width": ("index_codebooks", lambda a: a[:, :, :1]),
    "half the codes in the books": ("index_codebooks", lambda a: a[:, : a.shape[1] // 2 + 1]),
    "code books not finite": ("index_codebooks", lambda a: a + np.inf),
    "codes cut": ("index_codes", lambda a: a[:-1]),
    "narrow codes": ("index_codes", lambda a: a[:, :-1]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_state_that_does_not_fit_is_refused(wrong, tmp_path):
    """As a file from elsewhere with sound checksums could hold it."""
    refused(bank_of("ivfpq"), tmp_path, *WRONG[wrong])


@pytest.mark.parametrize(
    "about", [None, {}, {"kind": "hnsw"}, {"kind": "ivf"}, {"kind": "ivf", "trained_on": "9", "recall": 1.0}]
)
def test_a_description_that_does_not_fit_is_refused(about):
    bank = bank_of("ivf")
    bank.search(vectors_of(1, WIDTH), 1, None, None)
    arrays, _ = bank._index.state()
    with pytest.raises(ValueError, match="its index"):
        restore(arrays, about, bank._vectors.values, 2)
    with pytest.raises(ValueError, match="its index"):
        restore({**arrays, "index_codes": np.zeros((SIZE, 1), np.uint8)}, {"kind": "ivf"}, bank._vectors.values, 2)
    assert set(arrays) < set(STATE_ARRAYS)
