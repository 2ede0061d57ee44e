"""A web server on this machine that follows a script: cuts, stalls, refuses, and changes its files."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Server:
    """What is served, how, and the requests.

    Attributes:
        files: by path.
        script: for each request in turn: None to serve, (code, headers) to refuse, a number of bytes after which the
            connection is cut, "stall" to send half and then nothing, or "all" to ignore the range.
        left: requests of tar files that it still answers; then it refuses all.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    script: list[Any] = field(default_factory=list)
    ranges: bool = True
    chunked: bool = False
    left: int = 1 << 30
    kind: str = "application/octet-stream"
    asked: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)


def answer(server: Server, request: BaseHTTPRequestHandler) -> None:
    headers = {key.lower(): value for key, value in request.headers.items()}
    server.asked.append({"method": request.command, "path": request.path, **headers})
    server.left -= request.path.endswith(".tar")
    act = (503, {}) if server.left < 0 else server.script.pop(0) if server.script else None
    if isinstance(act, tuple):
        request.send_response(act[0])
        for name, value in act[1].items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    content = server.files.get(request.path)
    if content is None:
        request.send_error(404)
        return
    wanted, body = headers.get("range"), content
    if wanted and server.ranges and act != "all":
        start, _, last = wanted.removeprefix("bytes=").partition("-")
        first, end = int(start), min(int(last) + 1, len(content)) if last else len(content)
        body = content[first:end]
        if not last and first >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(content)}")
    else:
        request.send_response(200)
    request.send_header("Content-Type", server.kind)
    request.send_header(*(("Transfer-Encoding", "chunked") if server.chunked else ("Content-Length", str(len(body)))))
    request.end_headers()
    if request.command == "HEAD":
        return
    part = body[:act] if isinstance(act, int) else body[: len(body) // 2] if act == "stall" else body
    server.sent += len(part)
    if server.chunked:
        request.wfile.write(b"%x\r\n%s" % (len(body), part) + (b"\r\n0\r\n\r\n" if part == body else b""))
    else:
        request.wfile.write(part)
    request.wfile.flush()
    if act == "stall":
        server.over.wait(10)
    if len(part) < len(body):
        request.connection.shutdown(socket.SHUT_RDWR)
        request.close_connection = True


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on this machine; yields the address."""
    web = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_port}"
    finally:
        web.shutdown()
        web.server_close()


@contextmanager
def following_a_script() -> Iterator[Server]:
    """A running server that does what its `Server` says."""
    plan = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(plan, self)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Handler) as plan.url:
        yield plan
        plan.over.set()
