"""Our models in RecBole's own functions: every way in, the figures of our runner, and RecBole untouched without us."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import os
import subprocess
import sys

import pytest
import recbole.evaluator.register as register
import recbole.quick_start
import torch
from conftest import random_log, write_log
from darec_helpers import small, tiny_llm, write_items
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.evaluator.base_metric import TopkMetric
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.trainer import Trainer
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.case_study import full_sort_scores, full_sort_topk

import recbole_raserec
from recbole_raserec.comparison.plan import Problems, parse_specs
from recbole_raserec.compat import registration
from recbole_raserec.config import get_trainer_class, model_versions, name_of, short_name, sources
from recbole_raserec.data import SequenceDataset
from recbole_raserec.errors import ConfigError
from recbole_raserec.plugin import ModelTrainer
from recbole_raserec.recommendation import wrap_backbone

SIZES = {"MAX_ITEM_LIST_LENGTH": 8, "hidden_size": 16, "inner_size": 16, "train_batch_size": 64, "epochs": 2}
OPTIONS = {**SIZES, "metric_decimal_place": 6, "show_progress": False, "use_gpu": False, "state": "INFO"}
STAGE = {"backbone": "SASRec", "ram_inner_size": 16, "ram_epochs": 2, "top_k": 4}
GROUPS = {"RaSeRec": STAGE}
#: What RecBole asks for with a softmax loss on a data set that it does not know.
THEIRS = {"train_neg_sample_args": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}


#: RecBole's, in no file for a class of the user's.
OF_SASREC = {
    "loss_type": "CE", "n_layers": 1, "n_heads": 2, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1,
    "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.02,
}  # fmt: skip


class OwnSASRec(recbole_raserec.SASRec):
    """A user's model, derived from ours."""


class PlainSASRec(RecBoleSASRec):
    """A user's model, derived from RecBole's."""


class DuoRec(RecBoleSASRec):
    """A user's model with the name of one of ours."""


@pytest.fixture
def log(workdir, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "-q", "positional"])
    write_log(workdir / "data", "tiny", random_log(0))
    return workdir


def options(model="SASRec", **more):
    return {**OPTIONS, "data_path": "data", **GROUPS.get(model, {}), **more}


def ours(model="SASRec", **more):
    """The test figures of our runner, seen items kept."""
    given = options(model, checkpoint_dir="runner", **more)
    record = recbole_raserec.run_recbole_raserec(model, "tiny", config_dict=given, argv=[])
    stages = record["metrics"].get("stages", record["metrics"])
    return list(stages.values())[-1]["test"]["seen_kept"]


def trained(model="SASRec", make=None, **more):
    """A trainer of RecBole's functions called by hand, after `fit`, and the loaders."""
    config = Config(model, "tiny", config_dict=options(model, **more))
    loaders = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    made = get_model(config["model"])(config, loaders[0]._dataset)
    trainer = (make or get_trainer(config["MODEL_TYPE"], config["model"]))(config, made)
    trainer.fit(loaders[0], loaders[1], verbose=False)
    return trainer, loaders


@pytest.mark.parametrize("model", ["SASRec", "DuoRec", "GRU4Rec", "RaSeRec"])
def test_run_recbole_gives_the_figures_of_our_runner(log, model):
    more = {"embedding_size": 16} if model == "GRU4Rec" else {}
    given = options(model, **more)
    if model == "GRU4Rec":
        del given["inner_size"]
    runner = recbole_raserec.run_recbole_raserec(
        model, "tiny", config_dict={**given, "checkpoint_dir": "runner"}, argv=[]
    )
    found = run_recbole(model, "tiny", config_dict=given)
    assert dict(found["test_result"]) == list(runner["metrics"].values())[-1]["test"]["seen_kept"]
    assert found["best_valid_score"] == found["best_valid_result"]["ndcg@10"]
    config, loaded, _, _, _, test = load_data_and_model(next(str(p) for p in (log / "saved").glob(f"{model}-*.pth")))
    assert type(loaded) is getattr(recbole_raserec, model)
    again = get_trainer(config["MODEL_TYPE"], config["model"])(config, loaded).evaluate(test, load_best_model=False)
    assert again == found["test_result"]


