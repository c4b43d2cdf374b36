"""Checkpoints that version 0.1.0 wrote: this version reads them and answers what that one answered.

They and the answers are in tests/fixtures/0.1.0; tests/fixtures/make_checkpoint.py says how they were made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from recbole_raserec import Recommender

FIXTURE = Path(__file__).parent / "fixtures" / "0.1.0"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))

#: Of scores and of what an explanation says, where these are above 1 a share of them: other kernels, processors and
#: numbers of threads round otherwise, by half of that.
TOLERANCE = 1e-6


def near(expected):
    return pytest.approx(expected, abs=TOLERANCE, rel=TOLERANCE)


@pytest.fixture(scope="module", params=["RaSeRec", "SASRec"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def recommender(name):
    """Answers questions; no test changes it."""
    return Recommender.load(FIXTURE / name, device="cpu")


@pytest.fixture(scope="module")
def raserec():
    return Recommender.load(FIXTURE / "RaSeRec", device="cpu")


@pytest.fixture
def changed(name, tmp_path):
    """A recommender over a copy, after the update that 0.1.0 was asked about."""
    shutil.copytree(FIXTURE / name, tmp_path / "checkpoint")
    made = Recommender.load(tmp_path / "checkpoint", device="cpu")
    made.update([tuple(event) for event in EXPECTED["events"]])
    return made


def same_answer(recommender, expected, sequences=None, users=None):
    found = recommender.recommend(sequences, k=EXPECTED["k"], users=users)
    assert found.items == [expected["items"]]
    assert found.scores[0].tolist() == near(expected["top"])
    assert recommender.score(sequences, users=users)[0].tolist() == near(expected["scores"])


def same(found, expected, place="explanation"):
    """Equal, numbers with a point within the tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            same(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            same(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == near(expected), place
    else:
        assert found == expected, place


def test_the_items_are_in_the_same_order(recommender, name):
    assert recommender.items[1:] == EXPECTED[name]["items"]


def test_histories_get_the_same_items_and_scores(recommender, name):
    for case in EXPECTED[name]["sequences"]:
        same_answer(recommender, case, sequences=[case["history"]])


def test_many_histories_at_once_get_the_same_items_and_scores(recommender, name):
    cases = EXPECTED[name]["sequences"]
    histories = [case["history"] for case in cases]
    assert recommender.recommend(histories, k=EXPECTED["k"]).items == [case["items"] for case in cases]
    assert recommender.score(histories) == near(np.array([case["scores"] for case in cases]))


def test_users_get_the_same_items_and_scores(recommender, name):
    for case in EXPECTED[name]["users"]:
        same_answer(recommender, case, users=[case["user"]])


def test_new_interactions_change_the_same(changed, name):
    for case in EXPECTED[name]["updated"]:
        same_answer(changed, case, users=[case["user"]])


def test_what_is_saved_after_them_is_read_again(changed, name):
    again = Recommender.load(changed.save(), device="cpu")
    for case in EXPECTED[name]["updated"]:
        same_answer(again, case, users=[case["user"]])
    new, _, _ = EXPECTED["events"][0]
    again.forget(new)
    assert new not in Recommender.load(again.save(), device="cpu").users


def test_the_memory_has_the_same_entries(raserec):
    memory, expected = raserec.model.memory, dict(EXPECTED["RaSeRec"]["memory"])
    assert len(memory) == expected.pop("entries")
    for array, values in expected.items():
        found = np.asarray(getattr(memory, array))
        assert found[: len(values["first"])].tolist() == values["first"], array
        assert found.sum(dtype=np.float64) == pytest.approx(values["sum"], rel=1e-12), array


def test_the_explanation_is_the_same(raserec):
    expected = EXPECTED["RaSeRec"]["explanation"]
    found = raserec.explain(expected["history"], k=len(expected["found"]["items"])).to_dict()
    same(found, expected["found"])


def test_nothing_names_the_machine_that_made_them():
    for path in FIXTURE.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(f'"{root}' in text for root in ("/", "~", "C:")), path
