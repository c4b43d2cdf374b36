"""The service: what it answers, what it refuses, and what is left when it ends, gently or not."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from serve_helpers import TOKEN, Server

from recbole_raserec import Recommender, cli
from recbole_raserec.errors import CheckpointError, ConfigError

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi.testclient import TestClient

from recbole_raserec.serving.app import CSP, create_app
from recbole_raserec.serving.service import SERVE_HELP, Service, Settings

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Settings(TOKEN, max_body=20_000, max_sequences=4, max_history=50, max_k=20, max_candidates=30, max_events=6)


def fresh(planted_run, directory):
    shutil.copytree(planted_run.ours.directory, directory)
    return directory


@pytest.fixture(scope="module")
def served(planted_run, tmp_path_factory):
    """A recommender behind an application: what reads only is asked of this one."""
    directory = fresh(planted_run, tmp_path_factory.mktemp("served") / "checkpoint")
    recommender = Recommender.load(directory, "cpu", journal=True)
    app = create_app(recommender, LIMITS)
    yield SimpleNamespace(client=TestClient(app), app=app, recommender=recommender, directory=directory)
    app.state.service.stop()


@pytest.fixture
def own(planted_run, tmp_path):
    """The same for one test, which may change it."""
    recommender = Recommender.load(fresh(planted_run, tmp_path / "checkpoint"), "cpu", journal=True)
    app = create_app(recommender, LIMITS)
    yield SimpleNamespace(client=TestClient(app), app=app, recommender=recommender, directory=tmp_path / "checkpoint")
    app.state.service.stop()


def test_recommendations_are_the_recommenders(served):
    recommender, items = served.recommender, served.recommender.items
    asked = {"sequences": [items[1:5], [items[7], "unknown"], []], "k": 4, "exclude": [items[9]]}
    answer = served.client.post("/recommend", json=asked)
    assert answer.status_code == 200
    wanted = recommender.recommend(asked["sequences"], 4, exclude=[items[9]])
    results = answer.json()["results"]
    assert [row["items"] for row in results] == wanted.items
    np.testing.assert_allclose([row["scores"] for row in results], np.stack(wanted.scores), rtol=1e-6)
    assert [row["dropped"] for row in results] == [0, 1, 0]
    assert [row["popular"] for row in results] == [False, False, True]
    users = recommender.users[1:4]
    answer = served.client.post("/recommend", json={"users": users, "exclude_seen": False, "candidates": items[1:9]})
    wanted = recommender.recommend(users=users, exclude_seen=False, candidates=items[1:9])
    assert [row["items"] for row in answer.json()["results"]] == wanted.items


def test_explanations_as_json_and_as_a_page(served):
    asked = {"sequence": served.recommender.items[1:5], "k": 2}
    wanted = served.recommender.explain(asked["sequence"], 2)
    assert served.client.post("/explain", json=asked).json() == json.loads(wanted.to_json())
    assert served.client.post("/explain", json={"user": served.recommender.users[3]}).status_code == 200
    for options in ({"headers": {"Accept": "text/html,*/*"}}, {"params": {"format": "html"}}):
        page = served.client.post("/explain", json=asked, **options)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == CSP
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.text == wanted.to_html()
    # what the page loads, it loads from itself
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page.text)
    answer = served.client.post("/explain", json=asked, params={"format": "json"}, headers={"Accept": "text/html"})
    assert answer.headers["content-type"] == "application/json"


def test_changes(own):
    client, items = own.client, own.recommender.items
    events = [{"user": "new", "item": items[1], "time": 5}, {"user": "new", "item": items[2]}]
    answer = client.post("/update", json={"events": [*events, {"user": 7, "item": "x"}]}, headers=AUTHORIZED)
    assert answer.json() == {"events": 2, "memories": 1, "new_users": 1, "dropped": 1}
    assert (own.directory / "journal.jsonl").read_bytes().count(b"\n") == 1
    assert client.get("/health").json()["unsaved"] == 1
    assert client.post("/save", headers=AUTHORIZED).json() == {"changes": 1}
    assert (own.directory / "journal.jsonl").read_bytes() == b""
    assert client.post("/save", headers=AUTHORIZED).json() == {"changes": 0}
    assert client.post("/forget", json={"user": "new"}, headers=AUTHORIZED).json() == {"memories": 1}
    found = client.get("/health").json()
    assert (found["unsaved"], found["users"], found["ready"]) == (1, len(own.recommender.users) - 2, True)
    metrics = client.get("/metrics").text
    assert "raserec_events_total 2.0" in metrics
    assert f"raserec_memory_entries {float(found['memories'])}" in metrics
    assert 'raserec_requests_total{route="/update",status="200"} 1.0' in metrics
    assert 'raserec_request_seconds_count{route="/update"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/update", "/forget", "/save"])
def test_changes_need_the_token(served, planted_run, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "é"}):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = served.client.post(path, json={"user": "u", "events": []}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    without = TestClient(create_app(served.recommender, Settings()))
    answer = without.post(path, json={}, headers=AUTHORIZED)
    assert answer.status_code == 403
    assert "--token_file" in answer.json()["message"]


LONG = ["x"] * 51


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/recommend", {"sequences": [["a"]] * 5}, 422, "sequences has 5 entries, and 4 is the most"),
        ("/recommend", {"sequences": [LONG]}, 422, "sequences[0] has 51 entries, and 50 is the most"),
        ("/recommend", {"users": ["a"] * 5}, 422, "larger --max_sequences"),
        ("/recommend", {"users": ["a"], "candidates": ["b"] * 31}, 422, "larger --max_candidates"),
        ("/recommend", {"users": ["a"], "exclude": ["b"] * 31}, 422, "exclude has 31 entries"),
        ("/recommend", {"users": ["a"], "k": 21}, 422, "k is 21, and 20 is the most"),
        ("/recommend", {"users": ["a"], "k": 10**30}, 422, "larger --max_k"),
        ("/recommend", {"users": ["a"], "k": -1}, 422, "k: input should be greater than or equal to 1"),
        ("/recommend", {"users": ["a"], "k": 0}, 422, "k: "),
        ("/recommend", {"users": ["a"], "k": "3"}, 422, "k: input should be a valid integer"),
        ("/recommend", {"users": ["a"], "k": True}, 422, "k: input should be a valid integer"),
        ("/recommend", {"users": ["a"], "kk": 3}, 422, "'kk' is no member"),
        ("/recommend", {}, 422, "neither sequences nor users"),
        ("/recommend", [], 422, "the body: "),
        ("/recommend", {"sequences": "abc"}, 422, "sequences: input should be a valid"),
        ("/recommend", {"sequences": [["a", 1.5]]}, 422, "sequences[0][1] is no id"),
        ("/recommend", {"sequences": [["a", None]]}, 422, "sequences[0][1] is no id"),
        ("/recommend", {"sequences": [["a", 2**63]]}, 422, "sequences[0][1] is no id"),
        ("/recommend", {"sequences": [["b" * 257]]}, 422, "sequences[0][0] is no id"),
        ("/recommend", {"sequences": [["a"]], "users": ["a", "b"]}, 422, "users: 2 for 1 histories"),
        ("/recommend", {"sequences": [["zz"]], "strict": True}, 422, "1 unknown items, such as 'zz'"),
        ("/explain", {"sequence": ["zz"]}, 422, "nothing is known of this history"),
        ("/explain", {"sequence": LONG}, 422, "larger --max_history"),
        ("/explain", {"k": 3}, 422, "neither sequence nor user"),
        ("/explain?format=pdf", {"user": "a"}, 422, "format: give json or html"),
        ("/update", {"events": [{"user": "a", "item": "b"}] * 7}, 422, "larger --max_events"),
        ("/update", {"events": [{"user": "a"}]}, 422, "events[0].item: field required"),
        ("/update", {"events": [{"user": "", "item": "b"}]}, 422, "events[0].user is no id"),
        ("/update", {"events": [{"user": "a", "item": "b", "time": "x"}]}, 422, "events[0].time: "),
        ("/update", {"events": [{"user": "a", "item": "b"}], "strict": True}, 422, "'b' is no item of this model"),
        ("/update", b'{"events": [{"user": "a", "item": "b", "time": NaN}]}', 422, "finite"),
        ("/update", b'{"events": [{"user": "a", "item": "b", "time": -Infinity}]}', 422, "finite"),
        ("/update", b'{"events": [{"user": "a", "item": "b", "time": 1e999}]}', 422, "finite"),
        ("/update", b'{"events": [{"user": "\\ud800", "item": "b"}]}', 400, "the body is no JSON"),
        ("/recommend", b'{"users": ["a"], "k": NaN}', 422, "k: "),
        ("/recommend", b'{"users": ["\xff"]}', 400, "the body is no JSON"),
        ("/recommend", b"[" * 10_000, 400, "the body is no JSON: recursion"),
        ("/recommend", b'{"users": ["a"]', 400, "the body is no JSON"),
        ("/recommend", b"", 400, "the body is no JSON"),
        ("/recommend", b'{"users": [%s]}' % (b"1" * 9000), 400, "number out of range"),
        ("/recommend", b" " * 20_001, 413, "20000 bytes is the most a body may have, and this one has 20001"),
        ("/nowhere/alice", {}, 404, "there are /docs, /explain"),
    ],
)
def test_what_is_refused(served, path, body, status, words):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = served.client.post(path, content=content, headers={"Content-Type": "application/json", **AUTHORIZED})
    found = answer.json()
    assert answer.status_code == status, found
    assert words in found["message"]
    assert "\n" not in found["message"]
    if "--max" in found["message"]:
        assert found["error"] == "limit"
        assert found["allowed"] == getattr(LIMITS, found["limit"])
    assert not served.recommender.unsaved


def test_other_media_and_methods(served):
    answer = served.client.post("/recommend", data={"a": 1})
    assert (answer.status_code, answer.json()["error"]) == (415, "media_type")
    answer = served.client.get("/recommend")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_bodies_are_counted_where_their_length_is_not_told(served):
    def chunks():
        for _ in range(50):
            yield b" " * 1000

    answer = served.client.post("/recommend", content=chunks(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["limit"]) == (413, "max_body")
    assert answer.headers["connection"] == "close"


def call(app, receive, path="/recommend"):
    """The messages that the application sends for one request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 2), "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_body_that_does_not_come(served):
    app = create_app(served.recommender, dataclasses.replace(LIMITS, body_seconds=1))

    async def never():
        await asyncio.sleep(60)

    started = time.perf_counter()
    assert call(app, never)[0]["status"] == 408
    assert time.perf_counter() - started < 10

    async def gone():
        return {"type": "http.disconnect"}

    assert call(app, gone) == []
    assert 'status="499"' in TestClient(app).get("/metrics").text


