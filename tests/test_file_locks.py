"""Locks between processes: one holder, freed by its end, handed on to what it starts."""

import errno
import fcntl
import logging
import subprocess
import sys
import threading

import pytest

from recbole_raserec.storage import locked, try_lock

HOLD = """
import sys, time
from recbole_raserec.storage import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is inside, killed afterwards."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "thing")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def fails(code):
    def flock(handle, operation):
        raise OSError(code, "no")

    return flock


def test_the_second_gets_none_until_the_first_releases(tmp_path):
    path = tmp_path / "lock"
    first = try_lock(path)
    assert try_lock(path) is None
    thread = threading.Thread(target=first.release)
    thread.start()
    thread.join()
    second = try_lock(path)
    assert second is not None
    second.release()
    second.release()
    assert path.exists()


def test_who_waits_says_so_once_and_comes_in_when_the_holder_dies(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO)
    threading.Timer(0.5, holder.kill).start()
    with locked(tmp_path / "thing", "SASRec"):
        assert [record.message for record in caplog.records if record.name == "root"] == [
            f"SASRec: another run is working in {tmp_path / 'thing'}; waiting for it"
        ]
        assert try_lock(tmp_path / "thing" / ".lock") is None
    caplog.clear()
    with locked(tmp_path / "thing"):
        pass
    assert not [record for record in caplog.records if record.name == "root"]


def test_a_file_system_without_locks_lets_all_in_with_a_warning(tmp_path, monkeypatch, caplog):
    for code in (errno.ENOSYS, errno.ENOLCK):
        caplog.clear()
        monkeypatch.setattr(fcntl, "flock", fails(code))
        with locked(tmp_path / "thing"), locked(tmp_path / "thing"):
            assert "has no locks" in caplog.text


def test_a_lock_that_fails_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fails(errno.EIO))
    with pytest.raises(OSError, match="no"), locked(tmp_path / "thing"):
        pass


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        try_lock(tmp_path / "none" / "lock")
