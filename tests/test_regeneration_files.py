"""Files of stage i: stored, read by RecBole alone, refused where they do not fit; options that do not go together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import random_log, write_log
from pipeline_helpers import run
from regeneration_helpers import QUICK

from recbole_raserec.config import Config
from recbole_raserec.data.regenerated import ORIGINS, Regenerated, joined
from recbole_raserec.errors import CheckpointError, ConfigError, DatasetError
from recbole_raserec.regenerate import regenerate, regenerate_dataset
from recbole_raserec.stages import prepare_data, train_model


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
    from recbole_raserec.cli import main

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
