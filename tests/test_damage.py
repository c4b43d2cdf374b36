"""Damage of a checkpoint, of any of its files, is one error of this package; full disks and killed writers too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from live_helpers import load
from test_checkpoint_of_0_1_0 import FIXTURE

from recbole_raserec import load_checkpoint
from recbole_raserec.cli.main import main
from recbole_raserec.data.catalogue import Catalogue
from recbole_raserec.errors import CheckpointError, DiskFullError
from recbole_raserec.serving import live
from recbole_raserec.storage import files
from recbole_raserec.storage.files import (
    read_json,
    read_tensors,
    replacing,
    sealed,
    sha256,
    write_arrays,
    write_tensors,
)


def change_json(path, change):
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def swap(values, first=1, second=2):
    values[first], values[second] = values[second], values[first]


#: What version 0.1.0 loaded, and answered something else for.
SILENT = [
    ("ids.json", lambda ids: swap(ids["items"])),
    ("ids.json", lambda ids: swap(ids["users"])),
    ("items.json", lambda items: items["counts"].reverse()),
    ("checkpoint.json", lambda manifest: manifest["options"].update(top_k=7)),
    ("checkpoint.json", lambda manifest: manifest["backbone_options"].update(n_heads=1)),
    ("checkpoint.json", lambda manifest: manifest["backbone_options"].update(hidden_act="relu")),
    ("checkpoint.json", lambda manifest: manifest["options"].update(native_kernels=True)),
    ("checkpoint.json", lambda manifest: manifest["parts"].update(applied=0)),
]


@pytest.fixture
def saved(directory):
    """A checkpoint that a service has saved changes into."""
    recommender = load(directory, journal=True)
    recommender.update([("new", item) for item in recommender.items[1:5]])
    recommender.save()
    recommender.close()
    return directory


@pytest.mark.parametrize(("name", "change"), SILENT)
def test_a_changed_value_is_found(saved, name, change):
    (path,) = [*saved.glob(name), *saved.glob(f"live-*/{name}")]
    change_json(path, change)
    with pytest.raises(CheckpointError, match=rf"{name} .*(checksum|was written for)") as error:
        load(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_json_file_is_found(saved):
    """Of 0.1.0's, 21 to 44 in a hundred were not."""
    draw = np.random.default_rng(0)
    for name in ("checkpoint.json", "ids.json", "items.json"):
        (path,) = [*saved.glob(name), *saved.glob(f"live-*/{name}")]
        sound = path.read_bytes()
        for place in draw.integers(0, len(sound), 10):
            harmed = bytearray(sound)
            harmed[place] ^= 1 << int(draw.integers(8))
            path.write_bytes(harmed)
            with pytest.raises(CheckpointError):
                load(saved)
        path.write_bytes(sound)
    load(saved)


@pytest.mark.skipif(os.name == "nt", reason="no pipes and devices among files")
@pytest.mark.parametrize("name", ["checkpoint.json", "ids.json", "model.safetensors", "memory/manifest.json"])
def test_only_files_are_opened(directory, name):
    """A pipe hung, and a device took all memory."""
    path = directory / name
    for put in (
        os.mkfifo,
        lambda path: path.symlink_to("/dev/zero"),
        Path.mkdir,
        lambda path: os.truncate(path, 1 << 40),
    ):
        path.unlink() if not path.is_dir() else path.rmdir()
        if put.__name__ == "<lambda>":
            path.touch()
            path.unlink() if "zero" in str(put.__code__.co_consts) else None
        put(path)
        with pytest.raises(CheckpointError, match=str(directory)):
            load(directory)


#: Values that make no sense, under checksums that fit, or in a manifest of 0.1.0, which has none.
NONSENSE = [
    ("model", "os"), ("options", []), ("options", {}), ("options.top_k", 1e9), ("options.top_k", 10**9),
    ("options.ram_inner_size", 10**9), ("backbone_options.hidden_size", 10**6), ("backbone_options.n_layers", 10**8),
    ("options.MAX_ITEM_LIST_LENGTH", 10**9), ("backbone_options.hidden_act", "none"), ("backbone_options.model", "os"),
    ("files", 3),
]  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_nonsense_is_one_sentence_and_no_memory(directory, tmp_path, name, value, old):
    if old:
        directory = tmp_path / "old"
        shutil.copytree(FIXTURE / "RaSeRec", directory)
    path, started = directory / "checkpoint.json", time.monotonic()
    manifest = json.loads(path.read_text(encoding="utf-8"))
    holder, _, key = name.rpartition(".")
    (manifest[holder] if holder else manifest)[key] = value
    path.write_text(json.dumps(manifest if old else sealed(manifest)), encoding="utf-8")
    with pytest.raises(CheckpointError) as error:
        load(directory)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


