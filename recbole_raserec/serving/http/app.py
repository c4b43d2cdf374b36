"""The service as a FastAPI application: its routes, and their description as OpenAPI."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any, Callable, Literal, Optional

from recbole_raserec import __version__
from recbole_raserec.errors import InputError, MissingExtraError
from recbole_raserec.serving.explain import Explanation
from recbole_raserec.serving.http import messages
from recbole_raserec.serving.http.limits import Gate, Metrics, answer, count_memories
from recbole_raserec.serving.http.messages import Error, Problem
from recbole_raserec.serving.http.service import Service
from recbole_raserec.serving.http.settings import TOKEN_VARIABLE, Settings

try:
    from fastapi import FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.openapi.utils import get_openapi
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from pydantic.json_schema import models_json_schema
    from starlette.exceptions import HTTPException
except ImportError as missing:
    raise MissingExtraError("serve", missing.name or "fastapi", "the service stands on it") from None

#: For the page of an explanation: what stands in it works, and nothing is loaded, sent, or framed. The page itself
#: names its own style and script by their digests, and both policies hold.
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

ABOUT = {
    400: "the body is no JSON in UTF-8", 401: "the token is missing or wrong", 403: "the server has no token",
    404: "there is no such route", 408: "the body did not arrive in time", 413: "the body has too many bytes",
    415: "the body is not called application/json", 422: "the request does not make sense, or exceeds a limit",
    429: "too many requests at a time", 503: "the disk took nothing; nothing was changed",
}  # fmt: skip


def create_app(recommender: Any, settings: Optional[Settings] = None) -> FastAPI:
    """The application. ``app.state.service`` is its :class:`~recbole_raserec.serving.http.service.Service`.

    Args:
        recommender: a :class:`~recbole_raserec.serving.recommender.Recommender`, which should keep a journal.
        settings: limits and token.
    """
    settings = settings or Settings()
    service, metrics = Service(recommender, settings), Metrics(recommender)
    examples = (recommender.items[1:4] * 3)[:3] or ["item"]
    requests = messages.request_models(settings, examples)
    app = FastAPI(
        title="recbole-raserec",
        version=__version__,
        redoc_url=None,
        description="Recommendations from a trained model.",
    )
    app.state.service, app.state.metrics = service, metrics

    async def reading(call: Callable[[], Response]) -> Response:
        return await asyncio.get_running_loop().run_in_executor(service.readers, call)

    async def changing(call: Callable[[], Any]) -> Response:
        return await asyncio.get_running_loop().run_in_executor(service.writer, lambda: _json(call()))

    def asked(request: Request, body: bytes) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "media_type", "send JSON, with the header Content-Type: application/json.")
        return messages.parse(requests[request.url.path], body, settings)

    def permitted(request: Request) -> None:
        if settings.token is None:
            raise Problem(
                403, "token", "this server changes nothing: start it with --token_file=FILE, or with "
                f"{TOKEN_VARIABLE} set, and send that token as Authorization: Bearer TOKEN.",
            )  # fmt: skip
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), settings.token.encode())
        if scheme.lower() != "bearer" or not same:
            raise Problem(
                401, "token", "send the server's token as Authorization: Bearer TOKEN.", {"WWW-Authenticate": "Bearer"}
            )

    @app.post("/recommend", **_described("RecommendRequest", messages.Rankings))
    async def recommend(request: Request) -> Response:
        """The k best items for each history."""
        body = await request.body()

        def call() -> Response:
            found = recommender.recommend(**dict(asked(request, body)))
            rows = zip(found.items, found.scores, found.dropped.tolist(), found.popular.tolist())
            names = ("items", "scores", "dropped", "popular")
            return _json({"results": [dict(zip(names, (a, b.tolist(), c, d))) for a, b, c, d in rows]})

        return await reading(call)

    @app.post("/explain", **_described("ExplainRequest", Explanation, page=True))
    async def explain(
        request: Request,
        format: Optional[Literal["json", "html"]] = Query(None, description="wins over the header Accept"),
    ) -> Response:
        """Why the k best items are recommended: JSON, or a page where `Accept` has text/html."""
        body = await request.body()
        html = format == "html" or (format is None and "text/html" in request.headers.get("accept", ""))

        def call() -> Response:
            found = recommender.explain(**dict(asked(request, body)))
            if not html:
                return Response(found.to_json(), media_type="application/json")
            return Response(
                found.to_html(), media_type="text/html",
                headers={"Content-Security-Policy": CSP, "Referrer-Policy": "no-referrer", "Vary": "Accept"},
            )  # fmt: skip

        return await reading(call)

    @app.post("/update", **_described("UpdateRequest", messages.Updated, token=True))
    async def update(request: Request) -> Response:
        """Take up new interactions. When this answers 200 they are on the disk."""
        permitted(request)
        body = await request.body()

        def call() -> Any:
            wanted = asked(request, body)
            done = recommender.update([dict(event) for event in wanted.events], wanted.strict)
            metrics.events.inc(done.events)
            return vars(done)

        return await changing(call)

    @app.post("/forget", **_described("ForgetRequest", messages.Forgotten, token=True))
    async def forget(request: Request) -> Response:
        """Forget a user: at once in all answers, in the files with the next save."""
        permitted(request)
        body = await request.body()
        return await changing(lambda: {"memories": recommender.forget(asked(request, body).user)})

    @app.post("/save", **_described(None, messages.Saved, token=True))
    async def save(request: Request) -> Response:
        """Save now what is in the journal only."""
        permitted(request)
        return await changing(lambda: {"changes": service.save()})

    @app.get("/health", response_model=messages.Health)
    async def health() -> Response:
        """What is served, and whether it takes requests."""
        found = {
            "ready": service.ready, "version": __version__, "model": recommender.name, "dataset": recommender.dataset,
            "fingerprint": recommender.fingerprint, "users": recommender.n_users,
            "items": len(recommender.items) - 1, "memories": count_memories(recommender),
            "unsaved": recommender.unsaved,
        }  # fmt: skip
        return _json(found)

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> Response:
        return answer(error)

    @app.exception_handler(InputError)
    async def senseless(_: Request, error: InputError) -> Response:
        return answer(Problem(422, "invalid", str(error)))

    @app.exception_handler(OSError)
    async def full(_: Request, error: OSError) -> Response:
        return answer(Problem(503, "server", f"{error.strerror or 'the disk failed'}: nothing was changed."))

    @app.exception_handler(RequestValidationError)
    async def query(_: Request, error: RequestValidationError) -> Response:
        return answer(Problem(422, "invalid", "format: give json or html, or leave it out."))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            routes = ", ".join(sorted(PATHS))
            return answer(Problem(404, "not_found", f"there is no such route; there are {routes}."))
        message = f"{request.method:.20} is not for {request.url.path:.80}: {error.detail}."
        return answer(Problem(error.status_code, "method", message, dict(error.headers or {})))

    app.add_middleware(Gate, settings=settings, metrics=metrics, paths=PATHS)
    app.openapi = lambda: _openapi(app, requests)
    return app


PATHS = ("/recommend", "/explain", "/update", "/forget", "/save", "/health", "/metrics", "/docs", "/openapi.json")


def _json(value: Any) -> Response:
    return Response(json.dumps(value, ensure_ascii=False, allow_nan=False), media_type="application/json")


def _described(body: Optional[str], answered: Any, token: bool = False, page: bool = False) -> dict[str, Any]:
    """What OpenAPI says of a route: its body, which the route reads by itself, and all its answers."""
    statuses = [408, 413, 429, *((400, 415, 422) if body else ()), *((401, 403, 503) if token else ())]
    responses: dict[Any, Any] = {status: {"model": Error, "description": ABOUT[status]} for status in sorted(statuses)}
    if page:
        responses[200] = {"content": {"text/html": {"schema": {"type": "string"}}}}
    extra: dict[str, Any] = {"security": [{"token": []}]} if token else {}
    if body:
        schema = {"$ref": f"#/components/schemas/{body}"}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"response_model": answered, "responses": responses, "openapi_extra": extra}


def _openapi(app: FastAPI, requests: dict[str, Any]) -> dict[str, Any]:
    if not app.openapi_schema:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models: Any = [(model, "validation") for model in requests.values()]
        _, made = models_json_schema(models, ref_template="#/components/schemas/{model}")
        components = found.setdefault("components", {})
        components.setdefault("schemas", {}).update(made["$defs"])
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = found
    return app.openapi_schema
