"""Vectors, ONNX and torch.export programs of a finished run; each command checks them against the package's scores."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from recbole_raserec import Recommender
from recbole_raserec.cli.main import main
from recbole_raserec.errors import CheckpointError, InputError
from recbole_raserec.serving import write_programs, write_vectors

PAGE = Path(__file__).parents[1] / "docs" / "export.md"


@pytest.fixture(scope="module")
def recommender(planted_run):
    return Recommender.load(planted_run.ours.directory, "cpu")


def test_vectors_in_both_forms(recommender, tmp_path):
    lines = write_vectors(recommender, tmp_path, "npy")
    assert len(lines) == 3
    assert "differ by at most" in lines[1]
    write_vectors(recommender, tmp_path, "parquet")
    tables = {name: pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("items", "users", "memory")}
    for name, table in tables.items():
        vectors = np.load(tmp_path / f"{name}.npy")
        assert vectors.dtype == np.float32
        np.testing.assert_array_equal(np.array(table["vector"].to_list(), np.float32), vectors)
        other = pd.read_csv(tmp_path / f"{name}.csv", dtype=str, keep_default_na=False)
        assert list(other.columns) == table.columns[:-1]
    assert tables["items"]["item"].to_list() == recommender.items[1:]
    users = tables["users"]["user"].to_list()
    found = np.load(tmp_path / "users.npy") @ np.load(tmp_path / "items.npy").T
    np.testing.assert_allclose(found, recommender.score(users=users), rtol=1e-4, atol=1e-4)
    memory = recommender.model.memory
    assert tables["memory"]["item"].to_list()[:3] == [recommender.items[item] for item in memory.targets[:3]]
    np.testing.assert_array_equal(np.load(tmp_path / "memory.npy"), memory.keys)


def test_forgotten_users_leave_no_vectors(planted_run, tmp_path):
    loaded = Recommender.load(planted_run.ours.directory, "cpu")
    user = loaded.users[3]
    gone = loaded.forget(user)
    write_vectors(loaded, tmp_path, "parquet")
    assert user not in pl.read_parquet(tmp_path / "users.parquet")["user"].to_list()
    assert len(pl.read_parquet(tmp_path / "memory.parquet")) == len(loaded.model.memory) - gone
    assert gone > 0


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(("NARM", {}), ("BERT4Rec", {}), ("FEARec", {}), ("HGN", {})),
        ("RaSeRec", {"head": "both", "beta": 0.5, "memory": "both", "memory_frequency_weight": 0.1}),
    ],
)
def test_torch_export(tiny_run, tmp_path, model, options):
    run = tiny_run(model, **options)
    loaded = Recommender.load((run.ours if model == "RaSeRec" else run.base).directory, "cpu")
    lines = write_programs(loaded, tmp_path / "out", ["torch_export"])
    assert len(lines) == 1 + (model == "RaSeRec")
    about = json.loads((tmp_path / "out" / "programs.json").read_text())
    assert about["items"] == loaded.items
    program = torch.export.load(tmp_path / "out" / "backbone.pt2").module()
    assert about["inputs"]["backbone"][:2] == ["item_seq", "item_seq_len"]
    if model == "RaSeRec":
        row = torch.zeros((1, about["L"]), dtype=torch.int64)
        row[0, :3] = torch.tensor([1, 2, 3])
        scores = program(item_seq=row, item_seq_len=torch.tensor([3]))[1]
        wanted = loaded.backbone.scores(row, torch.tensor([3]))
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)


def test_a_difference_above_the_tolerance_is_an_error_and_the_file_is_not_kept(recommender, tmp_path):
    with pytest.raises(CheckpointError, match="more than --tolerance=-1 allows"):
        write_programs(recommender, tmp_path, ["torch_export"], tolerance=-1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="products"):
        write_vectors(recommender, tmp_path, "npy", tolerance=-1)


def test_onnx_and_the_example_of_the_page(tiny_run, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    run = tiny_run("RaSeRec")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run.ours.directory), "--onnx", "--output=programs"]) == 0
    assert {path.name for path in Path("programs").iterdir()} == {"backbone.onnx", "module.onnx", "programs.json"}
    loaded = Recommender.load(run.base.directory, "cpu")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    history = loaded.items[2:5]
    assert '["50", "172", "181"]' in code
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace('["50", "172", "181"]', repr(history)), {})
    assert printed.getvalue().strip() == repr(loaded.recommend([history], k=10)[0])


def test_the_command(planted_run, capsys, tmp_path):
    directory = str(planted_run.base.directory)
    assert main(["export", directory, f"--output={tmp_path}"]) == 2
    assert "give --vectors, --onnx or --torch_export" in capsys.readouterr().err
    assert main(["export", directory, f"--output={tmp_path}", "--vectors", "--format=npy"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_model_without_vectors_says_so(tiny_run, tmp_path):
    loaded = Recommender.load(tiny_run("RepeatNet").base.directory, "cpu")
    with pytest.raises(InputError, match="no user and item vectors"):
        write_programs(loaded, tmp_path, ["torch_export"])
