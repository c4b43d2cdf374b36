"""The processes of a run: errors, interrupts, ends, several machines, and the rows each of them has."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import distributed_helpers
import pytest
from conftest import ROOT

from recbole_raserec.distributed.group import Group, current
from recbole_raserec.distributed.launch import Layout, start
from recbole_raserec.errors import ConfigError, ProcessError

TWO = Layout(nproc=2, size=2)
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")


def test_an_error_of_this_package_is_raised_as_it_was():
    with pytest.raises(ConfigError) as caught:
        start(TWO, distributed_helpers.refuse, ())
    assert caught.value.problems == ["first: problem", "second: problem"]
    assert str(caught.value) == str(ConfigError(["first: problem", "second: problem"]))
    assert not multiprocessing.active_children()


def test_any_other_error_is_told_in_full():
    with pytest.raises(ProcessError, match=r"(?s)process 1 of 2 failed:.*ZeroDivisionError: nothing to divide by"):
        start(TWO, distributed_helpers.divide, ())
    assert not multiprocessing.active_children()


def appear(folder, count):
    """Wait for the processes of `sleep`; their numbers."""
    until = time.monotonic() + 60
    while len(list(folder.glob("*.pid"))) < count:
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(path.read_text()) for path in folder.glob("*.pid")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the processes' end is set up by a function of glibc")
def test_libraries_that_abort_at_the_end_do_not_undo_what_was_done(tmp_path):
    assert start(TWO, distributed_helpers.abort_late, (str(tmp_path),)) == 7
    assert [(tmp_path / f"{number}.end").read_text() for number in range(2)] == ["said", "said"]


@posix
def test_an_interrupt_ends_all_processes(tmp_path):
    def interrupt():
        appear(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            start(TWO, distributed_helpers.sleep, (str(tmp_path),))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()


@posix
def test_processes_end_with_the_one_that_started_them(tmp_path):
    program = "from recbole_raserec.distributed.launch import Layout, start; import distributed_helpers, sys; "
    program += "start(Layout(2, 2), distributed_helpers.sleep, (sys.argv[1],))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths})
    pids = appear(tmp_path, 2)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = f"/proc/{pid}/stat"  # one that has ended and was not waited for is still there
    return not os.path.exists(stat) or open(stat).read().rpartition(")")[2].split()[0] != "Z"


def test_two_machines():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = [Layout(nproc=1, size=2, offset=offset, ip="localhost", port=port) for offset in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda layout: start(layout, distributed_helpers.sums, ()), machines))
    for rank in (0, 1):
        assert found[rank] == {
            "rank": rank, "told": "by 0", "sum": [2.0, 1.0], "rows": [0, 1, 4, 9, 16, 25, 36],
            "few": [False, False, True], "same": (True, False), "names": ["x", "x.1"],
        }  # fmt: skip


def test_rows_are_shared_out_without_gap_or_overlap():
    assert current().span(9) == (0, 9)
    for size in (1, 2, 3, 5):
        group = [Group(rank, size) for rank in range(size)]
        for rows in (0, 1, 2, 3, 7, 10, 64):
            places = [row for of in group for row in range(*of.span(rows))]
            assert places == list(range(rows))
            assert sorted(row for of in group for row in range(rows)[of.every(rows)]) == places
            assert all(stop - start != 1 for start, stop in (of.span(rows) for of in group)) or rows == 1
