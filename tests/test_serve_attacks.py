"""The service under attack: connections that are held, bodies that are large, hosts and tokens that are wrong."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from serve_helpers import AUTHORIZED, LIMITS, TOKEN, Server, fresh

from recbole_raserec.cli import main as cli
from recbole_raserec.serving.http import READ_TOKEN_VARIABLE, Settings
from recbole_raserec.serving.http.settings import JsonLines

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi.testclient import TestClient

from recbole_raserec.serving.http.app import create_app
from recbole_raserec.serving.http.limits import SECURITY
from recbole_raserec.serving.http.messages import Problem, parse, request_models

HEAD = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(planted_run, tmp_path_factory):
    """A server with small limits."""
    path = tmp_path_factory.mktemp("attacked")
    limits = ["max_connections=20", "max_concurrent=4", "header_seconds=3", "body_seconds=4", "max_body=20000"]
    made = Server(fresh(planted_run, path / "checkpoint"), path / "log", *(f"--{each}" for each in limits)).wait()
    yield made
    assert made.end(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in made.log.read_text().splitlines()]  # all of them are JSON
    assert {line["log"]["event"] for line in lines} <= {"request", "refused", "closed"}


@contextlib.contextmanager
def opened(server, number, data):
    """So many connections, which have sent `data`."""
    found = []
    try:
        for _ in range(number):
            found.append(socket.create_connection(("127.0.0.1", server.port), 30))
            found[-1].sendall(data)
        yield found
    finally:
        for each in found:
            each.close()


def answer(connection):
    """Status, headers and JSON of what a connection is sent before it is closed; None without an answer."""
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if not head:
        return None
    lines = (line.partition(b": ") for line in head.split(b"\r\n")[1:])
    names = {name.lower(): value for name, _, value in lines}
    return int(head.split()[1]), names, json.loads(body)


def small(server):
    """Seconds of a small request, which is answered."""
    started = time.perf_counter()
    assert server.post("/recommend", {"sequences": [[1]], "k": 3}, None)[0] == 200
    return time.perf_counter() - started


@pytest.mark.parametrize(
    ("data", "status", "limit"),
    [
        (HEAD, 408, "header_seconds"),
        (HEAD + b"Content-Length: 1000\r\n\r\n ", 408, "body_seconds"),
        (CHUNKED + b"F" * 17 + b"\r\n ", 413, "max_body"),
        (CHUNKED + b"5\r\n     \r\nFFFFF\r\n", 413, "max_body"),
        (CHUNKED + b"1\r\n \r\n" * 3000, 400, None),
        (CHUNKED + b"x\r\n", 400, None),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 5000 + b"\r\n", 431, None),
        (b"hello\r\n\r\n", 400, None),
    ],
)
def test_what_is_not_sent_in_order(server, data, status, limit):
    """More connections than may be at work, or than there may be: others are answered, and those end with an error."""
    with opened(server, 30, data) as connections:
        for _ in range(5):
            assert small(server) < 3
        if status in (400, 413, 431):  # at once: nothing is waited for
            found = answer(connections[-1])
            assert found is not None
        else:
            found = answer(connections[-1])
            assert found is not None
            assert answer(connections[0]) is None  # closed, for others
        assert found[0] == status
        assert found[2].get("limit") == limit
        assert found[1][b"content-type"] == b"application/json"
        assert all(found[1][name] == value for name, value in SECURITY.items())


def test_a_connection_goes_on_after_413(server):
    connection = server.connect()
    for length in (100_000, 100):
        status, found = server.post("/recommend", b" " * length, None, connection)
        assert (status, found.get("limit")) == ((413, "max_body") if length > 100 else (400, None))


def test_requests_one_after_the_other(server):
    """Two at once over one connection, and a third half of which comes later."""
    one = HEAD + b"Content-Length: 2\r\n\r\n{}"
    with opened(server, 1, one + one + one[:60]) as (connection,):
        time.sleep(0.3)
        connection.sendall(one[60:])
        time.sleep(0.3)
        connection.settimeout(5)
        assert connection.recv(65536).count(b"HTTP/1.1 422") == 3


@pytest.mark.parametrize(
    ("trusted", "host", "status"),
    [
        (None, "localhost:8000", 200), (None, "127.0.0.1", 200), (None, "[::1]:1", 200), (None, "LOCALHOST", 200),
        (None, "evil.example", 421), (None, "localhost.evil.example", 421), (None, "", 421), (None, "[::1", 421),
        ("a.example, *.b.example", "A.example", 200), ("a.example, *.b.example", "x.b.example:80", 200),
        ("a.example,*.b.example", "b.example", 421), ("a.example", "localhost", 421), ("*", "any", 200),
        ("[fe80::1]", "[fe80::1]:8000", 200),
    ],
)  # fmt: skip
def test_hosts(served, trusted, host, status):
    client = TestClient(create_app(served.recommender, Settings(trusted_hosts=trusted)), follow_redirects=False)
    found = client.get("/health", headers={"Host": host})
    assert found.status_code == status
    assert ("error" in found.json()) == (status != 200)
    assert host not in found.text or not host


def test_nothing_redirects(served):
    for path in ("/recommend/", "/docs/", "/health/", "/docs/oauth2-redirect"):
        found = served.client.get(path, follow_redirects=False)
        assert (found.status_code, found.json()["error"]) == (404, "not_found")
    for path, status in (("/health", 200), ("/metrics", 200), ("/docs", 200), ("/recommend", 405), ("/x", 404)):
        found = served.client.get(path)
        assert found.status_code == status
        lacking = {name.decode() for name in SECURITY} - set(found.headers)
        assert lacking == ({"content-security-policy"} if path == "/docs" else set())


def test_reading_needs_a_token(served):
    settings = LIMITS.model_copy(update={"read_token": "reader"})
    client = TestClient(create_app(served.recommender, settings))
    body = {"sequence": served.recommender.items[1:5], "k": 2}
    reading = {"Authorization": "bearer reader"}
    for method, path in (("POST", "/recommend"), ("POST", "/explain"), ("GET", "/metrics"), ("GET", "/openapi.json")):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic reader"}):
            found = client.request(method, path, json=body, headers=headers)
            assert (found.status_code, found.json()["error"]) == (401, "token")
        for headers in (reading, AUTHORIZED):
            assert client.request(method, path, json=body, headers=headers).status_code in (200, 422)
    assert client.post("/explain", json=body, headers=reading).json()["memories"][0]["user"] in served.recommender.users
    assert client.post("/update", json={"events": []}, headers=reading).status_code == 401
    assert client.post("/update", json={"events": []}, headers=AUTHORIZED).status_code == 200
    assert client.get("/health").json() == {"ready": True}
    assert client.get("/health", headers=reading).json()["items"] == len(served.recommender.items) - 1
    described = client.get("/openapi.json", headers=reading).json()["paths"]
    assert all(
        "security" in described[path][method.lower()] for method, path in (("POST", "/explain"), ("GET", "/metrics"))
    )
    assert "security" not in described["/health"]["get"]


def test_users_have_numbers_for_those_without_a_token(served):
    body = {"sequence": served.recommender.items[1:5], "k": 2}
    wanted = [memory.user for memory in served.recommender.explain(body["sequence"], 2).memories]
    names = list(dict.fromkeys(wanted))
    numbers = [f"user #{1 + names.index(user)}" for user in wanted]
    assert len(names) > 1
    for settings, headers, shown in (
        (LIMITS, {}, numbers), (LIMITS, {"Authorization": "Bearer wrong"}, numbers), (LIMITS, AUTHORIZED, wanted),
        (LIMITS.model_copy(update={"show_users": True}), {}, wanted),
    ):  # fmt: skip
        client = TestClient(create_app(served.recommender, settings))
        found = client.post("/explain", json=body, headers=headers)
        assert [memory["user"] for memory in found.json()["memories"]] == shown
        page = client.post("/explain?format=html", json=body, headers=headers).text
        assert ("<bdi>user #1</bdi>" in page) == (shown is numbers)
        assert "user&nbsp;<bdi>user" not in page


def test_small_requests_overtake_large_ones(served, monkeypatch):
    settings = LIMITS.model_copy(update={"max_history": 2000, "max_concurrent": 8, "workers": 1})
    app = create_app(served.recommender, settings)
    recommend, go_on, answers = served.recommender.recommend, threading.Event(), []

    def slow(sequences, **options):
        assert len(sequences[0]) < 1000 or go_on.wait(30)
        return recommend(sequences, **options)

    def ask(length):
        body = {"sequences": [served.recommender.items[1:2] * length], "k": 3}
        return TestClient(app).post("/recommend", json=body)

    monkeypatch.setattr(served.recommender, "recommend", slow)
    threads = [threading.Thread(target=lambda: answers.append(ask(1500).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while app.state.service._large < 4:
        time.sleep(0.01)
    assert ask(3).status_code == 200
    refused = ask(1500)
    assert (refused.status_code, refused.json()["limit"], refused.headers["retry-after"]) == (
        429,
        "max_concurrent",
        "1",
    )
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
    assert ask(1500).status_code == 200


def test_items_in_all():
    settings = Settings(max_items=100)
    models = request_models(settings, ["a", "b", "c"])

    def refused(path, **body):
        try:
            parse(models[path], json.dumps(body).encode(), settings)
            return False
        except Problem as found:
            problem = found
        assert (problem.status, problem.body["limit"], problem.body["allowed"]) == (422, "max_items", 100)
        assert "--max_items" in problem.body["message"]
        return problem.body.get("value", True)

    assert not refused("/recommend", sequences=[["a"] * 30] * 2, k=19)  # 2 + 60 + 38
    assert refused("/recommend", sequences=[["a"] * 30] * 2, k=20) == 102
    assert refused("/recommend", users=["a"] * 10) == 110
    assert refused("/recommend", users=["a"], candidates=["b"] * 60, exclude=["b"] * 30) == 101
    assert not refused("/explain", sequence=["a"] * 95)
    assert refused("/explain", sequence=["a"] * 96) == 101
    assert refused("/update", events=[{"user": "a", "item": "b", "time": 1}] * 101) == 101
    assert refused("/recommend", sequences=[["a"] * 600]) is True  # not parsed at all


def test_bytes_in_all(served):
    """While bodies fill what there is room for, others are refused, and small ones are not."""
    app = create_app(served.recommender, LIMITS.model_copy(update={"max_body": 1 << 20, "max_buffered": 100_000}))
    headers, client = {"Content-Type": "application/json"}, TestClient(app)
    for size, status in ((200_000, 429), (90_000, 400), (200, 400), (90_000, 400)):
        found = client.post("/recommend", content=b" " * size, headers=headers)
        assert found.status_code == status
    assert client.post("/recommend", content=b" " * 200_000, headers=headers).json()["limit"] == "max_buffered"


def test_other_machines_need_a_token_for_reading(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(READ_TOKEN_VARIABLE, raising=False)
    command = ["serve", str(tmp_path), "--port=0"]
    (tmp_path / "read").write_text("reader\n")
    public = "host: 0.0.0.0 is reached by other machines"
    assert cli.main([*command, "--host=0.0.0.0"]) == 2
    assert public in capsys.readouterr().err
    for more in (["--host=0.0.0.0", "--public"], ["--host=0.0.0.0", f"--read_token_file={tmp_path / 'read'}"], []):
        assert cli.main([*command, *more]) == 2
        assert "is not a checkpoint directory" in capsys.readouterr().err
    monkeypatch.setenv(READ_TOKEN_VARIABLE, TOKEN)
    assert cli.main([*command, "--host=0.0.0.0"]) == 2
    assert public not in capsys.readouterr().err
    assert cli.main([*command, "--read_token_file=/nowhere/t"]) == 2
    assert "read_token_file: /nowhere/t cannot be read" in capsys.readouterr().err


def test_lines_of_the_log():
    def line(name, message, *arguments, error=None):
        record = logging.LogRecord(
            name, logging.WARNING, "x", 1, message, arguments, error and (type(error), error, None)
        )
        return json.loads(JsonLines().format(record))

    assert line("recbole_raserec.serve", '{"event": "saved"}')["log"] == {"event": "saved"}
    found = line("asyncio", 'a "%s"\nb', "c", error=ValueError("secret"))
    assert (found["level"], found["time"][-1]) == ("WARNING", "Z")
    assert found["log"] == {
        "event": "library",
        "logger": "asyncio",
        "message": 'a "c" b',
        "error": "ValueError",
        "at": [],
    }


def test_the_script_of_the_attacks(planted_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments"))
    attacks = importlib.import_module("attacks")
    output, name = tmp_path / "out" / "attacks.json", "10 chunks of 17 digits"
    command = ["attacks.py", str(planted_run.ours.directory), "--seconds=4", f"--output={output}", "--attacks", name]
    monkeypatch.setattr(sys, "argv", [*command, "--limit=5"])
    with pytest.raises(SystemExit) as ended:
        attacks.main()
    found = json.loads(output.read_text())
    assert (ended.value.code, found["failed"]) == (0, []), found
    assert set(found["attacks"][name]["attacker"]) == {"413"}