def test_room_is_counted_before_it_is_taken():
    with live._Room(1 << 24):
        torch.nn.Linear(64, 64)
        assert torch.arange(4096, 8192, 4096).tolist() == [4096]
    for ask in (
        lambda: torch.empty(10**6, 10**6), lambda: torch.nn.Embedding(10**6, 10**6), lambda: torch.arange(10**12),
        lambda: torch.zeros(size=(10**9, 9)), lambda: [torch.ones(2).clone() for _ in range(10**4)],
    ):  # fmt: skip
        with live._Room(1 << 24), pytest.raises(ValueError, match="more than its weights are"):
            ask()


def test_empty_ids_are_refused(directory):
    ids = directory / "ids.json"
    ids.write_text('{"users": [], "items": []}', encoding="utf-8")
    entry = {"bytes": ids.stat().st_size, "sha256": sha256(ids)}
    path = directory / "checkpoint.json"
    change_json(path, lambda manifest: manifest["files"].update({"ids.json": entry}))
    path.write_text(json.dumps(sealed(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not hold two lists of ids"):
        load(directory)


def test_a_directory_of_version_0_1_0_is_told_once_and_sealed_by_a_save(tmp_path, caplog):
    directory = tmp_path / "old"
    shutil.copytree(FIXTURE / "RaSeRec", directory)
    with caplog.at_level("INFO"):
        recommender = load(directory)
    assert caplog.text.count("without checksums of ids and options; a save adds them") == 1
    wanted = recommender.score([recommender.items[1:4]])
    recommender.save()
    assert not (directory / "ids.json").exists()
    again = load(directory)
    np.testing.assert_array_equal(again.score([again.items[1:4]]), wanted)
    (path,) = directory.glob("live-*/ids.json")
    change_json(path, lambda ids: swap(ids["items"]))
    with pytest.raises(CheckpointError, match="was written for"):
        load(directory)
    change_json(directory / "checkpoint.json", lambda manifest: manifest.update(version=1))
    with pytest.raises(CheckpointError, match="files, parts, journal, sha256 cannot be what it says"):
        load(directory)


def test_what_a_service_of_0_1_0_saved_is_taken_up(tmp_path):
    directory, parts = tmp_path / "old", "live-0123456789abcdef"
    shutil.copytree(FIXTURE / "RaSeRec", directory)
    (directory / parts).mkdir()
    for name in ("ids.json", "items.json", "memory", "histories"):
        shutil.move(directory / name, directory / parts / name)
    users, items = (len(json.loads((directory / parts / "ids.json").read_text())[name]) for name in ("users", "items"))
    live = {"parts": parts, "users": users, "items": items, "applied": 3}
    (directory / "live.json").write_text(json.dumps(live), encoding="utf-8")
    item = load(directory).items[1]
    (directory / "journal.jsonl").write_text(
        f'{{"n": 3, "forget": "x"}}\n{{"n": 4, "events": [["x", "{item}", null]]}}\n'
    )
    recommender = load(directory, journal=True)
    assert (directory / "live.json").exists()
    assert recommender.stored(["x"])[0].tolist() == [1]
    assert recommender.unsaved == 1
    recommender.close()
    recommender = load(directory, journal=True)  # its journal is of this version now, its manifest is not
    assert recommender.stored(["x"])[0].tolist() == [1]
    recommender.save()
    recommender.close()
    assert not (directory / "live.json").exists()
    assert not (directory / parts).exists()
    assert json.loads((directory / "checkpoint.json").read_text(encoding="utf-8"))["parts"]["applied"] == 4
    assert load(directory, journal=True).stored(["x"])[0].tolist() == [1]


def test_tensors_have_a_checksum_of_their_own(tmp_path):
    """Training states, and neighbours, are in no manifest."""
    path = tmp_path / "state.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.zeros(0, 2).bfloat16()}
    write_tensors(path, tensors, {"epoch": 3})
    sound = path.read_bytes()
    found, meta = read_tensors(path)
    assert meta == {"epoch": 3}
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    for harm in (lambda x: x[:-2] + bytes([x[-2] ^ 64]) + x[-1:], lambda x: x.replace(b"epoch", b"epocj")):
        path.write_bytes(harm(sound))
        with pytest.raises(CheckpointError, match="does not match its own checksum"):
            read_tensors(path)


def test_doctor_checks_a_checkpoint(saved, capsys):
    assert main(["doctor", str(saved)]) == 0
    assert "journal.jsonl: sound, 0 changes since the last save" in capsys.readouterr().out
    (path,) = saved.glob("live-*/ids.json")
    change_json(path, lambda ids: swap(ids["items"]))
    assert main(["doctor", str(saved)]) == 2
    assert "ids.json is not what checkpoint.json was written for" in capsys.readouterr().err
    assert main(["doctor", "--repair"]) == 2
    assert "needs the directory of a checkpoint" in capsys.readouterr().err


# ------------------------------------------------------------------ full disks


def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("moment", ["catalogue", "weights", "manifest"])
def test_a_save_that_fails_leaves_nothing_behind(directory, tmp_path, monkeypatch, moment):
    """Each of 0.1.0's left a directory."""
    from recbole_raserec.storage import checkpoint

    recommender = load(directory, journal=True)
    recommender.update([("new", recommender.items[1])])
    before = sorted(path.name for path in directory.iterdir())
    write = checkpoint.write_json
    with monkeypatch.context() as patch:
        if moment == "catalogue":
            patch.setattr(Catalogue, "save", no_room)
        elif moment == "weights":
            patch.setattr(checkpoint.shutil, "copyfile", no_room)
        else:
            named = {"checkpoint.json": no_room}
            patch.setattr(checkpoint, "write_json", lambda path, value: named.get(path.name, write)(path, value))
        for target in (directory, tmp_path / "copy"):
            if moment != "weights" or target != directory:
                with pytest.raises(OSError, match=r"No space|no room"):
                    recommender.save(target)
    assert sorted(path.name for path in directory.iterdir()) == before
    assert not (tmp_path / "copy").exists()
    assert recommender.unsaved == 1
    recommender.save()
    recommender.close()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def refused(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def short(*args, **kwargs):
        raise OSError("80 requested and 16 written")  # NumPy's, without a number

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", refused)
        with pytest.raises(DiskFullError, match=r"w\.safetensors cannot be written: no room on the disk"):
            write_tensors(tmp_path / "w.safetensors", {})
        patch.setattr(np.lib.format, "write_array", short)
        with pytest.raises(DiskFullError, match="no room on the disk"):
            write_arrays(tmp_path, "x", 1, {"a": np.zeros(10)}, {})
        patch.setattr(files.tempfile, "mkstemp", no_room)
        with pytest.raises(DiskFullError, match="no room on the disk") as error:
            files.write_json(tmp_path / "x.json", 1)
    assert isinstance(error.value, OSError)
    assert error.value.errno == 28
    assert not list(tmp_path.iterdir())


def test_the_command_line_names_a_full_disk(monkeypatch, capsys):
    from recbole_raserec import quick_start

    monkeypatch.setattr(quick_start, "run_recbole_raserec", no_room)
    assert main(["run", "--model=SASRec", "--dataset=ml-100k"]) == 2
    assert (
        capsys.readouterr().err == "error: no room on the disk (No space left on device); free some, then try again.\n"
    )


# ------------------------------------------------------------------ what killed writers leave

WRITER = """
import os, sys
from recbole_raserec.storage.files import replacing
with replacing(sys.argv[1]) as part:
    part.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="a writer cannot be killed so there")
def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-c", WRITER]
    writers = []
    for name in ("dead", "living"):
        words = [*start, str(tmp_path / name)]
        writers.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment))
    (tmp_path / ".of another program.part").touch()
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    writers[0].kill()
    writers[0].wait()
    assert len(list(tmp_path.glob(".*.part"))) == 3
    with replacing(tmp_path / "other") as part:
        part.write_text("x")
    assert sorted(path.name.split(".")[1] for path in tmp_path.glob(".*.part")) == ["living", "of another program"]
    writers[1].communicate(timeout=60)
    assert (tmp_path / "living").read_text() == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".of another program.part", "living", "other"]


def test_parts_of_a_killed_save_are_removed_by_the_next_server(saved):
    left = saved / "live-0123456789abcdef"
    left.mkdir()
    (left / "ids.json").write_text("{}")
    load(saved)  # who only reads removes nothing
    assert left.exists()
    load(saved, journal=True).close()
    assert not left.exists()
    load_checkpoint(saved, "cpu")


# ------------------------------------------------------------------ the scripts


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
@pytest.mark.parametrize(("script", "option"), [("damage", "--mutations=12"), ("kills", "--kills=2 --kinds=prepare")])
def test_the_attacks(tmp_path, script, option):
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    output = tmp_path / f"{script}.json"
    words = [
        sys.executable,
        str(ROOT / "experiments" / f"{script}.py"),
        *option.split(),
        "--seed=3",
        f"--output={output}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(output)
    assert sum(found.get("total", found.get("kills")).values()) >= 2
