"""`asit download` against a server of our own that drops, lies, stalls and changes its mind."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asit import cli
from asit.data import download as downloads
from asit.data import sources
from asit.data.archives import ArchiveError, Limits
from asit.data.download import RECORD, download
from asit.data.remote import PAUSES, DownloadError, RemoteFile, fetch
from asit.data.sources import Archive, Contents, Source
from asit.errors import ConfigError

DATA = np.random.default_rng(1).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
SHA = hashlib.sha256(DATA).hexdigest()


@dataclass
class Server:
    """What is served, how, and what was asked.

    Attributes:
        files: by path.
        script: for each request in turn: None to serve, (code, headers) to refuse, a number of bytes after which the
            connection is cut, or "stall" to send half and then nothing.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    script: list[Any] = field(default_factory=list)
    etag: str | None = '"v1"'
    modified: str | None = None
    ranges: bool = True
    minds_if_range: bool = True
    chunked: bool = False
    kind: str = "application/octet-stream"
    asked: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)


def answer(server: Server, request: BaseHTTPRequestHandler) -> None:
    headers = {key.lower(): value for key, value in request.headers.items()}
    server.asked.append({"path": request.path, **headers})
    act = server.script.pop(0) if server.script else None
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
    first, mark = 0, server.etag or server.modified
    asked = headers.get("range")
    current = "if-range" not in headers or headers["if-range"] == mark or not server.minds_if_range
    if asked and server.ranges and current:
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        if first >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
    else:
        request.send_response(200)
    for name, value in (("ETag", server.etag), ("Last-Modified", server.modified), ("Content-Type", server.kind)):
        if value:
            request.send_header(name, value)
    body = content[first:]
    request.send_header(*(("Transfer-Encoding", "chunked") if server.chunked else ("Content-Length", str(len(body)))))
    request.end_headers()
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


