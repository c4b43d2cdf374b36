"""Locks between processes: one holder, freed by its end, handed on to what it starts."""

import subprocess
import sys
import time

import pytest

from recbole_raserec.storage.files import INHERITED, lock_file, one_at_a_time

HOLD = """
import sys, time
from recbole_raserec.storage import one_at_a_time
with one_at_a_time(sys.argv[1]):
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


def test_the_second_gets_none_and_the_file_keeps_what_it_holds(tmp_path):
    path = tmp_path / "lock"
    first = lock_file(path)
    first.write(b"holder")
    assert lock_file(path) is None
    assert path.read_bytes() == b"holder"
    first.close()
    with lock_file(path) as second:
        assert second is not None
    assert path.read_bytes() == b"holder"


def test_who_waits_is_told_once_and_comes_in_when_the_holder_dies(tmp_path, holder):
    told = []

    def waiting():
        told.append(time.monotonic())
        assert lock_file(tmp_path / ".thing.lock") is None
        holder.kill()

    with one_at_a_time(tmp_path / "thing", waiting):
        assert len(told) == 1
        assert lock_file(tmp_path / ".thing.lock") is None
    with one_at_a_time(tmp_path / "thing", pytest.fail):
        pass


@pytest.mark.skipif(not INHERITED, reason="processes do not inherit open files on this system")
def test_a_started_process_holds_the_lock_with_its_starter(tmp_path):
    held = lock_file(tmp_path / "lock")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held.fileno()])
    held.close()
    assert lock_file(tmp_path / "lock") is None
    child.communicate(b"\n")
    lock_file(tmp_path / "lock").close()


def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    import errno

    from recbole_raserec.storage import files as file_locks

    def refuse(handle):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(file_locks, "_lock", refuse)
    with one_at_a_time(tmp_path / "thing", pytest.fail), one_at_a_time(tmp_path / "thing", pytest.fail):
        pass


def test_a_lock_that_fails_is_not_waited_for(tmp_path, monkeypatch):
    import errno

    from recbole_raserec.storage import files as file_locks

    def fail(handle):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(file_locks, "_lock", fail)
    with pytest.raises(OSError, match="input/output"), one_at_a_time(tmp_path / "thing", pytest.fail):
        pass


def test_a_missing_directory_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        lock_file(tmp_path / "none" / "lock")
