"""What the service refuses: calls without the token, bodies that are wrong, too large or do not come."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from serve_helpers import AUTHORIZED, LIMITS, TOKEN

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from fastapi.testclient import TestClient

from recbole_raserec.serving.http import Settings
from recbole_raserec.serving.http.app import create_app


@pytest.mark.parametrize("path", ["/update", "/forget", "/save"])
def test_changes_need_the_token(served, planted_run, path):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "é"}):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = served.client.post(path, json={"user": "u", "events": []}, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    without = TestClient(create_app(served.recommender, Settings(trusted_hosts="*")))
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


def call(app, receive, path="/recommend"):
    """The messages that the application sends for one request."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(b"host", b"testserver")],
        "http_version": "1.1", "scheme": "http", "server": ("x", 1), "client": ("y", 2), "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent


def test_a_body_that_does_not_come(served):
    app = create_app(served.recommender, LIMITS.model_copy(update={"body_seconds": 1}))

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
    app = create_app(served.recommender, LIMITS.model_copy(update={"max_concurrent": 1}))
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
