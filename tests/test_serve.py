"""The service: what it answers, what it changes, saves and logs, and how it describes itself."""

from __future__ import annotations

import json
import logging
import re
import time

import numpy as np
import pytest
from live_helpers import journaled
from serve_helpers import AUTHORIZED, LIMITS, TOKEN, application, fresh

from recbole_raserec import Recommender

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from recbole_raserec.serving.http import Settings
from recbole_raserec.serving.http.app import CSP, Service, create_app


@pytest.fixture
def own(planted_run, tmp_path):
    """A recommender behind an application, which the test may change."""
    with application(planted_run, tmp_path / "checkpoint") as made:
        yield made


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
    answer = served.client.post("/explain", json=asked, headers=AUTHORIZED)
    assert answer.json() == json.loads(wanted.to_json())
    assert served.client.post("/explain", json={"user": served.recommender.users[3]}).status_code == 200
    for options in ({"headers": {"Accept": "text/html,*/*"}}, {"params": {"format": "html"}}):
        options["headers"] = {**AUTHORIZED, **options.get("headers", {})}
        page = served.client.post("/explain", json=asked, **options)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == CSP
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
    assert journaled(own.directory) == 1
    assert client.get("/health").json()["unsaved"] == 1
    assert client.post("/save", headers=AUTHORIZED).json() == {"changes": 1}
    assert journaled(own.directory) == 0
    assert client.post("/save", headers=AUTHORIZED).json() == {"changes": 0}
    assert client.post("/forget", json={"user": "new"}, headers=AUTHORIZED).json() == {"memories": 1}
    found = client.get("/health").json()
    assert (found["unsaved"], found["users"], found["ready"]) == (1, len(own.recommender.users) - 2, True)
    metrics = client.get("/metrics").text
    assert "raserec_events_total 2.0" in metrics
    assert f"raserec_memory_entries {float(found['memories'])}" in metrics
    assert 'raserec_requests_total{route="/update",status="200"} 1.0' in metrics
    assert 'raserec_request_seconds_count{route="/update"} 1.0' in metrics


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
    service = Service(own.recommender, Settings(token=TOKEN, save_every=0.05))
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
    reason = "schemathesis is not installed (the extra fuzz)"
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
