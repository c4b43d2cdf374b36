"""The runner, in one process: what a run returns, prints and leaves behind, and what it takes up again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import recbole
import torch
from conftest import random_log, write_log
from pipeline_helpers import PLANTED, TINY, figures, run

from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.evaluation.report import PROTOCOL_TITLES

METRICS = {f"{metric}@{k}" for metric in ("recall", "ndcg") for k in (5, 10, 20)}


@pytest.fixture
def planted_copy(planted_run, tmp_path):
    """A directory in which the shared run has already taken place."""
    shutil.copytree(planted_run.saved, tmp_path / "saved")
    return tmp_path


def directories(saved, model):
    return {path.name for path in Path(saved).glob(f"{model}-*")}


# ------------------------------------------------------------------ what a run gives


def test_the_result_file_has_what_the_run_returned(planted_run):
    written = json.loads((planted_run.saved.parent / "result.json").read_text(encoding="utf-8"))
    assert written == planted_run.record
    assert written["model"] == "RaSeRec"
    assert written["backbone"] == "SASRec"
    assert written["dataset"] == "planted"
    assert written["seed"] == 2020
    assert set(written["metrics"]) == {"base", "ours"}
    for phases in written["metrics"].values():
        assert set(phases) == {"valid", "test"}
        for protocols in phases.values():
            assert set(protocols) == set(PROTOCOLS)
            for values in protocols.values():
                assert set(values) == METRICS
                assert all(0 <= value <= 1 for value in values.values())
    assert set(written["seconds"]) == {"recommendation", "retrieval", "this_run"}
    assert min(written["seconds"].values()) > 0
    assert written["seconds"]["recommendation"] + written["seconds"]["retrieval"] < written["seconds"]["this_run"]
    assert written["versions"]["recbole"] == recbole.__version__
    assert written["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert written["options"]["alpha"] == PLANTED["alpha"]
    base, ours = (written["metrics"][name]["test"]["seen_kept"]["ndcg@10"] for name in ("base", "ours"))
    improvement = written["improvement_percent"]["test"]["seen_kept"]["ndcg@10"]
    assert improvement == pytest.approx(100 * (ours - base) / base, abs=0.01)


def test_removing_seen_items_never_lowers_a_rank(planted_run):
    for phases in planted_run.record["metrics"].values():
        for protocols in phases.values():
            for key, kept in protocols["seen_kept"].items():
                assert protocols["seen_removed"][key] >= kept


def test_the_table_shows_base_ours_and_improvement_under_both_protocols(planted_run):
    blocks = planted_run.printed.strip().split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == [PROTOCOL_TITLES[name] for name in PROTOCOLS]
    for block, name in zip(blocks, PROTOCOLS):
        rows = {line.split()[0]: line.split()[1:] for line in block.splitlines() if not line.startswith("-")}
        column = rows["model"].index("NDCG@10")
        for row, who in (("SASRec", "base"), ("RaSeRec", "ours")):
            value = planted_run.record["metrics"][who]["test"][name]["ndcg@10"]
            assert rows[row][column] == f"{value:.4f}"
        percent = planted_run.record["improvement_percent"]["test"][name]["ndcg@10"]
        assert rows["improvement"][column] == f"{percent:+.2f}%"


# ------------------------------------------------------------------ what it takes up again


def test_the_same_run_again_trains_nothing_and_gives_the_same_figures(planted_run, planted_copy):
    again = run(planted_copy, **PLANTED)
    assert again.trained == []
    assert figures(again.record) == figures(planted_run.record)
    assert again.record["seconds"]["recommendation"] == planted_run.record["seconds"]["recommendation"]
    assert again.record["seconds"]["this_run"] < planted_run.record["seconds"]["this_run"]


def test_without_resume_it_trains_anew_to_the_same_figures(tiny_run):
    first, again = tiny_run(), tiny_run(resume=False)
    assert again.trained == first.trained == [("SASRec", 0), ("RaSeRec", 0)]
    assert figures(again.record) == figures(first.record)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        ({"alpha": 0.7}, ["RaSeRec"]),
        ({"top_k": 3}, ["RaSeRec"]),
        ({"ram": "single"}, ["RaSeRec"]),
        ({"seed": 7}, ["SASRec", "RaSeRec"]),
        ({"learning_rate": 0.01}, ["SASRec", "RaSeRec"]),
        ({"training": "packed"}, ["SASRec", "RaSeRec"]),
        ({"eval_batch_size": 7}, []),
        ({"topk": [10, 30]}, []),
    ],
    ids=lambda value: "-".join(map(str, value)) or "nothing",
)
def test_what_a_changed_option_makes_anew(tiny_run, change, trained):
    first = tiny_run()
    names = directories(first.saved, "SASRec"), directories(first.saved, "RaSeRec")
    kept = (path for path in first.saved.rglob("*") if path.is_file() and path.parent.name != "neighbours")
    files = {path: path.stat().st_mtime_ns for path in kept}
    second = tiny_run(**change)
    assert [model for model, _ in second.trained] == trained
    assert len(directories(first.saved, "SASRec") - names[0]) == trained.count("SASRec")
    assert len(directories(first.saved, "RaSeRec") - names[1]) == trained.count("RaSeRec")
    assert {path: path.stat().st_mtime_ns for path in files} == files  # what was there is left alone


def test_other_data_under_the_same_name_is_not_reused(tiny_run, tmp_path):
    first = tiny_run()
    log = random_log(0)
    user, item, time = log[0]
    write_log(tmp_path, "tiny", [(user, (item + 1) % 25, time), *log[1:]])
    second = tiny_run()
    assert second.trained == first.trained
    assert len(directories(second.saved, "SASRec")) == 2


def test_the_backbone_alone_is_the_backbone_of_a_retrieval_run(tiny_run):
    alone = tiny_run("SASRec", **{key: TINY[key] for key in ("MAX_ITEM_LIST_LENGTH", "train_batch_size")})
    both = tiny_run()
    assert [model for model, _ in both.trained] == ["RaSeRec"]
    assert figures(both.record)["base"] == figures(alone.record)["base"]


# ------------------------------------------------------------------ --backbone_checkpoint


def test_a_named_backbone_checkpoint_replaces_training(planted_run, tmp_path):
    again = run(tmp_path, **PLANTED, backbone_checkpoint=str(planted_run.base.directory))
    assert {model for model, _ in again.trained} == {"RaSeRec"}
    assert figures(again.record) == figures(planted_run.record)
    assert directories(again.saved, "SASRec") == set()


def damaged(directory):
    """Half of the weights' file."""
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "options", "words"),
    [
        (None, {"backbone": "DuoRec"}, ["holds a SASRec", "the backbone is DuoRec", "--backbone=SASRec"]),
        (None, {"user_inter_num_interval": "[6,inf)"}, ["other users or items", "tiny"]),
        (None, {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, ["another split", "valid_and_test", "RS"]),
        (None, {"hidden_size": 32}, ["model.safetensors", "does not fit"]),
        (damaged, {}, ["model.safetensors", "it is damaged"]),
        (shutil.rmtree, {}, ["not a checkpoint directory", "checkpoint.json"]),
        (lambda path: (path / "ids.json").unlink(), {}, ["ids.json", "does not exist"]),
    ],
    ids=["other-model", "other-vocabulary", "other-split", "other-size", "damaged", "missing", "no-ids"],
)
def test_an_unfit_backbone_checkpoint_is_refused(tiny_run, tmp_path, harm, options, words):
    directory = tmp_path / "mine"
    shutil.copytree(tiny_run().base.directory, directory)
    if harm is not None:
        harm(directory)
    with pytest.raises(CheckpointError) as error:
        tiny_run(backbone_checkpoint=str(directory), checkpoint_dir="elsewhere", **options)
    assert all(word in str(error.value) for word in [*words, str(directory)]), error.value


