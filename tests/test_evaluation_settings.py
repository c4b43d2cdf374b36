"""Sampled items, metrics of lists and of scores: evaluation as RecBole's users set it, and as its Trainer does it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare_helpers import go
from conftest import ROOT, random_log, write_log

sys.path.insert(0, str(ROOT / "experiments"))

import evaluation_settings

from recbole_raserec.comparison import driver
from recbole_raserec.comparison.driver import compare
from recbole_raserec.comparison.figures import Finished, Row, figures
from recbole_raserec.config import check_run, get_model, selection_protocol
from recbole_raserec.data import prepare_data
from recbole_raserec.errors import ConfigError
from recbole_raserec.evaluation import collect_ranks, evaluate, read_ranks, record_table
from recbole_raserec.evaluation.ranks import grouped
from recbole_raserec.evaluation.report import STYLES

SAMPLED = {"mode": {"valid": "uni10", "test": "pop10"}}
MIXED = {"mode": {"valid": "full", "test": "uni10"}}


@pytest.mark.parametrize("setting", evaluation_settings.SETTINGS, ids=evaluation_settings.name_of)
def test_values_are_recboles(setting, workdir):
    modes = tuple(mode.replace("0", "", 1) for mode in setting.modes)  # ten items, and five: a test has little time
    found = evaluation_settings.measure(setting._replace(modes=modes), ROOT / "dataset", "planted")
    assert found["difference"] == 0
    assert all(len(part["ours"]) >= 2 for part in found["phases"].values())


def test_the_page_has_no_difference():
    rows = re.findall(
        r"^\| .*\| (\S+) \|$", (ROOT / "results/evaluation_settings_ml-100k.md").read_text(), re.MULTILINE
    )
    assert rows == ["0"] * 24


LISTS = ["NDCG", "Recall", "GAUC", "ItemCoverage", "GiniIndex", "AveragePopularity", "TailPercentage"]


@pytest.mark.parametrize(
    ("mode", "metrics"), [("full", LISTS), ("uni10", LISTS), ("pop10", LISTS), ("uni10", ["AUC", "LogLoss", "RMSE"])]
)
def test_recboles_own_loaders_give_the_same(mode, metrics, workdir):
    """Nothing here is of this package but the metrics; of sampled items RecBole draws others at each reading."""
    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation
    from recbole.model.general_recommender import BPR
    from recbole.trainer import Trainer

    write_log(workdir, "tiny", random_log(3))
    config = RecBoleConfig("BPR", "tiny", config_dict={
        "data_path": str(workdir), "metrics": metrics, "topk": [3], "use_gpu": False, "metric_decimal_place": 8,
        "valid_metric": "AUC" if "AUC" in metrics else "NDCG@3", "load_col": {"inter": ["user_id", "item_id"]},
        "eval_args": {"split": {"RS": [6, 2, 2]}, "mode": mode},
    })  # fmt: skip
    train, valid, test = data_preparation(config, create_dataset(config))
    model = BPR(config, train.dataset)
    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(train)
    np.random.seed(5)
    theirs = trainer.evaluate(test, load_best_model=False)
    np.random.seed(5)
    seen = sum(part.dataset.inter_matrix(form="csr") for part in (train, valid)).astype(bool)
    ours = evaluate(model, test, config, seen, training=train.dataset)
    assert ours["sampled" if mode != "full" else "seen_removed"] == {name: float(v) for name, v in theirs.items()}


def test_the_items_are_the_same_whenever_they_are_read(workdir):
    setting = evaluation_settings.SETTINGS[0]._replace(modes=("uni20", "pop20"))
    config, model, splits = evaluation_settings.prepared(setting, ROOT / "dataset", "planted")
    before = np.random.get_state()[1].copy()
    first = evaluate(model, splits.test, config)
    assert list(first) == ["sampled"]
    assert evaluate(model, splits.test, config) == first
    assert (np.random.get_state()[1] == before).all()  # the draws of a training go on as without an evaluation


def test_the_draws_are_recboles_and_regenerated_rows_do_not_change_them(small_config, extra):
    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation

    config = small_config("SASRec", eval_args=SAMPLED)
    given = {name: config[name] for name in ("data_path", "eval_args", "MAX_ITEM_LIST_LENGTH", "load_col")}
    theirs = RecBoleConfig("SASRec", "tiny", config_dict={
        **given, "data_path": str(Path(config["data_path"]).parent), "eval_batch_size": config["eval_batch_size"],
        "train_neg_sample_args": None,
    })  # fmt: skip
    loaders = data_preparation(theirs, create_dataset(theirs))[1:]
    for regenerated in (None, extra):
        splits = prepare_data(config, regenerated=regenerated)
        for own, other in zip((splits.valid, splits.test), loaders):
            np.random.seed(config["seed"])
            wanted = [(batch[0]["item_id"], batch[1]) for batch in other]
            found = [(batch[0]["item_id"], batch[1]) for batch in own]
            assert len(found) == len(wanted)
            assert all(torch.equal(*pair) for each in zip(found, wanted) for pair in zip(*each))


def test_ranks_among_sampled_items_by_hand(small_config):
    """One plus the items of the query's draws with a higher score; an item that is drawn twice counts once."""
    config = small_config("SASRec", eval_args=SAMPLED, metrics=["MRR", "GAUC"], valid_metric="MRR@10")
    splits = prepare_data(config)
    model = get_model("SASRec")(config, splits.train._dataset).eval()
    interaction, row, _, targets = next(iter(splits.test))
    values = model.predict(interaction).detach()
    items, wanted = interaction["item_id"], []
    for query, target in enumerate(targets.tolist()):
        mine = row == query
        scores = dict(zip(items[mine].tolist(), values[mine].tolist()))
        assert mine.sum() == 11
        assert items[mine][0] == target
        wanted.append(1 + sum(score > scores[target] for score in scores.values()))
    ranks = collect_ranks(model, splits.test, config)
    assert ranks.kept.tolist() == wanted
    assert list(ranks.by_protocol()) == list(ranks.more) == ["sampled"]
    assert ranks.users.tolist() == [int(interaction["user_id"][row == query][0]) for query in range(len(targets))]


