"""The options of distributed runs: how they are read, and what they are refused for."""

from __future__ import annotations

import pytest

from recbole_raserec.config.checks import check_run
from recbole_raserec.config.config import Config
from recbole_raserec.config.sources import parse_arguments
from recbole_raserec.distributed.launch import Layout, layout_of
from recbole_raserec.errors import ConfigError
from recbole_raserec.regeneration.stage import regenerate_dataset
from recbole_raserec.tuning.tune import tune_hyper_parameters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Layout()),
        ({"nproc": 1, "world_size": -1}, Layout()),
        ({"nproc": 3}, Layout(3, 3)),
        ({"nproc": 2, "world_size": 4, "ip": "10.0.0.1", "port": "29500", "group_offset": 2},
         Layout(2, 4, 2, "10.0.0.1", 29500)),
    ],
)  # fmt: skip
def test_the_options_are_read_as_recbole_reads_them(options, expected):
    assert layout_of(options) == expected


@pytest.mark.parametrize(
    ("model", "words", "parts"),
    [
        ("DuoRec", "--nproc=2", ["contrast: us_x", "contrast: none"]),
        ("RaSeRec", "--nproc=2 --backbone=DuoRec", ["contrast: us_x", "contrast: none"]),
        ("FEARec", "--nproc=2", ["FEARec chooses its delays", "leave nproc"]),
        ("BSARec", "--nproc=2 --contrast=un", ["contrast: un", "contrast: none"]),
        ("DARec", "--nproc=2", ["DARec reads texts for all", "leave nproc"]),
        ("S3Rec", "--nproc=2", ["S3RecTrainer"]),
        ("Pop", "--nproc=2", ["TraditionalTrainer"]),
        ("GRU4Rec", "--nproc=2 --learner=sparse_adam", ["learner: adam"]),
        ("GRU4Rec", "--nproc=2 --enable_scaler=True", ["enable_scaler: true"]),
        ("BPR", "--nproc=2 --train_neg_sample_args={'dynamic':True,'candidate_num':2}", ["dynamic: false"]),
        ("GRU4Rec", "--nproc=2 --world_size=1", ["world_size: 1", "nproc: 2"]),
        ("GRU4Rec", "--nproc=1 --group_offset=1", ["group_offset: 1", "world_size"]),
        ("GRU4Rec", "--nproc=0", ["nproc: 0"]),
        ("GRU4Rec", "--port=high", ["port: 'high'"]),
        ("GRU4Rec", "--local_rank=0", ["local_rank: 0", "set nproc"]),
        ("GRU4Rec", "--offset=1", ["offset: 1", "set group_offset"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_any_data_are_read(model, words, parts):
    with pytest.raises(ConfigError) as caught:
        check_run(Config(model, "nowhere", config_dict=parse_arguments(words.split())[0], argv=[]))
    assert len(caught.value.problems) == 1
    for part in parts:
        assert part in caught.value.problems[0]


def test_trials_of_a_search_run_in_one_process(tmp_path):
    with pytest.raises(ConfigError, match="nproc: 2 processes share a run"):
        tune_hyper_parameters("SASRec", "nowhere", str(tmp_path), argv=["--nproc=2"])


def test_a_data_set_is_regenerated_in_one_process(tmp_path):
    with pytest.raises(ConfigError, match="nproc: 2 processes share a training"):
        regenerate_dataset("nowhere", tmp_path, argv=["--nproc=2"])


def test_the_number_of_processes_is_part_of_what_decides_a_result():
    one, two, four = (
        Config("SASRec", "nowhere", config_dict=options, argv=[]).training_options()
        for options in ({"nproc": 1}, {"nproc": 2}, {"nproc": 1, "world_size": 2, "group_offset": 1, "port": 1234})
    )
    assert "world_size" not in one
    assert two == four == {**one, "world_size": 2}
