"""A local server that answers as the Hugging Face hub does: api/models for a list of files, resolve for a file.

Repositories are folders below a root, `ROOT/owner/name`; their files are served from two commits, "main" and "first".
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMITS = {"main": "a" * 40, "first": "b" * 40}
LARGE = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Files that the hub keeps in large storage and names by their SHA-256."""


class HubServer(ThreadingHTTPServer):
    """The server.

    `asked` lists the requests, `ranges` those for a part of a file; `cut` are paths whose first answer ends in the
    middle, `wrong` names of files that are sent with another last byte than they have.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.asked, self.ranges, self.cut, self.wrong = (
            root,
            list[str](),
            list[str](),
            set[str](),
            set[str](),
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@contextmanager
def hub(root: Path) -> Iterator[HubServer]:
    """A running server."""
    server = HubServer(root)
    try:
        yield server
    finally:
        server.stop()


def environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a process that asks this server in place of the hub, with caches below `home`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    return {**clean, **own, **quiet, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repository, rest = "/".join(parts[:2]), parts[3:]
        revision, name = (rest[0] if rest else "main"), "/".join(rest[1:])
        if repository == "someone/broken":
            return self.send(500, {})
        if repository == "someone/gated" and not api:
            return self.send(403, {"X-Error-Code": "GatedRepo"}, b"ask the owner")
        folder = self.server.root / repository
        if not folder.is_dir():
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        commit = COMMITS.get(revision, revision if revision in COMMITS.values() else None)
        if commit is None:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        if api:
            names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            facts = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, {"Content-Type": "application/json"}, json.dumps(facts).encode())
        path = folder / name
        if not path.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = path.read_bytes()
        tag = (
            hashlib.sha256(content).hexdigest() if path.suffix in LARGE else f"{len(content):x}{name.replace('/', '-')}"
        )
        if name in self.server.wrong:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.send(200, {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}, content)

    do_HEAD = do_GET = answer  # noqa: N815

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        length, asked = len(body), self.headers.get("Range")
        if asked and status == 200:
            self.server.ranges.append(f"{self.path.rpartition('/')[2]} {asked}")
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status, body = 206, body[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{length - 1}/{length}"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if self.path in self.server.cut:
                self.server.cut.discard(self.path)
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
