"""The journal: what was not saved is taken up after a stop, by one process, and damage is refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
from live_helpers import load

from recbole_raserec.errors import CheckpointError
from recbole_raserec.serving import live
from recbole_raserec.serving.live import Journal


@pytest.mark.parametrize("moment", ["catalogue", "memory", "pointer", "cleaning"])
def test_killed_while_it_saves(directory, monkeypatch, moment):
    from recbole_raserec.data.catalogue import Catalogue
    from recbole_raserec.storage import checkpoint

    recommender = load(directory, journal=True)
    recommender.update([("new", item) for item in recommender.items[1:6]])
    wanted = recommender.score(users=["new"])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    write = checkpoint.write_json
    with monkeypatch.context() as patch:
        if moment == "catalogue":
            patch.setattr(Catalogue, "save", killed)
        elif moment == "memory":
            patch.setattr(type(recommender.model.memory), "save", killed)
        elif moment == "pointer":
            patch.setattr(
                checkpoint,
                "write_json",
                lambda path, value: killed() if path.name == "live.json" else write(path, value),
            )
        else:
            patch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            recommender.save()
    recommender.close()
    again = load(directory, journal=True)
    np.testing.assert_allclose(again.score(users=["new"]), wanted, rtol=1e-5, atol=1e-6)
    assert again.stored(["new"])[0].tolist() == [1, 2, 3, 4, 5]
    again.save()
    again.close()
    assert sum(path.name.startswith("live-") for path in directory.iterdir()) == 1
    assert load(directory).stored(["new"])[0].tolist() == [1, 2, 3, 4, 5]


def test_what_the_journal_holds_is_taken_up(directory):
    first = load(directory, journal=True)
    first.update([("a", item) for item in first.items[1:4]])
    first.update([("b", first.items[5]), ("a", first.items[6])])
    first.forget("b")
    first.update([("b", first.items[7])])
    wanted = first.score(users=["a", "b"])
    first.close()  # not saved
    with open(directory / "journal.jsonl", "ab") as file:
        file.write(b'{"n": 5, "events": [["c", "x')  # cut off
    second = load(directory, journal=True)
    assert second.users == first.users
    np.testing.assert_allclose(second.score(users=["a", "b"]), wanted, rtol=1e-5, atol=1e-6)
    second.save()
    assert (directory / "journal.jsonl").read_bytes() == b""
    second.update([("c", second.items[1])])
    second.close()
    third = load(directory, journal=True)
    assert third.stored(["a", "b", "c"])[2].tolist() == [1]
    assert third.live.applied == 5
    third.close()


def test_a_damaged_journal_is_refused(tmp_path):
    journal = Journal(tmp_path / "j")
    assert [journal.append({"events": [k]}) for k in range(3)] == [1, 2, 3]
    journal.close()
    sound = (tmp_path / "j").read_bytes()
    for text in (sound.replace(b'{"n": 2', b'{"n": 1'), sound.replace(b'"events"', b"events", 1), b"\xff\n" + sound):
        (tmp_path / "j").write_bytes(text)
        with pytest.raises(CheckpointError, match="j is damaged in line"):
            Journal(tmp_path / "j")
        assert (tmp_path / "j").read_bytes() == text


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    """Half a line is written, the rest refused, twice; later there is room again."""
    from recbole_raserec.serving import live as module

    (tmp_path / "j").write_bytes(b'{"n": 1, "events": []}\n{"n": 2, "eve')
    journal = Journal(tmp_path / "j")
    sound = (tmp_path / "j").read_bytes()
    room = len(sound) + 20
    write = type(journal._file).write

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            free = room - os.path.getsize(tmp_path / "j")
            if not free:
                raise OSError(28, "No space left on device")
            return write(self.file, bytes(data)[:free])

    journal._file = Full(journal._file)
    for _ in range(2):
        with pytest.raises(OSError, match="No space"):
            journal.append({"events": ["x" * 99]})
        assert (tmp_path / "j").read_bytes() == sound
    journal._file = journal._file.file
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            journal.append({"events": []})
    assert journal.append({"events": []}) == 2
    journal.close()
    assert [record["n"] for record in Journal(tmp_path / "j").records(0)] == [1, 2]


def test_where_nothing_can_be_written(directory, monkeypatch):
    def refused(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(live, "try_lock", refused)
    with pytest.raises(CheckpointError, match=r"takes no journal of changes \(Read-only file system\); .*--read_only"):
        load(directory, journal=True)


def test_one_process_keeps_the_journal(directory, tmp_path):
    first = load(directory, journal=True)
    with pytest.raises(CheckpointError, match=rf"in use by another process \({os.getpid()}\)"):
        load(directory, journal=True)
    load(directory)  # who only reads is let in
    first.update([("new", first.items[1])])
    assert first.unsaved == 1
    first.save(tmp_path / "copy")
    assert first.unsaved == 1
    first.save()
    assert first.unsaved == 0
    first.close()
    with pytest.raises(CheckpointError, match="is not a checkpoint directory"):
        load(tmp_path, journal=True)
    assert not (tmp_path / "journal.lock").exists()
    (ids,) = directory.glob("live-*/ids.json")
    sound = ids.read_bytes()
    for _ in range(2):  # a load that fails lets go of it
        ids.write_bytes(b"{")
        with pytest.raises(CheckpointError, match="JSON"):
            load(directory, journal=True)
    ids.write_bytes(sound)
    load(directory, journal=True).close()
