"""The page and its HTTP API as an ASGI application; `asit.serve.analysis` computes the answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asit.errors import AsitError
from asit.serve.guard import Guard, refusal
from asit.serve.openapi import document
from asit.serve.request_queue import GoneError, Job, RefusedError, RequestLimits, RequestQueue
from asit.serve.routes import ENDPOINTS, NEIGHBOURS, QueryOption, described, read

if TYPE_CHECKING:
    from asit.serve.analysis import Analyser

Endpoint = Callable[[Request], Awaitable[Response]]

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_JSON = "application/json"


def application(
    analyser: Analyser,
    limits: RequestLimits,
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    origins: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> Guard:
    """Return the page and the API of a model as an ASGI application.

    Args:
        analyser: the model, and the index if there is one.
        limits: what a request may cost.
        host: the address that is listened on; determines which Host headers are answered, see `Guard`.
        names: further host names to answer.
        origins: sites whose pages may use the API.
        prepare: called once in each thread that computes.
    """
    queue = RequestQueue(limits, prepare)
    shown = {name: getattr(limits, name) for name in ("megabytes", "seconds", "concurrency", "waiting")}
    page = {  # the files of the page and no others
        "/" if file.name == "index.html" else f"/{file.name}": _constant(
            file.read_bytes(), _KINDS[file.name.rpartition(".")[2]], "no-cache"
        )
        for file in resources.files("asit.serve").joinpath("page").iterdir()
    }

    async def health(request: Request) -> Response:
        return _response(_json({"status": "ok", "inside": queue.inside}))

    gets: dict[str, Endpoint] = {
        **page,
        "/api": _constant(_json(described())),
        "/api/openapi.json": _constant(_json(document())),
        "/api/health": health,
        "/api/model": _constant(_json(analyser.facts() | {"limits": shown})),
        "/api/map": _endpoint(queue, "map", {}, analyser.map),
        "/api/clip/{number:int}": _endpoint(queue, "clip", {}, analyser.clip, "audio/wav"),
        "/api/neighbours/{number:int}": _endpoint(queue, "neighbours", NEIGHBOURS, analyser.nearest_to),
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
    for name, (_, options) in ENDPOINTS.items():
        endpoint = _endpoint(queue, name, options, getattr(analyser, name))
        routes.append(Route(f"/api/{name}", endpoint, methods=["POST"]))
    errors = (HTTPException, AsitError, GoneError, Exception)  # the last one is logged by uvicorn too
    app = Starlette(routes=routes, exception_handlers=dict.fromkeys(errors, _refuse))
    app.router.redirect_slashes = False
    return Guard(app, queue, host, names, origins)


def _constant(content: bytes, kind: str = _JSON, cache: str = "no-store") -> Endpoint:
    async def answer(request: Request) -> Response:
        return _response(content, kind, cache)

    return answer


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode()


def _endpoint(
    queue: RequestQueue, name: str, known: Mapping[str, QueryOption], work: Callable[..., bytes], kind: str = _JSON
) -> Endpoint:
    """An endpoint that takes a recording as the body or, by GET, perhaps the number of a clip of the index."""

    async def answer(request: Request) -> Response:
        options = read(name, known, request.query_params.multi_items())
        length, posted = request.headers.get("content-length", ""), request.method == "POST"

        def compute(job: Job, body: bytes) -> bytes:
            return work(job, *([body] if posted else request.path_params.values()), **options)

        size = int(length) if length.isdecimal() else None
        return _response(await queue.answer(compute, request.receive, size, upload=posted), kind)

    return answer


def _response(content: bytes, kind: str = _JSON, cache: str = "no-store") -> Response:
    return Response(content, media_type=kind, headers={"cache-control": cache})


async def _refuse(request: Request, error: Exception) -> Response:
    what, see = f"{request.method} {request.url.path[:200]}", "GET /api lists all paths"
    if isinstance(error, HTTPException) and error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        error = RefusedError(405, what, f"one of {allow}", see, {"allow": allow})
    elif isinstance(error, HTTPException):
        expected = "the page at /, or a path of the API"
        error = RefusedError(error.status_code, f"{what}: {error.detail}", expected, see)
    elif isinstance(error, GoneError):
        error = RefusedError(499, "the client has closed the connection")  # which nobody reads
    elif not isinstance(error, AsitError):
        error = RefusedError(500, f"{type(error).__name__} in asit serve", "an answer", "see the server's output")
    return refusal(error)
