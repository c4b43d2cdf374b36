"""Options of the service, declared once: the command line, the checks and the limits of requests come from here.

A plain pydantic model instead of one of pydantic-settings: a single option, the token, may stand in the environment.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from recbole_raserec.errors import ConfigError

TOKEN_VARIABLE = "RECBOLE_RASEREC_TOKEN"
LOG = logging.getLogger("recbole_raserec.serve")

Count = Annotated[int, Field(ge=1, lt=1 << 40)]
Threads = Annotated[int, Field(ge=0, lt=1 << 40)]
Pause = Annotated[float, Field(ge=0, lt=1 << 40, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1, lt=1 << 40, allow_inf_nan=False)]


class Settings(BaseModel):
    """Options of the service, the limits being the most a request may have; a `ConfigError` has every problem found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: Optional[str] = Field(None, repr=False, description="of the calls that change something; None: refused")
    workers: Threads = Field(0, description="threads that answer reading calls (default: one a core, at most 4)")
    save_every: Pause = Field(300.0, description="seconds between saves when there were changes; 0: only at the end")
    drain_seconds: Seconds = Field(30.0, description="that running requests have to finish in when the server stops")
    body_seconds: Seconds = Field(30.0, description="in which the body of a request must have arrived")
    max_body: Count = Field(8 << 20, description="bytes of a request")
    max_sequences: Count = Field(1024, description="histories a request")
    max_history: Count = Field(10_000, description="items of a history")
    max_k: Count = Field(1000, description="items recommended")
    max_candidates: Count = Field(100_000, description="candidates, and excluded items")
    max_events: Count = Field(10_000, description="events an update")
    max_concurrent: Count = Field(128, description="requests at a time")

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError([_problem(found) for found in error.errors(include_url=False)]) from None

    @field_validator("token")
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


def find_token(token: Optional[str] = None, file: Optional[Path] = None) -> Optional[str]:
    """The token of a command line: itself, else what the file holds, else the environment variable; or None."""
    if token is None and file is not None:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ConfigError([f"token_file: {file} cannot be read ({error})."]) from None
    return os.environ.get(TOKEN_VARIABLE) or None if token is None else token


def log(event: str, **members: Any) -> None:
    """A line of JSON in the log. It has no ids of users or items: logs live longer than a user who is forgotten."""
    LOG.info(json.dumps({"event": event, **members}))


def log_error(event: str, error: BaseException) -> None:
    """The type of an error and where it was raised; without its message, which may have ids."""
    lines = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    LOG.error(json.dumps({"event": event, "error": type(error).__name__, "at": lines[-8:]}))
