"""Files of stage i: stored, read by RecBole alone, refused where they do not fit; options that do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import random_log, write_log
from pipeline_helpers import run
from regeneration_helpers import QUICK

from recbole_raserec.config.config import Config
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.data.splits import prepare_data
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.recommendation.stage import train_model
from recbole_raserec.regeneration.stage import regenerate, regenerate_dataset


def test_stored_and_read_again(tmp_path):
    data = Regenerated(
        np.array([3, 4, 5, 1, 2]), np.array([0, 3, 5]), np.array([0, 2]), np.array([1, 2], np.uint8),
        np.array([1, 0.5, 0.25, 1, 2], np.float32),
    )  # fmt: skip
    data.save(tmp_path, "mark")
    again = Regenerated.load(tmp_path, 3, 6, "mark")
    for name in ("items", "offsets", "users", "origin", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    with pytest.raises(CheckpointError, match="other data or options"):
        Regenerated.load(tmp_path, 3, 6, "another")
    for users, items in ((2, 6), (3, 5)):
        with pytest.raises(CheckpointError, match="users and items"):
            Regenerated.load(tmp_path, users, items)


BROKEN = {
    "offsets that fall": {"offsets": np.array([0, 6, 5])},
    "an empty sequence": {"offsets": np.array([0, 0, 5])},
    "offsets too short": {"offsets": np.array([0, 5])},
    "the padding item": {"items": np.array([3, 4, 0, 1, 2])},
    "an unknown origin": {"origin": np.array([1, 7], np.uint8)},
    "a negative user": {"users": np.array([0, -1])},
    "weights of another length": {"weights": np.ones(3, np.float32)},
    "weights not finite": {"weights": np.full(5, np.nan, np.float32)},
}


@pytest.mark.parametrize("harm", BROKEN)
def test_unfit_arrays_are_refused(tmp_path, harm):
    sound = {
        "items": np.array([3, 4, 5, 1, 2]), "offsets": np.array([0, 3, 5]), "users": np.array([0, 2]),
        "origin": np.array([1, 2], np.uint8),
    }  # fmt: skip
    Regenerated(**{**sound, **BROKEN[harm]}).save(tmp_path, "mark")
    with pytest.raises(CheckpointError, match="does not hold sequences"):
        Regenerated.load(tmp_path, 3, 6)


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"regeneration: True, but BPR reads no sequences"):
        Config("BPR", "tiny", config_dict={"regeneration": True}, argv=[])
    with pytest.raises(ConfigError, match=r"regen_gamma: 1.5.*\n.*regen_span: 1|regen_span: 1.*\n.*regen_gamma: 1.5"):
        Config("SASRec", "tiny", config_dict={"regen_gamma": 1.5, "regen_span": 1}, argv=[])
    with pytest.raises(ConfigError, match="backbone_checkpoint: x was trained already"):
        run(tmp_path, "RaSeRec", regeneration=True, backbone_checkpoint="x")


def test_a_log_without_patterns(small_config):
    log = [(user, 10 * user + k, k) for user in range(5) for k in range(5)]
    with pytest.raises(DatasetError, match=r"no pattern within 5 items occurs in 2 of the 5 training sequences"):
        regenerate(small_config("SASRec", log=log, **QUICK, regen_pretrained=False))


def test_recbole_alone_loads_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "tiny", random_log(0))
    options = {**QUICK, "data_path": str(tmp_path), "MAX_ITEM_LIST_LENGTH": 8, "show_progress": False}
    folder = regenerate_dataset("tiny", tmp_path, config_dict=options, argv=[])
    assert folder == tmp_path / "tiny-regenerated"
    for name in ("report.txt", "report.json", "report.png", "tiny-regenerated.yaml"):
        assert (folder / name).stat().st_size > 0

    from recbole.config import Config as RecBoleConfig
    from recbole.data import create_dataset, data_preparation

    given_ = {"data_path": str(tmp_path), "epochs": 1, "use_gpu": False, "gpu_id": "", "show_progress": False}
    config = RecBoleConfig("SASRec", "tiny-regenerated", [str(folder / "tiny-regenerated.yaml")], given_)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)

    plain = prepare_data(Config("SASRec", "tiny", config_dict={**options, "regeneration": False}, argv=[]))
    made = regenerate(Config("SASRec", "tiny", config_dict=options, argv=[]))
    for theirs, ours in ((train, joined(plain.train._dataset, made.data)), (valid, plain.valid._dataset),
                         (test, plain.test._dataset)):  # fmt: skip
        feat, rows = theirs._dataset.inter_feat, ours[np.arange(len(ours))]
        assert len(feat) == len(ours)
        token = lambda ids: [dataset.field2id_token["item_id"][i] for i in ids if i]  # noqa: E731
        mine = plain.vocabulary()["items"]
        for number in range(0, len(ours), 7):
            wanted = [mine[i] for i in rows["item_id_list"][number].tolist() if i]
            assert token(feat["item_id_list"][number].tolist()) == wanted
            assert token([int(feat["item_id"][number])]) == [mine[int(rows["item_id"][number])]]
    lines = (folder / "tiny-regenerated.train.inter").read_text().splitlines()[1:]
    origins = [line.split("\t")[3] for line in lines]
    assert set(origins) == set(ORIGINS)
    assert origins.count("original") == len(plain.train._dataset)
    assert all(line.startswith("[pattern]\t") == line.endswith("\tpattern") for line in lines)


def test_the_command(tmp_path, monkeypatch, capsys):
    from recbole_raserec.cli.main import main

    monkeypatch.chdir(tmp_path)
    write_log(tmp_path, "tiny", random_log(0))
    options = [f"--{name}={value}" for name, value in QUICK.items() if name != "regeneration"]
    words = ["regenerate", "--dataset=tiny", f"--data_path={tmp_path}", "--show_progress=False", "--name=new", *options]
    assert main(words) == 2
    assert "output: is not given" in capsys.readouterr().err
    assert main([*words, "--output=made"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "made/new"
    assert (tmp_path / "made" / "new" / "new.train.inter").exists()
    assert main(["regenerate", "--help"]) == 0
    assert "--regen_gamma" in capsys.readouterr().out


def test_a_model_with_a_smaller_log_is_refused(small_config):
    """Items without features are dropped from its log: its validation targets are others' training items."""
    options = {"regeneration": True, "regen_pretrained": False, "regen_epochs": 1, "regen_hidden_size": 8}
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"]}
    features = {"selected_features": ["kind"], "load_col": columns}
    config = small_config("GRU4RecF", **features, **options)
    rows = "".join(f"i{item}\tk{item % 3}\n" for item in range(20))  # five have none
    (Path(config["data_path"]) / "tiny.item").write_text("item_id:token\tkind:token\n" + rows)
    given_ = {**options, "regenerated_data": str(regenerate(small_config("SASRec", **options)).directory)}
    made = regenerate(small_config("SASRec", **given_))
    with pytest.raises(DatasetError, match=r"GRU4RecF reads another training split.*filter_inter_by_user_or_item"):
        train_model(config, regenerated=made)
    own = regenerate(config)  # mined from its own split
    assert train_model(config, regenerated=own).seconds >= 0
    with pytest.raises(ConfigError, match=r"regen_pretrained: true: GRU4RecF leaves \d+ of the training targets out"):
        regenerate(small_config("GRU4RecF", **{**options, **features, "regen_pretrained": True}))