def test_more_at_a_time_than_allowed(served, monkeypatch):
    app = create_app(served.recommender, dataclasses.replace(LIMITS, max_concurrent=1))
    client, begun, go_on = TestClient(app), threading.Event(), threading.Event()
    recommend = served.recommender.recommend

    def slow(**options):
        begun.set()
        go_on.wait(30)
        return recommend(**options)

    monkeypatch.setattr(served.recommender, "recommend", slow)
    answers = []
    body = {"sequences": [served.recommender.items[1:3]]}
    thread = threading.Thread(target=lambda: answers.append(client.post("/recommend", json=body)))
    thread.start()
    assert begun.wait(30)
    refused = TestClient(app).post("/recommend", json=body)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["limit"] == "max_concurrent"
    assert TestClient(app).get("/health").status_code == 200  # is not counted
    go_on.set()
    thread.join()
    assert answers[0].status_code == 200
    assert client.post("/recommend", json=body).status_code == 200


def test_failures_tell_nothing_and_logs_have_no_ids(own, monkeypatch, caplog):
    logger = logging.getLogger("recbole_raserec.serve")
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger.name)
    monkeypatch.setattr(own.recommender, "forget", lambda user: {}[user])
    secret = {"user": "alice-42"}
    answer = own.client.post("/forget", json=secret, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["error"]) == (500, "server")
    own.client.post("/explain", json=secret)
    own.client.get("/alice-42?x=alice-42")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own.recommender, "update", full)
    answer = own.client.post("/update", json={"events": []}, headers=AUTHORIZED)
    assert (answer.status_code, answer.json()["message"]) == (503, "No space left on device: nothing was changed.")
    lines = [json.loads(record.message) for record in caplog.records if record.name == logger.name]
    assert "alice" not in json.dumps(lines)
    seen = [(line["method"], line["path"], line["status"]) for line in lines if line["event"] == "request"]
    wanted = [("POST", "/forget", 500), ("POST", "/explain", 422), ("GET", "other", 404), ("POST", "/update", 503)]
    assert seen == wanted
    assert all(line["ms"] >= 0 for line in lines if line["event"] == "request")
    (failed,) = [line for line in lines if line["event"] == "failed"]
    assert failed["error"] == "KeyError"
    assert "test_serve.py" in failed["at"][-1]


