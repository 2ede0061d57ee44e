"""Refuse requests that pages of other sites make, unless their origin is allowed, and set the security headers."""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from asit.errors import AsitError
from asit.serve.request_queue import RefusedError, RequestQueue, TooLongError

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

_SHARED = {
    "access-control-expose-headers": "retry-after",
    "cross-origin-resource-policy": "cross-origin",
    "vary": "origin",
}
"""Of answers to a page of an allowed origin (https://fetch.spec.whatwg.org/#http-cors-protocol)."""
_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-allow-headers": "content-type",
    "access-control-allow-private-network": "true",
    "access-control-max-age": "600",
}


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
        origins: sites whose pages may use the API, such as https://example.org; "*": any site.
    """

    def __init__(
        self, app: ASGIApp, queue: RequestQueue, host: str, names: Sequence[str] = (), origins: Sequence[str] = ()
    ) -> None:
        self.app, self.queue = app, queue
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        address = _address(host)
        self.local = address.is_loopback if address else host.lower() == "localhost"
        if not self.local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        added = dict(HEADERS)

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        app = self.app
        if scope["type"] == "http":  # else the lifespan; there are no routes of websockets
            headers = Headers(scope=scope)
            try:
                if scope["path"].startswith("/api") and self._allows(headers.get("origin")):
                    added |= {"access-control-allow-origin": headers["origin"], **_SHARED}
                    if scope["method"] == "OPTIONS":  # the browser asks before it sends
                        added |= _PREFLIGHT
                        app = Response(status_code=204)
                self._check(scope["method"], scope["path"], headers)
            except RefusedError as error:
                app = refusal(error)
        await app(scope, receive, with_headers)

    def _allows(self, origin: str | None) -> bool:
        """Whether pages of this origin may use the API, as asked for."""
        return origin is not None and ("*" in self.origins or origin.lower() in self.origins)

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
        crossed = foreign or site in ("cross-site", "same-site")
        if path.startswith("/api") and crossed and not self._allows(origin):
            raise RefusedError(
                403,
                f"a {method} from the site {(origin or site)[:100]!r}",
                "the server's own page, a program that sends no Origin, or an allowed site",
                "open the server's page itself, or allow the site with --allow-origin",
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
