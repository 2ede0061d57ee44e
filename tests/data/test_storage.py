"""Parts of files on a disk, in memory and behind a web server that fails, stalls, truncates and recovers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from web_server import listening

from asit.errors import ConfigError, StoreError
from asit.io import local_files, remote_files, retry, storage
from asit.io.retry import RetryPolicy

BYTES = bytes(range(256)) * 40


@pytest.fixture
def web(server: Any) -> Any:
    """The server of conftest.py, which fsspec reads with aiohttp."""
    pytest.importorskip("aiohttp")
    return server


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the retry policy."""
    return lambda *given, **named: monkeypatch.setattr(RetryPolicy, "default", lambda: RetryPolicy(*given, **named))


def test_locations() -> None:
    assert storage.is_url("s3://bucket/x")
    assert storage.is_url("memory://x")
    assert not storage.is_url("/data/x.tar")
    assert not storage.is_url("C:\\x")
    assert storage.join("s3://b/x/", "y.tar") == "s3://b/x/y.tar"
    assert storage.join("/a", "y.tar") == "/a/y.tar"
    assert storage.join("/a", "s3://b/y") == "s3://b/y"
    assert storage.parent("s3://b/x/y.tar") == "s3://b/x"
    assert storage.parent("/a/b/y.tar") == "/a/b"


@pytest.mark.parametrize("kind", ["disk", "memory", "web"])
def test_parts_of_a_file(kind: str, tmp_path: Path, web: Any) -> None:
    folder = {"disk": str(tmp_path), "memory": "memory://parts", "web": web.url}[kind]
    location = f"{folder}/x.tar"
    if kind == "web":
        web.files["/x.tar"] = BYTES
    else:
        storage.write(location, b"old")
        storage.write(location, BYTES)
        assert storage.list(folder) == {"x.tar": len(BYTES)}
        assert storage.list(f"{folder}/none") == {}
    assert storage.read_range(location, 300, 40) == BYTES[300:340]
    assert storage.read_range(location, len(BYTES) - 1, 1) == BYTES[-1:]
    assert storage.read(location) == BYTES
    assert storage.size(location) == len(BYTES)
    assert storage.sizes([location]) == {location: len(BYTES)}
    assert storage.sizes([location, f"{folder}/none"]) == {location: len(BYTES)}
    with pytest.raises(StoreError, match=r"x.tar ends at byte 10,240\n  expected: 10,340 bytes at least"):
        storage.read_range(location, 10240, 100)
    with pytest.raises(StoreError, match=r"there is no .*none.tar\n  expected: a shard"):
        storage.read_range(f"{folder}/none.tar", 0, 5)
    if kind != "web":
        storage.remove(location)
        storage.remove(location)
        assert not storage.sizes([location])


def test_a_rewritten_file_has_another_fingerprint() -> None:
    storage.write("memory://fingerprint/x.tar", BYTES)
    first = storage.fingerprint("memory://fingerprint/x.tar")
    assert first == storage.fingerprint("memory://fingerprint/x.tar")
    assert first[0] == len(BYTES)
    storage.write("memory://fingerprint/x.tar", BYTES[::-1])
    assert storage.fingerprint("memory://fingerprint/x.tar") != first


def test_lengths_of_many_come_with_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        storage.write(f"memory://many/{i}.tar", BYTES[i:])
    asked: list[str] = []
    plain = storage.size
    monkeypatch.setattr(storage, "size", lambda location, **more: asked.append(location) or plain(location, **more))
    wanted = [*(f"memory://many/{i}.tar" for i in range(21)), "memory://few/x.tar"]
    assert storage.sizes(wanted) == {f"memory://many/{i}.tar": len(BYTES) - i for i in range(20)}
    assert asked == ["memory://few/x.tar"]


def test_transient_errors_are_retried(web: Any, caplog: pytest.LogCaptureFixture, policy: Any) -> None:
    web.files["/x.tar"], web.script = BYTES, [(503, {}), 50, (429, {})]
    policy(30, 0.001)
    assert storage.read_range(f"{web.url}/x.tar", 5, 100) == BYTES[5:105]
    assert len(caplog.messages) == 3
    assert "the server answers 503" in caplog.messages[0]
    assert "retry 1 in 0.001 s" in caplog.messages[0]
    assert "retry 3 in 0.004 s" in caplog.messages[2]
    assert [(made["method"], made["path"], made["range"]) for made in web.asked] == [
        ("GET", "/x.tar", "bytes=5-104")
    ] * 4


def test_retries_end(web: Any, caplog: pytest.LogCaptureFixture, policy: Any) -> None:
    web.files["/x.tar"], web.script = BYTES, [(500, {})] * 99
    policy(seconds=0.5, first_wait=0.01, answer=5.0)
    with pytest.raises(StoreError) as caught:
        storage.read_range(f"{web.url}/x.tar", 5, 100)
    assert "the server answers 500" in caplog.messages[0]
    assert "was not reached in" in caught.value.found
    assert "the last one: the server answers 500" in caught.value.found
    assert "--resume" in caught.value.remedy
    web.script = [(500, {})] * 99
    with pytest.raises(StoreError, match="was not reached"):  # no missing file
        storage.size(f"{web.url}/x.tar")


def test_a_server_that_stalls(web: Any, caplog: pytest.LogCaptureFixture, policy: Any) -> None:
    web.files["/x.tar"], web.script = BYTES, ["stall"]
    policy(seconds=20, first_wait=0.01, answer=0.1)
    assert storage.read_range(f"{web.url}/x.tar", 0, 9) == BYTES[:9]
    assert len(caplog.messages) == 1
    assert "no answer in time" in caplog.messages[0]


