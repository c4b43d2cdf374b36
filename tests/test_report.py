"""Tables and result records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recbole_raserec.evaluation.protocols import SEEN_KEPT, SEEN_REMOVED
from recbole_raserec.evaluation.report import (
    improvement,
    protocol_description,
    result_record,
    results_table,
    versions,
)
from recbole_raserec.storage import write_json

BASE = {
    SEEN_KEPT: {"recall@10": 0.0819, "ndcg@10": 0.0405},
    SEEN_REMOVED: {"recall@10": 0.09, "ndcg@10": 0.0},
}
OURS = {
    SEEN_KEPT: {"recall@10": 0.0844, "ndcg@10": 0.0400},
    SEEN_REMOVED: {"recall@10": 0.09, "ndcg@10": 0.05},
}


def comparison_table(base, ours, names=("SASRec", "RaSeRec"), **options):
    return results_table(list(zip(names, (base, ours))), compare=True, **options)


def test_comparison_table_names_both_protocols_and_aligns_its_columns():
    assert comparison_table(BASE, OURS).splitlines() == [
        "seen items kept in the ranking (RecBole's way for sequential models)",
        "-------------------------------",
        "model        Recall@10  NDCG@10",
        "SASRec          0.0819   0.0405",
        "RaSeRec         0.0844   0.0400",
        "improvement     +3.05%   -1.23%",
        "",
        "seen items removed from the ranking",
        "-------------------------------",
        "model        Recall@10  NDCG@10",
        "SASRec          0.0900   0.0000",
        "RaSeRec         0.0900   0.0500",
        "improvement     +0.00%        -",
    ]


def test_markdown_table():
    text = comparison_table(BASE, OURS, ("DuoRec", "RaSeRec|x"), style="markdown")
    first = text.split("\n\n**")[0].splitlines()
    assert first[0].startswith("**seen items kept in the ranking")
    assert first[1] == ""
    assert first[2:4] == ["| model | Recall@10 | NDCG@10 |", "| --- | ---: | ---: |"]
    assert "| DuoRec | 0.0819 | 0.0405 |" in text
    assert "| RaSeRec\\|x | 0.0844 | 0.0400 |" in text


@pytest.mark.parametrize("width", [40, 80, 100])
def test_wide_tables_go_on_in_a_second_band_and_lose_no_metric(width):
    metrics = {f"{name}@{k}": 0.5 for name in ("recall", "ndcg", "mrr", "hit", "precision", "map") for k in (5, 10, 20)}
    text = results_table([("GRU4Rec", {SEEN_REMOVED: metrics})], width=width)
    assert max(map(len, text.splitlines())) <= width
    titles = [word for line in text.splitlines() if line.startswith("model") for word in line.split()[1:]]
    assert [title.lower() for title in titles] == list(metrics)
    assert "improvement" not in text
    assert text.count("0.5000") == len(metrics)


def test_six_usual_metrics_fit_one_band_of_eighty_columns():
    metrics = {f"{name}@{k}": 0.0123 for name in ("recall", "ndcg") for k in (5, 10, 20)}
    text = comparison_table({SEEN_KEPT: metrics}, {SEEN_KEPT: metrics})
    assert len(text.splitlines()) == 6
    assert max(map(len, text.splitlines())) <= 80


def test_equal_names_still_give_two_rows():
    assert comparison_table(BASE, OURS, ("SASRec", "SASRec")).count("\nSASRec ") == 4


def test_results_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="SASRec and RaSeRec were not evaluated alike"):
        comparison_table(BASE, {SEEN_KEPT: OURS[SEEN_KEPT]})
    with pytest.raises(ValueError, match="style is 'html'"):
        comparison_table(BASE, OURS, style="html")
    with pytest.raises(ValueError, match="no result"):
        results_table([])


def test_improvement():
    assert improvement(0.04, 0.05) == pytest.approx(25)
    assert improvement(0.0, 0.05) is None
    assert improvement(0.04, float("nan")) is None


def record(**changes):
    config = {"eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO"}}
    given = {
        "model": "RaSeRec",
        "backbone": "SASRec",
        "dataset": "tiny",
        "seed": np.int64(2020),
        "metrics": {"base": {"valid": BASE, "test": BASE}, "ours": {"test": OURS}},
        "protocol": protocol_description(config, validation_in_memory=True),
        "seconds": {"backbone": 1.23456},
        "options": {"alpha": np.float32(0.5), "path": Path("saved"), "bad": float("nan"), "topk": (5, 10)},
    }
    return result_record(**{**given, **changes})


def test_a_record_is_plain_json_and_says_how_it_came_about(tmp_path):
    target = tmp_path / "deep" / "r.json"
    write_json(target, record())
    loaded = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded == record()
    assert loaded["metrics"]["base"]["test"] == BASE
    assert loaded["metrics"]["ours"]["test"] == OURS
    assert loaded["improvement_percent"] == {
        "test": {
            SEEN_KEPT: {"recall@10": 3.05, "ndcg@10": -1.23},
            SEEN_REMOVED: {"recall@10": 0.0, "ndcg@10": None},
        }
    }
    assert loaded["seconds"] == {"backbone": 1.235}
    assert loaded["options"] == {"alpha": 0.5, "path": "saved", "bad": None, "topk": [5, 10]}
    assert loaded["protocol"]["validation_in_memory"] is True
    assert loaded["protocol"]["split"] == {"LS": "valid_and_test"}
    assert set(loaded["protocol"]["seen_items"]) == {SEEN_KEPT, SEEN_REMOVED}
    assert [path.name for path in target.parent.iterdir()] == ["r.json"]


def test_a_baseline_record_has_no_comparison():
    baseline = record(model="GRU4Rec", backbone=None, metrics={"ours": {"test": OURS}})
    assert "improvement_percent" not in baseline
    assert baseline["backbone"] is None


def test_versions_of_what_decides_the_figures():
    found = versions()
    assert found["recbole"] == "1.2.1"
    assert found["torch"]
    assert found["faiss"]
    assert found["python"].startswith("3.")