# ------------------------------------------------------------------ baselines, other forms


@pytest.mark.parametrize("model", ["GRU4Rec", "BPR", "Pop", "ItemKNN"])
def test_a_baseline_runs_under_both_protocols(tiny_run, model):
    first = tiny_run(model)
    assert first.record["model"] == model
    assert first.record["backbone"] is None
    shown = [name for name, title in PROTOCOL_TITLES.items() if title in first.printed]
    assert shown == list(PROTOCOLS)
    assert "improvement" not in first.printed
    (results,) = figures(first.record).values()
    assert first.printed.count(model) == len(PROTOCOLS)
    for name in PROTOCOLS:
        assert set(results["test"][name]) == METRICS
        assert f"{results['test'][name]['ndcg@10']:.4f}" in first.printed
    again = tiny_run(model)
    if model in ("GRU4Rec", "BPR"):
        assert again.trained == []
    assert figures(again.record) == figures(first.record)


@pytest.mark.parametrize(
    "options", [{"ram": "single"}, {"beta": 0.5}, {"learnable_alpha": True}, {"similarity": "dot"}]
)
def test_every_form_of_the_module_runs(tiny_run, options):
    made = tiny_run(**options)
    assert all(math.isfinite(v) for v in figures(made.record)["ours"]["test"]["seen_kept"].values())
    assert figures(made.record)["ours"] != figures(made.record)["base"]


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("RaSeRec", {}, "seen_kept"),
        ("RaSeRec", {"valid_protocol": "seen_removed", "head": "both"}, "seen_removed"),
        ("BPR", {}, "seen_removed"),
        ("BPR", {"valid_protocol": "seen_kept"}, "seen_kept"),
    ],
)
def test_trainings_are_stopped_by_the_protocol_asked_for(tiny_run, model, given, expected):
    made = tiny_run(model, epochs=3, **given)
    (other,) = set(PROTOCOLS) - {expected}
    valid = next(iter(figures(made.record).values()))["valid"]
    best = max(value for _, value in next(iter(made.record["curves"].values()))["valid"])
    assert best == pytest.approx(valid[expected]["ndcg@10"], abs=1e-4)
    assert best != pytest.approx(valid[other]["ndcg@10"], abs=1e-4)


