"""The journal: what was not saved is taken up after a stop, by one process, and damage is refused."""

from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
from live_helpers import journaled, load

from recbole_raserec.errors import CheckpointError, DiskFullError
from recbole_raserec.serving import journal as module
from recbole_raserec.serving.journal import Journal, check_directory
from recbole_raserec.storage.files import sealed

#: Of a checkpoint of version 0.1.0, which does not know its journal.
OLD = {"version": 1}


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
                lambda path, value: killed() if path.name == "checkpoint.json" else write(path, value),
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
    assert journaled(directory) == 0
    second.update([("c", second.items[1])])
    second.close()
    third = load(directory, journal=True)
    assert third.stored(["a", "b", "c"])[2].tolist() == [1]
    assert third.live.applied == 5
    third.close()


def lines_of(directory) -> list[bytes]:
    return (directory / "journal.jsonl").read_bytes().splitlines(keepends=True)


@pytest.fixture
def journaled_directory(directory):
    """Five changes that were not saved: two events each."""
    recommender = load(directory, journal=True)
    for number in range(5):
        recommender.update([(f"new {number}", item) for item in recommender.items[1:3]])
    recommender.close()
    return directory


def swapped(lines):
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


def changed(lines):
    return [*lines[:3], lines[3].replace(b"new 2", b"new 7"), *lines[4:]]


@pytest.mark.parametrize(
    ("harm", "line", "why"),
    [
        (changed, 4, "not a change as it was written"),
        (swapped, 3, "change 3 follows on 1"),
        (lambda lines: [*lines[:2], *lines[3:]], 3, "change 3 follows on 1"),
        (lambda lines: [*lines[:3], *lines[2:]], 4, "change 2 follows on 2"),
        (lambda lines: [lines[0], *lines[2:]], 2, "change 2 follows on 0"),
        (lambda lines: lines[:-1], 6, "changes 5 to 5 are missing"),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], 6, "changes 5 to 5 are missing"),
        (lambda lines: lines[1:], 1, "the line that names the journal"),
        (lambda lines: [lines[0].replace(b'"last": "0', b'"last": "1'), *lines[1:]], 1, "names the journal"),
        (lambda lines: [], 1, "the line that names the journal"),
        (lambda lines: None, 1, "the file is missing"),
    ],
)
def test_a_journal_that_lost_a_change_is_refused(journaled_directory, capsys, harm, line, why):
    """Version 0.1.0 took up what it could read of most of these, and said nothing."""
    path, lines = journaled_directory / "journal.jsonl", harm(lines_of(journaled_directory))
    path.unlink() if lines is None else path.write_bytes(b"".join(lines))
    damaged = None if lines is None else b"".join(lines)
    remedy = rf"damaged in line {line}: .*{why}.*recbole-raserec doctor .* --repair"
    for options in ({"journal": True}, {}):
        with pytest.raises(CheckpointError, match=remedy):
            load(journaled_directory, **options).live.read_journal()
    assert (path.read_bytes() if path.is_file() else None) == damaged
    with pytest.raises(CheckpointError, match=remedy):
        check_directory(journaled_directory)
    said = "\n".join(check_directory(journaled_directory, repair=True))
    assert f"line {line}: " in said
    kept = int(re.search(r"(\d) changes since the last save are kept", said)[1])
    assert kept == {swapped: 5, None: 0}.get(harm, kept)
    assert kept >= (0 if not lines else 4)
    again = load(journaled_directory, journal=True)
    assert sum(user.startswith("new") for user in again.users) == again.live.applied == again.unsaved == kept
    again.update([("another", again.items[1])])
    again.close()
    if damaged is not None:
        assert (journaled_directory / "journal.damaged").read_bytes() == damaged
    assert f"sound, {kept + 1} changes" in check_directory(journaled_directory, repair=True)[-1]


def test_a_journal_of_another_checkpoint_is_refused(journaled_directory, tmp_path):
    shutil.copytree(journaled_directory, tmp_path / "other")
    manifest = json.loads((journaled_directory / "checkpoint.json").read_text(encoding="utf-8"))
    for change in ({"journal": "0" * 16}, {"journal": None}):
        text = json.dumps(sealed({**manifest, **change}))
        (tmp_path / "other" / "checkpoint.json").write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"this checkpoint has 0000|has no journal yet"):
            load(tmp_path / "other", journal=True)


def test_a_journal_of_version_0_1_0_is_taken_up(directory):
    events = [["a", "%s", None], ["b", "%s", 5.5]]
    items = load(directory).items
    text = json.dumps({"n": 1, "events": events}) % tuple(items[1:3]) + '\n{"n": 2, "forget": "b"}\n{"n": 3, "ev'
    (directory / "journal.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no journal yet"):  # the manifest is of this version
        load(directory, journal=True)
    Journal(directory, OLD, 0).close()
    content = module.read_journal(directory, OLD, 0)
    assert [record["n"] for record in content.records] == [1, 2]
    assert content.records[0]["events"][1] == ["b", items[2], 5.5]
    assert journaled(directory) == 2


def test_a_full_disk_leaves_the_journal_whole(tmp_path, monkeypatch):
    """Half a line is written, the rest refused, twice; later there is room again."""
    (tmp_path / "journal.jsonl").write_bytes(b'{"n": 1, "events": []}\n{"n": 2, "eve')
    journal = Journal(tmp_path, OLD, 0)
    sound = journal.path.read_bytes()
    room = len(sound) + 20
    write = type(journal._file).write

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            free = room - self.file.tell()
            if not free:
                raise OSError(28, "No space left on device")
            return write(self.file, bytes(data)[:free])

    journal._file = Full(journal._file)
    for _ in range(2):
        with pytest.raises(DiskFullError, match="no room on the disk"):
            journal.append({"events": [["x" * 99, "1", None]]})
        assert journal.path.read_bytes() == sound
    journal._file = journal._file.file
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            journal.append({"events": []})
    assert journal.append({"events": []}) == 2
    journal.close()
    assert [record["n"] for record in module.read_journal(tmp_path, OLD, 0).records] == [1, 2]


def test_where_nothing_can_be_written(directory, monkeypatch):
    def refused(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(module, "try_lock", refused)
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
        with pytest.raises(CheckpointError, match=r"is not what checkpoint\.json was written for"):
            load(directory, journal=True)
    ids.write_bytes(sound)
    load(directory, journal=True).close()
