"""The command serve: a server of its own, ended gently or not, and its options."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from live_helpers import journaled
from serve_helpers import AUTHORIZED, Server, fresh

from recbole_raserec import Recommender
from recbole_raserec.cli import main as cli
from recbole_raserec.errors import CheckpointError, ConfigError
from recbole_raserec.serving.http import TOKEN_VARIABLE, Settings, find_token

pytest.importorskip("fastapi", reason="the extra serve is not installed")


@pytest.fixture
def start():
    """Starts servers, and leaves none behind."""
    servers = []

    def starting(*arguments):
        servers.append(Server(*arguments))
        return servers[-1].wait()

    yield starting
    for server in servers:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


def test_killed_while_it_is_updated(planted_run, tmp_path, start):
    directory, log = fresh(planted_run, tmp_path / "checkpoint"), tmp_path / "log"
    first = start(directory, log, "--save_every=1")
    recommender = Recommender.load(directory, "cpu")
    items, acknowledged, stop, problems = recommender.items[1:], {}, threading.Event(), []

    def write(user):
        rng, connection = np.random.default_rng(user), first.connect()
        try:
            while True:
                chosen = [items[n] for n in rng.integers(0, len(items), 3)]
                events = [{"user": f"w{user}", "item": item} for item in chosen]
                status, _ = first.post("/update", {"events": events}, connection=connection)
                assert status == 200
                acknowledged.setdefault(f"w{user}", []).extend(chosen)
        except (OSError, http.client.HTTPException, ValueError) as error:  # it is dead
            if not stop.is_set():
                problems.append(error)
        except Exception as error:
            problems.append(error)

    def read():
        connection, known = first.connect(), {"users": ["w0", "w1", recommender.users[3]], "k": 5}
        try:
            while True:
                status, found = first.post("/recommend", known, None, connection)
                assert (status, len(found["results"])) == (200, 3)
        except Exception as error:
            if not stop.is_set():
                problems.append(error)

    threads = [threading.Thread(target=write, args=(user,)) for user in range(3)]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    # meanwhile: another server, refused; and what is too large, refused without being read
    with pytest.raises(CheckpointError, match="in use by another process"):
        Recommender.load(directory, "cpu", journal=True)
    assert cli.main(["serve", str(directory), "--port=0"]) == 2
    before = first.peak()[0]
    assert large(first, b"Content-Length: 104857600") == 413
    assert large(first, b"Transfer-Encoding: chunked") == 413
    assert first.peak()[0] - before < 30
    stop.set()
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    for thread in threads:
        thread.join()
    assert not problems
    assert len(acknowledged) == 3

    second = start(directory, log)
    assert second.post("/recommend", {"users": ["w0"], "k": 3})[0] == 200
    assert second.post("/recommend", {"sequences": [["x"] * 100_000]})[1]["limit"] == "max_history"
    assert second.post("/update", {"events": []}, "wrong")[0] == 401
    # in the middle of requests: each is either answered whole or not taken up
    late, connections = [], [second.connect() for _ in range(4)]
    for number, connection in enumerate(connections):
        events = [{"user": f"late{number}", "item": item} for item in items[:200]]
        headers = {**AUTHORIZED, "Content-Type": "application/json"}
        connection.request("POST", "/update", json.dumps({"events": events}), headers)
    time.sleep(0.05)
    second.process.send_signal(signal.SIGTERM)
    for number, connection in enumerate(connections):
        try:
            answer = connection.getresponse()
        except (OSError, ConnectionError):
            continue
        assert (answer.status, json.loads(answer.read())["events"]) == (200, 200)
        late.append(f"late{number}")
    assert second.process.wait(60) == 0, log.read_text()
    assert second.end() == 0
    assert late
    assert journaled(directory) == 0
    again = Recommender.load(directory, "cpu", journal=True)
    for user, chosen in acknowledged.items():
        stored = [again.items[n] for n in again.stored([user])[0]]
        assert stored[: len(chosen)] == chosen
        assert len(stored) - len(chosen) in (0, 3)  # the last one may have been journaled, and not answered
        memory, number = again.model.memory, again.live.numbers[user]
        assert sorted(memory.positions[memory.users == number].tolist()) == list(range(1, len(stored)))
    for user in late:
        assert [again.items[n] for n in again.stored([user])[0]] == items[:200]
    again.close()
    text = log.read_text()
    assert "Traceback" not in text
    assert not re.search(r"w0|late0", text)
    # after a kill Python's own helper process may report a semaphore that was left
    report = re.compile(r"resource_tracker|^  warnings\.warn")
    lines = [json.loads(line) for line in text.splitlines() if not report.search(line)]
    assert any(line["log"]["event"] == "saved" for line in lines)


def large(server, header):
    """Status of a request of 100 MB, whose client reads nothing before it has sent all it has."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        head = (
            b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + header + b"\r\n\r\n"
        )
        connection.sendall(head)
        block = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(100 if b"chunked" in header else 0):
            connection.sendall(block)
        return int(connection.recv(100).split()[1])


