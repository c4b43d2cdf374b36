"""What the service is sent and what it answers, as pydantic models: they check requests and describe the interface.

The limits stand in the models of requests, so that a request beyond one is refused while it is parsed. Bodies are
checked by `parse` and not by FastAPI: that parses them in the event loop, where 8 MiB of JSON hold up all requests,
and before it looks at the token; and with Python's json, which takes NaN and halves of surrogate pairs, and whose
errors would be told in another form.
"""

from __future__ import annotations

from typing import Annotated, Any, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from recbole_raserec.serving.http.settings import Settings

ID_LENGTH = 256
#: An id: text, or a whole number of 64 bits, which stands for its digits.
Id = Union[Annotated[str, Field(min_length=1, max_length=ID_LENGTH)], Annotated[int, Field(ge=-(2**63), lt=2**63)]]


class Problem(Exception):
    """An answer other than 200: its kind `error`, one word, a `message`, made one line, and `more` members."""

    def __init__(self, status: int, error: str, message: str, headers: Optional[dict[str, str]] = None, **more: Any):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": error, "message": " ".join(message.split()), **more}


class Error(BaseModel):
    """What went wrong. The last three are there where a limit is exceeded."""

    model_config = ConfigDict(extra="forbid")
    error: str = Field(description="malformed, invalid, limit, host, token, not_found, method, media_type, or server")
    message: str = Field(description="one line")
    limit: Optional[str] = Field(None, description="the option that sets the limit")
    value: Optional[int] = Field(None, description="what the request has, where it is known")
    allowed: Optional[int] = Field(None, description="what the server allows")


class Ranking(BaseModel):
    """What is recommended for one history."""

    items: list[str] = Field(description="best first; fewer than k where fewer are admissible")
    scores: list[float] = Field(description="of the items; how popular they are where `popular`")
    dropped: int = Field(description="unknown items that were left out of the history")
    popular: bool = Field(description="nothing is known of the history; these are the most popular items")


class Rankings(BaseModel):
    """Recommendations, in the order of the histories."""

    results: list[Ranking]


class Updated(BaseModel):
    """What an update did; it is in the journal, on the disk."""

    events: int = Field(description="taken up")
    memories: int = Field(description="added")
    new_users: int = Field(description="seen for the first time")
    dropped: int = Field(description="events of unknown items")


class Forgotten(BaseModel):
    """What was removed; from the files with the next save."""

    memories: int


class Saved(BaseModel):
    """What a save wrote."""

    changes: int = Field(description="updates and forgotten users that were not saved before")


class Health(BaseModel):
    """What is served."""

    ready: bool = Field(description="all that is told without the token, where reading needs one")
    version: Optional[str] = None
    model: Optional[str] = None
    dataset: Optional[str] = None
    fingerprint: Optional[str] = Field(None, description="of the run's options and data")
    users: Optional[int] = None
    items: Optional[int] = None
    memories: Optional[int] = None
    unsaved: Optional[int] = Field(None, description="changes that are in the journal only")


#: Exceeding a list's length or `le` at these paths is exceeding a limit: path -> option.
LIMITS = {
    ("sequences",): "max_sequences", ("users",): "max_sequences", ("sequences", 0): "max_history",
    ("sequence",): "max_history", ("candidates",): "max_candidates", ("exclude",): "max_candidates",
    ("events",): "max_events", ("k",): "max_k",
}  # fmt: skip

TOO_MANY = "items, given and wanted for all histories, is the most of a request: ask for less at a time"
#: Members of requests. Behind them an error's path has pydantic's names for what an id may be.
MEMBERS = {name for path in LIMITS for name in path} | {"user", "item", "time", "strict", "exclude_seen"}


