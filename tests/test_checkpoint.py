"""The checkpoint directory: it scores as the training process did, alone, without pickle; damage is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from recbole_raserec import load_checkpoint
from recbole_raserec.data.dataset import POSITION
from recbole_raserec.errors import CheckpointError

#: Loads each directory named on the command line, and scores the windows beside it.
SCORER = """
import pickle, sys
import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole_raserec import load_checkpoint

def refuse(*args, **kwargs):
    raise AssertionError("pickle was used")

pickle.load = pickle.loads = pickle.Unpickler = refuse
torch.load = refuse
torch.set_num_threads(1)
for directory in sys.argv[1:]:
    checkpoint = load_checkpoint(directory, device="cpu")
    windows = np.load(directory + ".windows.npz")
    batch = Interaction({name: torch.from_numpy(windows[name]) for name in windows.files})
    with torch.no_grad():
        np.save(directory + ".scores.npy", checkpoint.model.full_sort_predict(batch).view(len(batch), -1).numpy())
"""


@pytest.fixture
def all_runs(planted_run, tiny_run):
    """Finished stages by name, trained in this process."""
    duo = tiny_run(backbone="DuoRec")
    loose = tiny_run(freeze_backbone=False, ram="single", learnable_alpha=True)
    biased = tiny_run(backbone="BERT4Rec")
    return {
        "SASRec": planted_run.base,
        "RaSeRec": planted_run.ours,
        "DuoRec": duo.base,
        "RaSeRec-DuoRec": duo.ours,
        "RaSeRec-unfrozen": loose.ours,
        "RaSeRec-BERT4Rec": biased.ours,
        "GRU4Rec": tiny_run("GRU4Rec").base,
        "BPR": tiny_run("BPR").base,
    }


def test_it_scores_as_the_training_process_did_with_nothing_but_the_directory(all_runs, tmp_path):
    expected, alone = {}, tmp_path / "alone"
    alone.mkdir()
    for name, outcome in all_runs.items():
        shutil.copytree(outcome.directory, alone / name)
        batch = next(iter(outcome.splits.test))[0]
        with torch.no_grad():
            expected[name] = outcome.model.full_sort_predict(batch).view(len(batch), -1).numpy()
        fields = ("user_id", "item_id_list", "item_length", POSITION)
        np.savez(alone / f"{name}.windows.npz", **{f: batch[f].numpy() for f in fields if f in batch.columns})
    command = [sys.executable, "-c", SCORER, *expected]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, scores in expected.items():
        found = np.load(alone / f"{name}.scores.npy")
        assert np.isfinite(scores[:, 1:]).all()
        assert np.ptp(scores[:, 1:]) > 1e-3, name
        np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-5, err_msg=name)


def test_it_knows_options_figures_and_external_ids(planted_run):
    checkpoint = load_checkpoint(planted_run.ours.directory)
    splits = planted_run.ours.splits
    assert checkpoint.options["alpha"] == planted_run.record["options"]["alpha"]
    assert checkpoint.manifest["metrics"] == planted_run.record["metrics"]["ours"]
    assert checkpoint.vocabulary.user_num == splits.dataset.user_num
    tokens = checkpoint.vocabulary.items
    assert tokens == list(splits.dataset.field2id_token["item_id"])
    assert not checkpoint.model.training
    # every training pair, and the validation pair of every user
    users = splits.dataset.user_num - 1
    assert len(checkpoint.model.memory) == len(splits.train._dataset) + users


def test_no_file_of_a_checkpoint_is_a_pickle(all_runs):
    seen = set()
    for outcome in all_runs.values():
        for path in (path for path in outcome.directory.rglob("*") if path.is_file() and path.name != ".lock"):
            seen.add(path.suffix)
            content = path.read_bytes()
            if path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".npy":
                with path.open("rb") as file:
                    major = np.lib.format.read_magic(file)[0]
                    assert not getattr(np.lib.format, f"read_array_header_{major}_0")(file)[2].hasobject
            elif path.suffix == ".safetensors":
                size = int.from_bytes(content[:8], "little")
                json.loads(content[8 : 8 + size])
            else:
                pytest.fail(f"{path}: a format this test does not know")
    assert seen == {".json", ".npy", ".safetensors"}


# ------------------------------------------------------------------ damage


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(b"\x80\x04 no such format" * 40)


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    path.write_bytes(content)


def edit(**changes):
    def change(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in changes.items():
            content[key] = value(content[key])
        path.write_text(json.dumps(content), encoding="utf-8")

    change.__name__ = "edit-" + "-".join(changes)
    return change


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


DAMAGE = [
    ("model.safetensors", flip),
    *(("model.safetensors", harm) for harm in (shorten, overwrite, empty, remove)),
    *(("ids.json", harm) for harm in (shorten, overwrite, empty, remove)),
    ("ids.json", edit(items=lambda items: items[:-1])),
    ("ids.json", edit(users=lambda users: dict.fromkeys(users))),
    ("ids.json", edit(users=lambda users: [*users[:-1], 7])),
    *(("checkpoint.json", harm) for harm in (shorten, overwrite, empty, remove)),
    ("checkpoint.json", edit(format=lambda _: "something else")),
    ("checkpoint.json", edit(version=lambda version: version + 1)),
    ("checkpoint.json", edit(fingerprint=lambda mark: mark[::-1])),
    ("memory", remove),
    ("memory/manifest.json", shorten),
    ("memory/manifest.json", remove),
    *((f"memory/{name}-*.npy", harm) for name in ("keys", "targets") for harm in (shorten, flip, remove)),
]


@pytest.mark.parametrize(("name", "harm"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_damage_is_one_clear_error(planted_run, tmp_path, name, harm):
    directory = tmp_path / "copy"
    shutil.copytree(planted_run.ours.directory, directory)
    load_checkpoint(directory)
    (path,) = directory.glob(name)
    harm(path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(directory)
    message = str(error.value)
    assert str(directory) in message
    assert "\n" not in message
    assert len(message) < 600


def test_a_checkpoint_of_another_model_does_not_pass_for_this_one(planted_run, tmp_path):
    directory = tmp_path / "mixed"
    shutil.copytree(planted_run.ours.directory, directory)
    shutil.copy(planted_run.base.directory / "model.safetensors", directory)
    with pytest.raises(CheckpointError, match=r"does not fit|is not what"):
        load_checkpoint(directory)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint directory: it has no checkpoint\.json"):
        load_checkpoint(tmp_path)
