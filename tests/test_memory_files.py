"""The memory bank on disk: it survives as it was, and what is damaged, forged or of another kind is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from unittest import mock

import numpy as np
import pytest
from memory_helpers import HIDDEN, bank_of, log_of

from recbole_raserec.errors import CheckpointError
from recbole_raserec.retrieval.memory import MemoryBank
from recbole_raserec.storage import files


@pytest.fixture
def saved(tmp_path):
    bank = bank_of(log_of(11, 20, 8), similarity="dot", index="flat", ivf_lists=5, ivf_probes=2)
    bank.save(tmp_path / "memory", {"model": "abc"})
    return bank, tmp_path / "memory"


def same(left, right):
    return all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "times")
        for name in ("keys", "targets", "users", "positions", "times")
    )


def reseal(directory, change):
    """Write a manifest whose own checksum is right, as a forger would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps({**manifest, "sha256": files._seal(manifest)}))


def test_round_trip(saved):
    bank, directory = saved
    loaded = MemoryBank.load(directory, {"model": "abc"})
    assert same(loaded, bank)
    assert (loaded.similarity, loaded.index, loaded.ivf_lists, loaded.ivf_probes) == ("dot", "flat", 5, 2)
    a = loaded.search(bank.keys, 4, bank.users, bank.positions)
    b = bank.search(bank.keys, 4, bank.users, bank.positions)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.similarity, b.similarity)


def test_a_loaded_bank_grows_and_replaces_the_one_it_was_read_from(saved):
    bank, directory = saved
    loaded = MemoryBank.load(directory)
    more = log_of(12, 9, 9)
    loaded.add(*more)
    bank.add(*more)
    loaded.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory, {"model": "abc"}), bank)
    assert same(loaded, bank)
    assert len(list(directory.iterdir())) == 11  # nothing of the old one is left behind


def test_empty_bank_round_trip(tmp_path):
    MemoryBank(HIDDEN).save(tmp_path / "memory")
    assert len(MemoryBank.load(tmp_path / "memory")) == 0


def test_another_fingerprint_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"fingerprint is {'model': 'abc'}, expected {'model': 'xyz'}"):
        MemoryBank.load(saved[1], {"model": "xyz"})


def test_a_missing_bank_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.*does not exist"):
        MemoryBank.load(tmp_path / "nowhere")


def test_every_bit_flip_and_truncation_is_refused(saved):
    _, directory = saved
    rng = np.random.default_rng(0)
    for path in sorted(directory.iterdir()):
        intact = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(intact)
            damaged[rng.integers(len(intact))] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=str(directory)):
                MemoryBank.load(directory)
        for size in (0, 1, len(intact) // 2, len(intact) - 2):
            path.write_bytes(intact[:size])
            with pytest.raises(CheckpointError, match=path.name):
                MemoryBank.load(directory, verify=False)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            MemoryBank.load(directory)
        path.write_bytes(intact)
    MemoryBank.load(directory)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was executed')",)


def pickled():
    return pickle.dumps(Bomb())


def object_array():
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("targets.npy", bytes(10**6))
    return stream.getvalue()


def huge_shape():
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": (10**15,)})
    return stream.getvalue()


@pytest.mark.parametrize("forge", [pickled, object_array, archive, huge_shape, lambda: b""])
def test_a_forged_array_file_is_refused_even_with_the_right_checksums(saved, forge):
    _, directory = saved
    path = next(directory.glob("targets-*.npy"))
    path.write_bytes(forge())

    def change(manifest):
        manifest["arrays"]["targets"].update(bytes=path.stat().st_size, sha256=files.sha256(path))

    reseal(directory, change)
    with pytest.raises(CheckpointError, match=r"targets-.*not a plain \.npy array"):
        MemoryBank.load(directory)


def swap(manifest):
    arrays = manifest["arrays"]
    arrays["users"], arrays["targets"] = arrays["targets"], arrays["users"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(kind="recipe"), "does not describe"),
        (lambda m: m.update(version=99), "version is 99"),
        (lambda m: m["arrays"]["users"].update(file="../../secret.npy"), "names the file"),
        (lambda m: m["arrays"].pop("users"), "lists the arrays"),
        (lambda m: m.update(arrays=[]), "lists no arrays"),
        (lambda m: m["meta"].pop("similarity"), "incomplete"),
        (lambda m: m["meta"].update(similarity="euclid"), "cannot be used"),
        (lambda m: m["meta"].update(hidden_size=10**30), "do not fit together"),
        (swap, "names the file"),
    ],
)
def test_a_forged_manifest_is_refused(saved, change, message):
    reseal(saved[1], change)
    with pytest.raises(CheckpointError, match=message):
        MemoryBank.load(saved[1])


@pytest.mark.parametrize("text", ["[]", "null", "{}", "not json", "[" * 100_000, "\udcff"])
def test_a_manifest_of_another_kind_is_refused(saved, text):
    (saved[1] / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        MemoryBank.load(saved[1])


@pytest.mark.parametrize("stage", ["write_array", "manifest", "tidy"])
def test_an_interrupted_save_leaves_a_whole_bank(saved, stage):
    bank, directory = saved
    (directory / "notes.txt").write_text("not ours")
    grown = MemoryBank.load(directory)
    grown.add(*log_of(13, 5, 5))
    target = {
        "write_array": (np.lib.format, "write_array"),
        "manifest": (files, "write_json"),
        "tidy": (files, "_OWN_FILE"),
    }[stage]
    with mock.patch.object(*target, side_effect=KeyboardInterrupt) as patched:
        patched.fullmatch.side_effect = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            grown.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory), grown if stage == "tidy" else bank)
    grown.save(directory, {"model": "abc"})
    assert same(MemoryBank.load(directory), grown)
    assert len(list(directory.iterdir())) == 12
    assert (directory / "notes.txt").read_text() == "not ours"