def request_models(settings: Settings, items: list[str]) -> dict[str, Any]:
    """Models of the requests by route, with the limits of `settings`, and `items` of the model in their examples."""

    def model(name: str, text: str, examples: list[Any], *, either: Any = (), **fields: Any) -> Any:
        schema = {"examples": examples, **({"anyOf": [{"required": [one]} for one in either]} if either else {})}
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=schema)
        made = create_model(name, __config__=config, __doc__=text, **fields)
        made.either = either
        return made

    def listed(of: Any, option: str, text: Optional[str] = None) -> Any:
        return Annotated[list[of], Field(max_length=getattr(settings, option), fail_fast=True, description=text)]

    def some(of: Any, option: str, text: str) -> Any:
        return Optional[listed(of, option, text)], None

    def whole(default: int) -> Any:
        k = Annotated[int, Field(ge=1, le=settings.max_k, description="items wanted")]
        return k, min(default, settings.max_k)

    history = listed(Id, "max_history")
    users = "ids of users, one a history; without `sequences` their stored histories are used"
    strict = bool, Field(False, description="an unknown item is an error; otherwise it is dropped, and counted")
    some_event = {"user": "somebody", "item": items[0], "time": 1.7e9}
    members = {"user": (Id, ...), "item": (Id, ...), "time": (Optional[float], None)}
    event = model("Event", "An interaction, the newest of its user.", [some_event], **members)
    return {
        "/recommend": model(
            "RecommendRequest", "Histories to rank items for.",
            [{"sequences": [items[:3], items[:1]], "k": 5}, {"users": ["somebody"], "exclude_seen": False}],
            either=("sequences", "users"),
            sequences=some(history, "max_sequences", "histories, oldest item first"),
            users=some(Id, "max_sequences", users),
            k=whole(10), exclude_seen=(bool, Field(True, description="leave items of the history out")),
            candidates=some(Id, "max_candidates", "rank only these items"),
            exclude=some(Id, "max_candidates", "leave these items out"), strict=strict,
        ),
        "/explain": model(
            "ExplainRequest", "One history whose recommendations to explain.", [{"sequence": items[:3], "k": 3}],
            either=("sequence", "user"), sequence=(Optional[history], None), user=(Optional[Id], None), k=whole(5),
            strict=strict,
        ),
        "/update": model(
            "UpdateRequest", "New interactions.", [{"events": [some_event]}],
            events=(listed(event, "max_events", "in the order they happened"), ...), strict=strict,
        ),
        "/forget": model("ForgetRequest", "A user to forget.", [{"user": "somebody"}], user=(Id, ...)),
    }  # fmt: skip


def parse(model: Any, body: bytes, settings: Settings) -> Any:
    """A request of a model of `request_models`; `Problem` 400: it is no JSON, 422: it does not fit, or is too much."""
    # No other thread runs while pydantic parses, so what must have too many items is not parsed.
    if body.count(b",") > 4 * settings.max_items + 100:
        raise exceeded(settings, 422, "max_items", None, TOO_MANY)
    try:
        found = model.model_validate_json(body)
    except ValidationError as error:
        raise _problem(error.errors(include_url=False)[0], settings) from None
    if model.either and all(getattr(found, name) is None for name in model.either):
        raise Problem(422, "invalid", f"the request has neither {' nor '.join(model.either)}: give one of them.")
    if size(found) > settings.max_items:
        raise exceeded(settings, 422, "max_items", size(found), TOO_MANY)
    return found


def size(found: Any) -> int:
    """Items given in a request, and wanted by it for all histories."""
    lists = ("sequences", "users", "sequence", "candidates", "exclude", "events")
    given = {name: getattr(found, name, None) or () for name in lists}
    wanted = getattr(found, "k", 0) * max(len(given["sequences"]), len(given["users"]), 1)
    return sum(map(len, (*given.values(), *given["sequences"]))) + wanted


def exceeded(settings: Settings, status: int, option: str, value: Optional[int], what: str) -> Problem:
    """A request beyond the limit `option`; `what` follows its value. After 429 it may be sent again."""
    allowed, headers = int(getattr(settings, option)), {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}
    more = {"value": value} if value is not None and value < 2**63 else {}
    text = f"{allowed} {what}, or start the server with a larger --{option}."
    return Problem(status, "limit", text, headers.get(status), limit=option, allowed=allowed, **more)


def _problem(error: dict[str, Any], settings: Settings) -> Problem:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return Problem(400, "malformed", f"the body is no JSON: {context.get('error', error['msg'])}.")
    if kind == "extra_forbidden":
        return Problem(422, "invalid", f"{str(error['loc'][-1])!r:.80} is no member of this request; leave it out.")
    path = [part for part in error["loc"] if isinstance(part, int) or part in MEMBERS]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the body"
    option = LIMITS.get(tuple(0 if isinstance(part, int) else part for part in path))
    allowed = context.get("max_length" if kind == "too_long" else "le")
    if option and kind in ("too_long", "less_than_equal") and allowed == getattr(settings, option):
        value = context.get("actual_length") if kind == "too_long" else error["input"]
        value = value if isinstance(value, int) and abs(value) < 2**63 else None
        known = f"is {value}" if kind != "too_long" else f"has {value or 'more'} entries"
        remedy = f"ask for less at a time, or start the server with a larger --{option}."
        text = f"{where} {known}, and {allowed} is the most: {remedy}"
        return Problem(422, "limit", text, limit=option, value=value, allowed=allowed)
    message = f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}."
    if len(path) < len(error["loc"]):
        message = f"{where} is no id; ids are text of 1 to {ID_LENGTH} characters or whole numbers."
    return Problem(422, "invalid", message)
