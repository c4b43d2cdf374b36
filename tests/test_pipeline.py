"""The runner, in one process: what a run returns, prints and leaves behind, and what it takes up again."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import recbole
import torch
import yaml
from conftest import ROOT, random_log, write_log

from recbole_raserec import quick_start
from recbole_raserec.config import Config
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.evaluation.protocols import PROTOCOLS
from recbole_raserec.evaluation.report import PROTOCOL_TITLES
from recbole_raserec.option_sources import keys_read_by
from recbole_raserec.recommendation.trainer import ResumableTrainer
from recbole_raserec.registry import get_model

METRICS = {f"{metric}@{k}" for metric in ("recall", "ndcg") for k in (5, 10, 20)}

#: The run most tests share: a few seconds, and long enough for retrieval to pay.
PLANTED = {
    "backbone": "SASRec",
    "training": "packed",
    "native_kernels": False,  # figures are to be the same on every processor
    "softmax_precision": "float32",
    "hidden_size": 32,
    "inner_size": 64,
    "hidden_dropout_prob": 0.2,
    "attn_dropout_prob": 0.2,
    "learning_rate": 0.005,
    "epochs": 6,
    "ram_inner_size": 64,
    "ram_dropout": 0.2,
    "ram_learning_rate": 0.003,
    "ram_epochs": 4,
    "alpha": 0.2,
}

#: One epoch of everything on a log of 30 users.
TINY = {
    "backbone": "SASRec",
    "MAX_ITEM_LIST_LENGTH": 8,
    "ram_inner_size": 16,
    "train_batch_size": 64,
    "epochs": 1,
    "ram_epochs": 1,
    "top_k": 5,
}
SIZES = {"hidden_size": 16, "inner_size": 16, "embedding_size": 16}


def small(model):
    """Those of :data:`SIZES` that the model reads; the others would be refused."""
    return {name: size for name, size in SIZES.items() if name in keys_read_by(get_model(model))}


def run(directory, model="RaSeRec", dataset="planted", **options):
    """A run below `directory`: `record`, the text it `printed`, the epochs it `trained` by model, `base` and `ours`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = {"trained": []}
    report, train_epoch = quick_start._report, ResumableTrainer._train_epoch

    def reporting(config, stages, data, seconds):
        base, *more = stages.values()
        kept.update(base=base, ours=more[-1] if more else None, stages=stages, data=data)
        return report(config, stages, data, seconds)

    def training(self, data, epoch_idx, *args, **kwargs):
        kept["trained"].append((self.config["model"], epoch_idx))
        return train_epoch(self, data, epoch_idx, *args, **kwargs)

    printed = io.StringIO()
    options = {"show_progress": False, "state": "WARNING", "data_path": str(ROOT / "dataset"), **options}
    before = os.getcwd()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(quick_start, "_report", reporting)
        patch.setattr(ResumableTrainer, "_train_epoch", training)
        os.chdir(directory)
        try:
            record = quick_start.run_recbole_raserec(model, dataset, config_dict=options, argv=[])
            for outcome in filter(None, (kept["base"], kept["ours"])):
                outcome.directory = outcome.directory.resolve()
        finally:
            os.chdir(before)
    return SimpleNamespace(record=record, printed=printed.getvalue(), saved=directory / "saved", **kept)


@cache
def shared_run(directory: Path):
    """The run of :data:`PLANTED`, once a session."""
    return run(directory, **PLANTED, result_file="result.json")


@pytest.fixture(scope="session")
def planted_run(tmp_path_factory):
    # base temp + fixed name: the fixture is imported by other files too, and they share one run
    return shared_run(tmp_path_factory.getbasetemp() / "planted-run")


@pytest.fixture
def planted_copy(planted_run, tmp_path):
    """A directory in which the shared run has already taken place."""
    shutil.copytree(planted_run.saved, tmp_path / "saved")
    return tmp_path


@pytest.fixture
def tiny_run(tmp_path):
    """Factory of runs on a generated log, all below one directory."""
    write_log(tmp_path, "tiny", random_log(0))

    def build(model="RaSeRec", **options):
        reader = options.get("backbone", TINY["backbone"]) if model == "RaSeRec" else model
        given = {**(TINY if model == "RaSeRec" else {"epochs": 1}), **small(reader), **options}
        return run(tmp_path, model, "tiny", data_path=str(tmp_path), **given)

    return build


