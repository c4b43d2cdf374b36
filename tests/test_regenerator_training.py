"""The regenerator's training: what is held out, early stopping, resuming, damaged states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from regeneration_helpers import model_of, pairs_of, sequences_of

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.regeneration import regenerator
from recbole_raserec.regeneration.pairs import make_pairs
from recbole_raserec.regeneration.regenerator import BEST, STATE, Schedule, epoch_batches, fit, held_out_loss, split
from recbole_raserec.storage.files import read_tensors


def test_held_out_sequences_are_learned_from_by_nobody():
    pairs = pairs_of()
    learn, held = split(pairs, 0.2, 3)
    usable = np.flatnonzero(np.diff(pairs.offsets))
    assert sorted([*learn, *held]) == usable.tolist()
    assert len(held) == round(0.2 * len(usable))
    batches = epoch_batches(pairs, learn, 20, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == learn.tolist()
    assert max(len(pairs.batch(batch)[1]) for batch in batches) <= 20 + 5
    assert len(split(pairs, 0.0, 3)[1]) == 0


@pytest.fixture
def schedule():
    return Schedule(epochs=4, patience=9, held_out=0.2, batch_pairs=32, learning_rate=5e-3, seed=1)


def trained(directory, schedule, epochs=None):
    model, pairs = model_of(2, dropout=0.1), pairs_of()
    options = schedule if epochs is None else Schedule(**{**vars(schedule), "epochs": epochs})
    return model, fit(model, pairs, options, directory, False)


def test_it_learns_and_ends_with_the_best_weights(tmp_path, schedule):
    model, pairs = model_of(2, dropout=0.1), pairs_of()
    before = held_out_loss(model, pairs, split(pairs, 0.2, 1)[1])
    found = fit(model, pairs, schedule, tmp_path, False)
    assert found["held_out"] < before
    assert found["held_out"] == min(epoch["held_out"] for epoch in found["epochs"])
    assert held_out_loss(model, pairs, split(pairs, 0.2, 1)[1]) == pytest.approx(found["held_out"], rel=1e-6)
    assert not model.training
    assert all(0 < epoch["entropy"] <= math.log(3) + 1e-6 for epoch in found["epochs"])


def test_interrupted_it_ends_with_the_same_weights(tmp_path, schedule):
    whole, history = trained(tmp_path / "a", schedule)
    trained(tmp_path / "b", schedule, epochs=2)
    parts, resumed = trained(tmp_path / "b", schedule)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
    assert [epoch["held_out"] for epoch in history["epochs"]] == [epoch["held_out"] for epoch in resumed["epochs"]]


def test_it_stops_when_nothing_gets_better(tmp_path, schedule):
    model, pairs = model_of(2), pairs_of()
    stuck = Schedule(**{**vars(schedule), "epochs": 30, "patience": 2, "learning_rate": 1e-12})
    found = fit(model, pairs, stuck, tmp_path, False)
    assert len(found["epochs"]) == found["best"] + 3 < 30


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other sizes"])
def test_a_damaged_state_is_refused(tmp_path, schedule, damage):
    trained(tmp_path, schedule, epochs=1)
    path = tmp_path / STATE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "foreign":
        path.write_bytes((tmp_path / BEST).read_bytes())
    model = model_of(2, size=16) if damage == "other sizes" else model_of(2)
    with pytest.raises(CheckpointError, match=r"does not fit this run.*delete"):
        fit(model, pairs_of(), schedule, tmp_path, False)


def test_nothing_to_learn_from(tmp_path, schedule):
    sequences = sequences_of([[1, 2], [3, 4]])
    pairs = make_pairs(sequences, sequences, 4, 2, 4, 5, 0)
    assert len(pairs) == 0
    with pytest.raises(ValueError, match="no sequence contains a frequent pattern"):
        fit(model_of(), pairs, schedule, tmp_path, False)


def test_a_held_out_loss_that_is_no_number_is_not_taken_for_the_best(tmp_path, monkeypatch):
    losses = iter([3.0, float("nan")])
    monkeypatch.setattr(regenerator, "held_out_loss", lambda *_: next(losses))
    with pytest.raises(ConfigError, match=r"regen_learning_rate: 0\.001: .*lower it"):
        fit(model_of(), pairs_of(), Schedule(epochs=3, batch_pairs=64, held_out=0.2), tmp_path, False)
    tensors, meta = read_tensors(tmp_path / STATE)
    assert [epoch["held_out"] for epoch in meta["history"]] == [3.0]
    assert all(torch.isfinite(x).all() for x in tensors.values())


def test_the_best_weights_are_those_of_the_history_where_an_epoch_cannot_be_repeated(tmp_path, schedule, monkeypatch):
    """Killed while it writes; then the epoch goes otherwise, as on a device whose sums are not repeatable."""
    write = regenerator.write_tensors

    def killed(path, tensors, meta):
        if len(meta.get("history", [])) == 3:
            raise KeyboardInterrupt
        write(path, tensors, meta)

    with monkeypatch.context() as patch:
        patch.setattr(regenerator, "write_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, schedule)
    kept = read_tensors(tmp_path / STATE)[1]["history"]
    assert [epoch["held_out"] for epoch in kept] == sorted((e["held_out"] for e in kept), reverse=True)
    worse = Schedule(**{**vars(schedule), "learning_rate": 30.0})  # no epoch is better than those of before
    model, found = trained(tmp_path, worse)
    assert found["best"] == 1
    pairs = pairs_of()
    assert held_out_loss(model, pairs, split(pairs, 0.2, 1)[1]) == pytest.approx(kept[1]["held_out"], rel=1e-6)
    tensors, meta = read_tensors(tmp_path / BEST)
    assert meta == {"epoch": 1}
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
