"""What every request passes on its way in and out: limits on bytes, seconds and requests at a time; log; metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Optional

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect

from recbole_raserec.serving.http.messages import Problem
from recbole_raserec.serving.http.settings import Settings, log, log_error

#: Paths that answer under any load, for those who watch it.
FREE = ("/health", "/metrics")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Of one application, in a registry of its own.

    Args:
        recommender: whose memory is counted.
    """

    def __init__(self, recommender: Any):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "raserec_requests", "Requests answered", ["route", "status"], registry=self.registry
        )  # exposed as raserec_requests_total
        self.seconds = Histogram(
            "raserec_request_seconds", "From the first byte to the last", ["route"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.events = Counter("raserec_events", "Events taken up since the start", registry=self.registry)
        self.running = Gauge("raserec_running_requests", "Requests at work or waiting", registry=self.registry)
        memories = Gauge("raserec_memory_entries", "Memories that can be retrieved", registry=self.registry)
        memories.set_function(lambda: count_memories(recommender))
        unsaved = Gauge("raserec_unsaved_changes", "Changes that only the journal has", registry=self.registry)
        unsaved.set_function(lambda: recommender.unsaved)


def count_memories(recommender: Any) -> int:
    """Memories that can be retrieved; 0 of a model without any."""
    memory = getattr(recommender.model, "memory", None)
    return 0 if memory is None else int(len(memory) - memory.gone.sum())


class Gate:
    """ASGI middleware. It reads the whole body, so that what lies behind it never waits for a client.

    Args:
        app: behind it. settings: limits. metrics: to count into. paths: routes; others are logged as one.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, paths: Iterable[str]):
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, frozenset(paths)
        self._running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        counted = scope["path"] not in FREE

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        self._running += counted
        self.metrics.running.set(self._running)
        try:
            if counted and self._running > self.settings.max_concurrent:
                raise _limit(
                    429, "max_concurrent", self._running, self.settings.max_concurrent, "requests run at a time",
                    "ask again later", {"Retry-After": "1"},
                )  # fmt: skip
            body = await self._body(scope, receive)
            await self.app(scope, _replaying(body, receive), sending)
        except Problem as problem:
            await answer(problem)(scope, receive, sending)
        except ClientDisconnect:
            status = status or 499  # as nginx has it; there is nobody to tell
        except Exception as error:
            log_error("failed", error)
            if not status:
                await answer(Problem(500, "server", "the server failed; its log says where."))(scope, receive, sending)
        finally:
            self._running -= counted
            self.metrics.running.set(self._running)
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self.paths else "other"  # which may have ids in it
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log("request", method=scope["method"], path=path, status=status, ms=round(1000 * seconds, 1))

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """The body, of which no more is read than it may have.

        Raises:
            Problem: 413, 408. ClientDisconnect: the client left before it was whole.
        """
        most = self.settings.max_body
        told = [value for name, value in scope["headers"] if name == b"content-length"]
        size = int(told[0]) if told and told[0].isdigit() else 0
        if size > most:
            raise self._too_large(size)

        async def read() -> bytes:
            parts: list[bytes] = []
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise self._too_large(None)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(read(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise _limit(
                408, "body_seconds", None, int(self.settings.body_seconds), "seconds is how long a body may take",
                "send it faster", {"Connection": "close"},
            ) from None  # fmt: skip

    def _too_large(self, size: Optional[int]) -> Problem:
        what = f"bytes is the most a body may have, and this one has {size or 'more'}"
        # The rest of the body is not read, so nothing more can come over this connection.
        return _limit(413, "max_body", size, self.settings.max_body, what, "send less", {"Connection": "close"})


def answer(problem: Problem) -> JSONResponse:
    """A problem as a response."""
    return JSONResponse(problem.body, problem.status, problem.headers)


def _limit(
    status: int, option: str, value: Optional[int], allowed: int, what: str, remedy: str, headers: dict[str, str]
) -> Problem:
    text = f"{allowed} {what}: {remedy}, or start the server with a larger --{option}."
    more = {"value": value} if value is not None and value < 2**63 else {}
    return Problem(status, "limit", text, headers, limit=option, allowed=allowed, **more)


def _replaying(body: bytes, receive: Any) -> Any:
    """`receive` of a request whose body has been read."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
