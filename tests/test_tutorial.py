"""The tutorial notebook runs from top to bottom, and what it shows is so."""

from __future__ import annotations

import json
import os

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"

#: Appended to the notebook: what the tests look at, as JSON.
RESULTS = """
import json

with open("loans.csv", newline="", encoding="utf-8") as file:
    loans = list(csv.reader(file))
results = {
    "titles": titles, "loans": loans, "status": status, "metrics": record["metrics"],
    "explanation": explanation.to_dict(), "page": Path("explanation.html").read_text(encoding="utf-8"),
    "popular": unknown.popular.tolist(), "removed": removed, "update": vars(update),
}
for name in ("recommended", "similar", "before", "after", "again", "unknown"):
    results[name] = read(globals()[name])
results["kept"] = {name: reloaded.users.count(name) for name in ("new-0", "new-10")}
results["scores"] = recommender.score([history], [reason.item.id for reason in explanation.items])[0].tolist()
Path(os.environ["TUTORIAL_RESULTS"]).write_text(json.dumps(results), encoding="utf-8")
"""


@pytest.fixture(scope="module")
def notebook():
    """The notebook as committed; what runs it is in the extra `test`."""
    nbformat = pytest.importorskip("nbformat", reason="the tutorial needs nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def results(notebook, tmp_path_factory):
    """What the executed notebook holds."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient", reason="the tutorial needs nbclient")
    pytest.importorskip("ipykernel", reason="the tutorial needs ipykernel")
    directory = tmp_path_factory.mktemp("tutorial")
    cells = [*notebook.cells, nbformat.v4.new_code_cell(RESULTS)]
    copy = nbformat.from_dict({**notebook, "cells": cells})
    environment = {
        "TMPDIR": str(directory), "IPYTHONDIR": str(directory), "JUPYTER_RUNTIME_DIR": str(directory / "runtime"),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TUTORIAL_RESULTS": str(directory / "results.json"),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    client = nbclient.NotebookClient(
        copy, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    client.execute(env={**os.environ, **environment})
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))


def test_committed_without_outputs(notebook):
    # They would differ from machine to machine; this test and the site make them again.
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_links_lead_to_files(notebook):
    for cell in notebook.cells:
        for part in cell.source.split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            assert (NOTEBOOK.parent / target).is_file(), target


def test_recommendations_are_known_titles_not_read_before(results):
    titles = set(results["titles"])
    for name in ("recommended", "before", "after", "again", "unknown"):
        (found,) = results[name]
        assert len(set(found)) == 5
        assert set(found) <= titles
    assert not set(results["recommended"][0]) & {item["title"] for item in results["explanation"]["history"]}
    assert [len(row) for row in results["similar"]] == [4, 4, 4]


def test_retrieval_pays_under_both_protocols(results):
    assert results["status"] == 0
    base, ours = (results["metrics"][name]["test"] for name in ("base", "ours"))
    for protocol in ("seen_kept", "seen_removed"):
        assert ours[protocol]["ndcg@10"] > base[protocol]["ndcg@10"]


def test_the_parts_of_the_explanation_add_up_to_the_scores(results):
    explanation = results["explanation"]
    assert [reason["item"]["title"] for reason in explanation["items"]] == results["recommended"][0][:3]
    for reason, score in zip(explanation["items"], results["scores"]):
        assert reason["backbone"] + reason["retrieval"] == pytest.approx(reason["score"])
        assert reason["score"] == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert len(reason["effects"]) == len(explanation["memories"]) == 10
    assert sum(memory["attention"] for memory in explanation["memories"]) == pytest.approx(1, abs=1e-4)
    assert results["recommended"][0][0] in results["page"]


def test_new_events_change_the_answer_and_forgetting_takes_that_back(results):
    rows = results["loans"][1:]
    momo, solaris = (f"B{results['titles'].index(title):02d}" for title in ("Momo", "Solaris"))
    assert not any((*one[:2], two[1]) == (two[0], momo, solaris) for one, two in zip(rows, rows[1:]))  # as it says
    assert results["update"] == {"events": 30, "memories": 20, "new_users": 10, "dropped": 0}
    assert "Ivanhoe" not in results["before"][0]
    assert results["after"][0][0] == "Ivanhoe"
    assert results["removed"] == [2] * 10
    assert results["again"] == results["before"]
    assert results["popular"] == [True]
    assert results["kept"] == {"new-0": 0, "new-10": 1}


def test_the_log_is_the_same_everywhere(results):
    assert results["loans"][0] == ["reader", "book", "lent_on"]
    assert len(results["loans"]) == 7347