@pytest.fixture
def features(tmp_path):
    """A log five of whose items have no features, and the options of a model that reads them."""
    write_log(tmp_path, "tiny", random_log(0))
    (tmp_path / "tiny" / "tiny.item").write_text(
        "item_id:token\tkind:token\n" + "".join(f"i{item}\tk{item % 3}\n" for item in range(20))
    )
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "kind"]}
    return {
        "selected_features": ["kind"], "load_col": columns, "data_path": str(tmp_path), "regen_rows": "patterns",
        "checkpoint_dir": str(tmp_path / "saved"), "show_progress": False, "MAX_ITEM_LIST_LENGTH": 8,
    }  # fmt: skip


def test_a_set_of_a_models_own_split_can_be_given_back(features):
    config = Config("GRU4RecF", "tiny", config_dict={"regeneration": True, **features}, argv=[])
    made = regenerate(config)
    given_ = {"regeneration": True, **features, "regenerated_data": str(made.directory)}
    again = regenerate(Config("GRU4RecF", "tiny", config_dict=given_, argv=[]))
    np.testing.assert_array_equal(again.data.items, made.data.items)
    plain = {name: value for name, value in given_.items() if name not in ("selected_features", "load_col")}
    with pytest.raises(CheckpointError, match="regenerated_data"):  # mined of a split that SASRec does not have
        regenerate(Config("SASRec", "tiny", config_dict=plain, argv=[]))


