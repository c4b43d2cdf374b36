"""What every request passes on its way in and out: host, token, limits on bytes, seconds and number; log; metrics.

By hand, as ASGI middleware: uvicorn and FastAPI limit neither the seconds that a body takes nor the bytes of all
bodies; newer versions of Starlette limit the size of one. TrustedHostMiddleware answers in plain text, and FastAPI
asks for a token after it has read the body.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Optional
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.requests import ClientDisconnect, Request

from recbole_raserec.serving.http.messages import Problem, exceeded
from recbole_raserec.serving.http.settings import TOKEN_VARIABLE, Settings, log, log_error

FREE = ("/health", "/metrics")  # paths that answer under any load, for those who watch it
CHANGES = ("/update", "/forget", "/save")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SMALL = 16 << 10  # bytes of a body for which there is always room
#: Of every answer that has no such header of its own.
SECURITY = {
    b"x-content-type-options": b"nosniff", b"x-frame-options": b"DENY", b"referrer-policy": b"no-referrer",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'", b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
}  # fmt: skip
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
        trusted = settings.trusted_hosts or ",".join(LOOPBACK)
        self._trusted = [name.strip(" []").lower() for name in trusted.split(",")]
        self._running = self._buffered = 0  # requests, and bytes of bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, entered, body = time.perf_counter(), 0, 0, bytearray()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = secured(message.get("headers", ()), scope["path"] == "/docs")
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
            scope["authorized"] = self._authorized(scope["path"], headers.get(b"authorization", b""))
            await self._read(scope, receive, body)
            entered = scope["path"] not in FREE
            self._running += entered
            self.metrics.running.set(self._running)
            if entered and self._running > self.settings.max_concurrent:
                what = "requests run at a time: ask again later"
                raise exceeded(self.settings, 429, "max_concurrent", self._running, what)
            await self.app(scope, _replaying(bytes(body), receive), sending)
        except Problem as problem:
            await answer(problem)(scope, receive, sending)
        except ClientDisconnect:
            status = status or 499  # as nginx has it; there is no one to tell
        except Exception as error:
            log_error("failed", error)
            if not status:
                await answer(Problem(500, "server", "the server failed; its log says where."))(scope, receive, sending)
        finally:
            self._running -= entered
            self._buffered -= len(body)
            self.metrics.running.set(self._running)
            seconds = time.perf_counter() - started
            path = scope["path"] if scope["path"] in self.paths else "other"  # which may have ids in it
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            log("request", method=scope["method"], path=path, status=status, ms=round(1000 * seconds, 1))

    def _check_host(self, header: str) -> None:
        """Refuse names that are not this server's: a page of a stranger's name for it could read what it answers."""
        try:
            host = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            host = ""
        if not any(fnmatchcase(host, pattern) for pattern in self._trusted):
            remedy = "send one it has, or start it with --trusted_hosts=NAME,..."
            raise Problem(421, "host", f"the header Host is no name of this server; {remedy}")

    def _authorized(self, path: str, header: bytes) -> bool:
        """Whether a valid token was sent; raises `Problem` 401 and 403 where the path needs one."""
        token, reading, how = self.settings.token, self.settings.read_token, "token as Authorization: Bearer TOKEN."
        if path in CHANGES and token is None:
            start = f"start it with --token_file=FILE, or with {TOKEN_VARIABLE} set"
            raise Problem(403, "token", f"this server changes nothing: {start}, and send that {how}")
        scheme, _, sent = header.partition(b" ")
        known = [each.encode() for each in (token, None if path in CHANGES else reading) if each is not None]
        found = scheme.lower() == b"bearer" and [hmac.compare_digest(sent.strip(), each) for each in known].count(True)
        if not found and (path in CHANGES or (reading is not None and path != "/health")):
            raise Problem(401, "token", f"send the server's {how}", {"WWW-Authenticate": "Bearer"})
        return bool(found)

    async def _read(self, scope: Any, receive: Any, body: bytearray) -> None:
        """The body, of which no more is read than it may have; raises `Problem` 408, 413, 429, and `ClientDisconnect`.

        After 413 the connection stays: uvicorn drops what still comes, so that a client that reads nothing before it
        has sent everything gets the answer.
        """
        told = [value for name, value in scope["headers"] if name == b"content-length"]
        size = int(told[0]) if told and told[0].isdigit() else 0
        if size > self.settings.max_body:
            raise self._too_large(size)

        async def read() -> None:
            async for part in Request(scope, receive).stream():
                body.extend(part)
                self._buffered += len(part)
                if len(body) > self.settings.max_body:
                    raise self._too_large(None)
                if len(body) > SMALL and self._buffered > self.settings.max_buffered:
                    what = "bytes of requests at a time is the most: ask again later"
                    raise exceeded(self.settings, 429, "max_buffered", self._buffered, what)

        try:
            await asyncio.wait_for(read(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            what = "seconds is how long a body may take: send it faster"
            raise exceeded(self.settings, 408, "body_seconds", None, what) from None

    def _too_large(self, size: Optional[int]) -> Problem:
        what = f"bytes is the most a body may have, and this one has {size or 'more'}: send less"
        return exceeded(self.settings, 413, "max_body", size, what)


def secured(headers: Iterable[tuple[bytes, bytes]], loads: bool = False) -> list[tuple[bytes, bytes]]:
    """Headers of an answer with those of `SECURITY` that it lacks; without a policy where it `loads` scripts."""
    names = {name.lower() for name, _ in headers} | ({b"content-security-policy"} if loads else set())
    return [*headers, *(each for each in SECURITY.items() if each[0] not in names)]


def answer(problem: Problem) -> JSONResponse:
    """A problem as a response."""
    return JSONResponse(problem.body, problem.status, problem.headers)


def _replaying(body: bytes, receive: Any) -> Any:
    """`receive` of a request whose body has been read."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return messages.pop() if messages else await receive()

    return replay