def test_saved_from_time_to_time(own, monkeypatch):
    service = Service(own.recommender, Settings(TOKEN, save_every=0.05))
    save, tried = own.recommender.save, []

    def failing():
        tried.append(0)
        if len(tried) == 1:
            raise OSError(28, "No space left on device")
        return save()

    monkeypatch.setattr(own.recommender, "save", failing)
    own.recommender.update([("new", own.recommender.items[1])])
    service.start()
    for _ in range(200):
        time.sleep(0.05)
        if not own.recommender.unsaved:
            break
    service.stop()
    assert len(tried) == 2  # and no more, without changes
    again = Recommender.load(own.directory, "cpu")
    assert again.stored(["new"])[0].tolist() == [1]


def test_the_description_is_whole(served):
    found = served.client.get("/openapi.json").json()
    schemas = found["components"]["schemas"]
    text = json.dumps(found)
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(schemas)
    assert schemas["RecommendRequest"]["properties"]["k"] == {
        "default": 10, "description": "items wanted", "maximum": 20, "minimum": 1, "title": "K", "type": "integer",
    }  # fmt: skip
    for path in ("/recommend", "/explain", "/update", "/forget", "/save"):
        route = found["paths"][path]["post"]
        assert {"200", "408", "413", "429"} <= set(route["responses"])
        assert ("security" in route) == ("403" in route["responses"]) == (path in ("/update", "/forget", "/save"))
        if path != "/save":
            name = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            assert schemas[name]["additionalProperties"] is False
            for example in schemas[name]["examples"]:
                served_ = served.client.post(path, json=example)
                assert served_.status_code == (401 if "security" in route else 200), served_.text


