"""The HTTP side of a page: routes, options, statuses. What is answered is made in `asit.serve.analysis`."""

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
from asit.serve.limits import Gate, GoneError, Job, Limits, RefusedError, TooLongError
from asit.serve.options import ENDPOINTS, described, read

if TYPE_CHECKING:
    from asit.serve.analysis import Analyst

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/lists.js": ("lists.js", "text/javascript; charset=utf-8"),
    "/server.js": ("server.js", "text/javascript; charset=utf-8"),
    "/sound.js": ("sound.js", "text/javascript; charset=utf-8"),
    "/recorder.js": ("recorder.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page: paths and the files behind them, and no others."""

_JSON = "application/json"


def application(
    analyst: Analyst,
    limits: Limits,
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
) -> Guard:
    """The page and the API of a model, as an ASGI application.

    Args:
        analyst: the model, and the index if there is one.
        limits: what a request may cost.
        host: the address that is listened on; decides which Host headers are answered, see `Guard`.
        names: host names to answer beside these.
        prepare: called once in each thread that computes.

    Returns:
        The application; its attribute `gate` tells who is inside, and closes it.
    """
    gate = Gate(limits, prepare)
    routes = [Route(path, _file(*of), methods=["GET"]) for path, of in _FILES.items()]
    routes += [
        Route("/api", _constant(described(limits)), methods=["GET"]),
        Route("/api/health", _health(gate), methods=["GET"]),
        Route("/api/model", _constant(analyst.facts() | {"limits": _shown(limits)}), methods=["GET"]),
        Route("/api/clip/{number:int}", _get(gate, "clip", analyst.clip, "audio/wav"), methods=["GET"]),
        Route(
            "/api/neighbours/{number:int}", _get(gate, "neighbours", analyst.alike, "application/json"), methods=["GET"]
        ),
    ]
    for name in ENDPOINTS:
        routes.append(Route(f"/api/{name}", _post(gate, name, getattr(analyst, name)), methods=["POST"]))
    handlers: dict[Any, Any] = {
        HTTPException: _unrouted,
        AsitError: _mistake,
        GoneError: _gone,
        Exception: _failed,  # which uvicorn then logs
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, gate, _refusal, host, names)


def _shown(limits: Limits) -> dict[str, Any]:
    return {
        "megabytes": limits.megabytes,
        "seconds": limits.seconds,
        "concurrency": limits.concurrency,
        "waiting": limits.waiting,
    }


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files("asit.serve").joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    return answer


def _constant(value: Mapping[str, Any]) -> Callable[[Request], Awaitable[Response]]:
    content = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode()

    async def answer(request: Request) -> Response:
        return _json(content)

    return answer


def _health(gate: Gate) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return _json(json.dumps({"status": "ok", "inside": gate.inside}).encode())

    return answer


def _post(gate: Gate, name: str, work: Callable[..., bytes]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        options = read(name, request.query_params.multi_items())
        length = request.headers.get("content-length", "")
        with gate.place() as place:
            body = await place.body(request.receive, int(length) if length.isdecimal() else None)
            return _json(await place.run(lambda job: work(job, body, gate.limits, **options), request.receive))

    return answer


def _get(gate: Gate, name: str, work: Callable[..., bytes], kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Of something in the index, by its number."""

    async def answer(request: Request) -> Response:
        options = read(name, request.query_params.multi_items(), numbered=True)
        number = int(request.path_params["number"])

        def compute(job: Job) -> bytes:
            return work(job, number, gate.limits, **options)

        with gate.place() as place:
            content = await place.run(compute, request.receive)
        return Response(content, media_type=kind, headers={"cache-control": "no-store"})

    return answer


def _json(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, status, media_type=_JSON, headers={"cache-control": "no-store", **(headers or {})})


def _refusal(error: AsitError) -> Response:
    """An error's three parts, with the status that fits it."""
    headers = {}
    status = 422 if isinstance(error, TooLongError) else 400
    if isinstance(error, RefusedError):
        status = error.status
        headers = {"retry-after": str(error.retry)} if error.retry is not None else {}
        headers |= {"allow": error.allow} if error.allow else {}
    words = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
    return _json(json.dumps(words, ensure_ascii=False).encode(), status, headers)


async def _mistake(request: Request, error: AsitError) -> Response:
    return _refusal(error)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return _refusal(RefusedError(405, what, f"one of {allow}", "GET /api tells what there is", allow=allow))
    expected = "the page at /, or a path of the API"
    return _refusal(
        RefusedError(error.status_code, f"{what}: {error.detail}", expected, "GET /api tells what there is")
    )


async def _gone(request: Request, error: GoneError) -> Response:
    return _refusal(RefusedError(499, "the sender hung up"))  # which nobody reads


async def _failed(request: Request, error: Exception) -> Response:
    return _refusal(
        RefusedError(500, f"{type(error).__name__} in asit serve", "an answer", "see what the server printed")
    )