@pytest.fixture
def server() -> Iterator[Server]:
    plan = Server({"/a.bin": DATA})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(plan, self)

        def log_message(self, *_: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    plan.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield plan
    plan.over.set()
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


class Calls:
    """Fetches that do not wait, and what they were told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.slept, self.told, self.at = folder, [], [], []  # type: ignore[var-annotated]

    def fetch(self, remote: RemoteFile, **options: Any) -> Path:
        return fetch(
            remote,
            self.folder,
            **{
                "notify": self.told.append,
                "progress": lambda done, total: self.at.append((done, total)),
                "sleep": self.slept.append,
                "timeout": 5.0,
                **options,
            },
        )

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    return Calls(tmp_path)


def whole(server: Server) -> RemoteFile:
    return RemoteFile(server.url + "/a.bin", "a.bin", len(DATA), SHA)


def bare(server: Server) -> RemoteFile:
    return RemoteFile(server.url + "/a.bin", "a.bin")


def test_a_file_comes_whole(server: Server, calls: Calls) -> None:
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert calls.names() == ["a.bin"]
    assert calls.at[0] == (0, len(DATA))
    assert calls.at[-1] == (len(DATA), len(DATA))
    assert "range" not in server.asked[0]


@pytest.mark.parametrize("marks", [{"etag": '"v1"'}, {"etag": None, "modified": "Sat, 01 Aug 2026 00:00:00 GMT"}])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_dropped_connection_is_gone_on_with(
    server: Server, calls: Calls, marks: dict[str, str | None], chunked: bool
) -> None:
    vars(server).update(marks, chunked=chunked, script=[70_000, 50_000, 1, None])
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
    assert calls.slept == [PAUSES[0]] * 3  # each try brought something
    assert "trying again in 1 s" in calls.told[0]


def test_a_later_call_goes_on(server: Server, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError, match=r"byte 70,000 of 300,000, after 1 tries; 70,000 bytes are in"):
        calls.fetch(whole(server), pauses=())
    assert calls.names() == ["a.bin.partial", "a.bin.partial.json"]
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert server.sent == len(DATA)


def test_stopping_keeps_what_has_come(server: Server, calls: Calls) -> None:
    def stop(done: int, total: int | None) -> None:
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calls.fetch(whole(server), progress=stop)
    kept = (calls.folder / "a.bin.partial").stat().st_size
    assert 100_000 < kept < len(DATA)
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert server.asked[1]["range"] == f"bytes={kept}-"


def test_a_server_without_ranges_starts_again(server: Server, calls: Calls) -> None:
    server.ranges, server.script = False, [70_000, None]
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert server.sent == len(DATA) + 70_000


def test_without_a_mark_or_a_checksum_two_halves_are_never_joined(server: Server, calls: Calls) -> None:
    server.etag, server.script = None, [70_000, None]
    assert calls.fetch(bare(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]
    (calls.folder / "a.bin").unlink()
    server.script = [70_000, None]
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert server.asked[3]["range"] == "bytes=70000-"  # the checksum would tell


def test_a_weak_mark_does_not_join_halves(server: Server, calls: Calls) -> None:
    server.etag, server.script = 'W/"v1"', [70_000, None]
    assert calls.fetch(bare(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]


@pytest.mark.parametrize("minds", [True, False])
def test_a_file_that_changes_in_between_is_fetched_anew(server: Server, calls: Calls, minds: bool) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), pauses=())
    fresh = DATA[::-1]
    server.files["/a.bin"], server.etag, server.minds_if_range = fresh, '"v2"', minds
    assert calls.fetch(bare(server)).read_bytes() == fresh
    assert server.asked[1]["if-range"] == '"v1"'
    assert calls.told == ([] if minds else [calls.told[0]])
    assert minds or "the server's file has changed" in calls.told[0]


def test_another_address_does_not_go_on_from_this_one(server: Server, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), pauses=())
    server.files["/b.bin"] = DATA[::-1]
    assert calls.fetch(replace(bare(server), url=server.url + "/b.bin")).read_bytes() == DATA[::-1]
    assert "range" not in server.asked[1]


def test_a_file_that_became_shorter_is_fetched_anew(server: Server, calls: Calls) -> None:
    server.script = [70_000]
    with pytest.raises(DownloadError):
        calls.fetch(bare(server), pauses=())
    server.files["/a.bin"] = b"short"
    assert calls.fetch(bare(server)).read_bytes() == b"short"
    assert "shorter than what has come" in calls.told[0]


def test_passing_errors_are_tried_again(server: Server, calls: Calls) -> None:
    server.script = [(500, {}), (503, {"Retry-After": "7"}), (429, {"Retry-After": "900"}), None]
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert calls.slept == [1.0, 7.0, 60.0]
    assert "500 Internal Server Error" in calls.told[0]


def test_tries_end(server: Server, calls: Calls) -> None:
    server.script = [(502, {})] * 6
    with pytest.raises(DownloadError, match=r"502 Bad Gateway, after 6 tries; 0 bytes are in .*\n.*\n.*put it at"):
        calls.fetch(whole(server))
    assert calls.slept == list(PAUSES)
    # A server that always cuts at the same byte and cannot resume brings nothing new either.
    server.ranges, server.script = False, [70_000] * 20
    with pytest.raises(DownloadError, match="the connection ended at byte 70,000"):
        calls.fetch(whole(server))
    assert len(server.script) == 14


def test_silence_is_not_waited_for_for_ever(server: Server, calls: Calls) -> None:
    server.script = ["stall", None]
    began = time.monotonic()
    assert calls.fetch(whole(server), timeout=0.3).read_bytes() == DATA
    assert time.monotonic() - began < 5
    assert "no answer in time" in calls.told[0]
    assert server.asked[1]["range"] == "bytes=150000-"


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_will_not_pass_is_told_at_once(server: Server, calls: Calls, code: int) -> None:
    server.script = [(code, {})]
    with pytest.raises(DownloadError, match=rf"a\.bin: the server answers {code}") as caught:
        calls.fetch(whole(server))
    assert f"put it at {calls.folder / 'a.bin'} and run the same command" in str(caught.value)
    assert not calls.slept


def test_a_page_instead_of_the_file(server: Server, calls: Calls) -> None:
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(DownloadError, match="answers with a web page"):
        calls.fetch(whole(server))
    assert calls.names() == []


def test_another_size_is_told_before_it_is_fetched(server: Server, calls: Calls) -> None:
    with pytest.raises(DownloadError, match=r"has 300,000 bytes\n.*300,001 bytes, as published"):
        calls.fetch(replace(whole(server), size=300_001))
    assert calls.names() == []


def test_a_wrong_checksum(server: Server, calls: Calls) -> None:
    server.files["/a.bin"] = DATA[::-1]
    with pytest.raises(DownloadError, match=rf"SHA-256 [^\n]*\n.*{SHA[:16]}[^\n]*\n.*a\.bin\.damaged"):
        calls.fetch(whole(server))
    assert calls.names() == ["a.bin.damaged"]
    server.files["/a.bin"] = DATA  # the next try begins anew
    assert calls.fetch(whole(server)).read_bytes() == DATA
    assert "range" not in server.asked[1]


def test_a_file_put_there_by_hand_is_checked_and_used(server: Server, calls: Calls) -> None:
    (calls.folder / "a.bin").write_bytes(DATA)
    assert calls.fetch(whole(server)).read_bytes() == DATA
    (calls.folder / "a.bin").write_bytes(DATA[:-1])
    with pytest.raises(DownloadError, match=r"a\.bin has 299,999 bytes\n.*\n.*delete it"):
        calls.fetch(whole(server))
    (calls.folder / "a.bin").write_bytes(DATA[::-1])
    with pytest.raises(DownloadError, match="as published"):
        calls.fetch(whole(server))
    assert not server.asked


def test_redirections_are_followed(server: Server, calls: Calls) -> None:
    server.script = [(302, {"Location": "/a.bin"})]
    assert calls.fetch(replace(whole(server), url=server.url + "/elsewhere")).read_bytes() == DATA


def test_no_server_and_no_address(calls: Calls) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=r"no connection \(Connection refused\), after 6 tries"):
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


def test_a_full_disk(server: Server, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    class Full(io.BytesIO):
        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path: Path, mode: str = "r", **options: Any) -> Any:
        return Full() if path.suffix == ".partial" and "b" in mode else real(path, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DownloadError, match=r"the disk is full[^$]*make room and run the same command"):
        calls.fetch(whole(server))


def tgz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return out.getvalue()


WORDS = {"./yes/a.wav": DATA[:5000], "./yes/b.wav": DATA[5000:9000], "./yes/._b.wav": b"fork", "./README.md": b"hello"}
TEST = {"./yes/t.wav": DATA[9000:9900]}


def source(server: Server) -> Source:
    """A miniature of Speech Commands V1: two archives, each to a folder of its own."""
    archives = []
    for name, files in (("train", WORDS), ("test", TEST)):
        content = server.files[f"/{name}.tar.gz"] = tgz(files)
        sha = hashlib.sha256(content).hexdigest()
        file = RemoteFile(f"{server.url}/{name}.tar.gz", f"{name}.tar.gz", len(content), sha)
        archives.append(Archive(file, Limits(20, 20_000), folder=name))
    return Source(
        "mini", "Mini", "CC0", 10_000, tuple(archives), (Contents("train", 2), Contents("test", 1)), "mini {}"
    )


Get = Callable[..., downloads.Downloaded]


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Get:
    sets = {"mini": source(server)}

    def call(**options: Any) -> downloads.Downloaded:
        chosen = {"sources": sets, "sleep": lambda _: None, "timeout": 5.0, **options}
        return download("mini", tmp_path / "data" / "mini", **chosen)

    return call


def test_a_set_comes_whole(get: Get, server: Server, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    server.script = [200, None, 100, None]
    got = get(progress=lambda *line: told.append(line))
    assert not got.there
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["mini"]
    assert (got.folder / "train" / "yes" / "a.wav").read_bytes() == DATA[:5000]
    assert sorted(p.name for p in got.folder.iterdir()) == sorted(["test", "train", RECORD])
    assert {line[0] for line in told} == {
        "train.tar.gz",
        "test.tar.gz",
        "unpacking train.tar.gz",
        "unpacking test.tar.gz",
    }


def test_a_set_that_is_there_is_left_alone(get: Get, server: Server) -> None:
    folder = get().folder
    (folder / "notes.txt").write_text("mine")  # what the user adds beside the set does not matter
    asked = len(server.asked)
    assert get().there
    assert len(server.asked) == asked
    (folder / "train" / "yes" / "a.wav").unlink()
    with pytest.raises(DownloadError, match=r"1 of 4 folders have not the files .*such as train/yes"):
        get()


def test_force_fetches_again_and_deletes_nothing(get: Get, server: Server) -> None:
    folder = get().folder
    (folder / "notes.txt").write_text("mine")
    (folder / "train" / "yes" / "a.wav").unlink()
    got = get(force=True)
    assert got.replaced == folder.with_name("mini.old")
    assert (got.replaced / "notes.txt").read_text() == "mine"
    assert (folder / "train" / "yes" / "a.wav").exists()
    assert len(server.asked) == 4
    with pytest.raises(DownloadError, match=r"mini\.old is there"):
        get(force=True)


def test_a_set_unpacked_by_other_means_counts(get: Get, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "mini"
    for place, files in (("train", WORDS), ("test", TEST)):
        for name, content in files.items():
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / place / name).write_bytes(content)
    assert get().there
    (folder / "test" / "yes" / "t.wav").unlink()
    for force in (False, True):
        with pytest.raises(DownloadError, match="holds other things, or a part of Mini"):
            get(force=force)
    assert (folder / "train" / "yes" / "a.wav").exists()
    assert not server.asked


def test_folders_that_cannot_be_the_target(get: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = get().folder
    (folder / RECORD).write_text('{"name": "esc50", "folders": {}}')
    with pytest.raises(DownloadError, match="holds esc50"):
        get()
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(DownloadError, match="is a file"):
        get()
    folder.unlink()
    folder.mkdir()  # empty: may be used
    assert not get().there
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="the folder you are in"):
        download("free-spoken-digit", ".")


def test_archives_are_kept_on_demand_and_where_the_user_put_them(get: Get, server: Server, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tar.gz").write_bytes(server.files["/train.tar.gz"])
    got = get()
    assert [path.name for path in got.kept] == ["train.tar.gz"]
    assert [asked["path"] for asked in server.asked] == ["/test.tar.gz"]
    shutil.rmtree(got.folder)
    assert [path.name for path in get(keep_archive=True).kept] == ["train.tar.gz", "test.tar.gz"]
    assert (tmp_path / "data" / "test.tar.gz").exists()


def test_a_mirror(get: Get, server: Server) -> None:
    for name in ("train", "test"):
        server.files[f"/mirror/{name}.tar.gz"] = server.files.pop(f"/{name}.tar.gz")
    with pytest.raises(ConfigError, match=r"mini has 2 archives\n.*train\.tar\.gz, test\.tar\.gz, ending in /"):
        get(url=server.url + "/mirror/train.tar.gz")
    with pytest.raises(DownloadError, match="404"):
        get()
    assert not get(url=server.url + "/mirror/").there


def test_a_mirror_with_other_files_is_refused(get: Get, server: Server, tmp_path: Path) -> None:
    content = server.files["/train.tar.gz"]
    server.files["/train.tar.gz"] = content[:-20] + bytes(20)
    with pytest.raises(DownloadError, match="as published"):
        get()
    assert not (tmp_path / "data" / "mini").exists()


def test_nothing_half_unpacked_is_left(
    get: Get, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "unpacking test.tar.gz":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command unpacks them"):
        get(progress=stop)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["test.tar.gz", "train.tar.gz"]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "unpack", full)
        with pytest.raises(DownloadError, match=r"the disk is full while unpacking[^$]*need not be fetched again"):
            get()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["test.tar.gz", "train.tar.gz"]
    (tmp_path / "data" / ".mini.unpacking" / "x").mkdir(parents=True)  # of a killed run
    asked = len(server.asked)
    assert not get().there
    assert len(server.asked) == asked
    assert not (tmp_path / "data" / ".mini.unpacking").exists()


def test_stopping_a_transfer_says_how_to_go_on(get: Get) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
        get(progress=stop)


def test_room_is_asked_for_first(get: Get, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_500))
    with pytest.raises(DownloadError, match=r"GB free[^$]*the archives still to come, and what they unpack to"):
        get()
    assert not server.asked


def test_an_archive_that_is_not_the_set(server: Server, tmp_path: Path) -> None:
    mini = source(server)
    cases: list[tuple[Source, type[Exception], str]] = [
        (replace(mini, contents=(Contents("train", 3),)), DownloadError, r"2 recordings \(\.wav\)\n.*3, as in Mini"),
        (replace(mini, contents=(Contents("train", 2, "0" * 64),)), DownloadError, "not those of Mini"),
        (
            replace(mini, archives=(replace(mini.archives[0], limits=Limits(2, 10**6)), mini.archives[1])),
            ArchiveError,
            "more than 2 files",
        ),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            download("mini", tmp_path / "mini", sources={"mini": wrong})
        assert not (tmp_path / "mini").exists()
        assert not (tmp_path / ".mini.unpacking").exists()


def test_the_digest_by_hand(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [tmp_path / "b" / "a.wav", tmp_path / "b.wav", tmp_path / "a.wav"]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    lines = "".join(
        f"{hashlib.md5(bytes([i])).hexdigest()}  {name}\n" for i, name in ((2, "a.wav"), (1, "b.wav"), (0, "b/a.wav"))
    )
    assert downloads.digest(tmp_path, paths) == hashlib.sha256(lines.encode()).hexdigest()


def test_unknown_sets_and_those_of_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no esc, did you mean esc50"):
        download("esc", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"eval_segments\.csv[^$]*asit catalogue audioset ROOT"):
        download("audioset", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"iden_split\.txt[^$]*asit catalogue voxceleb1 ROOT"):
        download("voxceleb1", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_every_set_is_bounded_and_proved() -> None:
    """Each archive has a published checksum, or each of its recordings stands in a digest."""
    for name, known in sources.SOURCES.items():
        assert name == known.name
        assert known.contents
        for archive in known.archives:
            assert archive.file.url.startswith("https://")
            assert archive.file.size or archive.about
            assert archive.limits.bytes <= 1.5 * known.unpacked
            parts = [part for part in known.contents if part.folder.startswith(archive.folder)]
            assert archive.file.sha256 or any(part.digest for part in parts)
            assert archive.limits.files > sum(part.recordings for part in parts if part.folder == archive.folder)


def esc50(rows: list[str], files: list[str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "audio").mkdir(parents=True)
        (folder / "meta").mkdir()
        for name in files:
            (folder / "audio" / name).touch()
        header = "filename,fold,target,category,esc10,src_file,take"
        (folder / "meta" / "esc50.csv").write_text("\n".join([header, *rows]) + "\n")
        finish = sources.SOURCES["esc50"].finish
        assert finish
        finish(folder)

    return make


GOOD = ["1-100032-A-0.wav,1,0,dog,True,100032,A", "5-9-B-49.wav,5,49,hand_saw,False,9,B"]
NAMES = ["1-100032-A-0.wav", "5-9-B-49.wav"]


@pytest.mark.parametrize(
    ("rows", "files", "message"),
    [
        (GOOD[:1], NAMES, "1 names that do not fit the files, such as 5-9-B-49.wav"),
        (GOOD, NAMES[:1], "such as 5-9-B-49.wav"),
        ([GOOD[0], GOOD[1].replace(",49,", ",48,")], NAMES, "such as 5-9-B-49.wav"),
        ([GOOD[0], GOOD[1].replace(",5,", ",4,")], NAMES, "such as 5-9-B-49.wav"),
        ([GOOD[0], "5-9-B-49.wav,5"], NAMES, "such as 5-9-B-49.wav"),
        ([*GOOD, GOOD[0]], NAMES, "3 lines, and 0 names"),
    ],
)
def test_the_table_of_esc50_must_fit_its_files(tmp_path: Path, rows: list[str], files: list[str], message: str) -> None:
    esc50(GOOD, NAMES)(tmp_path / "good")
    with pytest.raises(DownloadError, match=message):
        esc50(rows, files)(tmp_path / "bad")


def test_the_real_digits_from_the_command_line(
    server: Server,
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The set as it is published, packed as its host packs it, against the digest that asit carries."""
    recordings = sorted((shared_data / "free-spoken-digit-dataset" / "recordings").glob("*.wav"))
    top = "free-spoken-digit-dataset-d6938f9bf1545aa66d8489fc9f1385a7abd64282/"
    files = {f"{top}recordings/{path.name}": path.read_bytes() for path in recordings}
    server.files["/d.zip"] = zipped({top: b"", **files, top + "README.md": b"digits"})
    server.script = [1_000_000, None]
    monkeypatch.setattr(time, "sleep", lambda _: None)
    out = tmp_path / "digits"
    given = ["download", "free-spoken-digit", "--out", str(out), "--url", server.url + "/d.zip"]
    assert cli.main(given) == 0
    told = capsys.readouterr()
    assert f"{out}: Free Spoken Digit Dataset 1.0.10, 3,000 recordings\n" in told.out
    assert "licence: CC BY-SA 4.0" in told.out
    assert f"next: asit catalogue {out}/table.csv --out free-spoken-digit.jsonl" in told.out
    assert "trying again" in told.err
    assert "free-spoken-digit-dataset-1.0.10.zip: " in told.err
    with (out / "table.csv").open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["path", "label", "group"]
    assert len(rows) == 3001
    assert len({tuple(row[1:]) for row in rows[1:]}) == 60
    assert rows[1] == ["recordings/0_george_0.wav", "0", "george"]
    assert all((out / row[0]).is_file() for row in rows[1:])
    assert cli.main(given) == 0
    assert "already there" in capsys.readouterr().out
    # One byte of one recording: the size stays, the digest does not.
    damaged = out / "recordings" / recordings[7].name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    with pytest.raises(DownloadError, match="not those of Free Spoken Digit Dataset"):
        downloads.check(sources.SOURCES["free-spoken-digit"], out)


def test_command_line_of_sets_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "audioset"]) == 2
    assert "balanced_train_segments.csv" in capsys.readouterr().err