def test_alpha_one_is_the_base(tiny_run):
    made = figures(tiny_run(alpha=1.0).record)
    assert made["ours"] == made["base"]


def test_an_unfrozen_backbone_moves_and_a_frozen_one_does_not(tiny_run):
    frozen, free = tiny_run(ram_epochs=2), tiny_run(ram_epochs=2, freeze_backbone=False)
    start = frozen.base.model.state_dict()
    for made, same in ((frozen, True), (free, False)):
        weights = made.ours.model.backbone.model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in start.items()) is same
    again = tiny_run(ram_epochs=2, freeze_backbone=False)
    assert again.trained == []
    assert figures(again.record) == figures(free.record)


# ------------------------------------------------------------------ refusals before any data is read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "GRU4RecKG"}, ["backbone", "GRU4RecKG", "SASRec"]),
        ({"metrics": ["ItemCoverage"], "valid_metric": "ItemCoverage@10"}, ["metrics", "ItemCoverage"]),
        ({"eval_args": {"mode": "labeled"}}, ["eval_args", "labeled"]),
    ],
    ids=["backbone", "metrics", "labeled"],
)
def test_the_runner_refuses_before_it_looks_for_data(tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        run(tmp_path, dataset="nowhere", **options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("model", ["SASRec", "DuoRec", "BSARec", "GRU4Rec", "NARM", "BERT4Rec", "FEARec"])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_automatic_mixed_precision_trains(tiny_run, model, precision):
    """Layers give shorter numbers than the item table has."""
    made = tiny_run(model, enable_amp=True, softmax_precision=precision)
    figures = made.record["metrics"]["base"]["test"]["seen_kept"]
    assert all(0 <= value <= 1 for value in figures.values())
    assert all(torch.isfinite(weight).all() for weight in made.base.model.parameters())
