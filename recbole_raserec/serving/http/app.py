"""The service as a FastAPI application: what works behind it, its routes, and their description as OpenAPI."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Literal, Optional

from recbole_raserec import __version__
from recbole_raserec.distributed import cores
from recbole_raserec.errors import InputError, MissingExtraError
from recbole_raserec.serving.explain import Explanation
from recbole_raserec.serving.http import messages
from recbole_raserec.serving.http.limits import CHANGES, Limits, Metrics, answer
from recbole_raserec.serving.http.messages import Error, Problem, exceeded
from recbole_raserec.serving.http.settings import Settings, log, log_error

try:
    from fastapi import Depends, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from pydantic.json_schema import models_json_schema
    from starlette.exceptions import HTTPException
except ImportError as missing:
    raise MissingExtraError("serve", missing.name or "fastapi", "the service stands on it") from None

BEARER = HTTPBearer(scheme_name="token", auto_error=False)

PATHS = ("/recommend", "/explain", *CHANGES, "/health", "/metrics", "/docs", "/openapi.json")
SMALL = 1000  # items of a request that is answered before larger ones

#: For the page of an explanation: what stands in it works, and nothing is loaded, sent, or framed. The page itself
#: names its own style and script by their digests, and both policies hold.
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)

ABOUT = {
    400: "the body is no JSON in UTF-8", 401: "the token is missing or wrong", 403: "the server has no token",
    404: "there is no such route", 408: "the body did not arrive in time", 413: "the body has too many bytes",
    415: "the body is not called application/json", 421: "the header Host is no name of this server",
    422: "the request does not make sense, or exceeds a limit",
    429: "too many requests at a time", 503: "the disk took nothing; nothing was changed",
}  # fmt: skip


class Service:
    """A `Recommender` at work: threads for reading calls, one for changes, and saves from time to time.

    Large reading calls have threads of their own, so that small ones wait for no large one.
    """

    def __init__(self, recommender: Any, settings: Settings):
        self.recommender, self.settings = recommender, settings
        workers = settings.workers or min(4, cores())
        share = (max(1, cores() // workers),)
        self.readers = ThreadPoolExecutor(workers, "read", _threads, share)
        self.large = ThreadPoolExecutor(max(1, workers // 2), "large", _threads, share)
        self._large = 0  # calls at work or waiting
        # Changes come one after the other anyway; a save keeps them waiting, and must not keep readers waiting.
        self.writer = ThreadPoolExecutor(1, "write", _threads, share)
        self.ready = True
        self._stopping = threading.Event()
        self._saver = threading.Thread(target=self._save_repeatedly, name="save", daemon=True)

    async def run(self, pool: ThreadPoolExecutor, work: Callable[[], Any]) -> Any:
        """The result of a call in a thread of a pool."""
        self._large += pool is self.large
        try:
            if pool is self.large and self._large > max(1, self.settings.max_concurrent // 2):
                what = "requests, half of them large ones, run at a time: ask again later"
                raise exceeded(self.settings, 429, "max_concurrent", None, what)
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        finally:
            self._large -= pool is self.large

    def start(self) -> None:
        """Save every `save_every` seconds from now on."""
        if self.settings.save_every:
            self._saver.start()

    def save(self) -> int:
        """Save, if there is anything to; the number of changes that were not saved before."""
        changes = int(self.recommender.unsaved)
        if changes:
            self.recommender.save()
            log("saved", changes=changes)
        return changes

    def stop(self) -> None:
        """Finish what runs, save and let go of the directory; after an `OSError` the journal has everything."""
        self.ready = False
        self._stopping.set()
        self.readers.shutdown()
        self.large.shutdown()
        self.writer.shutdown()
        if self._saver.is_alive():
            self._saver.join()
        try:
            self.save()
        finally:
            self.recommender.close()

    def _save_repeatedly(self) -> None:
        while not self._stopping.wait(self.settings.save_every):
            try:
                self.writer.submit(self.save).result()
            except Exception as error:  # the journal has the changes, and the next save may succeed
                log_error("not saved", error)


def create_app(recommender: Any, settings: Optional[Settings] = None) -> FastAPI:
    """The application of a `Recommender`, which should keep a journal; `app.state.service` is its `Service`."""
    settings = settings or Settings()
    service, metrics = Service(recommender, settings), Metrics(recommender)
    requests = messages.request_models(settings, (recommender.items[1:4] * 3)[:3] or ["item"])
    about = "Recommendations from a trained model."
    app = FastAPI(
        title="recbole-raserec", version=__version__, redoc_url=None, description=about,
        swagger_ui_oauth2_redirect_url=None, redirect_slashes=False,  # it redirects to the name in the header Host
    )  # fmt: skip
    app.state.service = service
    reads = settings.read_token is not None

    async def run(
        request: Request, call: Callable[[Any], Any], pool: Optional[ThreadPoolExecutor] = None, weight: int = 1
    ) -> Response:
        """The answer of `call` to a request; without `pool` its size, times `weight`, decides whose threads it has."""
        body, kind = await request.body(), request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "media_type", "send JSON, with the header Content-Type: application/json.")

        model, fit = requests[request.scope["path"]], (service.readers, service.large)
        wanted = await service.run(fit[len(body) > 16 * SMALL], lambda: messages.parse(model, body, settings))

        def work() -> Response:
            found = call(wanted)
            return found if isinstance(found, Response) else JSONResponse(found)

        return await service.run(pool or fit[weight * messages.size(wanted) > SMALL], work)

    @app.post("/recommend", **_described("RecommendRequest", messages.Rankings, reads))
    async def recommend(request: Request) -> Response:
        """The k best items for each history."""

        def call(wanted: Any) -> Any:
            found = recommender.recommend(**dict(wanted))
            scores = (row.tolist() for row in found.scores)
            rows = zip(found.items, scores, found.dropped.tolist(), found.popular.tolist())
            return {"results": [dict(zip(messages.Ranking.model_fields, row)) for row in rows]}

        return await run(request, call)

    wins: Any = Query(None, description="wins over the header Accept")

    @app.post("/explain", **_described("ExplainRequest", Explanation, reads, text="text/html"))
    async def explain(request: Request, format: Optional[Literal["json", "html"]] = wins) -> Response:
        """Why the k best items are recommended: JSON, or a page where `Accept` has text/html."""
        html = format == "html" or (format is None and "text/html" in request.headers.get("accept", ""))

        def call(wanted: Any) -> Response:
            found = recommender.explain(**dict(wanted))
            if not (settings.show_users or request.scope["authorized"]):
                found = found.without_users()
            if html:
                headers = {"Content-Security-Policy": CSP, "Vary": "Accept"}
                return Response(found.to_html(), media_type="text/html", headers=headers)
            return Response(found.to_json(), media_type="application/json")

        return await run(request, call, weight=10)

    @app.post("/update", **_described("UpdateRequest", messages.Updated, True))
    async def update(request: Request) -> Response:
        """Take up new interactions. When this answers 200 they are on the disk."""

        def call(wanted: Any) -> Any:
            done = recommender.update([dict(event) for event in wanted.events], wanted.strict)
            metrics.events.inc(done.events)
            return vars(done)

        return await run(request, call, service.writer)

    @app.post("/forget", **_described("ForgetRequest", messages.Forgotten, True))
    async def forget(request: Request) -> Response:
        """Forget a user: at once in all answers, in the files with the next save."""
        return await run(request, lambda wanted: {"memories": recommender.forget(wanted.user)}, service.writer)

    @app.post("/save", **_described(None, messages.Saved, True))
    async def save() -> Response:
        """Save now what is in the journal only."""
        return JSONResponse({"changes": await service.run(service.writer, service.save)})

    @app.get("/health", **_described(None, messages.Health, False))
    async def health(request: Request) -> Response:
        """What is served, and whether it takes requests."""
        if settings.read_token is not None and not request.scope["authorized"]:
            return JSONResponse({"ready": service.ready})
        return JSONResponse({
            "ready": service.ready, "version": __version__, "model": recommender.name, "dataset": recommender.dataset,
            "fingerprint": recommender.fingerprint, "users": recommender.n_users,
            "items": len(recommender.items) - 1, "memories": recommender.live.n_memories,
            "unsaved": recommender.unsaved,
        })  # fmt: skip

    @app.get("/metrics", **_described(None, None, reads, text="text/plain"))
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def refuse(request: Request, error: Exception) -> Response:
        return answer(_problem(request, error))

    for kind in (Problem, InputError, OSError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)
    app.add_middleware(Limits, settings=settings, metrics=metrics, paths=PATHS)
    app.openapi = lambda: _openapi(app, requests)
    return app


def _threads(number: int) -> None:
    """Both are settings of the calling thread."""
    import faiss
    import torch

    torch.set_num_threads(number)
    faiss.omp_set_num_threads(number)


def _problem(request: Request, error: Any) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, InputError):
        return Problem(422, "invalid", str(error))
    if isinstance(error, OSError):
        return Problem(503, "server", f"{error.strerror or 'the disk failed'}: nothing was changed.")
    if isinstance(error, RequestValidationError):
        return Problem(422, "invalid", "format: give json or html, or leave it out.")
    if error.status_code == 404:
        return Problem(404, "not_found", f"there is no such route; there are {', '.join(sorted(PATHS))}.")
    message = f"{request.method:.20} is not for {request.scope['path']:.80}: {error.detail}."
    return Problem(error.status_code, "method", message, dict(error.headers or {}))


def _described(body: Optional[str], answered: Any, token: bool, text: str = "") -> dict[str, Any]:
    """What OpenAPI says of a route: its body, which the route reads by itself, and all its answers."""
    changes = answered in (messages.Updated, messages.Forgotten, messages.Saved)
    statuses = [408, 413, 421, 429, *((400, 415, 422) if body else ()), *((401,) if token else ())]
    statuses += (403, 503) if changes else ()
    responses: dict[Any, Any] = {status: {"model": Error, "description": ABOUT[status]} for status in sorted(statuses)}
    if text:
        responses[200] = {"content": {text: {"schema": {"type": "string"}}}}
    found = {"response_model": answered, "responses": responses, "dependencies": [Depends(BEARER)] if token else []}
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        found["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return found


def _openapi(app: FastAPI, requests: dict[str, Any]) -> dict[str, Any]:
    if not app.openapi_schema:
        app.openapi_schema = FastAPI.openapi(app)
        models: Any = [(model, "validation") for model in requests.values()]
        _, made = models_json_schema(models, ref_template="#/components/schemas/{model}")
        app.openapi_schema["components"]["schemas"].update(made["$defs"])
    return app.openapi_schema
