"""Options of the service, declared once: the command line, the checks and the limits of requests come from here.

A plain pydantic model instead of one of pydantic-settings: the tokens alone may stand in the environment.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from recbole_raserec.errors import ConfigError

TOKEN_VARIABLE, READ_TOKEN_VARIABLE = "RECBOLE_RASEREC_TOKEN", "RECBOLE_RASEREC_READ_TOKEN"
LOG = logging.getLogger("recbole_raserec.serve")

Count = Annotated[int, Field(ge=1, lt=1 << 40)]
Threads = Annotated[int, Field(ge=0, lt=1 << 40)]
Pause = Annotated[float, Field(ge=0, lt=1 << 40, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1, lt=1 << 40, allow_inf_nan=False)]


class Settings(BaseModel):
    """Options of the service, the limits being the most a request may have; a `ConfigError` has every problem found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: Optional[str] = Field(None, repr=False, description="of the calls that change something; None: refused")
    read_token: Optional[str] = Field(None, repr=False, description="of the calls that read; None: they need none")
    trusted_hosts: Optional[str] = Field(
        None, description="names in a request's Host, with commas; *: any (default: loopback names and --host)"
    )
    show_users: bool = Field(False, description="explanations name other users to those who send no token")
    workers: Threads = Field(0, description="threads that answer reading calls (default: one a core, at most 4)")
    save_every: Pause = Field(300.0, description="seconds between saves when there were changes; 0: only at the end")
    drain_seconds: Seconds = Field(30.0, description="that running requests have to finish in when the server stops")
    body_seconds: Seconds = Field(30.0, description="in which the body of a request must have arrived")
    header_seconds: Seconds = Field(10.0, description="in which the head of a request must have arrived")
    max_body: Count = Field(8 << 20, description="bytes of a request")
    max_buffered: Count = Field(256 << 20, description="bytes of all requests, beside small ones, at a time")
    max_items: Count = Field(100_000, description="items given in and wanted by a request, in all")
    max_sequences: Count = Field(1024, description="histories a request")
    max_history: Count = Field(10_000, description="items of a history")
    max_k: Count = Field(1000, description="items recommended")
    max_candidates: Count = Field(100_000, description="candidates, and excluded items")
    max_events: Count = Field(10_000, description="events an update")
    max_concurrent: Count = Field(128, description="requests at a time whose bodies have arrived")
    max_connections: Count = Field(512, description="connections; beyond it one that has waited longest is closed")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError([_problem(found) for found in error.errors(include_url=False)]) from None

    @field_validator("token", "read_token")
    @classmethod
    def _fits_a_header(cls, token: Optional[str]) -> Optional[str]:
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise ValueError("is empty, or not of printable ASCII characters; HTTP headers carry no others")
        return token


def _problem(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}."
    return f"{name}: {error['input']} is no such value; {error['msg'].replace('Input', 'it')}."


def find_token(token: Optional[str] = None, file: Optional[Path] = None, name: str = TOKEN_VARIABLE) -> Optional[str]:
    """The token of a command line: itself, else what the file holds, else the environment variable; or None."""
    if token is None and file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            option = "token_file" if name == TOKEN_VARIABLE else "read_token_file"
            raise ConfigError([f"{option}: {file} cannot be read ({error})."]) from None
    return os.environ.get(name) or None if token is None else token


def log(event: str, **members: Any) -> None:
    """A line of JSON in the log. It has no ids of users or items: logs live longer than a user who is forgotten."""
    LOG.info(json.dumps({"event": event, **members}))


def log_error(event: str, error: BaseException) -> None:
    """The type of an error and where it was raised; without its message, which may have ids."""
    LOG.error(json.dumps({"event": event, **_raised(error)}))


class JsonLines(logging.Formatter):
    """Lines of the log as JSON: those of `log`, and what libraries say."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as one line."""
        if record.name == LOG.name:
            said = json.loads(record.getMessage())
        else:
            error = record.exc_info[1] if record.exc_info else None
            text = " ".join(record.getMessage().split())
            said = {"event": "library", "logger": record.name, "message": text, **(_raised(error) if error else {})}
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": when, "level": record.levelname, "log": said})


def _raised(error: BaseException) -> dict[str, Any]:
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "at": lines[-8:]}
