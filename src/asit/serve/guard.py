"""Refuse requests that pages of other sites make, and add security headers to every answer.

Another site's page could use a server on this machine in three ways: a request to its address (the browser marks it
with Origin or Sec-Fetch-Site), a name of its own that resolves to this machine (DNS rebinding: Host has that name), or
a frame, image or player around an answer (the headers forbid it).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from asit.serve.limits import RefusedError
from asit.serve.request_queue import Receive, RequestQueue

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

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


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    address = _address(host)
    return address.is_loopback if address else host.lower() == "localhost"


class Guard:
    """An ASGI application around another one: refuses other sites' requests and adds the headers.

    Args:
        app: the application.
        queue: of the application, for the server to close.
        refuse: makes an ASGI application of a refusal.
        host: the address that is listened on. For a loopback address only names of loopback are answered, for another
            one also any IP address and the machine's names.
        names: further host names to answer.
    """

    def __init__(
        self,
        app: Application,
        queue: RequestQueue,
        refuse: Callable[[RefusedError], Application],
        host: str,
        names: Sequence[str] = (),
    ) -> None:
        self.app, self.queue, self.refuse = app, queue, refuse
        self.local = is_loopback(host)
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        if not self.local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan; there are no routes of websockets
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        app = self.app
        try:
            self._check(scope["method"], scope["path"], headers)
        except RefusedError as refusal:
            app = self.refuse(refusal)
        await app(scope, receive, with_headers)

    def _check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raise 421 for a Host that is not this machine, 403 for an Origin that is not the Host."""
        host = headers.get("host", "")
        if not self._is_here(_hostname(host)):
            raise RefusedError(
                421,
                f"the Host {host[:100]!r}",
                "localhost or this machine's address" if self.local else "an address or a name of this machine",
                "open the address that asit serve printed, or allow the name with --allow-host",
            )
        if not path.startswith("/api"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        # The scheme may differ: behind a proxy with TLS the page is https, and this server is not.
        foreign = origin is not None and origin.lower().partition("://")[2] != host.lower()
        if foreign or site in ("cross-site", "same-site"):
            raise RefusedError(
                403,
                f"a {method} from the site {(origin or site)[:100]!r}",
                "the server's own page, or a program that sends no Origin",
                "open the server's page itself",
            )

    def _is_here(self, name: str) -> bool:
        address = _address(name)
        return name in self.names or (address is not None and (address.is_loopback or not self.local))


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _hostname(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