@pytest.mark.parametrize("model", ["SASRec", "RaSeRec"])
def test_load_data_and_model_reads_a_directory(log, model):
    figures = ours(model)
    path = next(path for path in (log / "runner").glob(f"{model}-tiny-*") if path.is_dir())
    config, loaded, dataset, train, valid, test = load_data_and_model(path)
    assert type(dataset) is SequenceDataset
    assert (len(train), len(valid)) == (2, 1)
    trainer = Trainer(config, loaded)
    assert trainer.evaluate(test, load_best_model=False) == figures
    users = dataset.token2id(dataset.uid_field, ["u1", "u2"])
    scores, items = full_sort_topk(users, loaded, test, k=5, device=config["device"])
    every = full_sort_scores(users, loaded, test, device=config["device"])
    assert bool((every.gather(1, items) == scores).all())


def test_trainers_made_by_hand(log):
    figures = ours()
    for make in (None, Trainer, recbole.trainer.SASRecTrainer):
        trainer, (_, _, test) = trained(make=make)
        assert type(trainer) is ModelTrainer
        assert trainer.evaluate(test) == figures
    file = trainer.saved_model_file
    trainer.resume_checkpoint(file)
    assert trainer.start_epoch > 0
    assert trainer.evaluate([]) is None


def test_weights_that_were_not_saved_are_those_validated(log):
    config = Config("SASRec", "tiny", config_dict=options(weight_averaging=0.9, epochs=1))
    train, valid, test = data_preparation(config, create_dataset(config))
    model = get_model("SASRec")(config, train._dataset)
    trainer = Trainer(config, model)
    _, best = trainer.fit(train, valid, verbose=False, saved=False)
    assert not list((log / "saved").glob("*.pth"))
    assert trainer.evaluate(valid, load_best_model=False) == best
    assert len(trainer.evaluate(test, load_best_model=False)) == len(best)


def test_names_and_classes(log, monkeypatch):
    config = Config("SASRec", "tiny", config_dict=options())
    assert type(config) is recbole_raserec.Config
    assert config.model_class is recbole_raserec.SASRec
    assert Config(recbole_raserec.RaSeRec, "tiny", config_dict=options("RaSeRec"))["backbone"] == "SASRec"
    assert Config(config_dict={**options(), "model": "BSARec", "dataset": "tiny"})["model"] == "BSARec"
    for name in ("RaSeRec", "DuoRec", "BSARec", "SASRec", "GRU4Rec", "NARM", "BERT4Rec", "FEARec"):
        assert get_model(name) is getattr(recbole_raserec, name)
    from recbole.model.sequential_recommender import DuoRec as named
    from recbole.model.sequential_recommender.raserec import RaSeRec

    assert (named, RaSeRec) == (recbole_raserec.DuoRec, recbole_raserec.RaSeRec)
    assert recbole.data.dataset.RaSeRecDataset is SequenceDataset
    entry = importlib.metadata.EntryPoint("Named", f"{__name__}:OwnSASRec", "recbole_raserec.models")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "entry_points", lambda group: [entry])
        assert get_model("Named") is OwnSASRec
        assert Config("Named", "tiny", config_dict=options()).model_class is OwnSASRec
    assert recbole.trainer.RaSeRecTrainer is ModelTrainer
    assert get_trainer_class(config) is Trainer  # in our own stages
    with pytest.raises(AttributeError, match="NoSuchDataset"):
        recbole.data.dataset.NoSuchDataset  # noqa: B018
    with pytest.raises(ImportError):
        from recbole.model.sequential_recommender import NoSuch  # noqa: F401
    with pytest.raises(ValueError, match="did you mean DuoRec"):
        get_model("DuoRek")  # RecBole misses lightgbm on its way
    with pytest.raises(ModuleNotFoundError, match="lightgbm"):
        get_model("LightGBM")
    with pytest.raises(ValueError, match="not a model of RecBole"):
        get_model("recbole:RaSeRec")