def test_files_hold_the_split_that_was_mined(features, tmp_path):
    config = Config("GRU4RecF", "tiny", config_dict=features, argv=[])
    own = prepare_data(config)
    folder = regenerate_dataset("tiny", tmp_path / "made", model="GRU4RecF", config_dict=features, argv=[])
    for part, data in (("train", own.train), ("valid", own.valid), ("test", own.test)):
        lines = (folder / f"tiny-regenerated.{part}.inter").read_text().splitlines()[1:]
        written = sorted(tuple(line.split("\t")[::2]) for line in lines if line.endswith("\toriginal"))
        vocabulary, feat = own.vocabulary(), data._dataset.inter_feat
        rows = zip(feat["user_id"].tolist(), feat["item_id"].tolist())
        assert written == sorted((vocabulary["users"][user], vocabulary["items"][item]) for user, item in rows)
    plain = prepare_data(Config("SASRec", "tiny", config_dict={
        name: value for name, value in features.items() if name not in ("selected_features", "load_col", "regen_rows")
    }, argv=[]))  # fmt: skip
    assert len(plain.train._dataset) > len(own.train._dataset)


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ({"regeneration": "personalised"}, "regeneration: personalised weighs rows for one model"),
        ({"nproc": 2}, "nproc: 2 processes"),
    ],
)
def test_what_stage_i_alone_refuses(features, tmp_path, option, problem, monkeypatch):
    monkeypatch.setattr("recbole_raserec.regeneration.stage.ensure_dataset", None)  # before any data is read
    given_ = {name: value for name, value in features.items() if name not in ("selected_features", "load_col")}
    words = [f"--{name}={value}" for name, value in option.items()]
    with pytest.raises(ConfigError, match=problem):
        regenerate_dataset("tiny", tmp_path / "made", config_dict=given_, argv=words)


def test_patterns_that_cannot_be_used(tmp_path):
    log = [(user, item, item) for user in range(6) for item in range(4)]  # all train on the same two items
    write_log(tmp_path, "tiny", log)
    options = {
        "regeneration": True,
        "data_path": str(tmp_path),
        "checkpoint_dir": str(tmp_path),
        "regen_rows": "patterns",
    }
    with pytest.raises(DatasetError, match=r"of 1 patterns of the 6 training sequences none can be used"):
        regenerate(Config("SASRec", "tiny", config_dict=options, argv=[]))


def test_a_set_of_another_split_or_data_set_is_refused(small_config, tmp_path):
    options = {**QUICK, "regen_pretrained": False}
    made = regenerate(small_config("SASRec", **options))
    given_ = {**options, "regenerated_data": str(made.directory)}
    assert len(regenerate(small_config("SASRec", **given_)).data) == len(made.data)
    split = {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"}
    with pytest.raises(CheckpointError, match=r"regenerated_data: .* another training split"):
        regenerate(small_config("SASRec", **given_, eval_args=split))
    with pytest.raises(CheckpointError, match=r"regenerated_data: .* users and items"):
        regenerate(small_config("SASRec", log_seed=1, **given_))


def test_what_does_not_go_together(tmp_path):
    def refused(words, model="SASRec", **options):
        with pytest.raises(ConfigError, match=words):
            run(tmp_path, model, "tiny", **{"regeneration": True, "data_path": str(tmp_path), **options})

    personal = {"regeneration": "personalised", "loss_type": "BPR"}
    personal["train_neg_sample_args"] = {"distribution": "uniform"}
    refused("personalised weighs rows of loss_type: CE; it is BPR", **personal)
    refused("benchmark files have no histories", benchmark_filename=["train", "valid", "test"])
    write_log(tmp_path, "tiny", random_log(0))
    refused(r"regen_heads: 3 does not divide vectors of length 64", regen_heads=3)