def test_lists_of_both_protocols_by_hand(small_config):
    config = small_config("SASRec", metrics=["ItemCoverage", "GAUC"], topk=[3], valid_metric="ItemCoverage@3")
    splits = prepare_data(config)
    model = get_model("SASRec")(config, splits.train._dataset).eval()
    seen, interaction = splits.seen["test"], next(iter(splits.test))[0]
    scores = model.full_sort_predict(interaction).detach().clone()
    scores[:, 0] = -torch.inf
    ranks = collect_ranks(model, splits.test, config, seen)
    assert ranks.more["seen_kept"]["rec.items"].tolist() == scores.topk(3).indices.tolist()
    for query, user in enumerate(ranks.users.tolist()):
        gone = seen[user].indices[seen[user].indices != int(ranks.targets[query])]
        scores[query, gone.astype(np.int64)] = -torch.inf
    assert ranks.more["seen_removed"]["rec.items"].tolist() == scores.topk(3).indices.tolist()
    figures = evaluate(model, splits.test, config, seen)
    for name, auc in (("seen_kept", ranks.kept), ("seen_removed", ranks.removed)):
        width = ranks.more[name]["rec.meanrank"][:, 1]
        expected = ((width - auc) / (width - 1)).mean()
        assert figures[name]["gauc"] == pytest.approx(float(expected), abs=1e-4)


PIPELINE = {
    "metrics": ["NDCG", "Recall", "GAUC", "GiniIndex"], "topk": [5], "valid_metric": "NDCG@5",
    "ram_valid_metric": "NDCG@5",
}  # fmt: skip


