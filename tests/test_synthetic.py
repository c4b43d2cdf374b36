"""The planted data set: what is committed is what the generator makes, and only long contexts predict it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recbole_raserec.data.preparation.atomic import write_inter
from recbole_raserec.data.preparation.planted import main, planted

COMMITTED = Path(__file__).parents[1] / "dataset" / "planted" / "planted.inter"


@pytest.fixture(scope="module")
def log():
    return planted()


def test_the_committed_file_is_remade_byte_for_byte(tmp_path, capsys):
    main([f"--output={tmp_path}"], standalone_mode=False)
    assert (tmp_path / "planted" / "planted.inter").read_bytes() == COMMITTED.read_bytes()
    assert "600 users, 240 items" in capsys.readouterr().out
    assert COMMITTED.stat().st_size < 300_000


def test_the_seed_decides(tmp_path, log):
    write_inter(planted(seed=1), tmp_path / "one.inter")
    write_inter(planted(seed=1), tmp_path / "again.inter")
    assert (tmp_path / "one.inter").read_bytes() == (tmp_path / "again.inter").read_bytes()
    assert (tmp_path / "one.inter").read_bytes() != COMMITTED.read_bytes()


def test_form(log):
    assert len(np.unique(log.users)) == 600
    assert np.array_equal(np.unique(log.items), np.arange(240))
    assert (np.diff(log.users) >= 0).all()
    assert np.array_equal(np.sort(log.times), np.arange(len(log.times)))  # one clock, no ties
    same_user = np.diff(log.users) == 0
    assert (np.diff(log.times)[same_user] > 0).all()
    assert not np.array_equal(np.argsort(log.times), np.arange(len(log.times)))  # users overlap in time
    assert np.bincount(log.users).min() >= 15


@pytest.mark.parametrize("options", [{"story": 20}, {"items": 40}, {"users": 0}, {"community": 0}])
def test_impossible_sizes(options):
    with pytest.raises(ValueError, match="must"):
        planted(**options)


def test_only_the_longer_context_tells_what_comes_next(log):
    """Leave-one-out: matching the last three items against training prefixes recalls what first-order models cannot."""
    ends = np.flatnonzero(np.diff(log.users, append=-1))  # [users], row of each user's last item: the test target
    train = np.ones(len(log.users), dtype=bool)
    train[ends] = train[ends - 1] = False
    contexts = last_items(log, 3)  # [N, 3]
    targets = log.items[ends]

    popularity = np.bincount(log.items[train], minlength=240).astype(float)
    popular = np.tile(popularity, (len(ends), 1))
    follows = np.zeros((240, 240))
    steps = train & (contexts[:, 0] >= 0)
    np.add.at(follows, (contexts[steps, 0], log.items[steps]), 1)
    markov = follows[contexts[ends, 0]] + 1e-6 * popularity
    recalled = recall(contexts[ends], contexts[steps], log.items[steps]) + 1e-6 * popularity

    hits = {
        name: hit_rate(scores, targets, 10)
        for name, scores in (("popular", popular), ("markov", markov), ("recalled", recalled))
    }
    assert hits["popular"] < 0.15
    assert hits["markov"] < 0.65
    assert hits["recalled"] > 0.88
    assert hit_rate(recalled, targets, 1) > 5 * hit_rate(markov, targets, 1)


def last_items(log, depth):
    """The `depth` items before each interaction, latest first; -1 where the history is shorter: [N, depth]."""
    columns = []
    for back in range(1, depth + 1):
        earlier = np.full(len(log.items), -1)
        same = log.users[back:] == log.users[:-back]
        earlier[back:][same] = log.items[:-back][same]
        columns.append(earlier)
    return np.stack(columns, axis=1)


def recall(queries, keys, values, neighbours=20):
    """Scores [Q, items] from the keys that share most with the query; the k-th latest item weighs 0.8**k."""
    overlap = np.zeros((len(queries), len(keys)))
    for age in range(queries.shape[1]):
        overlap += 0.8**age * (queries[:, age, None, None] == keys[None]).any(axis=2)
    nearest = np.argsort(-overlap, axis=1, kind="stable")[:, :neighbours]
    scores = np.zeros((len(queries), 240))
    weights = np.take_along_axis(overlap, nearest, axis=1) ** 3
    np.add.at(scores, (np.arange(len(queries))[:, None], values[nearest]), weights)
    return scores


def hit_rate(scores, targets, k):
    """Share of the targets that fewer than `k` items outscore or tie with."""
    reached = np.take_along_axis(scores, targets[:, None], axis=1)
    return float(((scores >= reached).sum(axis=1) - 1 < k).mean())
