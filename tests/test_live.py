"""A memory in use: updates, forgetting, saving."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pandas as pd
import pytest
from live_helpers import journaled, load

from recbole_raserec import load_checkpoint
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.storage.files import sealed


def test_new_interactions_are_used_by_the_next_call(directory):
    recommender = load(directory)
    a, b, c, d = recommender.items[1:5]
    entries = len(recommender.model.memory)
    done = recommender.update([("new", a, 1), ("new", b, 2), ("new", "unknown"), {"user": "new", "item": c}])
    assert (done.events, done.memories, done.new_users, done.dropped) == (3, 2, 1, 1)
    memory = recommender.model.memory
    number = recommender.live.numbers["new"]
    assert memory.targets[entries:].tolist() == [2, 3]
    assert memory.positions[entries:].tolist() == [1, 2]
    assert memory.users[entries:].tolist() == [number, number]
    np.testing.assert_allclose(memory.keys[entries:], keys_of(recommender, [[a], [a, b]]), rtol=1e-5, atol=1e-6)
    assert recommender.stored(["new"])[0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(recommender.score(users=["new"]), recommender.score([[a, b, c]], users=["new"]))
    # somebody with the same history finds what followed
    h = recommender.model.encode(*rows([[1]]))
    ids, mask = recommender.model.neighbours(h)
    assert entries in ids[mask].tolist()
    ids, mask = recommender.model.neighbours(h, np.array([number]), np.array([1]))
    assert entries not in ids[mask].tolist()  # its own future
    more = recommender.update(pd.DataFrame({"user_id": ["new"], "item_id": [d], "timestamp": [9.0]}))
    assert (more.memories, more.new_users) == (1, 0)
    assert recommender.stored(["new"])[0].tolist() == [1, 2, 3, 4]


def rows(lists):
    import torch

    return torch.tensor(lists), torch.tensor([len(row) for row in lists])


def keys_of(recommender, histories):
    numbers = [[recommender._number[item] for item in row] for row in histories]
    return np.concatenate([recommender.model.encode(*rows([row])).detach().numpy() for row in numbers])


def test_a_forgotten_user_leaves_nothing(directory):
    recommender = load(directory)
    user = recommender.users[7]
    secret = "somebody-42"
    recommender.update([(secret, item) for item in recommender.items[3:9]])
    assert recommender.forget(secret) == 5
    assert recommender.forget(secret) == 0
    own = int((recommender.model.memory.users == 7).sum())
    assert recommender.forget(user) == own > 0
    assert recommender.stored([user])[0].tolist() == []
    recommender.save()
    text = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
    assert secret.encode() not in text
    again = load(directory)
    assert user not in again.users
    assert not (again.model.memory.users[~again.model.memory.gone] == 7).any()
    assert again.histories.of(7).tolist() == []
    again.update([(user, again.items[1])])  # who comes back is somebody new
    assert again.live.numbers[user] == len(again.users) - 1
    assert again.catalogue.counts.sum() == sum(len(again.histories.of(n)) for n in range(len(again.histories)))


def test_saved_and_loaded_again(directory, tmp_path):
    recommender = load(directory)
    recommender.update([(f"u{n}", recommender.items[1 + (n * 7 + k) % 30], k) for n in range(9) for k in range(5)])
    wanted = recommender.score(users=["u3", "u8", recommender.users[1]])
    recommender.save()
    assert sum(path.name.startswith("live-") for path in directory.iterdir()) == 1
    recommender.save(tmp_path / "copy")
    for place in (directory, tmp_path / "copy"):
        again = load(place)
        np.testing.assert_allclose(again.score(users=["u3", "u8", again.users[1]]), wanted, rtol=1e-5, atol=1e-6)
        assert again.users == recommender.users
        again.save()
        assert load_checkpoint(place, "cpu").users == recommender.users


NOT_THERE = "live-0123456789abcdef"


@pytest.mark.parametrize(
    "parts",
    [
        {"directory": "../x", "users": 3, "applied": 0}, {"directory": NOT_THERE, "users": 3, "applied": 0},
        {"directory": None}, [], {"directory": NOT_THERE, "users": "3", "applied": 0},
    ],
)  # fmt: skip
def test_a_pointer_to_other_parts_is_refused(directory, parts):
    path = directory / "checkpoint.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text(encoding="utf-8")), "parts": parts})))
    with pytest.raises(CheckpointError, match=r"checkpoint.json is damaged: it does not name the parts"):
        load(directory)


def test_readers_beside_writers(directory):
    recommender = load(directory)
    users, stop, problems = recommender.users[1:20], threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                found = recommender.recommend(users=users, k=5)
                assert all(np.isfinite(row).all() for row in found.scores)
            except Exception as error:
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    rng = np.random.default_rng(0)
    for step in range(60):
        recommender.update([(f"w{step % 7}", str(item)) for item in rng.choice(recommender.items[1:], 3)])
        if step % 5 == 0:
            recommender.forget(f"w{step % 7}")
    stop.set()
    for thread in readers:
        thread.join()
    assert not problems
    lengths = [len(recommender.stored([f"w{n}"])[0]) for n in range(7)]
    assert sum(lengths) > 0
    memory = recommender.model.memory
    for user, number in recommender.live.numbers.items():
        if user.startswith("w"):
            live = (memory.users == number) & ~memory.gone
            assert int(live.sum()) == max(len(recommender.stored([user])[0]) - 1, 0)


@pytest.mark.parametrize("model", ["GRU4Rec", "FPMC"])
def test_models_without_a_memory_keep_histories(tiny_run, model, tmp_path):
    shutil.copytree(tiny_run(model).base.directory, tmp_path / "c")
    recommender = load(tmp_path / "c")
    done = recommender.update([("new", recommender.items[1]), ("new", recommender.items[2])])
    assert (done.memories, done.new_users) == (0, 1)
    wanted = recommender.score(users=["new"])
    np.testing.assert_array_equal(wanted, recommender.score([recommender.items[1:3]]))
    recommender.save()
    np.testing.assert_allclose(load(tmp_path / "c").score(users=["new"]), wanted, rtol=1e-5, atol=1e-6)


def test_backbones_with_user_vectors_take_new_users(tiny_run, tmp_path):
    shutil.copytree(tiny_run(backbone="FPMC").ours.directory, tmp_path / "c")
    recommender = load(tmp_path / "c")
    recommender.update([("new", item) for item in recommender.items[1:5]])
    assert np.isfinite(recommender.score(users=["new"])).all()
    recommender.save()
    assert np.isfinite(load(tmp_path / "c").score(users=["new"])).all()


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ("x", "give a list"), ([("a",)], "is no"), ([("a", "b", "c")], "time 'c' is no number"), (5, "give a list"),
        ([("a", "b", float("nan"))], "not finite"), ([("", "b")], "user is empty"), ([(None, "b")], "None is no id"),
        ([{"user": "a"}], "None is no id"), ({"user": "a", "item": "b"}, "give a list"), (["ab"], "is no"),
        (pd.DataFrame({"user_id": [1]}), "no column item_id"), ([("\ud800", "b")], "cannot be written as UTF-8"),
        ([("a", "b", 10**400)], "not finite"), ([(10**5000, "b")], "too many digits"),
    ],
)  # fmt: skip
def test_events_without_sense_change_nothing(directory, events, words):
    recommender = load(directory, journal=True)
    with pytest.raises(InputError, match=words):
        recommender.update(events)
    with pytest.raises(InputError, match="'unknown' is no item"):
        recommender.update([("a", recommender.items[1]), ("a", "unknown")], strict=True)
    assert journaled(directory) == 0
    assert "a" not in recommender.live.numbers
    recommender.close()