def test_read_only(planted_run, tmp_path, start):
    """What the journal holds counts, changes are refused, and nothing in the directory is touched."""
    directory = fresh(planted_run, tmp_path / "checkpoint")
    with contextlib.closing(Recommender.load(directory, "cpu", journal=True)) as recommender:
        items = recommender.items[1:4]
        recommender.update([("anna", item) for item in items])
        gone = recommender.users[3]
        recommender.forget(gone)

    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [directory, *directory.rglob("*")]}

    before = files()
    server = start(directory, tmp_path / "log", "--read_only")
    status, found = server.post("/recommend", {"users": ["anna"], "k": 3, "strict": True})
    assert (status, len(found["results"][0]["items"])) == (200, 3)
    assert not set(found["results"][0]["items"]) & set(items)
    status, found = server.post("/recommend", {"users": [gone], "k": 3})
    assert (status, found["results"][0]["popular"]) == (200, True)
    status, found = server.post("/update", {"events": [{"user": "anna", "item": items[0]}]})
    assert (status, found["error"]) == (403, "token")
    assert server.end() == 0
    assert files() == before


def test_options(tmp_path, capsys, monkeypatch):
    wrong = ["serve", str(tmp_path), "--max_k=0", "--save_every=nan", "--token="]
    assert cli.main(wrong) == 2
    text = capsys.readouterr().err
    assert all(words in text for words in ("max_k: 0", "save_every: nan", "token: is empty"))
    assert cli.main(["serve", str(tmp_path), "--token_file=/nowhere/t"]) == 2
    assert "token_file: /nowhere/t cannot be read" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path), "--port=0"]) == 2
    assert "is not a checkpoint directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert cli.main(["serve", str(tmp_path), "--host=300.1.1.1"]) == 2
    assert "host: '300.1.1.1'" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", str(tmp_path), f"--port={taken.getsockname()[1]}"]) == 2
    assert "nothing can listen on" in capsys.readouterr().err
    assert cli.main(["serve", "--help"]) == 0
    shown = capsys.readouterr().out
    assert TOKEN_VARIABLE in shown
    for name, field in Settings.model_fields.items():
        assert f"--{name}" in shown
        assert field.description


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    (tmp_path / "t").write_text(" from-file\n")
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    assert find_token() is None
    monkeypatch.setenv(TOKEN_VARIABLE, "from-variable")
    assert find_token() == "from-variable"
    assert find_token(None, tmp_path / "t") == "from-file"
    assert find_token("given", tmp_path / "t") == "given"
    assert "given" not in repr(Settings(token="given"))
    assert Settings().token is None  # the environment is the command line's
    with pytest.raises(ConfigError, match="printable"):
        Settings(token="a\nb")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_k": 0}, "max_k: 0 is no such value; it should be greater than or equal to 1."),
        ({"workers": -1}, "workers: -1"), ({"save_every": -1.0}, "save_every: -1.0"),
        ({"max_body": 1 << 40}, "max_body: 1099511627776"),
        ({"body_seconds": float("nan")}, "body_seconds: nan"), ({"drain_seconds": float("inf")}, "drain_seconds: inf"),
        ({"max_ks": 3}, "max_ks: 3"), ({"max_k": "x", "max_events": 0}, "2 problems"),
    ],
)  # fmt: skip
def test_values_out_of_range(options, words):
    with pytest.raises(ConfigError) as error:
        Settings(**options)
    assert words in str(error.value)
    assert Settings(workers=0, save_every=0).save_every == 0


def test_nothing_of_it_is_imported_before_it_is_needed(tmp_path):
    code = (
        "import sys; from recbole_raserec.cli import main as cli; "
        "cli.main(['serve', '--help']); cli.main(['serve', 'x', '--k']); "
        "found = {'torch', 'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules); "
        "assert not found, found; sys.modules['fastapi'] = None; sys.modules['uvicorn'] = None; "
        "sys.exit(cli.main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "pip install 'recbole-raserec[serve]'" in done.stderr