def test_the_log_says_once_whose_a_name_is(log, monkeypatch, caplog):
    monkeypatch.setattr(registration, "_NAMED", set())
    with caplog.at_level(logging.WARNING):
        get_model("SASRec")
    with caplog.at_level(logging.INFO):
        for name in ("SASRec", "SASRec", "RaSeRec", "recbole:SASRec", "BPR"):
            get_model(name)
    assert caplog.messages == ["SASRec is recbole_raserec's model; recbole:SASRec is RecBole's"]


def test_recbole_in_front_gives_recboles_class_in_its_functions(log):
    assert get_model("recbole:SASRec") is RecBoleSASRec
    config = Config("recbole:SASRec", "tiny", config_dict=options(**THEIRS))
    assert (type(config), config["model"], config.model_class) == (Config, "recbole:SASRec", RecBoleSASRec)
    assert config["n_layers"] == 2  # of RecBole's file
    assert Config("recbole:BPR", "tiny", config_dict=options())["model"] == "BPR"
    data = create_dataset(config)
    assert type(data) is SequentialDataset
    assert get_trainer(config["MODEL_TYPE"], config["model"]) is Trainer
    found = run_recbole("recbole:SASRec", "tiny", config_dict=options(**THEIRS))
    assert found["test_result"]
    file = next((log / "saved").glob("*SASRec-*.pth"))
    assert type(load_data_and_model(str(file))[1]) is RecBoleSASRec


def test_a_file_that_recbole_wrote_before_keeps_its_model(log):
    config = Config("recbole:SASRec", "tiny", config_dict=options(**THEIRS))
    train, _, _ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, RecBoleSASRec(config, train._dataset))
    config["model"] = "SASRec"  # what RecBole calls it without this package
    trainer._save_checkpoint(0)
    config, model, *_ = load_data_and_model(trainer.saved_model_file)
    assert (config["model"], type(model)) == ("recbole:SASRec", RecBoleSASRec)


def test_recbole_in_front_gives_recboles_class_in_our_runner(log):
    assert name_of(RecBoleSASRec) == "recbole:SASRec"
    assert name_of(recbole_raserec.SASRec) == "SASRec"
    assert short_name("recbole:SASRec") == "SASRec"
    assert model_versions("recbole:SASRec") != model_versions("SASRec")
    for given in ("recbole:SASRec", RecBoleSASRec, "recbole.model.sequential_recommender.sasrec:SASRec"):
        config = recbole_raserec.Config(given, "tiny", config_dict=options(), argv=[])
        assert (config["model"], config.model_class) == ("recbole:SASRec", RecBoleSASRec)
    config = recbole_raserec.Config(
        "RaSeRec", "tiny", config_dict=options("RaSeRec", backbone="recbole:SASRec"), argv=[]
    )
    assert config["backbone"] == "recbole:SASRec"
    specs = parse_specs("recbole:SASRec:epochs=2,RaSeRec:backbone=recbole:SASRec:top_k=4", Problems())
    assert [(spec.model, spec.options.get("backbone")) for spec in specs] == [
        ("recbole:SASRec", None), ("RaSeRec", "recbole:SASRec")
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="recbole:SASRek"):
        recbole_raserec.Config("recbole:SASRek", "tiny", config_dict=options(), argv=[])
    given = options("RaSeRec", backbone="recbole:SASRec", epochs=1, ram_epochs=1)
    record = recbole_raserec.run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])
    assert record["options"]["backbone"] == "recbole:SASRec"


