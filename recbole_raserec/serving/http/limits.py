"""What every request passes on its way in and out: limits on bytes, seconds and requests at a time; log; metrics.

By hand, as ASGI middleware: uvicorn and FastAPI limit neither the size of a body nor the seconds it takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, Optional

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect, Request

from recbole_raserec.serving.http.messages import Problem
from recbole_raserec.serving.http.settings import Settings, log, log_error

FREE = ("/health", "/metrics")  # paths that answer under any load, for those who watch it
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Of one application and its recommender, in a registry of their own."""

    def __init__(self, recommender: Any):
        self.registry = own = CollectorRegistry()
        labels, about = ["route", "status"], "From the first byte to the last"
        self.requests = Counter("raserec_requests", "Requests answered", labels, registry=own)  # exposed as ..._total
        self.seconds = Histogram("raserec_request_seconds", about, labels[:1], buckets=SECONDS, registry=own)
        self.events = Counter("raserec_events", "Events taken up since the start", registry=own)
        self.running = Gauge("raserec_running_requests", "Requests at work or waiting", registry=own)
        memories = Gauge("raserec_memory_entries", "Memories that can be retrieved", registry=own)
        memories.set_function(lambda: recommender.live.n_memories)
        unsaved = Gauge("raserec_unsaved_changes", "Changes that only the journal has", registry=own)
        unsaved.set_function(lambda: recommender.unsaved)


class Limits:
    """ASGI middleware. It reads the whole body, so that the `app` behind it never waits for a client.

    Paths beside the routes `paths` are logged as one.
    """

    def __init__(self, app: Any, settings: Settings, metrics: Metrics, paths: Iterable[str]):
        self.app, self.settings, self.metrics, self.paths = app, settings, metrics, frozenset(paths)
        self._running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, counted = time.perf_counter(), 0, scope["path"] not in FREE

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
                what = "requests run at a time: ask again later"
                raise self._exceeded(429, "max_concurrent", self._running, what, {"Retry-After": "1"})
            body = await self._body(scope, receive)
            await self.app(scope, _replaying(body, receive), sending)
        except Problem as problem:
            await answer(problem)(scope, receive, sending)
        except ClientDisconnect:
            status = status or 499  # as nginx has it; there is no one to tell
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
        """The body, of which no more is read than it may have; raises `Problem` 413 and 408, and `ClientDisconnect`."""
        told = [value for name, value in scope["headers"] if name == b"content-length"]
        size = int(told[0]) if told and told[0].isdigit() else 0
        if size > self.settings.max_body:
            raise self._too_large(size)

        async def read() -> bytes:
            body = bytearray()
            async for part in Request(scope, receive).stream():
                body += part
                if len(body) > self.settings.max_body:
                    raise self._too_large(None)
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            what = "seconds is how long a body may take: send it faster"
            raise self._exceeded(408, "body_seconds", None, what, {"Connection": "close"}) from None

    def _too_large(self, size: Optional[int]) -> Problem:
        # The rest of the body is not read, so nothing more can come over this connection.
        what = f"bytes is the most a body may have, and this one has {size or 'more'}: send less"
        return self._exceeded(413, "max_body", size, what, {"Connection": "close"})

    def _exceeded(self, status: int, option: str, value: Optional[int], what: str, headers: dict[str, str]) -> Problem:
        allowed = int(getattr(self.settings, option))
        more = {"value": value} if value is not None and value < 2**63 else {}
        text = f"{allowed} {what}, or start the server with a larger --{option}."
        return Problem(status, "limit", text, headers, limit=option, allowed=allowed, **more)


def answer(problem: Problem) -> JSONResponse:
    """A problem as a response."""
    return JSONResponse(problem.body, problem.status, problem.headers)


def _replaying(body: bytes, receive: Any) -> Any:
    """`receive` of a request whose body has been read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay
