"""A `.pth` of RecBole's Trainer as `backbone_checkpoint`: same scores, nothing in it is run, misfits are named."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import zipfile

import pytest
import torch
from conftest import random_log, write_log
from pipeline_helpers import TINY, small
from recbole.quick_start import run_recbole

from recbole_raserec import Recommender, run_recbole_raserec
from recbole_raserec.compat import read_recbole_checkpoint
from recbole_raserec.errors import CheckpointError

COMMON = {
    "data_path": ".", "MAX_ITEM_LIST_LENGTH": 8, "epochs": 1, "train_batch_size": 64, "show_progress": False,
    "state": "ERROR", "metrics": ["Recall", "NDCG"], "topk": [5, 10], "valid_metric": "NDCG@10",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of RecBole's own function: a directory with `tiny`, and by model the file and the test figures."""
    directory, before, made = tmp_path_factory.mktemp("recbole"), os.getcwd(), {}
    write_log(directory, "tiny", random_log(0))
    os.chdir(directory)
    try:
        for name in ("SASRec", "Caser"):
            options = {**COMMON, **small(name), "train_neg_sample_args": None, "metric_decimal_place": 6}
            with contextlib.redirect_stdout(io.StringIO()):
                found = run_recbole(name, "tiny", config_dict={**options, "checkpoint_dir": name})
            (path,) = (directory / name).glob("*.pth")
            made[name] = path, dict(found["test_result"])
    finally:
        os.chdir(before)
    return directory, made


@pytest.fixture
def take(trained, tmp_path, monkeypatch):
    """Factory of runs of RaSeRec over a file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0] / "tiny", tmp_path / "tiny")

    def run(path, name="SASRec", **options):
        sizes = {key: TINY[key] for key in ("ram_inner_size", "ram_epochs", "top_k")}
        given = {**COMMON, **sizes, **small(name), "backbone": name, "backbone_checkpoint": str(path), **options}
        return run_recbole_raserec("RaSeRec", "tiny", config_dict=given, argv=[])

    return run


@pytest.mark.parametrize("name", ["SASRec", "Caser"])
def test_the_figures_are_recboles(take, trained, name):
    path, figures = trained[1][name]
    record = take(path, name)
    assert record["metrics"]["base"]["test"]["seen_kept"] == pytest.approx(figures, abs=1e-6)
    assert "ours" in record["metrics"]
    kept = Recommender.load(record["checkpoints"]["base"])  # a checkpoint of this package, which needs no .pth
    assert len(kept.recommend([["i1", "i2"]], k=3)[0]) == 3
    assert take(path, name)["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_heads": 1, "MAX_ITEM_LIST_LENGTH": 9}, ["MAX_ITEM_LIST_LENGTH: 8 (here 9)", "n_heads: 2 (here 1)"]),
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, ["eval_args", "valid_and_test"]),
        ({"item_inter_num_interval": "[8,inf)"}, ["item_inter_num_interval", "[8,inf)"]),
        ({"backbone": "DuoRec"}, ["holds a SASRec", "--backbone=SASRec"]),
    ],
    ids=["sizes", "split", "filter", "model"],
)
def test_options_that_have_to_agree(take, trained, options, words):
    path = trained[1]["SASRec"][0]
    with pytest.raises(CheckpointError) as error:
        take(path, **options)
    assert all(word in str(error.value) for word in [*words, "backbone_checkpoint", str(path)]), error.value


def test_other_items_under_the_same_name(take, trained, tmp_path):
    shutil.rmtree(tmp_path / "tiny")
    write_log(tmp_path, "tiny", random_log(0, items=20))
    with pytest.raises(CheckpointError, match=r"item_embedding\.weight \[26, 16\] \(here \[21, 16\]\)"):
        take(trained[1]["SASRec"][0])


class Harm:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(trained, tmp_path):
    good = read_recbole_checkpoint(trained[1]["SASRec"][0])
    state = {"state_dict": good[0], "config": Harm(tmp_path / "made"), "best_valid_score": Harm(tmp_path / "made")}
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"backbone_checkpoint: .*bad\.pth is not a readable checkpoint"):
        read_recbole_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()
    assert isinstance(good[2], float)


@pytest.mark.parametrize("kind", ["half", "text", "script", "tensors"])
def test_a_file_of_another_kind(trained, tmp_path, kind):
    path, content = tmp_path / "bad.pth", trained[1]["SASRec"][0].read_bytes()
    if kind == "script":
        with zipfile.ZipFile(path, "w") as archive:  # of TorchScript, which torch.load would load
            archive.writestr("bad/data.pkl", b"")
            archive.writestr("bad/constants.pkl", b"")
    elif kind == "tensors":
        torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    else:
        path.write_bytes(content[: len(content) // 2] if kind == "half" else b"hello")
    with pytest.raises(CheckpointError, match=r"bad\.pth is not a readable checkpoint of RecBole"):
        read_recbole_checkpoint(path)
