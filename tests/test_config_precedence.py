"""Which source of the configuration wins, and how the texts of a command line are read."""

from __future__ import annotations

import pytest
from config_helpers import only_problem, write
from recbole.config import Config as RecBoleConfig

from recbole_raserec.config import sources
from recbole_raserec.config.config import Config


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
    monkeypatch.setattr("recbole_raserec.config.config.PROPERTIES", tmp_path)
    config = Config("GRU4Rec", "mine", argv=["--MAX_ITEM_LIST_LENGTH=3"])
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
    assert sources.parse_value(text) == RecBoleConfig._convert_config_dict(None, {"key": text})["key"]


def test_texts_are_never_evaluated(tmp_path):
    target = tmp_path / "made"
    text = f"__import__('pathlib').Path({str(target)!r}).touch()"
    assert sources.parse_value(text) == text
    assert not target.exists()
    assert sources.parse_value("null") is None


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