def figures(record):
    """Base and ours, every metric of both protocols."""
    return record["metrics"]


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
        (None, {"hidden_size": 32}, ["model.safetensors", "does not fit"]),
        (damaged, {}, ["model.safetensors", "not a readable"]),
        (shutil.rmtree, {}, ["not a checkpoint directory", "checkpoint.json"]),
        (lambda path: (path / "ids.json").unlink(), {}, ["ids.json", "does not exist"]),
    ],
    ids=["other-model", "other-vocabulary", "other-size", "damaged", "missing", "no-ids"],
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
    assert [title for title in PROTOCOL_TITLES.values() if title in first.printed] == list(PROTOCOL_TITLES.values())
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
        ({"backbone": "GRU4RecF"}, ["backbone", "GRU4RecF", "SASRec"]),
        ({"metrics": ["ItemCoverage"], "valid_metric": "ItemCoverage@10"}, ["metrics", "ItemCoverage"]),
        ({"eval_args": {"mode": "uni100"}}, ["eval_args", "uni100"]),
    ],
    ids=["backbone", "metrics", "sampled"],
)
def test_the_runner_refuses_before_it_looks_for_data(tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        run(tmp_path, dataset="nowhere", **options)
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------ every shipped YAML file


@pytest.mark.parametrize("path", sorted((ROOT / "properties" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_loads_and_runs(tiny_run, path):
    if path.stem == "DARec":
        pytest.importorskip("transformers", reason="needs the extra llm")
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    made = tiny_run(path.stem, **({"backbone": options["backbone"]} if "backbone" in options else {}))
    given = {*TINY, *SIZES}
    used = made.record["options"]
    assert {key: used[key] for key in options if key not in given} == {
        key: value if not key.endswith("_eps") else float(value) for key, value in options.items() if key not in given
    }
    assert all(math.isfinite(v) for v in figures(made.record)["base"]["test"]["seen_kept"].values())


def stand_in(directory, name):
    """Generated histories under a data set's name, with a user and an item too rare for a 5-core."""
    rows = random_log(3, users=60, items=30, longest=20)
    rows += [(900, item, 2000 + item) for item in range(4)] + [(0, 900, 5000)]
    write_log(directory, name, rows)


def ml_100k_cut(directory):
    """The first hundred users of RecBole's own copy."""
    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.inter"
    head, *lines = source.read_text(encoding="utf-8").splitlines()
    path = directory / "ml-100k" / "ml-100k.inter"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([head, *(line for line in lines if int(line.split("\t")[0]) <= 100)]) + "\n")


@pytest.mark.parametrize("path", sorted((ROOT / "properties" / "dataset").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_data_set_file_loads_and_runs(tmp_path, path):
    name = path.stem
    if name == "ml-100k":
        ml_100k_cut(tmp_path)
    elif name != "planted":
        stand_in(tmp_path, name)
    where = ROOT / "dataset" if name == "planted" else tmp_path
    sizes = {key: TINY[key] for key in ("ram_inner_size", "epochs", "ram_epochs")}
    options = {**sizes, **small("SASRec"), "backbone": "SASRec", "train_batch_size": 2048}
    made = run(tmp_path, dataset=name, data_path=str(where), **options)
    expected = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {key: made.record["options"][key] for key in expected} == expected
    vocabulary = made.base.splits.vocabulary()
    if "user_inter_num_interval" in expected:
        assert "u900" not in vocabulary["users"]
        assert "i900" not in vocabulary["items"]
        offsets = made.base.splits.dataset.store.offsets
        assert (offsets[2:] - offsets[1:-1]).min() >= 5
    assert len(vocabulary["users"]) > 50
    for who in ("base", "ours"):
        assert 0 < figures(made.record)[who]["test"]["seen_removed"]["recall@20"] < 1


def test_the_overall_file_is_what_a_run_starts_from(small_config):
    overall = yaml.safe_load((ROOT / "properties" / "overall.yaml").read_text(encoding="utf-8"))
    config = small_config("SASRec")
    changed = {"data_path", "checkpoint_dir", "show_progress", "MAX_ITEM_LIST_LENGTH"}  # by the fixture
    assert isinstance(config, Config)
    for key, value in overall.items():
        if key not in changed:
            assert config[key] == value, key
