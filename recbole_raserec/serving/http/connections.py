"""Connections of the server: how long one may wait for its request, how many there are, and errors before a request.

uvicorn's `limit_concurrency` turns away everyone else while a stranger holds connections open. It has no time limit on
the head of a request, and its errors are plain text. So its protocol is extended here.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any, Optional

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from recbole_raserec.serving.http.limits import answer, secured
from recbole_raserec.serving.http.messages import Problem, exceeded
from recbole_raserec.serving.http.settings import Settings, log

PART = 16 << 10  # bytes that are parsed at a time, and the longest head of a request
CHUNKS = 1000  # of any size; the others of a body must have 64 bytes on average


class Parser(h11.Connection):
    """h11's parser, which also refuses chunks that are too small or too large; `problem` says why it refuses."""

    def __init__(self, settings: Settings):
        super().__init__(h11.SERVER, PART - 1)
        self.problem: Optional[Problem] = None
        self._settings, self._chunks, self._bytes = settings, 0, 0

    def next_event(self) -> Any:
        """As h11's."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            status = HTTPStatus(error.error_status_hint)
            self.problem = Problem(status, "malformed", f"this is no request of HTTP/1.1 ({status.phrase.lower()}).")
            raise
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks, self._bytes = self._chunks + event.chunk_end, self._bytes + len(event.data)
            if self._chunks > CHUNKS + self._bytes // 64:
                self.problem = Problem(400, "malformed", "the chunks of the body are too small; send larger ones.")
        if getattr(self._reader, "_bytes_in_chunk", 0) > self._settings.max_body:  # nothing public tells it
            what = "bytes is the most a body may have, and this one announces a chunk of more: send less"
            self.problem = exceeded(self._settings, 413, "max_body", None, what)
        if self.problem is not None:
            raise h11.RemoteProtocolError(self.problem.body["message"])
        return event


class Connection(H11Protocol):
    """A connection. `waiting`, shared by all of a server, are those whose request has not arrived.

    They are listed by the address of the client, those that have waited longest first.
    """

    def __init__(self, settings: Settings, waiting: dict[str, dict[Connection, None]], **options: Any):
        super().__init__(**options)
        self.conn: Parser = Parser(settings)
        self._settings, self._waiting = settings, waiting
        self._timer: Optional[asyncio.TimerHandle] = None
        self._in_head, self._address = True, ""

    def connection_made(self, transport: Any) -> None:
        """Close another one where there are too many: the oldest that waits, of the address that has most of them."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._wait(self._settings.header_seconds)
        if len(self.connections) > self._settings.max_connections:
            most = max(self._waiting, key=lambda address: len(self._waiting[address]))
            oldest = next(iter(self._waiting[most]))
            log("closed", reason="max_connections")
            oldest.transport.abort()
            oldest.connection_lost(None)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Also called at once where this server ends it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse it in parts, so that h11's limit on the head of a request holds for one that comes at once too."""
        for start in range(0, len(data), PART):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + PART])
        if not self._at_request() and not self._in_head:  # between two requests
            self._in_head = True
            self._wait(self._settings.header_seconds)

    def on_response_complete(self) -> None:
        """Between requests uvicorn closes it after some seconds; here: one whose client takes no answer."""
        self._in_head = False
        self._wait(self._settings.body_seconds)
        super().on_response_complete()
        self._at_request()  # the next one may have been there already

    def _at_request(self) -> bool:
        """Whether the head of a request has arrived that is not answered; then no time limit is needed here."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        self._in_head = False
        if self.cycle.more_body:  # which `body_seconds` limits
            self._cancel()
        else:
            self._stop_waiting()
        return True

    def send_400_response(self, msg: str) -> None:
        """In JSON; `msg` is uvicorn's."""
        self._refuse(self.conn.problem or Problem(400, "malformed", msg))

    def _wait(self, seconds: float) -> None:
        self._cancel()
        self._waiting.setdefault(self._address, {}).setdefault(self)
        self._timer = self.loop.call_later(seconds, self._expire)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _stop_waiting(self) -> None:
        self._cancel()
        same = self._waiting.get(self._address, {})
        same.pop(self, None)
        if not same:
            self._waiting.pop(self._address, None)

    def _expire(self) -> None:
        if self.transport.is_closing() or not self._in_head or self.conn.their_state is not h11.IDLE:
            self.transport.abort()
        else:
            what = "seconds is how long the head of a request may take: send it faster"
            self._refuse(exceeded(self._settings, 408, "header_seconds", None, what))

    def _refuse(self, problem: Problem) -> None:
        log("refused", status=problem.status)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = answer(problem)
            close = [] if "connection" in response.headers else [(b"connection", b"close")]
            headers = [*secured(response.raw_headers), *close]
            reason = HTTPStatus(problem.status).phrase.encode()
            start = h11.Response(status_code=problem.status, headers=headers, reason=reason)
            for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
