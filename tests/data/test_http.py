"""Downloads over HTTP from a server that cuts, stalls, refuses and changes its files (conftest.py)."""

from __future__ import annotations

import errno
import hashlib
import io
import socket
import ssl
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asit.data.download import http
from asit.data.download.http import DownloadError, fetch
from asit.data.download.registry import Archive
from asit.errors import CheckpointError
from asit.io import retry

DATA = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


class Calls:
    """Fetches that do not wait, and what they reported."""

    def __init__(self, folder: Path, url: str, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        self.slept: list[float] = []
        self.at: list[tuple[int, int | None]] = []
        self.archive = Archive(f"{url}/a.bin", "a.bin", len(DATA), 0, 0, sha256=SHA)
        self.bare = replace(self.archive, sha256=None, size=100_000)
        patch.setattr(retry, "time", SimpleNamespace(sleep=self.slept.append, monotonic=time.monotonic))
        self.policy(answer=5.0)

    def policy(self, **fields: float) -> None:
        self.patch.setattr(http, "POLICY", replace(http.POLICY, **fields))

    def fetch(self, archive: Archive | None = None) -> bytes:
        return fetch(archive or self.archive, self.folder, lambda *at: self.at.append(at)).read_bytes()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def calls(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> Calls:
    server.files["/a.bin"] = DATA
    return Calls(tmp_path, server.url, monkeypatch)


def test_a_file_is_downloaded(server: Any, calls: Calls) -> None:
    server.script = [(302, {"Location": "/a.bin"})]
    assert calls.fetch(replace(calls.archive, url=server.url + "/elsewhere")) == DATA
    assert calls.names() == ["a.bin"]
    assert calls.at[0] == (0, len(DATA))
    assert calls.at[-1] == (len(DATA), len(DATA))
    assert not any("range" in asked for asked in server.asked)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_dropped_connection_is_resumed(
    server: Any, calls: Calls, chunked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    vars(server).update(chunked=chunked, script=[70_000, 50_000, 1, None])
    assert calls.fetch(calls.bare) == DATA
    ranges = [asked.get("range") for asked in server.asked]
    assert ranges == [None, "bytes=70000-", "bytes=120000-", "bytes=120001-"]
    assert server.sent == len(DATA)
    assert calls.names() == ["a.bin"]
    assert calls.slept == [1.0] * 3  # each attempt brought something
    assert "retry 1 in 1 s" in caplog.messages[0]


def test_a_later_call_resumes(server: Any, calls: Calls) -> None:
    server.script = [70_000]
    calls.policy(attempts=1)
    with pytest.raises(DownloadError, match=r"byte 70,000 of 300,000, after 1 attempts; 70,000 bytes are in"):
        calls.fetch()
    assert calls.names() == ["a.bin.partial"]
    assert calls.fetch() == DATA
    assert server.sent == len(DATA)


def test_stopping_keeps_what_has_come(server: Any, calls: Calls) -> None:
    def stop(done: int, total: int | None) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(calls.archive, calls.folder, stop)
    kept = (calls.folder / "a.bin.partial").stat().st_size
    assert 100_000 < kept < len(DATA)
    assert calls.fetch() == DATA
    assert server.asked[1]["range"] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_again(server: Any, calls: Calls) -> None:
    server.ranges, server.script = False, [70_000, None]
    assert calls.fetch() == DATA
    assert server.sent == len(DATA) + 70_000


def test_a_file_that_became_shorter_is_fetched_again(
    server: Any, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    (calls.folder / "a.bin.partial").write_bytes(DATA[:70_000])
    server.files["/a.bin"] = b"short"
    assert calls.fetch(calls.bare) == b"short"
    assert "shorter than what has come" in caplog.messages[0]


def test_transient_errors_are_retried(server: Any, calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    server.script = [(500, {}), (503, {"Retry-After": "7"}), (429, {"Retry-After": "900"}), None]
    assert calls.fetch() == DATA
    assert calls.slept == [1.0, 7.0, 60.0]
    assert "500 Internal Server Error" in caplog.messages[0]


def test_retries_end(server: Any, calls: Calls) -> None:
    server.script = [(502, {})] * 6
    with pytest.raises(
        DownloadError, match=r"502 Bad Gateway, after 6 attempts; 0 bytes are in .*\n.*\n.*put the file"
    ):
        calls.fetch()
    assert calls.slept == [1.0, 2.0, 4.0, 8.0, 16.0]
    # A server that always cuts at the same byte and cannot resume brings nothing new either.
    server.ranges, server.script = False, [70_000] * 20
    with pytest.raises(DownloadError, match="the connection ended at byte 70,000"):
        calls.fetch()
    assert len(server.script) == 14


def test_a_silent_server_times_out(server: Any, calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    server.script = ["stall", None]
    calls.policy(answer=0.3)
    began = time.monotonic()
    assert calls.fetch() == DATA
    assert time.monotonic() - began < 5
    assert "no answer in time" in caplog.messages[0]
    assert server.asked[1]["range"] == "bytes=150000-"


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_permanent_errors_are_not_retried(server: Any, calls: Calls, code: int) -> None:
    server.script = [(code, {})]
    with pytest.raises(DownloadError, match=rf"a\.bin: the server answers {code}") as caught:
        calls.fetch()
    assert f"put the file at {calls.folder / 'a.bin'}" in str(caught.value)
    assert not calls.slept


def test_another_file_is_refused_before_the_transfer(server: Any, calls: Calls) -> None:
    with pytest.raises(DownloadError, match="300,000 bytes in place of 300,001, as published"):
        calls.fetch(replace(calls.archive, size=300_001))
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="a web page instead of the file"):
        calls.fetch()
    assert calls.names() == []


def test_more_than_a_file_may_have_is_not_taken(server: Any, calls: Calls) -> None:
    server.chunked = True
    with pytest.raises(DownloadError, match="more than 200,000 bytes are sent"):
        calls.fetch(replace(calls.bare, size=50_000))
    assert (calls.folder / "a.bin.partial").stat().st_size <= 200_000


@pytest.mark.parametrize("had", [0, 70_000])  # of another version, which the server has replaced
def test_a_wrong_checksum(server: Any, calls: Calls, had: int) -> None:
    (calls.folder / "a.bin.partial").write_bytes(DATA[:had])
    server.files["/a.bin"] = DATA[::-1]
    with pytest.raises(DownloadError, match=rf"SHA-256 [^\n]*\n.*{SHA[:16]}[^\n]*\n.*a\.bin\.damaged"):
        calls.fetch()
    assert calls.names() == ["a.bin.damaged"]
    server.files["/a.bin"] = DATA  # the next attempt starts again
    assert calls.fetch() == DATA
    assert "range" not in server.asked[1]


def test_a_file_put_there_by_hand_is_checked_and_used(server: Any, calls: Calls) -> None:
    (calls.folder / "a.bin").write_bytes(DATA)
    assert calls.fetch() == DATA
    for wrong, message in ((DATA[:-1], r"a\.bin has 299,999 bytes"), (DATA[::-1], "as published")):
        (calls.folder / "a.bin").write_bytes(wrong)
        with pytest.raises(DownloadError, match=rf"{message}[^$]*delete it"):
            calls.fetch()
    assert not server.asked


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://example.org/a", "a.bin", "http://127.0.0.1:port/a.bin"])
def test_what_is_no_address(calls: Calls, url: str) -> None:
    with pytest.raises(DownloadError, match="not an address"):
        calls.fetch(replace(calls.archive, url=url))


def test_no_server(calls: Calls) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=r"no connection \(Connection refused\), after 6 attempts"):
        calls.fetch(replace(calls.archive, url=f"http://127.0.0.1:{port}/a.bin"))


@pytest.mark.parametrize(
    "error", [socket.gaierror(socket.EAI_NONAME, "no such host"), ssl.SSLCertVerificationError(1, "not trusted")]
)
def test_no_network(calls: Calls, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(
        DownloadError, match=rf"no connection \({error.strerror}\)\n[^\n]*\n.*https_proxy; SSL_CERT_FILE"
    ):
        calls.fetch(replace(calls.archive, url="https://data.example/a.bin"))
    assert not calls.slept


def test_a_full_disk(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return Full() if path.suffix == ".partial" and "b" in mode else real(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(CheckpointError, match=r"the disk is full: [^$]*free space on the disk"):
        calls.fetch()
