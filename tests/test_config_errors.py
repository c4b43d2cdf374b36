"""Every wrong option is told with its value and the remedy, all at once."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest
import recbole
import recbole.model.general_recommender
import recbole.model.sequential_recommender
from config_helpers import only_problem, problems, write
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender

from recbole_raserec.config import sources
from recbole_raserec.config.config import Config
from recbole_raserec.errors import ConfigError

RECBOLE = Path(recbole.__file__).parent
SHIPPED = sorted(path for path in sources.PROPERTIES.rglob("*.yaml") if path.parent.name != "tune")
MODELS = sorted(
    name
    for package, base in (
        (recbole.model.general_recommender, GeneralRecommender),
        (recbole.model.sequential_recommender, SequentialRecommender),
    )
    for name, value in vars(package).items()
    if isinstance(value, type) and issubclass(value, base) and value.__module__.startswith(package.__name__ + ".")
)


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
        ({"index": "tree"}, ["index", "'tree'", "flat", "auto"]),
        ({"memory": "pattern"}, ["memory", "'pattern'", "did you mean patterns?"]),
        ({"memory_max_length": 2, "memory_min_length": 3}, ["memory_max_length", "2", "memory_min_length: 3"]),
        ({"memory": "both", "memory_min_length": 6, "memory_span": 6}, ["memory_span", "6", "7"]),
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
        ({"backbone": "NARM", "dropout_probs": 0.5}, ["dropout_probs", "0.5", "two numbers in [0, 1)", "[0.25, 0.5]"]),
        ({"backbone": "NARM", "dropout_probs": [0.5, 1]}, ["dropout_probs", "[0.5, 1]"]),
        ({"backbone": "FEARec", "global_ratio": 0}, ["global_ratio", "0", "(0, 1]"]),
        ({"backbone": "FEARec", "contrast": "x"}, ["contrast", "'x'", "none"]),
        ({"backbone": "FEARec", "topk_factor": 0.2}, ["topk_factor: 0.2", "= 0 delays", "LENGTH: 50"]),
        ({"backbone": "FEARec", "topk_factor": 13.1}, ["topk_factor: 13.1", "= 51 delays", "at most 50"]),
        ({"backbone": "FEARec", "n_layers": 1}, ["n_layers: 1", "2 or more"]),
        ({"backbone": "FEARec", "use_filter": True}, ["use_filter: true", "leave it out"]),
        ({"backbone": "FEARec", "loss_type": "ce"}, ["loss_type", "'ce'", "CE"]),
        ({"backbone": "BERT4Rec", "mask_ratio": 1.5}, ["mask_ratio", "1.5", "(0, 1]"]),
        (
            {"backbone": "BERT4Rec", "mask_ratio": 0.01},
            ["mask_ratio: 0.01", "LENGTH: 50", "0.02 or more"],
        ),
        ({"backbone": "BERT4Rec", "ft_ratio": 2}, ["ft_ratio", "2", "[0, 1]"]),
        ({"backbone": "BERT4Rec", "transform": None}, ["transform", "mask_itemseq"]),
        ({"backbone": "BERT4Rec", "loss_type": "x"}, ["loss_type", "'x'", "BPR"]),
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
        ({"user_inter_num_interval": [5, "x"]}, ["user_inter_num_interval", "[5,inf)"]),
        ({"user_inter_num_interval": "5,inf"}, ["user_inter_num_interval", "[5,inf)"]),
        ({"topk": [5, 0]}, ["topk", "[5, 0]"]),
        ({"topk": "ten"}, ["topk", "'ten'"]),
        ({"metrics": ["Recal"], "valid_metric": "Recal@10"}, ["metrics", "'Recal'", "recall"]),
        ({"metrics": ["NDCG", "AUC"]}, ["metrics", "ranking and value"]),
        ({"metrics": ["AUC"], "valid_metric": "AUC", "ram_valid_metric": "AUC"}, ["metrics", "AUC", "uni100"]),
        ({"metrics": ["NDCG", "GAUC"], "valid_metric": "GAUC@10"}, ["valid_metric", "one of GAUC, NDCG"]),
        ({"metrics": ["NDCG", "GiniIndex"], "valid_metric": "GiniIndex@10"}, ["valid_metric", "smaller"]),
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
    assert Config("FEARec", "ml-100k", config_dict={"use_filter": False}, argv=[])["use_filter"] is False
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
    def broken(name, find=sources.get_model):
        if name in sources.MODELS:
            return find(name)
        raise ImportError("No module named 'boosting'")

    monkeypatch.setattr(sources, "get_model", broken)
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
