"""Routes, options and statuses of the page and its HTTP API; `asit.serve.analysis` computes the answers."""

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
from asit.serve.guard import Guard
from asit.serve.limits import GoneError, Job, RefusedError, RequestLimits, TooLongError
from asit.serve.query_options import ENDPOINTS, NEIGHBOURS, QueryOption, described, read
from asit.serve.request_queue import RequestQueue

if TYPE_CHECKING:
    from asit.serve.analysis import Analyser

Endpoint = Callable[[Request], Awaitable[Response]]

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_JSON = "application/json"
_SEE = "GET /api lists all paths"


def application(
    analyser: Analyser,
    limits: RequestLimits,
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> Guard:
    """Return the page and the API of a model as an ASGI application.

    Args:
        analyser: the model, and the index if there is one.
        limits: what a request may cost.
        host: the address that is listened on; determines which Host headers are answered, see `Guard`.
        names: further host names to answer.
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
    gets: dict[str, Endpoint] = {
        **page,
        "/api": _constant(_json(described())),
        "/api/health": _health(queue),
        "/api/model": _constant(_json(analyser.facts() | {"limits": shown})),
        "/api/clip/{number:int}": _numbered(queue, "clip", {}, analyser.clip, "audio/wav"),
        "/api/neighbours/{number:int}": _numbered(queue, "neighbours", NEIGHBOURS, analyser.nearest_to, _JSON),
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
    for name in ENDPOINTS:
        routes.append(Route(f"/api/{name}", _recording(queue, name, getattr(analyser, name)), methods=["POST"]))
    handlers: dict[Any, Any] = {
        HTTPException: _unrouted,
        AsitError: _mistake,
        GoneError: _gone,
        Exception: _failed,  # uvicorn then logs it
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, queue, _refusal, host, names)


def _constant(content: bytes, kind: str = _JSON, cache: str = "no-store") -> Endpoint:
    async def answer(request: Request) -> Response:
        return _response(content, headers={"cache-control": cache}, kind=kind)

    return answer


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode()


def _health(queue: RequestQueue) -> Endpoint:
    async def answer(request: Request) -> Response:
        return _response(_json({"status": "ok", "inside": queue.inside}))

    return answer


def _recording(queue: RequestQueue, name: str, work: Callable[..., bytes]) -> Endpoint:
    """An endpoint that takes a recording as the body."""

    async def answer(request: Request) -> Response:
        options = read(name, ENDPOINTS[name][1], request.query_params.multi_items())
        length = request.headers.get("content-length", "")
        with queue.admit() as admitted:
            body = await admitted.body(request.receive, int(length) if length.isdecimal() else None)
            return _response(await admitted.run(lambda job: work(job, body, **options), request.receive))

    return answer


def _numbered(
    queue: RequestQueue, name: str, known: Mapping[str, QueryOption], work: Callable[..., bytes], kind: str
) -> Endpoint:
    """An endpoint that takes the number of a clip of the index."""

    async def answer(request: Request) -> Response:
        options = read(name, known, request.query_params.multi_items())
        number = int(request.path_params["number"])

        def compute(job: Job) -> bytes:
            return work(job, number, **options)

        with queue.admit() as admitted:
            return _response(await admitted.run(compute, request.receive), kind=kind)

    return answer


def _response(
    content: bytes, status: int = 200, headers: Mapping[str, str] | None = None, kind: str = _JSON
) -> Response:
    return Response(content, status, media_type=kind, headers={"cache-control": "no-store", **(headers or {})})


def _refusal(error: AsitError) -> Response:
    """The three parts of an error, with its status."""
    status, headers = 422 if isinstance(error, TooLongError) else 400, {}
    if isinstance(error, RefusedError):
        status, headers = error.status, error.headers
    parts = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
    return _response(_json(parts), status, headers)


async def _mistake(request: Request, error: AsitError) -> Response:
    return _refusal(error)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return _refusal(RefusedError(405, what, f"one of {allow}", _SEE, {"allow": allow}))
    expected = "the page at /, or a path of the API"
    return _refusal(RefusedError(error.status_code, f"{what}: {error.detail}", expected, _SEE))


async def _gone(request: Request, error: GoneError) -> Response:
    return _refusal(RefusedError(499, "the client has closed the connection"))  # which nobody reads


async def _failed(request: Request, error: Exception) -> Response:
    return _refusal(RefusedError(500, f"{type(error).__name__} in asit serve", "an answer", "see the server's output"))
