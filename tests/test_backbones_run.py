"""Every model that is said to work as a backbone goes through the whole pipeline."""

from __future__ import annotations

import math

import pytest
import torch
from pipeline_helpers import figures

from recbole_raserec import load_checkpoint
from recbole_raserec.config import SUPPORTED

INTER = ["user_id", "item_id", "timestamp"]


def write_items(path):
    """Attributes of the items of the small log."""
    rows = (f"i{number}\tk{number % 3} k{number % 5}" for number in range(25))
    path.write_text("\n".join(["item_id:token\tkind:token_seq", *rows]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_supported_model_carries_retrieval(tiny_run, tmp_path, name):
    options = {}
    if name == "DARec":
        pytest.importorskip("transformers", reason="needs the extra llm")
        write_items(tmp_path / "tiny" / "tiny.item")
    if name in ("FDSA", "GRU4RecF", "SASRecF"):
        write_items(tmp_path / "tiny" / "tiny.item")
        options.update(selected_features=["kind"], load_col={"inter": INTER, "item": ["item_id", "kind"]})
    made = tiny_run("RaSeRec", backbone=name, **options)
    assert made.trained == [(name, 0), ("RaSeRec", 0)]
    assert made.record["backbone"] == name
    for phases in figures(made.record).values():
        for protocols in phases.values():
            for values in protocols.values():
                assert all(math.isfinite(value) for value in values.values())
    batch = next(iter(made.ours.splits.test))[0]
    with torch.no_grad():
        base, ours = (outcome.model.full_sort_predict(batch).view(len(batch), -1) for outcome in (made.base, made.ours))
    assert not torch.allclose(base, ours, rtol=1e-3)  # the neighbours have reached the scores
    rows = len(made.base.splits.train._dataset) + len(made.base.splits.valid._dataset)
    assert len(made.ours.model.memory) == rows
    again = load_checkpoint(made.ours.directory).model  # reloaded without the data set
    with torch.no_grad():
        torch.testing.assert_close(again.full_sort_predict(batch).view(len(batch), -1), ours)
