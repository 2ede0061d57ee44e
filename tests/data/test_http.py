"""Downloads over HTTP from a server that cuts, stalls, refuses and changes its files (conftest.py)."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asit.data.download import http
from asit.data.download.http import POLICY, DownloadError, RemoteFile, fetch
from asit.io import retry

DATA = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


WAITS = [1.0, 2.0, 4.0, 8.0, 16.0]
QUICK = replace(POLICY, answer=5.0)
ONCE = replace(QUICK, attempts=1)


class Calls:
    """Fetches that do not wait, and what they reported."""

    def __init__(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.folder, self.slept, self.caplog, self.at = folder, [], caplog, []  # type: ignore[var-annotated]

    @property
    def logged(self) -> list[str]:
        return self.caplog.messages

    def fetch(self, remote: RemoteFile, **options: Any) -> Path:
        progress = lambda done, total: self.at.append((done, total))  # noqa: E731
        return fetch(remote, self.folder, **{"progress": progress, "policy": QUICK, **options})

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def calls(tmp_path: Path, server: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Calls:
    server.files["/a.bin"] = DATA
    made = Calls(tmp_path, caplog)
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=made.slept.append, monotonic=time.monotonic))
    return made


def published(server: Any) -> RemoteFile:
    return RemoteFile(server.url + "/a.bin", "a.bin", len(DATA), SHA)


def bare(server: Any) -> RemoteFile:
    return RemoteFile(server.url + "/a.bin", "a.bin")


def test_a_file_is_downloaded(server: Any, calls: Calls) -> None:
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert calls.names() == ["a.bin"]
    assert calls.at[0] == (0, len(DATA))
    assert calls.at[-1] == (len(DATA), len(DATA))
    assert "range" not in server.asked[0]


@pytest.mark.parametrize("version", [{"etag": '"v1"'}, {"etag": None, "modified": "Sat, 01 Aug 2026 00:00:00 GMT"}])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_dropped_connection_is_resumed(
    server: Any, calls: Calls, version: dict[str, str | None], chunked: bool
) -> None:
    vars(server).update(version, chunked=chunked, script=[70_000, 50_000, 1, None])
    assert calls.fetch(bare(server)).read_bytes() == DATA
    assert [asked.get("range") for asked in server.asked] == [
        None,
        "bytes=70000-",
        "bytes=120000-",
        "bytes=120001-",
    ]
    assert {asked.get("if-range") for asked in server.asked[1:]} == {server.etag or server.modified}
    assert server.sent == len(DATA)
    assert calls.names() == ["a.bin"]
    assert calls.slept == [1.0] * 3  # each try brought something
    assert "retry 1 in 1 s" in calls.logged[0]


def test_a_later_call_resumes(server: Any, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError, match=r"byte 70,000 of 300,000, after 1 attempts; 70,000 bytes are in"):
        calls.fetch(published(server), policy=ONCE)
    assert calls.names() == ["a.bin.partial", "a.bin.partial.json"]
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert server.sent == len(DATA)


def test_stopping_keeps_what_has_come(server: Any, calls: Calls) -> None:
    def stop(done: int, total: int | None) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls.fetch(published(server), progress=stop)
    kept = (calls.folder / "a.bin.partial").stat().st_size
    assert 100_000 < kept < len(DATA)
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert server.asked[1]["range"] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_again(server: Any, calls: Calls) -> None:
    server.ranges, server.script = False, [70_000, None]
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert server.sent == len(DATA) + 70_000


def test_without_a_version_or_a_checksum_two_halves_are_never_joined(server: Any, calls: Calls) -> None:
    server.etag, server.script = None, [70_000, None]
    assert calls.fetch(bare(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]
    (calls.folder / "a.bin").unlink()
    server.script = [70_000, None]
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert server.asked[3]["range"] == "bytes=70000-"  # the checksum would tell


def test_a_weak_etag_does_not_join_halves(server: Any, calls: Calls) -> None:
    server.etag, server.script = 'W/"v1"', [70_000, None]
    assert calls.fetch(bare(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]


@pytest.mark.parametrize("honours", [True, False])
def test_a_file_that_changes_in_between_is_fetched_again(server: Any, calls: Calls, honours: bool) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), policy=ONCE)
    fresh = DATA[::-1]
    server.files["/a.bin"], server.etag, server.honours_if_range = fresh, '"v2"', honours
    assert calls.fetch(bare(server)).read_bytes() == fresh
    assert server.asked[1]["if-range"] == '"v1"'
    assert calls.logged == ([] if honours else [calls.logged[0]])
    assert honours or "the server's file has changed" in calls.logged[0]


def test_another_address_is_not_resumed_from_this_one(server: Any, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), policy=ONCE)
    server.files["/b.bin"] = DATA[::-1]
    assert calls.fetch(replace(bare(server), url=server.url + "/b.bin")).read_bytes() == DATA[::-1]
    assert "range" not in server.asked[1]


def test_a_file_that_became_shorter_is_fetched_again(server: Any, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), policy=ONCE)
    server.files["/a.bin"] = b"short"
    assert calls.fetch(bare(server)).read_bytes() == b"short"
    assert "shorter than what has come" in calls.logged[0]


def test_transient_errors_are_retried(server: Any, calls: Calls) -> None:
    server.script = [(500, {}), (503, {"Retry-After": "7"}), (429, {"Retry-After": "900"}), None]
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert calls.slept == [1.0, 7.0, 60.0]
    assert "500 Internal Server Error" in calls.logged[0]


def test_retries_end(server: Any, calls: Calls) -> None:
    server.script = [(502, {})] * 6
    with pytest.raises(DownloadError, match=r"502 Bad Gateway, after 6 attempts; 0 bytes are in .*\n.*\n.*put it at"):
        calls.fetch(published(server))
    assert calls.slept == WAITS
    # A server that always cuts at the same byte and cannot resume brings nothing new either.
    server.ranges, server.script = False, [70_000] * 20
    with pytest.raises(DownloadError, match="the connection ended at byte 70,000"):
        calls.fetch(published(server))
    assert len(server.script) == 14


def test_a_silent_server_times_out(server: Any, calls: Calls) -> None:
    server.script = ["stall", None]
    began = time.monotonic()
    assert calls.fetch(published(server), policy=replace(POLICY, answer=0.3)).read_bytes() == DATA
    assert time.monotonic() - began < 5
    assert "no answer in time" in calls.logged[0]
    assert server.asked[1]["range"] == "bytes=150000-"


def test_a_trickle_counts_as_silence(server: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some bytes in time each, and next to nothing in all: the tries come to an end although each brings something."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(http, "_BLOCK", 1000)
    with pytest.raises(DownloadError, match=r"only \d,000 bytes came in 60 s, after 3 attempts"):
        calls.fetch(published(server), policy=replace(POLICY, attempts=3))
    assert calls.slept == [1.0, 2.0]


def test_more_than_a_file_may_have_is_not_taken(server: Any, calls: Calls) -> None:
    server.chunked = True
    with pytest.raises(DownloadError, match=r"sends more than 200,000 bytes\n  expected: a\.bin with at most so many"):
        calls.fetch(bare(server), most=200_000)
    assert (calls.folder / "a.bin.partial").stat().st_size <= 200_000


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_permanent_errors_are_not_retried(server: Any, calls: Calls, code: int) -> None:
    server.script = [(code, {})]
    with pytest.raises(DownloadError, match=rf"a\.bin: the server answers {code}") as caught:
        calls.fetch(published(server))
    assert f"put it at {calls.folder / 'a.bin'} and run the same command" in str(caught.value)
    assert not calls.slept


def test_a_page_instead_of_the_file(server: Any, calls: Calls) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="answers with a web page"):
        calls.fetch(published(server))
    assert calls.names() == []


def test_another_size_is_refused_before_the_transfer(server: Any, calls: Calls) -> None:
    with pytest.raises(DownloadError, match=r"has 300,000 bytes\n.*300,001 bytes, as published"):
        calls.fetch(replace(published(server), size=300_001))
    assert calls.names() == []


def test_a_wrong_checksum(server: Any, calls: Calls) -> None:
    server.files["/a.bin"] = DATA[::-1]
    with pytest.raises(DownloadError, match=rf"SHA-256 [^\n]*\n.*{SHA[:16]}[^\n]*\n.*a\.bin\.damaged"):
        calls.fetch(published(server))
    assert calls.names() == ["a.bin.damaged"]
    server.files["/a.bin"] = DATA  # the next attempt starts again
    assert calls.fetch(published(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]


def test_a_file_put_there_by_hand_is_checked_and_used(server: Any, calls: Calls) -> None:
    (calls.folder / "a.bin").write_bytes(DATA)
    assert calls.fetch(published(server)).read_bytes() == DATA
    (calls.folder / "a.bin").write_bytes(DATA[:-1])
    with pytest.raises(DownloadError, match=r"a\.bin has 299,999 bytes\n.*\n.*delete it"):
        calls.fetch(published(server))
    (calls.folder / "a.bin").write_bytes(DATA[::-1])
    with pytest.raises(DownloadError, match="as published"):
        calls.fetch(published(server))
    assert not server.asked


def test_redirections_are_followed(server: Any, calls: Calls) -> None:
    server.script = [(302, {"Location": "/a.bin"})]
    assert calls.fetch(replace(published(server), url=server.url + "/elsewhere")).read_bytes() == DATA


def test_no_server_and_no_address(calls: Calls) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=r"no connection \(Connection refused\), after 6 attempts"):
        calls.fetch(RemoteFile(f"http://127.0.0.1:{port}/a.bin", "a.bin"))
    for url in ("file:///etc/hosts", "ftp://example.org/a", "a.bin", "http://127.0.0.1:port/a.bin"):
        with pytest.raises(DownloadError, match="not an address"):
            calls.fetch(RemoteFile(url, "a.bin"))


def test_no_network(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(DownloadError, match=r"no such host[^\n]*\n[^\n]*\n.*check the connection, or set https_proxy"):
        calls.fetch(RemoteFile("https://data.example/a.bin", "a.bin"))


def test_a_full_disk(server: Any, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return Full() if path.suffix == ".partial" and "b" in mode else real(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DownloadError, match=r"the disk is full[^$]*make room and run the same command"):
        calls.fetch(published(server))
