"""RecBole's models through the runner: the script that sweeps over them, and the page it wrote."""

from __future__ import annotations

import importlib
import json
import re

import pytest
from conftest import ROOT

DOCS = ROOT / "docs" / "recbole_models"


@pytest.fixture(scope="module")
def script():
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        return importlib.import_module("recbole_models")


@pytest.mark.parametrize(("model", "options"), [("NPE", {"embedding_size": 8}), ("RaCT", {"mlp_hidden_size": [16]})])
def test_a_model_trains_and_is_tested(script, workdir, model, options):
    script.write_cut(workdir, 20)
    result = script.run_model(model, workdir, workdir, {**options, "item_inter_num_interval": "[0,inf)"})
    assert result["seconds"] > 0
    assert 0 <= result["seen_kept"] <= result["seen_removed"] <= 1
    stages = sorted(workdir.glob(f"saved-*/{model}-*/model.safetensors"))
    assert len(stages) == (3 if model == "RaCT" else 1)
    assert not list(workdir.glob("saved-*/**/*.pth"))


def test_a_pre_training_stage_hands_its_weights_on_and_is_resumed(script, workdir):
    import torch

    from recbole_raserec.quick_start import run_recbole_raserec
    from recbole_raserec.storage.files import read_tensors

    script.write_cut(workdir, 20)
    common = {**script.COMMON, "data_path": str(workdir), "mlp_hidden_size": [16], "metrics_k": 5}
    common["item_inter_num_interval"] = "[0,inf)"
    # save_step is 10: three epochs never reach it, and what they learned is kept all the same
    first = {**common, "train_stage": "actor_pretrain", "pretrain_epochs": 3, "checkpoint_dir": "a"}

    def weights(folder):
        (path,) = workdir.glob(f"{folder}/RaCT-*/model.safetensors")
        return read_tensors(path)[0]

    record = run_recbole_raserec("RaCT", script.DATASET, config_dict=first, argv=[])
    actor = weights("a")
    assert run_recbole_raserec("RaCT", script.DATASET, config_dict=first, argv=[])["metrics"] == record["metrics"]
    assert all(torch.equal(actor[name], value) for name, value in weights("a").items())

    second = {**first, "train_stage": "critic_pretrain", "checkpoint_dir": "b"}
    second["pre_model_path"] = str(next(workdir.glob("a/RaCT-*")))
    run_recbole_raserec("RaCT", script.DATASET, config_dict=second, argv=[])
    critic = weights("b")
    frozen = [name for name in actor if name.startswith(("encoder", "decoder"))]
    assert frozen
    assert all(torch.equal(actor[name], critic[name]) for name in frozen)
    assert any(not torch.equal(actor[name], critic[name]) for name in actor if name.startswith("critic_net"))


def test_a_failure_is_a_row_of_the_table_and_is_tried_again(script, workdir, monkeypatch):
    settings = {"recbole": "1.2.1", "users": 20, "options": script.COMMON}
    monkeypatch.setattr(script, "write_cut", lambda directory, users: directory)  # so there is no data set
    results = script.sweep(["Pop"], settings, workdir / "t.json", workdir, 1, 120)
    assert not results["Pop"]["works"]
    assert results["Pop"]["error"].startswith("DatasetError")
    page = script.table(results, settings)
    assert "**0 of 1 work**" in page
    assert "| Pop | general | no |" in page
    assert script.known_results(workdir / "t.json", settings) == results
    assert script.known_results(workdir / "t.json", {**settings, "users": 21}) == {}


def test_the_page_lists_every_model(script):
    models = script.recbole_models()
    assert {"sequential", "general"} == set(models.values())
    assert {"SASRec", "S3Rec", "RaCT", "Random", "LightGCN"} <= set(models)

    page = DOCS.with_suffix(".md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (sequential|general) \| (yes|no) \|", page, re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == {**models, **script.OURS}
    assert len(rows) == len(models) + len(set(script.OURS) - set(models))

    figures = json.loads(DOCS.with_suffix(".json").read_text(encoding="utf-8"))
    assert {name: works == "yes" for name, _, works in rows} == {
        name: result["works"] for name, result in figures["models"].items()
    }
    assert page == script.table(figures["models"], figures["settings"])


def test_a_resumed_graph_model_forgets_the_embeddings_of_its_last_epoch(small_config):
    import torch

    from recbole_raserec.config import get_model
    from recbole_raserec.evaluation.protocols import evaluate
    from recbole_raserec.recommendation.stage import train_model
    from recbole_raserec.training.trainer import ResumableTrainer

    config = small_config("LightGCN")
    run = train_model(config)
    model = get_model("LightGCN")(config, run.splits.train._dataset)
    trainer = ResumableTrainer(config, model, run.directory, evaluate=None, protocol="")
    assert trainer.start_epoch == 2
    model.restore_user_e, model.restore_item_e = torch.ones(model.n_users, 64), torch.ones(model.n_items, 64)
    trainer.load_best()
    assert evaluate(model, run.splits.test, config, run.splits.seen["test"], decimals=6) == run.metrics["test"]