def test_a_users_own_class_stays_recboles(log):
    for kind, name in ((PlainSASRec, "PlainSASRec"), (DuoRec, "recbole:DuoRec")):
        given = options(**THEIRS, **OF_SASREC)
        config = Config(kind, "tiny", config_dict=given)
        assert (type(config), config["model"]) == (Config, name)
        train, valid, test = data_preparation(config, create_dataset(config))
        assert type(train._dataset) is SequentialDataset
        trainer = Trainer(config, kind(config, train._dataset))
        assert type(trainer) is Trainer
        trainer.fit(train, valid, verbose=False)
        assert trainer.evaluate(test)


def test_a_users_class_derived_from_ours_is_ours(log):
    config = Config(OwnSASRec, "tiny", config_dict=options())
    assert (type(config), config["model"]) == (recbole_raserec.Config, f"{__name__}:OwnSASRec")
    found = run_recbole(OwnSASRec, "tiny", config_dict=options())
    assert dict(found["test_result"]) == ours(OwnSASRec)
    assert run_recbole(f"{__name__}:OwnSASRec", "tiny", config_dict=options()) == found


def test_options_that_a_model_does_not_read_are_named_and_left_out(log, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["script.py", "--params_file=space.hyper", "--learning_rate=0.005", "--quiet"])
    with caplog.at_level(logging.WARNING):
        config = Config("SASRec", "tiny", config_dict=options(mlp_hidden_size=[8], learning_rat=0.1))
    assert config["learning_rate"] == 0.005
    assert "params_file" not in config
    assert "mlp_hidden_size" not in config
    text = caplog.messages[-1]
    assert text.startswith("Options that SASRec does not read are left out.")
    assert "did you mean learning_rate?" in text
    assert "params_file" in text
    with pytest.raises(ConfigError, match="hidden_size"):  # a wrong value stays an error
        Config("SASRec", "tiny", config_dict=options(hidden_size="wide"))
    with pytest.raises(ConfigError, match="learning_rat"):
        recbole_raserec.Config("SASRec", "tiny", config_dict=options(learning_rat=0.1), argv=[])


def test_a_search_with_recboles_objective(log, monkeypatch):
    monkeypatch.setattr(recbole.quick_start.quick_start, "tune", type("Tune", (), {"report": lambda **_: None}))
    given = {**options(), "model": "SASRec", "dataset": "tiny"}
    found = [objective_function({**given, "learning_rate": rate}, saved=False) for rate in ("0.001", "0.01")]
    assert dict(found[0]["test_result"]) == ours() or found[0]["best_valid_result"]
    assert found[0]["best_valid_score"] != found[1]["best_valid_score"]


def test_a_loop_over_models_of_both(log):
    shared = options(n_layers=1, neg_sampling=None)
    for name in ("BSARec", "NARM", "BPR", "recbole:GRU4Rec"):
        more = {**THEIRS, "loss_type": "CE"} if "recbole" in name else {}
        assert run_recbole(name, "tiny", config_dict={**shared, **more, "epochs": 1}, saved=False)["test_result"]


@pytest.mark.parametrize("model", ["SASRec", "RaSeRec"])
def test_regeneration_is_a_stage_of_fit(log, model):
    more = {"regeneration": True, "regen_rows": "patterns", "regen_min_support": 2, "epochs": 1, "ram_epochs": 1}
    if model == "SASRec":
        del more["ram_epochs"]
    found = run_recbole(model, "tiny", config_dict=options(model, **more))
    assert dict(found["test_result"]) == ours(model, **more)


def test_darec(log):
    pytest.importorskip("transformers")
    write_items(log / "data")
    given = small(log / "data", tiny_llm(log), epochs=1, metric_decimal_place=6)
    runner = {**given, "checkpoint_dir": "runner"}
    record = recbole_raserec.run_recbole_raserec("DARec", "tiny", config_dict=runner, argv=[])
    found = run_recbole("DARec", "tiny", config_dict=given)
    assert dict(found["test_result"]) == record["metrics"]["base"]["test"]["seen_kept"]
    config, loaded, _, _, _, test = load_data_and_model(next(str(p) for p in (log / "data/saved").glob("DARec-*.pth")))
    assert Trainer(config, loaded).evaluate(test, load_best_model=False) == found["test_result"]


