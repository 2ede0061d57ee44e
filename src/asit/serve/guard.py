"""Who may ask: the Host and Origin of a request, and the headers that every answer carries.

A page of another site must not use a server on this machine. It could try three ways: a request to the server's own
address (a browser marks it with Origin or Sec-Fetch-Site), a name of its own that leads to this machine (DNS rebinding:
the Host header has that name), or a frame, image or player around an answer (the headers forbid it).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from asit.serve.limits import Gate, Receive, RefusedError

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
"""On every answer: nothing is loaded from elsewhere, no script but the page's own file, no frame around it."""


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Guard:
    """An ASGI application around another: refuses other sites, and adds the headers.

    Args:
        app: what is guarded.
        gate: of the application, for whoever stops it.
        refuse: makes an ASGI application of a refusal.
        host: the address that is listened on. One of this machine's own: the names of loopback alone are answered;
            another: any IP address, the machine's names and `names`.
        names: host names to answer beside these.
    """

    def __init__(
        self,
        app: Application,
        gate: Gate,
        refuse: Callable[[RefusedError], Application],
        host: str,
        names: Sequence[str] = (),
    ) -> None:
        self.app, self.gate, self.refuse = app, gate, refuse
        self.local = is_loopback(host)
        self.names = {"localhost", host.lower(), *(name.lower() for name in names)}
        if not self.local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"an ASGI connection of type {scope['type']}: http alone is served")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self.check(scope["method"], scope["path"], headers)
        except RefusedError as refusal:
            await self.refuse(refusal)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)

    def check(self, method: str, path: str, headers: MutableMapping[str, str]) -> None:
        """Refuse a request that another site made.

        Raises:
            RefusedError: 421 for a Host that is not ours, 403 for an Origin that is not the Host.
        """
        host = headers.get("host", "")
        if not self._ours(_name(host)):
            raise RefusedError(
                421,
                f"the Host {host[:100]!r}",
                "localhost or this machine's address" if self.local else "an address or a name of this machine",
                "open the address that asit serve printed, or allow the name with --allow-host",
            )
        if not path.startswith("/api"):
            return
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        # The scheme may differ: behind a proxy that speaks TLS the page is https, and we are not.
        foreign = origin is not None and origin.lower().partition("://")[2] != host.lower()
        if foreign or site in ("cross-site", "same-site"):
            raise RefusedError(
                403,
                f"a {method} from the site {(origin or site)[:100]!r}",
                "the server's own page, or a program that sends no Origin",
                "open the server's page itself",
            )

    def _ours(self, name: str) -> bool:
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.local


def _name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
