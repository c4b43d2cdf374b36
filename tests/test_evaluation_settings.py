"""Sampled items, metrics of lists and of scores: evaluation as RecBole's users set it, and as its Trainer does it."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))

import evaluation_settings


@pytest.mark.parametrize("setting", evaluation_settings.SETTINGS, ids=evaluation_settings.name_of)
def test_values_are_recboles(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = evaluation_settings.measure(setting, ROOT / "dataset", "planted")
    assert found["difference"] == 0
    assert set(found["ours"]) == set(found["recbole"])
    assert len(found["ours"]) >= 2


def test_the_candidates_are_the_same_whenever_they_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = evaluation_settings.SETTINGS[0]._replace(mode={"valid": "uni20", "test": "pop20"})
    config, model, splits = evaluation_settings.prepared(setting, ROOT / "dataset", "planted")
    from recbole_raserec.evaluation import evaluate

    first = evaluate(model, splits.test, config)
    assert list(first) == ["sampled"]
    assert evaluate(model, splits.test, config) == first
