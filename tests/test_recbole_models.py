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


@pytest.mark.parametrize("model", ["GRU4RecF", "KSR", "SASRecCPR"])
def test_a_checkpoint_holds_what_the_model_reads(script, workdir, monkeypatch, model):
    import torch

    from recbole_raserec import Recommender, quick_start
    from recbole_raserec.errors import CheckpointError

    script.write_cut(workdir, 20)
    extra = {**script.EXTRA.get(model, {}), "item_inter_num_interval": "[0,inf)", "data_path": str(workdir)}
    stages = {}
    report = quick_start.report_stages
    monkeypatch.setattr(quick_start, "report_stages", lambda *given: stages.update(given[1]) or report(*given))
    record = quick_start.run_recbole_raserec(
        model, script.DATASET, config_dict={**script.COMMON, **extra, "state": "WARNING"}, argv=[]
    )
    (workdir / script.DATASET).rename(workdir / "gone")
    trained, loaded = stages["base"], Recommender.load(record["checkpoint"])
    batch = next(iter(trained.splits.test))[0]
    with torch.no_grad():
        assert torch.equal(loaded.model.full_sort_predict(batch), trained.model.eval().full_sort_predict(batch))
    history = loaded.items[1:6]
    found = loaded.recommend([history], k=3)[0]
    copy = loaded.save(workdir / "copy")
    assert Recommender.load(copy).recommend([history], k=3)[0] == found
    features = copy / "features.safetensors"
    assert features.is_file() == (model != "SASRecCPR")
    if features.is_file():
        features.write_bytes(features.read_bytes()[:-8] + b"12345678")
        with pytest.raises(CheckpointError, match=r"features\.safetensors"):
            Recommender.load(copy)


def test_models_that_score_pairs(tiny_run, tmp_path):
    import torch

    from recbole_raserec import Recommender
    from recbole_raserec.errors import CheckpointError

    rows = {"item": [f"i{n}\tk{n % 3}" for n in range(25)], "user": [f"u{n}\tsecret{n % 4}" for n in range(30)]}
    (tmp_path / "tiny").mkdir(exist_ok=True)
    for kind, lines in rows.items():
        text = "\n".join([f"{kind}_id:token\tkind_of_{kind}:token", *lines])
        (tmp_path / "tiny" / f"tiny.{kind}").write_text(text + "\n", encoding="utf-8")
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind_of_item"]}
    sizes = {"mlp_hidden_size": [8], "MAX_ITEM_LIST_LENGTH": 8}
    made = tiny_run("DIN", load_col=load, **sizes)
    loaded = Recommender.load(made.base.directory)
    batch = next(iter(made.base.splits.test))[0]
    with torch.no_grad():
        batch["item_id"] = torch.arange(len(batch)) % 25 + 1
        own = made.base.model.eval().predict(batch)
        assert torch.equal(loaded.model.predict(batch), own)
    assert len(loaded.recommend([["i1", "i2"], ["i3"]], k=4)[1]) == 4
    # attributes of users are personal: a checkpoint does not keep them, and a model that reads them cannot be rebuilt
    with_users = tiny_run("DIN", load_col={**load, "user": ["user_id", "kind_of_user"]}, **sizes)
    assert b"users." not in (with_users.base.directory / "features.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"reads attributes of users \(kind_of_user\), which are personal"):
        Recommender.load(with_users.base.directory)
    with pytest.raises(CheckpointError, match="reads sampled negative items beside a history"):
        Recommender.load(tiny_run("DIEN", **sizes).base.directory)


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