def test_a_server_that_refuses_or_sends_all_is_not_asked_again(web: Any) -> None:
    web.files["/x.tar"], web.script = BYTES, [(403, {})]
    with pytest.raises(StoreError, match="the server answers 403"):
        storage.read_range(f"{web.url}/x.tar", 0, 9)
    web.script = ["all"]
    web.asked.clear()
    with pytest.raises(StoreError, match="sends more than the requested part"):
        storage.read_range(f"{web.url}/x.tar", 0, 9)
    assert len(web.asked) == 1


class Endless(BaseHTTPRequestHandler):
    """Answers without an end, by what the path says: with a false length, compressed, as links, slow."""

    def do_GET(self) -> None:
        self.send_response(200)
        if "claim" in self.path:
            self.send_header("Content-Length", str(10**12))
        if "gzip" in self.path:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        pieces: Iterator[bytes] = itertools.repeat(bytes(1 << 16))
        if "gzip" in self.path:
            packed = zlib.compressobj(wbits=31)
            pieces = (packed.compress(bytes(1 << 20)) for _ in itertools.count())
        if "links" in self.path:
            pieces = itertools.repeat(b'<a href="clip.wav">clip</a>' * 1000)
        if "drip" in self.path:
            pieces = (time.sleep(0.02) or b"x" for _ in itertools.count())
        with contextlib.suppress(OSError):
            for piece in pieces if self.command == "GET" else ():
                self.wfile.write(piece)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("path", ["more", "claim", "gzip", "links/", "drip", "claim-drip", "range", "range-gzip"])
def test_a_server_that_never_ends(path: str, monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    """Neither more than the limit is read nor longer than the time that a store has."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(remote_files, "MOST", 4 << 20)
    monkeypatch.setattr(remote_files, "_LISTING", 1 << 20)
    began = time.monotonic()
    policy(seconds=1.0 if "drip" in path else 20.0, first_wait=5.0, answer=30.0)
    expected = "was not reached in 1 attempts" if "drip" in path else "4,194,304 bytes at most"
    if path == "claim-drip":
        expected = "has 1,000,000,000,000 bytes"
    with listening(Endless) as url:
        location = f"{url}/{path}"
        if path == "links/":
            with pytest.raises(StoreError, match="1,048,576 bytes at most"):
                storage.list(location)
        elif path.startswith("range"):
            with pytest.raises(StoreError, match="sends more than the requested part"):
                storage.read_range(location, 0, 1000)
        else:
            with pytest.raises(StoreError, match=expected):
                storage.read(location)
    assert time.monotonic() - began < 15


def test_no_server(policy: Any) -> None:
    policy(0.1, 0.01)
    with pytest.raises(StoreError, match="was not reached in"):
        storage.read_range("http://127.0.0.1:9/x.tar", 0, 9)


def test_errors_that_are_retried_briefly_or_not_at_all(monkeypatch: pytest.MonkeyPatch, policy: Any) -> None:
    class NoCredentialsError(Exception):
        """As botocore calls it."""

    def raises(error: Exception) -> None:
        def go(_: float) -> None:
            raise error

        storage._retried("s3://bucket/x", go)

    policy(seconds=1e9, first_wait=6.0)
    now = iter((0, 0, 5, 0, 0, 0, 0, 0, 0))
    # A clock of its own: fsspec's thread reads that of the time module.
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=lambda: next(now))
    monkeypatch.setattr(retry, "time", clock)
    with pytest.raises(StoreError, match=r"in 1 attempts over 5 s[\s\S]*AWS_ACCESS_KEY_ID"):
        raises(NoCredentialsError("Unable to locate credentials"))
    for error in (KeyError("size"), PermissionError("no")):
        with pytest.raises(StoreError, match="rights at hand"):
            raises(error)


def test_stores_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"nosuch:// is no kind of store"):
        storage.read("nosuch://x/y")
    with pytest.raises(ConfigError, match=r"needs s3fs, which is not installed\n.*\n.*pip install s3fs"):
        storage.read("s3://bucket/y")
    monkeypatch.setenv(retry.SECONDS, "soon")
    with pytest.raises(ConfigError, match="ASIT_STORE_SECONDS=soon"):
        storage.read("memory://x/y")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"x.tar cannot be written: the disk is full"):
        storage.write(str(tmp_path / "x.tar"), BYTES)
    assert not [*tmp_path.iterdir()]


def test_many_threads_and_more_files_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_open_files", functools.lru_cache(3)(local_files._OpenFile))
    for i in range(9):
        (tmp_path / f"{i}.tar").write_bytes(BYTES[i:])
    wrong: list[int] = []

    def reads(seed: int) -> None:
        for k in range(200):
            i, offset = (seed + k) % 9, (seed * 31 + k * 7) % 1000
            if storage.read_range(str(tmp_path / f"{i}.tar"), offset, 50) != BYTES[i + offset : i + offset + 50]:
                wrong.append(i)

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert local_files._open_files.cache_info().currsize == 3


def _child(location: str, url: str, answers: Any) -> None:
    answers.put((storage.read_range(location, 3, 4), storage.read_range(url, 3, 4)))


def test_forked_processes_read_too(tmp_path: Path, web: Any) -> None:
    location, url = str(tmp_path / "x.tar"), f"{web.url}/x.tar"
    (tmp_path / "x.tar").write_bytes(BYTES)
    web.files["/x.tar"] = BYTES
    _here = storage.read_range(location, 0, 2), storage.read_range(url, 0, 2)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_child, args=(location, url, answers))
    child.start()
    assert answers.get(timeout=30) == (BYTES[3:7], BYTES[3:7])
    child.join()
    assert storage.read_range(url, 5, 2) == BYTES[5:7]
