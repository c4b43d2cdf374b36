"""The command ``serve``: its options and limits, and the life of a server from the first load to the last save."""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from typing import Any, Optional

from recbole_raserec.errors import ConfigError

TOKEN_VARIABLE = "RECBOLE_RASEREC_TOKEN"

LOG = logging.getLogger("recbole_raserec.serve")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the service; the limits are the largest values that a request may have.

    Attributes:
        token: for the calls that change something; None: they are refused.
        workers: threads that answer reading calls; 0: one a core, at most 4. Changes have a thread of their own.
        save_every: seconds between saves, when there were changes; 0: only at the end.
        drain_seconds: that running requests have to finish in when the server stops.
        body_seconds: in which a request must have arrived. max_body: bytes of it.
    """

    token: Optional[str] = dataclasses.field(default=None, repr=False)
    workers: int = 0
    save_every: float = 300.0
    drain_seconds: float = 30.0
    body_seconds: float = 30.0
    max_body: int = 8 << 20
    max_sequences: int = 1024
    max_history: int = 10_000
    max_k: int = 1000
    max_candidates: int = 100_000
    max_events: int = 10_000
    max_concurrent: int = 128

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("workers", "save_every") else 1
            if field.name != "token" and not least <= value < 1 << 40:  # NaN is neither
                problems.append(f"{field.name}: {value} is no such number; give one from {least} on.")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            problems.append("token: is empty, or not of printable ASCII characters; HTTP headers carry no others.")
        if problems:
            raise ConfigError(problems)


HELP = {
    "workers": "threads that answer reading calls (default: one a core, at most 4)",
    "save_every": "seconds between saves when there were changes; 0: only at the end",
    "drain_seconds": "that running requests have to finish in when the server stops",
    "body_seconds": "in which the body of a request must have arrived",
    "max_body": "bytes of a request", "max_sequences": "histories a request", "max_history": "items of a history",
    "max_k": "items recommended", "max_candidates": "candidates, and excluded items",
    "max_events": "events an update", "max_concurrent": "requests at a time",
}  # fmt: skip


def log(event: str, **members: Any) -> None:
    """A line of JSON in the log. It has no ids of users or items: logs live longer than a user who is forgotten."""
    LOG.info(json.dumps({"event": event, **members}))


def log_error(event: str, error: BaseException) -> None:
    """The type of an error and where it was raised; without its message, which may have ids."""
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    LOG.error(json.dumps({"event": event, "error": type(error).__name__, "at": lines[-8:]}))
