"""Routes, options and statuses of the page and its HTTP API; `asit.serve.analysis` computes the answers."""

from __future__ import annotations

import ipaddress
import json
import math
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asit.config.yaml import nearest
from asit.errors import AsitError
from asit.serve.request_queue import GoneError, Job, RefusedError, RequestLimits, RequestQueue, TooLongError

if TYPE_CHECKING:
    from asit.serve.analysis import Analyser


@dataclass(frozen=True)
class QueryOption:
    """One option of a query.

    Attributes:
        about: its meaning.
        kind: int, float or str.
        default: when it is not given; None: the model's own.
        low, high: bounds of a number, inclusive.
        choices: of a str.
    """

    about: str
    kind: type
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.low:g} to {self.high:g}"

    def value(self, text: str) -> Any:
        """Return the value of a query's text; raises ValueError if it is not allowed."""
        # Python would also read 1_0, spaces and the digits of other scripts as numbers.
        if text not in self.choices and (self.kind is str or not _NUMBER.fullmatch(text)):
            raise ValueError(text)
        value = self.kind(text)
        if self.kind is not str and not self.low <= value <= self.high:  # NaN too
            raise ValueError(text)
        return value


_NUMBER = re.compile(r"[-+]?[0-9.]{1,20}(e[-+]?[0-9]{1,3})?", re.IGNORECASE)
_LAYER = "block of the encoder, 0 the first, -1 the last"
_LABELS = {
    "top": QueryOption("labels of the whole clip, best first", int, 5, 1, 10_000),
    "threshold": QueryOption("lowest score of a segment", float, 0.5, 0, 1),
    "window": QueryOption("seconds of a window; as in training if not given", float, None, 0.01, 600),
    "hop": QueryOption("seconds from window to window; end to end if not given", float, None, 0.01, 600),
}
NEIGHBOURS = {"k": QueryOption("number of neighbours", int, 10, 1, 1000)}
"""Options of the neighbours of a recording or of a clip of the index."""

ENDPOINTS: dict[str, tuple[str, dict[str, QueryOption]]] = {
    "tag": ("scores of the model's labels, of the clip and of its windows", _LABELS),
    "embed": (
        "the clip's vector, or with level=frames also one for each moment",
        {
            "level": QueryOption("clip, or clip and frames", str, "clip", choices=("clip", "frames")),
            "layer": QueryOption(_LAYER, int, None, -1000, 1000),
            "hop": QueryOption("seconds between frames; a column of patches if not given", float, None, 0.001, 60),
        },
    ),
    "neighbours": (
        "the clips of the index that are most similar to the recording, or to a part of it",
        {
            **NEIGHBOURS,
            "start": QueryOption("where the part begins, in seconds", float, 0.0, 0, 1e6),
            "seconds": QueryOption("length of the part; to the end if not given", float, None, 0.01, 1e6),
        },
    ),
    "attention": (
        "what the class token of a block attends to, for each head, moment and band of the spectrogram",
        {"layer": QueryOption(_LAYER, int, -1, -1000, 1000)},
    ),
    "analyse": (
        "all that the page shows: spectrogram, labels with their times, vector, colours of the frames, neighbours",
        {**_LABELS, **NEIGHBOURS},
    ),
}
"""POST /api/NAME with the bytes of an audio file as the body: what it answers, and its options."""


