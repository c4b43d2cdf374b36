"""Metrics of test targets in groups, training curves, and the plots of a comparison that show them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import random_log, write_log

from recbole_raserec.comparison.driver import group_panels, training_panels
from recbole_raserec.comparison.figures import Finished, Row, figures
from recbole_raserec.evaluation.protocols import PROTOCOLS, metrics_from_ranks
from recbole_raserec.evaluation.ranks import StageRanks, grouped, quintiles, read_ranks
from recbole_raserec.quick_start import run_recbole_raserec

LOG = random_log(0, repeats=False)
OPTIONS = {
    "MAX_ITEM_LIST_LENGTH": 8, "hidden_size": 16, "inner_size": 16, "train_batch_size": 64, "epochs": 3,
    "show_progress": False, "state": "WARNING", "result_file": "result.json", "ranks_file": "ranks.npz",
}  # fmt: skip


def go(directory, model="RaSeRec", **options):
    write_log(directory, "tiny", LOG)
    more = {"backbone": "SASRec", "top_k": 3, "ram_epochs": 2, "ram_inner_size": 16} if model == "RaSeRec" else {}
    given = {**OPTIONS, **more, **options, "data_path": str(directory)}
    return run_recbole_raserec(model, "tiny", config_dict=given, argv=[])


def test_quintiles_keep_equal_values_together():
    values = np.random.default_rng(0).permutation([1] * 50 + [2] * 30 + list(range(3, 23)))
    groups = quintiles(values)
    assert sorted(np.concatenate(groups).tolist()) == list(range(100))
    spans = [(values[rows].min(), values[rows].max()) for rows in groups]
    assert all(a[1] < b[0] for a, b in zip(spans, spans[1:]))
    assert [rows.tolist() for rows in quintiles(np.array([4, 4, 4]))] == [[0, 1, 2]]


def test_groups_add_up_to_the_whole():
    rng = np.random.default_rng(1)
    kept, counts = rng.integers(1, 30, 200), rng.integers(0, 9, 200)
    ranks = StageRanks(
        np.arange(200).astype(str), np.arange(200), {"seen_kept": kept, "seen_removed": kept // 2 + 1},
        {"popularity": counts, "history": np.full(200, 7)},
    )  # fmt: skip
    options = {"metrics": ["Recall", "NDCG"], "topk": [5, 10], "eval_args": {"mode": "full"}}
    found = grouped(ranks, options, "ndcg@10")
    for protocol, values in ranks.ranks.items():
        whole = metrics_from_ranks(torch.from_numpy(values), options, decimals=9)["ndcg@10"]
        for groups in found.values():
            assert sum(each["targets"] for each in groups.values()) == 200
            mean = sum(each["targets"] * each[protocol] for each in groups.values()) / 200
            assert mean == pytest.approx(whole, abs=2e-6)
    assert list(found["history"]) == ["7-7"]
    assert grouped(StageRanks(ranks.users, ranks.queries, ranks.ranks, {}), options, "ndcg@10") == {}


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_popularity_and_history_are_those_of_the_log(workdir, model):
    own = {"embedding_size": 16} if model == "BPR" else {}
    keep = {name: OPTIONS[name] for name in ("train_batch_size", "show_progress", "state", "result_file", "ranks_file")}
    write_log(workdir, "tiny", LOG)
    options = {**(OPTIONS if model == "SASRec" else keep), **own, "epochs": 1, "data_path": str(workdir)}
    run_recbole_raserec(model, "tiny", config_dict=options, argv=[])
    histories: dict[str, list[int]] = {}
    for user, item, _ in sorted(LOG, key=lambda row: (row[0], row[2])):
        histories.setdefault(f"u{user}", []).append(item)
    # of three items a sequential model validates none: its first target is the second item, and that trains
    held = {user: 1 if model == "SASRec" and len(items) == 3 else 2 for user, items in histories.items()}
    assert 1 in held.values() or model == "BPR"
    counts = Counter(item for user, items in histories.items() for item in items[: -held[user]])
    ranks = read_ranks("ranks.npz")["base"]
    assert len(ranks.users) == len(histories)
    for number, user in enumerate(ranks.users):
        assert ranks.groupings["popularity"][number] == counts[histories[user][-1]]
        assert ranks.groupings["history"][number] == len(histories[user]) - 1


def test_curves_are_of_all_epochs_also_of_a_run_found_again(workdir):
    record = go(workdir)
    curves = record["curves"]
    for who, epochs, metric in (("base", 3, "ndcg@10"), ("ours", 2, None)):
        assert [epoch for epoch, _ in curves[who]["valid"]] == list(range(epochs))
        assert [epoch for epoch, _ in curves[who]["train_loss"]] == list(range(epochs))
        assert curves[who]["metric"] == metric or metric is None
        best = max(value for _, value in curves[who]["valid"])
        valid = record["metrics"][who]["valid"]["seen_kept"]
        assert best == pytest.approx(valid[curves[who]["metric"]], abs=1e-4)
    again = go(workdir)
    assert again["curves"] == json.loads(json.dumps(curves))


def test_the_plots_of_a_comparison_show_groups_and_curves(workdir):
    record = go(workdir)
    run = Finished(record, workdir / "ranks.npz")
    alone = Finished({**record, "metrics": {"base": record["metrics"]["base"]}, "curves": {}}, workdir / "ranks.npz")
    content = {
        "datasets": {"tiny": figures([Row("SASRec", None, {1: alone}, {}), Row("ours", "SASRec", {1: run}, {})])}
    }
    content = json.loads(json.dumps(content))
    for grouping in ("popularity", "history"):
        panels = group_panels(content, grouping)
        assert len(panels) == len(PROTOCOLS)
        for panel in panels.values():
            assert list(panel) == ["SASRec", "ours"]
            assert list(panel["SASRec"]) == list(panel["ours"])
    panels = training_panels(content)
    ((title, panel),) = panels.items()
    assert title.startswith("tiny: ")
    assert {name: list(points) for name, points in panel.items()} == {"ours": [0, 1]}
    content["datasets"]["tiny"]["rows"][1]["seeds"]["2"] = {**content["datasets"]["tiny"]["rows"][1]["seeds"]["1"]}
    content["datasets"]["tiny"]["rows"][1]["seeds"]["2"]["curve"] = {"metric": "recall@10", "valid": [[0, 0.5]]}
    ((_, panel),) = training_panels(content).items()
    assert list(panel["ours"]) == [0]  # the second seed stopped there
    assert len(panel["ours"][0]) == 2
