"""Bind the socket before anything is loaded, so that a taken port is reported at once; run the server."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Any

from asit.errors import ConfigError, missing_extra

if TYPE_CHECKING:
    from asit.serve.guard import Guard

CONNECTIONS = 512
"""Most connections at once; further ones are answered with 503."""

QUIET = 20.0
"""Seconds after which a connection without a complete request head is closed."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: this machine has no such address, or the port is taken or not allowed.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(address[0]), port), family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise ConfigError(
            f"--host {host} --port {port}: {'this port is taken' if taken else error}",
            "an address of this machine, and a free port from 0 to 65535 that you may use",
            "leave out --host for 127.0.0.1; pass --port 0 for any free port",
        ) from None


def address(listening: socket.socket) -> str:
    """Return the address for a browser: http://HOST:PORT/."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def need_extra() -> None:
    """Raise a ConfigError if the web libraries are not installed."""
    try:
        import starlette
        import uvicorn
    except ImportError as error:
        raise missing_extra("asit serve", error.name, "serve") from None
    del starlette, uvicorn


def server(app: Guard) -> Any:
    """Return a uvicorn.Server; its `run(sockets=[...])` serves until it is stopped."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.queue.close()  # uvicorn would wait for the computations, and then print their tracebacks
            await super().shutdown(sockets)

    class Protocol(H11Protocol):
        """With a timeout for a request's head, without which slow clients hold connections for ever."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(QUIET, self._look, None)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self, answered: Any) -> None:
            """Close if no request has begun since the last look, when `answered` was the latest."""
            over = self.cycle is None or self.cycle.response_complete
            if over and self.cycle is answered:
                self.transport.close()
                return
            self._timer = self.loop.call_later(QUIET, self._look, self.cycle if over else self)

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_level="error",
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=round(QUIET),
        timeout_graceful_shutdown=3,
    )
    return Server(config)


def run(app: Guard, listening: socket.socket) -> None:
    """Serve until Ctrl-C or a signal, which is raised again after all is closed."""
    try:
        server(app).run(sockets=[listening])
    finally:
        app.queue.close()
        listening.close()