def test_fuzzed(planted_run, tmp_path):
    """Random requests by the description: no 5xx, and answers as described."""
    reason = "schemathesis is not installed (the extra fuzz, Python 3.10 or later)"
    schemathesis = pytest.importorskip("schemathesis", reason=reason)
    from hypothesis import HealthCheck, given, settings

    recommender = Recommender.load(fresh(planted_run, tmp_path / "checkpoint"), "cpu", journal=True)
    app = create_app(recommender, LIMITS)
    # That a request fits the description does not make it sensible: ids may be unknown, numbers of lists may differ.
    left_out = [schemathesis.checks.positive_data_acceptance]
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    counts, started = {}, time.perf_counter()
    for operation in schema.get_all_operations():
        operation = operation.ok()
        modes = schemathesis.GenerationMode
        for mode in (modes.POSITIVE, modes.NEGATIVE) if operation.body else (modes.POSITIVE,):

            @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy(generation_mode=mode))
            def check(case):
                if time.perf_counter() - started < 15:
                    answer = case.call(headers=AUTHORIZED)
                    case.validate_response(answer, excluded_checks=left_out)
                    counts[answer.status_code] = counts.get(answer.status_code, 0) + 1

            check()
    app.state.service.stop()
    assert counts[200] > 5
    assert counts[422] > 5
    assert max(counts) < 500