def test_a_pipeline_among_sampled_items(tiny_run, tmp_path):
    made = tiny_run("RaSeRec", ranks_file="ranks.npz", eval_args=SAMPLED, **PIPELINE)
    for who in ("base", "ours"):
        for phase in ("valid", "test"):
            assert list(made.record["metrics"][who][phase]) == ["sampled"]
            assert list(made.record["metrics"][who][phase]["sampled"]) == ["ndcg@5", "recall@5", "gauc", "giniindex@5"]
    assert "the targets among sampled items" in made.printed
    assert "10 items drawn by popularity" in " ".join(made.printed.split())
    assert "seen items" not in made.printed
    assert made.record["protocol"]["seen_means"].endswith("they may be drawn")
    stored = read_ranks(tmp_path / "ranks.npz")["base + (iii)"]
    assert list(stored.ranks) == ["sampled"]
    assert stored.ranks["sampled"].max() <= 11
    assert list(grouped(stored, made.record["options"], "ndcg@5")) == ["popularity", "history"]
    assert grouped(stored, made.record["options"], "gauc") == {}

    rows = [
        Row("SASRec", None, {2020: Finished(_alone(made.record), tmp_path / "ranks.npz")}, {}),
        Row("RaSeRec", "SASRec", {2020: Finished(made.record, tmp_path / "ranks.npz")}, {}),
    ]
    data = figures(rows)
    tested = data["rows"][1]["significance"]["sampled"]
    assert tested["ndcg@5"]["users"] is not None
    assert tested["gauc"]["users"] is None  # it has no value for each user
    content = {"datasets": {"tiny": data}}
    for style in STYLES.values():
        text = " ".join(style(content).split())
        assert "among sampled items" in text
        assert "10 items drawn by popularity" in text
    assert list(driver.metric_panels(content)) == ["tiny: the targets among sampled items"]
    assert list(driver.training_panels(content)) == ["tiny: NDCG@5, among sampled items"]

    other = json.loads(json.dumps(made.record).replace("10 items", "99 items"))
    mixed = [rows[0], Row("RaSeRec", "SASRec", {2020: Finished(other, tmp_path / "ranks.npz")}, {})]
    with pytest.raises(ValueError, match="different items cannot be compared"):
        figures(mixed)


def _alone(record):
    return {**record, "metrics": {"base": record["metrics"]["base"]}}


def test_validation_of_all_items_and_a_test_of_sampled_ones(tiny_run):
    made = tiny_run("RaSeRec", head="knn", eval_args=MIXED, **PIPELINE)
    ours = made.record["metrics"]["ours"]
    assert list(ours["valid"]) == ["seen_kept", "seen_removed"]
    assert list(ours["test"]) == ["sampled"]
    assert made.record["protocol"]["ranking"].endswith("; in the validation every item of the data set")
    assert "Ranked: the target and 10 items drawn uniformly" in record_table(made.record, width=300)


def test_a_comparison_holds_one_mode(stand_in):
    models = "SASRec,BPR:eval_args={'mode': 'uni10'}"
    with pytest.raises(ConfigError, match=r"would hold figures of two protocols: eval_args is .*'uni10'"):
        compare(models, "tiny", 1, "out", argv=["--data_path=data"])
    go(models="SASRec", seeds=1)
    with pytest.raises(ConfigError, match="would hold figures of two protocols"):
        go(models="SASRec", seeds=1, argv=["--eval_args={'mode': {'valid': 'full', 'test': 'pop10'}}"])


def test_what_decides_in_a_validation_of_sampled_items(small_config):
    assert selection_protocol(small_config("SASRec", eval_args=SAMPLED)) == "sampled"
    assert selection_protocol(small_config("SASRec", eval_args=MIXED)) == "seen_kept"
    with pytest.raises(ConfigError, match=r"valid_protocol: seen_removed is of all items"):
        check_run(small_config("SASRec", eval_args=SAMPLED, valid_protocol="seen_removed"))