def read(endpoint: str, known: Mapping[str, QueryOption], given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the options of a request, with the defaults of those that are not given.

    Args:
        endpoint: its name, for messages.
        known: its options.
        given: names and values of the query, in their order.

    Raises:
        RefusedError: 400, an unknown option, one given twice, or a value that is not allowed.
    """
    found = {name: option.default for name, option in known.items()}
    names = [name for name, _ in given]
    for name, text in given:
        if name not in known:
            what, expected = f"/api/{endpoint} has no option {name[:50]!r}{nearest(name, known)}", ", ".join(known)
        elif names.count(name) > 1:
            what, expected = f"the option {name} is given twice", "one value"
        else:
            try:
                found[name] = known[name].value(text)
                continue
            except ValueError:
                what, expected = f"{name}={text[:50]!r}", known[name].expected
        raise RefusedError(400, what, expected, "GET /api lists the options")
    return found


def described() -> dict[str, Any]:
    """Return what GET /api answers."""
    posts = {
        f"POST /api/{name}": {
            "answers": about,
            "options": {
                key: {"meaning": option.about, "expected": option.expected, "default": option.default}
                for key, option in options.items()
            },
        }
        for name, (about, options) in ENDPOINTS.items()
    }
    return {
        "GET /api/model": {"answers": "the model, its labels, the limits, the index"},
        "GET /api/health": {"answers": "whether the server runs, and how many requests are inside"},
        **posts,
        "GET /api/clip/N": {"answers": "the sound of clip N of the index, as WAV"},
        "GET /api/neighbours/N": {"answers": "the most similar clips of clip N of the index", "options": ["k"]},
        "body": "of a POST: an audio file's bytes, as they are: curl --data-binary @clip.wav ADDRESS/api/tag",
        "errors": "found, expected, remedy; for 503 the header Retry-After has the seconds until the next try",
    }


HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Of every answer: only the page's own files are loaded, and no other page may frame it."""


class Guard:
    """An ASGI application around another one: refuses requests that pages of other sites make, and adds the headers.

    Such a page could use a server on this machine in three ways: a request to its address (the browser marks it with
    Origin or Sec-Fetch-Site), a name of its own that resolves to this machine (DNS rebinding: Host has that name), or
    a frame, image or player around an answer (the headers forbid it).

    Args:
        app: the application.
        queue: of the application, for the server to close.
        host: the address that is listened on. For a loopback address only names of loopback are answered, for another
            one also any IP address and the machine's names.
        names: further host names to answer.
    """

    def __init__(self, app: ASGIApp, queue: RequestQueue, host: str, names: Sequence[str] = ()) -> None:
        self.app, self.queue = app, queue
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        address = _address(host)
        self.local = address.is_loopback if address else host.lower() == "localhost"
        if not self.local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        app = self.app
        if scope["type"] == "http":  # else the lifespan; there are no routes of websockets
            try:
                self._check(scope["method"], scope["path"], Headers(scope=scope))
            except RefusedError as error:
                app = refusal(error)
        await app(scope, receive, with_headers)

    def _check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise 421 for a Host that is not this machine, 403 for an Origin that is not the Host."""
        host = headers.get("host", "").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        address = _address(name)
        if name not in self.names and not (address and (address.is_loopback or not self.local)):
            raise RefusedError(
                421,
                f"the Host {host[:100]!r}",
                "localhost or this machine's address" if self.local else "an address or a name of this machine",
                "open the address that asit serve printed, or allow the name with --allow-host",
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        # The scheme may differ: behind a proxy with TLS the page is https, and this server is not.
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if path.startswith("/api") and (foreign or site in ("cross-site", "same-site")):
            raise RefusedError(
                403,
                f"a {method} from the site {(origin or site)[:100]!r}",
                "the server's own page, or a program that sends no Origin",
                "open the server's page itself",
            )


def refusal(error: AsitError) -> Response:
    """Return the three parts of an error as JSON, with its status."""
    status, headers = 422 if isinstance(error, TooLongError) else 400, {}
    if isinstance(error, RefusedError):
        status, headers = error.status, error.headers
    parts = {"found": error.found, "expected": error.expected, "remedy": error.remedy}
    content = json.dumps(parts, ensure_ascii=False, indent=1)
    return Response(content, status, {"cache-control": "no-store", **headers}, "application/json")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


Endpoint = Callable[[Request], Awaitable[Response]]

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_JSON = "application/json"


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

    async def health(request: Request) -> Response:
        return _response(_json({"status": "ok", "inside": queue.inside}))

    gets: dict[str, Endpoint] = {
        **page,
        "/api": _constant(_json(described())),
        "/api/health": health,
        "/api/model": _constant(_json(analyser.facts() | {"limits": shown})),
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
    return Guard(app, queue, host, names)


def _constant(content: bytes, kind: str = _JSON, cache: str = "no-store") -> Endpoint:
    async def answer(request: Request) -> Response:
        return _response(content, kind, cache)

    return answer


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).encode()


def _endpoint(
    queue: RequestQueue, name: str, known: Mapping[str, QueryOption], work: Callable[..., bytes], kind: str = _JSON
) -> Endpoint:
    """An endpoint that takes a recording as the body or, by GET, the number of a clip of the index."""

    async def answer(request: Request) -> Response:
        options = read(name, known, request.query_params.multi_items())
        length, number = request.headers.get("content-length", ""), request.path_params.get("number")

        def compute(job: Job, body: bytes) -> bytes:
            return work(job, body if number is None else number, **options)

        size = int(length) if length.isdecimal() else None
        return _response(await queue.answer(compute, request.receive, size, upload=number is None), kind)

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
