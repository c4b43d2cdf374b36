from __future__ import annotations

import builtins
import copy
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import recbole
import recbole.model.general_recommender
import recbole.model.sequential_recommender
import yaml
from recbole.config import Config as RecBoleConfig
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.utils import InputType, ModelType

from recbole_raserec import option_sources, options, registry
from recbole_raserec.config import Config
from recbole_raserec.errors import ConfigError

RECBOLE = Path(recbole.__file__).parent
SHIPPED = sorted(option_sources.PROPERTIES.rglob("*.yaml"))
MODELS = sorted(
    name
    for package, base in (
        (recbole.model.general_recommender, GeneralRecommender),
        (recbole.model.sequential_recommender, SequentialRecommender),
    )
    for name, value in vars(package).items()
    if isinstance(value, type) and issubclass(value, base) and value.__module__.startswith(package.__name__ + ".")
)


def problems(model="RaSeRec", dataset="ml-100k", **arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config(model, dataset, **{"argv": [], **arguments})
    return caught.value.problems


def only_problem(**arguments) -> str:
    found = problems(**arguments)
    assert len(found) == 1, found
    return found[0]


def write(folder: Path, text: str, name: str = "options.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# ---------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_yaml_makes_a_configuration_and_holds_known_options(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = path.stem if path.parent.name == "model" else "RaSeRec"
    dataset = path.stem if path.parent.name == "dataset" else "ml-100k"
    # Given as the user's own file, every option in it passes the checks for unknown names and for values.
    config = Config(model, dataset, config_file_list=[path], argv=[])
    for name in content:
        assert config[name] is not None or content[name] is None


def test_shipped_files_are_those_promised():
    assert {path.relative_to(option_sources.PROPERTIES).as_posix() for path in SHIPPED} >= {
        "overall.yaml",
        *(f"model/{name}.yaml" for name in ("RaSeRec", "DuoRec", "SASRec")),
        *(f"dataset/amazon-{name}.yaml" for name in ("beauty", "toys-games", "sports-outdoors")),
        *(f"dataset/{name}.yaml" for name in ("ml-100k", "planted")),
    }


def test_every_option_of_the_retrieval_stage_has_a_default_and_a_rule():
    shipped = yaml.safe_load((option_sources.PROPERTIES / "model" / "RaSeRec.yaml").read_text(encoding="utf-8"))
    assert set(shipped) == set(options.RETRIEVAL)


def test_options_of_the_retrieval_stage_that_hide_one_of_a_backbone():
    keys = option_sources.model_keys()
    backbones = [name for name in keys if hasattr(recbole.model.sequential_recommender, name)]
    assert len(backbones) > 25
    hidden = {name: keys[name] & set(options.RETRIEVAL) for name in backbones}
    # Known: these two keep their own default in a RaSeRec run. Any other would need a new name here.
    assert {name: set(names) for name, names in hidden.items() if names} == {"DIEN": {"alpha"}, "FOSSIL": {"alpha"}}
    assert Config("RaSeRec", "ml-100k", argv=["--backbone=FOSSIL", "--alpha=0.9"]).for_backbone()["alpha"] == 0.6


@pytest.mark.parametrize("dataset", ["amazon-beauty", "amazon-toys-games", "amazon-sports-outdoors", "ml-100k"])
@pytest.mark.parametrize("model", ["RaSeRec", "SASRec", "BPR", "GRU4Rec"])
def test_protocol_of_the_published_data_sets(model, dataset):
    config = Config(model, dataset, argv=[])
    assert config["eval_args"] == {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": {"valid": "full", "test": "full"},
    }
    assert (config["metrics"], config["topk"]) == (["Recall", "NDCG"], [5, 10, 20])
    assert config["valid_metric"] == "NDCG@10"
    assert config["MAX_ITEM_LIST_LENGTH"] == 50
    assert config["user_inter_num_interval"] == config["item_inter_num_interval"] == "[5,inf)"
    assert config["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}


def test_yaml_reads_as_recbole_reads_it_but_safely(tmp_path):
    recbole_loader = RecBoleConfig._build_yaml_loader(None)
    files = [path for path in RECBOLE.glob("properties/**/*.yaml") if path.parent.name != "dataset"]
    assert len(files) > 80
    for path in [*files, *SHIPPED]:
        # Trusted files of the library and of this package: the loader that RecBole uses is the reference.
        expected = yaml.load(path.read_text(encoding="utf-8"), Loader=recbole_loader)
        assert option_sources.read_yaml(path) == (expected or {}), path
    evil = write(tmp_path, "seed: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in only_problem(config_file_list=[evil])


# ---------------------------------------------------------------------- RecBole's models


def test_all_models_of_recbole_are_tried():
    assert len(MODELS) > 60
    assert {"BPR", "LightGCN", "EASE", "SASRecF", "BERT4Rec", "RepeatNet", "DIEN"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_recbole_gets_a_configuration(name):
    config = Config(name, "ml-100k", argv=[])
    assert config["model"] == name
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    # All of its own options can be given by the user.
    path = RECBOLE / "properties" / "model" / f"{name}.yaml"
    if path.is_file() and name not in registry.MODELS:
        again = Config(name, "ml-100k", config_file_list=[path], argv=[])
        assert again.training_options() == config.training_options()


def test_negatives_only_where_a_model_learns_from_them():
    def sampled(model, **given):
        return Config(model, "ml-100k", config_dict=given, argv=[])["train_neg_sample_args"]["distribution"]

    assert [sampled(name) for name in ("SASRec", "GRU4Rec", "BERT4Rec", "RepeatNet", "RaSeRec")] == ["none"] * 5
    assert [sampled(name) for name in ("BPR", "FPMC", "TransRec", "NeuMF", "DIN")] == ["uniform"] * 5
    assert sampled("GRU4Rec", loss_type="BPR") == "uniform"
    assert Config("GRU4Rec", "ml-100k", config_dict={"loss_type": "BPR"}, argv=[])["MODEL_INPUT_TYPE"] == (
        InputType.PAIRWISE
    )


def test_models_that_read_features_load_them():
    assert "class" in Config("SASRecF", "ml-100k", argv=[])["load_col"]["item"]
    assert "class" in Config("RaSeRec", "ml-100k", argv=["--backbone=SASRecF"])["load_col"]["item"]


def test_model_class_and_context_model():
    from recbole.model.general_recommender import BPR

    assert Config(BPR, "ml-100k", argv=[])["model"] == "BPR"
    assert Config("FM", "ml-100k", argv=[])["metrics"] == ["AUC", "LogLoss"]


def test_keys_that_recbole_reads_are_all_known():
    known = option_sources.all_keys() | options.COMPUTED_KEYS | {"full"}  # "full" is an evaluation mode
    missing = {}
    for path in RECBOLE.rglob("*.py"):
        for key in option_sources.keys_in_source(path.read_text(encoding="utf-8")) - known:
            missing.setdefault(key, path.relative_to(RECBOLE))
    assert missing == {}


# ---------------------------------------------------------------------- precedence


def test_precedence(tmp_path):
    first = write(tmp_path, "top_k: 11\nalpha: 0.1\nbeta: 0.1\nseed: 1\n", "first.yaml")
    second = write(tmp_path, "top_k: 12\nalpha: 0.2\nbeta: 0.2\n", "second.yaml")
    config = Config(
        "RaSeRec",
        "ml-100k",
        config_file_list=[first, second],
        config_dict={"top_k": 13, "alpha": 0.3},
        argv=["--top_k=14"],
    )
    assert [config[name] for name in ("top_k", "alpha", "beta", "seed")] == [14, 0.3, 0.2, 1]
    assert config["train_batch_size"] == 512  # our model file, over RecBole's 2048
    assert config["eval_batch_size"] == 1024  # our overall file, over RecBole's 4096
    assert config["learner"] == "adam"  # RecBole's own


def test_dataset_file_is_over_overall_file_and_under_the_user(tmp_path, monkeypatch):
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset", "eval_batch_size: 7\nMAX_ITEM_LIST_LENGTH: 9\n", "mine.yaml")
    write(tmp_path, "eval_batch_size: 5\ntopk: [10]\n", "overall.yaml")
    monkeypatch.setattr("recbole_raserec.config.PROPERTIES", tmp_path)
    config = Config("GRU4Rec", "mine", argv=["--MAX_ITEM_LIST_LENGTH=3", "--valid_metric=MRR@10"])
    assert [config[name] for name in ("eval_batch_size", "MAX_ITEM_LIST_LENGTH", "topk")] == [7, 3, [10]]


def test_model_and_dataset_from_every_source(tmp_path):
    path = write(tmp_path, "model: SASRec\ndataset: planted\n")
    config = Config(config_file_list=[path], argv=[])
    assert (config["model"], config["dataset"]) == ("SASRec", "planted")
    config = Config(config_dict={"model": "DuoRec"}, argv=["--dataset=2019"])
    assert (config["model"], config["dataset"]) == ("DuoRec", "2019")


def test_config_files_of_the_command_line(tmp_path):
    one, two = write(tmp_path, "seed: 1\nalpha: 0.1\n", "1.yaml"), write(tmp_path, "seed: 2\n", "2.yaml")
    config = Config("RaSeRec", "ml-100k", argv=[f"--config_files={one} {two}"])
    assert (config["seed"], config["alpha"]) == (2, 0.1)
    assert f"'{tmp_path}/3.yaml' does not exist" in only_problem(argv=[f"--config_files={one} {tmp_path}/3.yaml"])
    assert "config_file_list" in only_problem(config_dict={"config_files": one})


def test_arguments_of_the_process_are_the_default(monkeypatch):
    monkeypatch.setattr("sys.argv", ["run.py", "--model=SASRec", "--dataset=planted", "--seed=5"])
    config = Config()
    assert (config["model"], config["dataset"], config["seed"]) == ("SASRec", "planted", 5)


@pytest.mark.parametrize(
    "text",
    [
        "3",
        "-3",
        "0.5",
        "1e-4",
        "None",
        "True",
        "true",
        "FALSE",
        "[1, 2]",
        "{'a': [0.8, .1]}",
        "'x y'",
        "(1,)",
        "1,2",
        "us_x",
        "amazon-beauty",
        "[5,inf)",
        "NDCG@10",
        "",
        "cos",
        "none",
        "saved/x",
        "{1}",
        "1_000",
    ],
)
def test_texts_parse_as_recbole_parses_them(text):
    assert option_sources.parse_value(text) == RecBoleConfig._convert_config_dict(None, {"key": text})["key"]


def test_texts_are_never_evaluated(tmp_path):
    target = tmp_path / "made"
    text = f"__import__('pathlib').Path({str(target)!r}).touch()"
    assert option_sources.parse_value(text) == text
    assert not target.exists()
    assert option_sources.parse_value("null") is None


def test_value_may_hold_an_equals_sign():
    assert Config("SASRec", "planted", argv=["--checkpoint_dir=a=b=c"])["checkpoint_dir"] == "a=b=c"


def test_nested_options_may_be_given_in_part(tmp_path):
    mine = {"mode": "uni100"}
    config = Config(
        "BPR", "ml-100k", config_dict={"eval_args": mine, "train_neg_sample_args": {"sample_num": 3}}, argv=[]
    )
    assert config["eval_args"]["split"] == {"LS": "valid_and_test"}
    assert config["eval_args"]["mode"] == {"valid": "uni100", "test": "uni100"}
    assert config["train_neg_sample_args"]["sample_num"] == 3
    assert config["train_neg_sample_args"]["distribution"] == "uniform"
    assert mine == {"mode": "uni100"}  # the caller's dictionary is left alone


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"alpha": 1.2}, ["alpha", "1.2", "[0, 1]", "0.5"]),
        ({"alpha": True}, ["alpha", "True", "number"]),
        ({"alpha": float("nan")}, ["alpha", "nan"]),
        ({"beta": -0.1}, ["beta", "-0.1", "[0, 1]"]),
        ({"top_k": 0}, ["top_k", "0", ">= 1", "20"]),
        ({"top_k": "abc"}, ["top_k", "'abc'", "integer"]),
        ({"top_k": 2.0}, ["top_k", "2.0", "integer"]),
        ({"attn_tau": 0}, ["attn_tau", "0", "> 0"]),
        ({"ram": "duel"}, ["ram", "'duel'", "did you mean dual?"]),
        ({"index": "hnsw"}, ["index", "'hnsw'", "flat", "auto"]),
        ({"ram_dropout": 1.0}, ["ram_dropout", "1.0", "[0, 1)"]),
        ({"ivf_probes": 129}, ["ivf_probes", "129", "ivf_lists: 128"]),
        ({"backbone": "SASRek"}, ["backbone", "'SASRek'", "did you mean SASRec?"]),
        ({"backbone": "BPR"}, ["backbone", "BPR", "sequential"]),
        ({"backbone": "RaSeRec"}, ["backbone", "RaSeRec", "choose SASRec"]),
        ({"backbone": 3}, ["backbone", "3", "not a model"]),
        ({"hidden_size": 65}, ["hidden_size: 65", "n_heads: 2", "ram_heads: 2", "hidden_size: 66"]),
        ({"backbone": "SASRec", "hidden_size": 66, "ram_heads": 4}, ["hidden_size: 66", "ram_heads: 4", "68"]),
        ({"ram_heads": 3}, ["hidden_size: 64", "ram_heads: 3"]),
        ({"backbone": "GRU4Rec", "embedding_size": 7}, ["embedding_size: 7", "ram_heads: 2"]),
        ({"ram_valid_metric": "NDCG@3"}, ["ram_valid_metric", "NDCG@3", "NDCG@5"]),
        ({"learnable_alpha": "yes"}, ["learnable_alpha", "'yes'", "true or false"]),
        ({"contrast": "usx"}, ["contrast", "'usx'", "did you mean us_x?"]),
        ({"tau": 0.0}, ["tau", "0.0", "> 0"]),
        ({"sim": "cosine"}, ["sim", "cos"]),
        ({"training": "pack"}, ["training", "packed"]),
        ({"learning_rate": 0}, ["learning_rate", "0", "> 0", "0.001"]),
        ({"epochs": 0}, ["epochs", "0", "100"]),
        ({"train_batch_size": -1}, ["train_batch_size", "-1"]),
        ({"eval_batch_size": 0}, ["eval_batch_size", "0"]),
        ({"stopping_step": -1}, ["stopping_step", "-1"]),
        ({"hidden_dropout_prob": 1}, ["hidden_dropout_prob", "[0, 1)"]),
        ({"attn_dropout_prob": -0.5}, ["attn_dropout_prob", "-0.5"]),
        ({"n_layers": 0}, ["n_layers", "0"]),
        ({"MAX_ITEM_LIST_LENGTH": 0}, ["MAX_ITEM_LIST_LENGTH", "0", "50"]),
        ({"seed": "x"}, ["seed", "'x'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"gpu_id": "cpu"}, ["gpu_id", "'cpu'"]),
        ({"device": "cpu"}, ["device", "gpu_id"]),
        ({"state": "LOUD"}, ["state", "LOUD", "info"]),
        ({"threads": 0}, ["threads", "0", "null"]),
        ({"user_inter_num_interval": "5,inf"}, ["user_inter_num_interval", "[5,inf)"]),
        ({"topk": [5, 0]}, ["topk", "[5, 0]"]),
        ({"topk": "ten"}, ["topk", "'ten'"]),
        ({"metrics": ["Recal"], "valid_metric": "Recal@10"}, ["metrics", "'Recal'", "recall"]),
        ({"metrics": ["NDCG", "AUC"]}, ["metrics", "ranking and value"]),
        ({"valid_metric": "MRR@10"}, ["valid_metric", "MRR@10", "Recall@10"]),
        ({"valid_metric": 3}, ["valid_metric", "3"]),
        ({"eval_args": "full"}, ["eval_args", "mapping"]),
        ({"eval_args": {"splt": {}}}, ["eval_args", "'splt'", "split"]),
        ({"eval_args": {"split": {"LS": "all"}}}, ["eval_args", "'all'", "valid_and_test"]),
        ({"eval_args": {"order": "XX"}}, ["eval_args", "'XX'", "TO"]),
        ({"eval_args": {"mode": "some"}}, ["eval_args", "'some'", "full"]),
        ({"train_neg_sample_args": {"distribution": "uniform"}}, ["train_neg_sample_args", "loss_type"]),
        ({"neg_sampling": {"uniform": 1}}, ["neg_sampling", "train_neg_sample_args"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_one_bad_value_is_one_problem_with_option_value_and_remedy(given, parts):
    problem = only_problem(config_dict=given)
    assert problem.split(":")[0] in {*given, "hidden_size"}
    for part in parts:
        assert part in problem, problem
    assert re.search(r"; \S", problem), f"no remedy in: {problem}"


def test_each_metric_to_stop_by_must_be_computed():
    found = problems(config_dict={"topk": [5]})
    assert [problem.split(":")[0] for problem in found] == ["valid_metric", "ram_valid_metric"]
    assert all("NDCG@10" in problem and "choose one of Recall@5, NDCG@5" in problem for problem in found)


@pytest.mark.parametrize(
    ("model", "name", "guess"),
    [
        ("RaSeRec", "alfa", "alpha"),
        ("RaSeRec", "topk_", "topk"),
        ("RaSeRec", "TOP_K", "top_k"),
        ("RaSeRec", "learning-rate", "learning_rate"),
        ("RaSeRec", "attn_tua", "attn_tau"),
        ("SASRec", "hiden_size", "hidden_size"),
        ("BPR", "embeding_size", "embedding_size"),
        ("GRU4Rec", "MAX_ITEM_LIST_LENGHT", "MAX_ITEM_LIST_LENGTH"),
    ],
)
def test_a_typo_anywhere_suggests_the_nearest_option(model, name, guess, tmp_path):
    path = write(tmp_path, f"{name}: 1\n")
    sources = {"config_file_list": [path]}, {"config_dict": {name: 1}}, {"argv": [f"--{name}=1"]}
    for source, where in zip(sources, (path, "config_dict", "command line")):
        problem = only_problem(model=model, **source)
        assert problem.startswith(f"{name}: 1 (")
        assert f"did you mean {guess}?" in problem
        assert where in problem


def test_options_of_other_models():
    problem = only_problem(model="BPR", config_dict={"n_layers": 2})
    assert "n_layers: 2" in problem
    assert "other models" in problem
    assert "remove" in problem
    assert "RaSeRec" in only_problem(model="SASRec", config_dict={"top_k": 3})
    assert "DuoRec" in only_problem(config_dict={"backbone": "SASRec", "lmd_sem": 0.3})
    assert (
        Config("RaSeRec", "ml-100k", config_dict={"backbone": "GRU4Rec", "num_layers": 3}, argv=[])["num_layers"] == 3
    )
    # FEARec reads an option that stands in none of RecBole's files.
    assert Config("FEARec", "ml-100k", config_dict={"use_filter": True}, argv=[])["use_filter"] is True
    assert "other models" in only_problem(model="SASRec", config_dict={"eta": 0.5})
    config = Config("SASRec", "ml-100k", config_dict={"eta": 0.5, "transform": "crop_itemseq"}, argv=[])
    assert config["eta"] == 0.5


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["alpha=0.3"], ["alpha=0.3", "--alpha=0.3"]),
        (["-alpha=0.3"], ["--alpha=0.3"]),
        (["--alpha"], ["--alpha", "--alpha=VALUE"]),
        (["--alpha", "0.3"], ["--alpha=0.3"]),
        (["--alpha", "--seed=1"], ["--alpha=VALUE"]),
        (["stray"], ["stray", "--name=value"]),
        (["--"], ["--"]),
        (["--=3"], ["--=3"]),
        (["--alpha=0.3", "--alpha=0.4"], ["alpha", "'0.3'", "'0.4'", "keep one"]),
    ],
)
def test_arguments_of_another_form(argv, parts):
    problem = only_problem(argv=argv)
    for part in parts:
        assert part in problem


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "not a mapping"),
        ("3: 4\n", "not a mapping"),
        ("\xff", "cannot be read"),
    ],
)
def test_broken_config_file(tmp_path, text, part):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    problem = only_problem(config_file_list=[str(path)])
    assert str(path) in problem
    assert part in problem


def test_config_file_missing_empty_or_a_folder(tmp_path):
    missing = str(tmp_path / "missing.yaml")
    problem = only_problem(config_file_list=[missing])
    assert missing in problem
    assert "does not exist" in problem
    assert "correct the path" in problem
    assert "cannot be read" in only_problem(config_file_list=[str(tmp_path)])
    assert Config("SASRec", "planted", config_file_list=[write(tmp_path, "# nothing\n")], argv=[])["seed"] == 2020


@pytest.mark.parametrize(
    ("model", "guess"),
    [("RaseRec", "RaSeRec"), ("DuoRek", "DuoRec"), ("sasrec", "SASRec"), ("LightGNC", "LightGCN"), ("Randm", "Random")],
)
def test_unknown_model(model, guess):
    problem = only_problem(model=model)
    assert problem.startswith("model: ")
    assert model in problem
    assert f"did you mean {guess}?" in problem
    assert f"did you mean {guess}?" in only_problem(model=None, argv=[f"--model={model}"])


@pytest.mark.parametrize("model", ["a.b", "", "../x", 7, "zzzzzzzz"])
def test_name_that_is_no_model(model):
    assert "choose RaSeRec" in only_problem(model=model)


def test_model_that_cannot_be_imported(monkeypatch):
    def broken(name):
        raise ImportError("No module named 'boosting'")

    monkeypatch.setattr(registry, "get_model", broken)
    assert "No module named 'boosting'" in only_problem(model="LightGBM")
    assert "did you mean SASRec?" in only_problem(model="SASRek")


def test_model_and_data_set_not_given():
    found = problems(model=None, dataset=None, argv=["--alpha=7", "--tpo_k=3"])
    assert [problem.split(":")[0] for problem in found] == ["model", "dataset", "tpo_k"]
    assert "data_path" in only_problem(dataset="../elsewhere")
    assert "data_path" in only_problem(dataset="..")


def test_all_problems_come_at_once_and_before_any_data_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "planted"
    folder.mkdir(parents=True)
    write(folder, "not an atomic file", "planted.inter")
    opened = []
    real_open = builtins.open

    def watched(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)
    bad = write(tmp_path, "alpha: 1.2\nhiden_size: 3\n")
    opened.clear()
    found = problems(
        dataset="planted",
        config_file_list=[bad, str(tmp_path / "none.yaml")],
        config_dict={"top_k": 0, "hidden_size": 65},
        argv=["--backbone=DuoRec", "--sim=cosin", f"--data_path={tmp_path / 'data'}", "stray"],
    )
    wanted = ["none.yaml", "stray", "hiden_size", "alpha", "top_k", "sim", "hidden_size: 65"]
    assert len(found) == len(wanted)
    for part in wanted:
        assert any(part in problem for problem in found), (part, found)
    assert bad in opened
    assert not any(path.endswith(".inter") for path in opened)
    with pytest.raises(ConfigError, match="7 problems"):
        raise ConfigError(found)


def test_unknown_model_does_not_hide_other_problems():
    found = problems(model="RaseRec", config_dict={"alpha": 1.2, "tpo_k": 1, "learning_rate": -1})
    assert {problem.split(":")[0] for problem in found} == {"model", "alpha", "tpo_k", "learning_rate"}


def test_what_recbole_alone_refuses_is_a_config_error():
    problem = only_problem(model="SASRec", config_dict={"repeatable": False})
    assert "repeatable" in problem


# ---------------------------------------------------------------------- what is derived


def test_recbole_keeps_its_copy_of_ml_100k_unless_the_user_has_one(tmp_path):
    embedded = Config("SASRec", "ml-100k", argv=[])["data_path"]
    assert os.path.isfile(os.path.join(embedded, "ml-100k.inter"))
    assert Config("SASRec", "ml-100k", argv=[f"--data_path={tmp_path}"])["data_path"] == embedded
    (tmp_path / "ml-100k").mkdir()
    write(tmp_path / "ml-100k", "", "ml-100k.inter")
    assert Config("SASRec", "ml-100k", argv=[f"--data_path={tmp_path}"])["data_path"] == str(tmp_path / "ml-100k")
    assert Config("SASRec", "planted", argv=["--data_path=x"])["data_path"] == os.path.join("x", "planted")


def test_use_gpu_false_means_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("recbole_raserec.config._VISIBLE_DEVICES", None)
    assert Config("SASRec", "planted", argv=[])["device"].type == "cuda"
    assert Config("SASRec", "planted", argv=["--use_gpu=false"])["device"].type == "cpu"
    assert Config("SASRec", "planted", argv=["--gpu_id="])["device"].type == "cpu"
    assert Config("SASRec", "planted", config_dict={"gpu_id": [0, 1]}, argv=[])["gpu_id"] == "0,1"


def test_devices_chosen_in_the_environment_stay_chosen(monkeypatch):
    monkeypatch.setattr("recbole_raserec.config._VISIBLE_DEVICES", "3")
    assert Config("SASRec", "planted", argv=[])["gpu_id"] == "3"
    assert Config("SASRec", "planted", argv=["--gpu_id=1"])["gpu_id"] == "1"


@pytest.fixture(autouse=True)
def _keep_visible_devices(monkeypatch):
    # RecBole writes the variable at every configuration; it must not leak from these tests.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def test_copies_missing_options_and_texts():
    config = Config("RaSeRec", "ml-100k", argv=["--alpha=1", "--topk=5,10"])
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.explain() == config.explain()
        twin["eval_args"]["order"] = "RO"
        assert config["eval_args"]["order"] == "TO"
    assert config["missing"] is None
    assert "missing" not in config
    assert isinstance(config["alpha"], float)  # 1 and 1.0 are one configuration
    assert config["topk"] == [5, 10]
    assert "alpha" in str(config)


def test_explain_is_json():
    config = Config("RaSeRec", "ml-100k", argv=["--gpu_id=0,1"])
    explained = json.loads(json.dumps(config.explain()))
    assert explained == config.explain()
    assert explained["MODEL_TYPE"] == "SEQUENTIAL"
    assert explained["alpha"] == 0.5


def test_recbole_lists_of_arguments_do_not_grow():
    from recbole.utils import dataset_arguments

    before = list(dataset_arguments)
    Config("SASRec", "ml-100k", argv=[])
    assert dataset_arguments == before


# ---------------------------------------------------------------------- the backbone and fingerprints


@pytest.mark.parametrize("backbone", ["DuoRec", "SASRec", "GRU4Rec", "BERT4Rec", "FEARec", "FPMC"])
def test_configuration_of_the_backbone_is_that_of_a_run_of_its_own(backbone):
    shared = ["--seed=7", "--checkpoint_dir='1'", "--learning_rate=0.01"]
    config = Config("RaSeRec", "amazon-beauty", argv=[*shared, f"--backbone={backbone}", "--top_k=3", "--alpha=0.9"])
    alone = Config(backbone, "amazon-beauty", argv=shared)
    assert config.for_backbone().explain() == alone.explain()
    assert config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    assert not set(options.RETRIEVAL) & set(config.for_backbone().explain())


def test_backbone_may_learn_by_another_loss_than_the_retrieval_stage():
    config = Config("RaSeRec", "ml-100k", argv=["--backbone=SASRec", "--loss_type=BPR"])
    assert (config["loss_type"], config["train_neg_sample_args"]["distribution"]) == ("CE", "none")
    backbone = config.for_backbone()
    assert (backbone["loss_type"], backbone["train_neg_sample_args"]["distribution"]) == ("BPR", "uniform")


def test_only_a_model_with_a_backbone_has_one():
    with pytest.raises(ValueError, match="no backbone"):
        Config("SASRec", "ml-100k", argv=[]).for_backbone()


CHANGES = {
    "backbone_checkpoint": "x",
    "freeze_backbone": False,
    "memory_min_length": 2,
    "memory_refresh": 2,
    "top_k": 5,
    "similarity": "dot",
    "index": "flat",
    "ivf_lists": 64,
    "ivf_probes": 4,
    "ram": "single",
    "alpha": 0.25,
    "learnable_alpha": True,
    "beta": 0.5,
    "attn_tau": 2.0,
    "ram_heads": 1,
    "ram_inner_size": 128,
    "ram_dropout": 0.1,
    "ram_learning_rate": 0.01,
    "ram_weight_averaging": 0.9,
    "ram_train_batch_size": 8,
    "ram_epochs": 3,
    "ram_stopping_step": 1,
    "ram_valid_metric": "Recall@10",
}


def test_every_option_of_the_retrieval_stage_is_tried_below():
    # memory has one choice so far; backbone is the backbone.
    assert set(CHANGES) == set(options.RETRIEVAL) - {"memory", "backbone"}


@pytest.mark.parametrize("name", CHANGES)
def test_options_of_the_retrieval_stage_leave_the_backbone_alone(name):
    before, after = (Config("RaSeRec", "ml-100k", config_dict=given, argv=[]) for given in ({}, {name: CHANGES[name]}))
    assert before.for_backbone().training_options() == after.for_backbone().training_options()
    changed = before.training_options() != after.training_options()
    assert changed == (name != "backbone_checkpoint")  # a path: its content counts, not its name


@pytest.mark.parametrize(
    "given",
    [
        {"learning_rate": 0.01},
        {"seed": 1},
        {"hidden_size": 32},
        {"valid_metric": "Recall@10"},
        {"tau": 0.5},
        {"MAX_ITEM_LIST_LENGTH": 10},
        {"eval_args": {"mode": {"valid": "uni100", "test": "full"}}},
        {"n_layers": 1},
    ],
)
def test_options_that_decide_the_weights_decide_the_fingerprint(given):
    before, after = (Config("RaSeRec", "ml-100k", config_dict=options, argv=[]) for options in ({}, given))
    assert before.training_options() != after.training_options()
    assert before.for_backbone().training_options() != after.for_backbone().training_options()


@pytest.mark.parametrize(
    "given",
    [
        {"checkpoint_dir": "x"},
        {"show_progress": False},
        {"eval_batch_size": 3},
        {"eval_memory_mb": 64},
        {"topk": [10]},
        {"use_gpu": False},
        {"metrics": ["NDCG"]},
        {"result_file": "r.json"},
        {"resume": False},
        {"threads": 1},
        {"gpu_id": "1"},
        {"data_path": "x"},
        {"state": "DEBUG"},
        {"eval_args": {"mode": {"valid": "full", "test": "uni100"}}},
        {"learning_rate": 0.001},
        {"lmd": 0.1},
    ],
    ids=str,
)
def test_options_that_do_not_decide_the_weights_leave_the_fingerprint(given):
    before, after = (Config("DuoRec", "planted", config_dict=options, argv=[]) for options in ({}, given))
    assert json.dumps(before.training_options()) == json.dumps(after.training_options())