def test_raserec_over_a_backbone_that_is_given_or_loaded(log):
    ours(), ours("RaSeRec")
    path = next(path for path in (log / "runner").glob("SASRec-tiny-*") if path.is_dir())
    config, base, dataset, *_ = load_data_and_model(path)
    figures = {}
    for how in ("given", "loaded"):
        where = {"backbone_checkpoint": str(path)} if how == "loaded" else {}
        config = Config("RaSeRec", "tiny", config_dict=options("RaSeRec", checkpoint_dir=how, **where))
        train, valid, test = data_preparation(config, create_dataset(config))
        wrapped = wrap_backbone(copy.deepcopy(base), config, dataset) if how == "given" else None
        model = recbole_raserec.RaSeRec(config, train._dataset, wrapped)
        assert torch.equal(model.item_vectors(), base.item_embedding.weight[: dataset.item_num])
        trainer = Trainer(config, model)
        values = {}
        trainer.fit(train, valid, callback_fn=values.__setitem__)
        assert list(values) == [0, 1]
        figures[how] = trainer.evaluate(test)
    assert figures["given"] == figures["loaded"] == ours("RaSeRec")
    with pytest.raises(ValueError, match="RaSeRecTrainer"):
        recbole_raserec.RaSeRec(config, train._dataset).calculate_loss(next(iter(train)))
    with pytest.raises(ConfigError, match="data_preparation"):
        trainer.fit(torch.utils.data.DataLoader([1]))
    config["regeneration"] = True
    trainer.model.makes_backbone = False
    with pytest.raises(ConfigError, match="trains backbones of its own"):
        trainer.fit(train)


def test_several_processes_are_ours_to_start(log):
    config = Config("SASRec", "tiny", config_dict=options(nproc=2))
    with pytest.raises(ConfigError, match="recbole-raserec run --nproc=2"):
        data_preparation(config, create_dataset(config))


@pytest.mark.parametrize("need", ["rec.topk", "rec.items"])
def test_a_metric_in_recboles_registry(log, monkeypatch, need):
    class Share(TopkMetric):
        def __init__(self, config):
            super().__init__(config)

        def calculate_metric(self, dataobject):
            return {f"share@{k}": round(float(dataobject.get(need).shape[0]), 2) for k in self.topk}

    monkeypatch.setitem(register.metrics_dict, "share", Share)
    monkeypatch.setitem(register.metric_information, "share", [need])
    monkeypatch.setitem(register.metric_types, "share", Share.metric_type)
    found = run_recbole("SASRec", "tiny", config_dict=options(metrics=["NDCG", "Share"], topk=[10]), saved=False)
    assert found["test_result"]["share@10"] == 30
    assert 0 <= found["test_result"]["ndcg@10"] <= 1


def test_without_the_import_recbole_is_as_it_was(tmp_path):
    code = """
import numpy as np
for old, new in {"bool8": "bool_", "float_": "float64", "complex_": "complex128", "unicode_": "str_"}.items():
    vars(np).setdefault(old, getattr(np, new))
import sys, types
sys.modules.setdefault("ray", types.ModuleType("ray")).tune = None
import recbole.trainer, recbole.data.dataset
from recbole.config import Config
from recbole.utils import get_model, get_trainer
from recbole.quick_start import load_data_and_model
assert get_model("SASRec").__module__ == "recbole.model.sequential_recommender.sasrec"
assert get_trainer(None, "SASRec") is recbole.trainer.Trainer
for module, name in ((recbole.trainer, "RaSeRecTrainer"), (recbole.data.dataset, "RaSeRecDataset")):
    assert not hasattr(module, name)
for function in (get_model, load_data_and_model, Config.__init__, recbole.trainer.Trainer.__init__):
    assert "recbole_raserec" not in function.__code__.co_filename
assert not any(name.startswith("recbole_raserec") for name in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