# ------------------------------------------------------------------ a process of its own


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
        except (OSError, ConnectionError, ValueError) as error:  # it is dead
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
    assert (directory / "journal.jsonl").read_bytes() == b""
    again = Recommender.load(directory, "cpu", journal=True)
    for user, chosen in acknowledged.items():
        stored = [again.items[n] for n in again.stored([user])[0]]
        assert stored[: len(chosen)] == chosen
        assert len(stored) - len(chosen) in (0, 3)  # the last one may have been journaled, and not answered
        memory, number = again.model.memory, again._user_number[user]
        assert sorted(memory.positions[memory.users == number].tolist()) == list(range(1, len(stored)))
    for user in late:
        assert [again.items[n] for n in again.stored([user])[0]] == items[:200]
    again.close()
    text = log.read_text()
    assert "Traceback" not in text
    assert not re.search(r"w0|late0", text)
    lines = [json.loads(line) for line in text.splitlines()]
    assert any(line["log"]["event"] == "saved" for line in lines)


def large(server, header):
    """Status of a request that starts to send 100 MB, and how it ends."""
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + header + b"\r\n\r\n"
        connection.sendall(head)
        block = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        try:
            for _ in range(100 if b"chunked" in header else 0):
                connection.sendall(block)
        except OSError:  # closed on the other side
            pass
        try:
            return int(connection.recv(100).split()[1])
        except (OSError, IndexError):
            text = server.log.read_text()  # the answer was lost with the connection; the log has it
            return int(re.findall(r'"path": "/recommend", "status": (413)', text)[-1])


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
    assert "--max_concurrent" in capsys.readouterr().out
    assert "RECBOLE_RASEREC_TOKEN" in SERVE_HELP


def test_where_the_token_comes_from(tmp_path, monkeypatch):
    from recbole_raserec.serving import service

    (tmp_path / "t").write_text(" from-file\n")
    parser = cli._Parser(prog="recbole-raserec serve")
    service.add_serve(parser)

    def token(*words):
        return service.settings_of(parser.parse_args(["d", *words])).token

    monkeypatch.delenv(service.TOKEN_VARIABLE, raising=False)
    assert token() is None
    monkeypatch.setenv(service.TOKEN_VARIABLE, "from-variable")
    assert token() == "from-variable"
    assert token(f"--token_file={tmp_path / 't'}") == "from-file"
    assert token(f"--token_file={tmp_path / 't'}", "--token=given") == "given"
    assert "given" not in repr(service.settings_of(parser.parse_args(["d", "--token=given"])))
    with pytest.raises(ConfigError, match="printable"):
        Settings("a\nb")


def test_nothing_of_it_is_imported_before_it_is_needed(tmp_path):
    code = (
        "import sys; from recbole_raserec import cli; cli.main(['serve', '--help']); cli.main(['serve', 'x', '--k']); "
        "found = {'torch', 'fastapi', 'uvicorn', 'pydantic', 'prometheus_client'} & set(sys.modules); "
        "assert not found, found; sys.modules['fastapi'] = None; sys.modules['uvicorn'] = None; "
        "sys.exit(cli.main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "pip install 'recbole-raserec[serve]'" in done.stderr
