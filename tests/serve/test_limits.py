"""Limits of requests: size, pace, number, Host and Origin. The model is a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from asit.errors import AudioError
from asit.serve import server
from asit.serve.app import application
from asit.serve.guard import HEADERS, Guard
from asit.serve.request_queue import Job, RequestLimits, TooLongError

NAMES = ("tag", "embed", "neighbours", "attention", "analyse")


class Fake:
    """Answers with the length of the body; "bad" is no audio, "boom" a defect; waits for `go` where one is set."""

    def __init__(self) -> None:
        self.go: threading.Event | None = None
        self.started = threading.Semaphore(0)
        self.seen: list[bytes] = []
        for name in NAMES:
            setattr(self, name, self._answer)

    def facts(self) -> dict[str, Any]:
        return {"name": "fake", "classes": None}

    def _answer(self, job: Any, body: bytes, **options: Any) -> bytes:
        self.seen.append(body[:20])
        self.started.release()
        if self.go is not None:
            while not self.go.wait(0.01):
                job.check()
        if body == b"bad":
            raise AudioError("no audio", "audio", "send audio")
        if body == b"boom":
            raise RuntimeError("secret")
        return json.dumps({"size": len(body), "options": options}).encode()

    def clip(self, job: Any, number: int) -> bytes:
        return b"clip %d" % number

    def map(self, job: Any) -> bytes:
        return b"{}"

    def nearest_to(self, job: Any, number: int, *, k: int) -> bytes:
        return json.dumps({"number": number, "k": k}).encode()


def app(fake: Any = None, host: str = "127.0.0.1", names: tuple[str, ...] = (), **limits: Any) -> Guard:
    return application(fake or Fake(), RequestLimits(**limits), host, names)


def client(guard: Guard, base: str = "http://127.0.0.1:8000") -> TestClient:
    return TestClient(guard, base_url=base, raise_server_exceptions=False)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(address: str) -> socket.socket:
    """A connection on which bytes are sent as they are."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def raw(address: str, *pieces: bytes, wait: float = 0.0) -> bytes:
    """What the server answers to bytes, with pauses between them."""
    with connect(address) as line:
        for i, piece in enumerate(pieces):
            time.sleep(wait if i else 0)
            with contextlib.suppress(BrokenPipeError):  # the server may have refused already
                line.sendall(piece)
        got = b""
        with contextlib.suppress(ConnectionResetError):  # after the answer
            while part := line.recv(65536):
                got += part
    return got


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /api/tag HTTP/1.1", "Host: localhost", "Connection: close", *lines, "", ""]).encode()


def words(answer: Any, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, str] = answer.json()
    assert set(found) == {"found", "expected", "remedy"}
    return found


def test_options_are_read_and_wrong_ones_refused() -> None:
    with client(app()) as ask:
        assert ask.post("/api/tag?top=3&threshold=0.25&hop=2", content=b"x").json() == {
            "size": 1,
            "options": {"top": 3, "threshold": 0.25, "window": None, "hop": 2.0},
        }
        for query, message in {
            "tpo=3": "no option 'tpo', did you mean top",
            "top=three": "top='three'",
            "top=0": "top='0'",
            "threshold=nan": "threshold='nan'",
            "top=1&top=2": "given twice",
            "top=1_0": "top='1_0'",
            "top=%D9%A3": "top='٣'",
            "hop=inf": "hop='inf'",
        }.items():
            assert message in words(ask.post(f"/api/tag?{query}", content=b"x"), 400)["found"]
        assert "one of clip, frames" in words(ask.post("/api/embed?level=all", content=b"x"), 400)["expected"]
        assert ask.get("/api/neighbours/3?k=2").json() == {"number": 3, "k": 2}


def test_every_endpoint_is_described() -> None:
    with client(app()) as ask:
        described = ask.get("/api").json()
        assert {f"POST /api/{name}" for name in NAMES} < set(described)
        assert ask.get("/api/health").json() == {"status": "ok", "inside": 0}
        assert ask.get("/api/model").json()["limits"]["megabytes"] == 50.0


def test_refusals_have_three_parts_and_the_right_status() -> None:
    with client(app(megabytes=0.001)) as ask:
        assert words(ask.post("/api/tag", content=b"bad"), 400)["remedy"] == "send audio"
        assert "empty body" in words(ask.post("/api/tag", content=b""), 400)["found"]
        assert "0.001 MB at most" in words(ask.post("/api/tag", content=bytes(1001)), 413)["expected"]
        assert ask.post("/api/tag", content=bytes(1000)).json()["size"] == 1000
        for path in ("/nothing", "/api/tag/", "/api/clip/-1", "/api/clip/x", "/page/app.js", "/../app.py", "/app.py"):
            assert "the page at /" in words(ask.get(path), 404)["expected"]
        refused = ask.get("/api/tag")
        assert refused.headers["allow"] == "POST"
        assert "POST" in words(refused, 405)["expected"]
        words(ask.put("/api/tag", content=b"x"), 405)
        words(ask.request("OPTIONS", "/api/tag"), 405)
        assert "secret" not in json.dumps(words(ask.post("/api/tag", content=b"boom"), 500))


def test_every_answer_has_the_headers() -> None:
    with client(app()) as ask:
        for answer in (
            *(ask.get(path) for path in ("/", "/app.js", "/api", "/nothing", "/api/clip/1")),
            ask.post("/api/tag", content=b"boom"),
            ask.get("/", headers={"host": "evil.example"}),
        ):
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("host", "names", "asked", "status"),
    [
        ("127.0.0.1", (), "127.0.0.1:8000", 200),
        ("127.0.0.1", (), "localhost:1", 200),
        ("::1", (), "[::1]:8000", 200),
        ("127.0.0.1", (), "evil.example:8000", 421),
        ("127.0.0.1", (), "127.0.0.1.evil.example", 421),
        ("127.0.0.1", (), "192.168.1.5:8000", 421),
        ("127.0.0.1", (), "", 421),
        ("127.0.0.1", ("sound.example",), "Sound.Example", 200),
        ("0.0.0.0", (), "192.168.1.5:8000", 200),
        ("0.0.0.0", (), "evil.example", 421),
        ("0.0.0.0", (), socket.gethostname(), 200),
    ],
)
def test_a_foreign_host_is_refused(host: str, names: tuple[str, ...], asked: str, status: int) -> None:
    with client(app(host=host, names=names)) as ask:
        answer = ask.get("/api/health", headers={"host": asked})
        assert answer.status_code == status, answer.text
        if status == 421:
            words(answer, 421)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://127.0.0.1:8000"}, 200),  # behind a proxy with TLS
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_another_site_is_refused(headers: dict[str, str], status: int) -> None:
    with client(app()) as ask:
        assert ask.post("/api/tag", content=b"x", headers=headers).status_code == status
        assert ask.get("/api/clip/1", headers=headers).status_code == status
        assert ask.get("/", headers=headers).status_code == 200


def test_too_many_are_refused_with_a_time_to_retry(served: Callable[[Guard], Any]) -> None:
    fake = Fake()
    fake.go = threading.Event()
    guard = app(fake, concurrency=1, waiting=3)
    with served(guard) as address:

        async def all_of_them() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=address, timeout=30, trust_env=False) as ask:
                first = [asyncio.create_task(ask.post("/api/tag", content=b"x")) for _ in range(4)]
                while guard.queue.inside < 4:
                    await asyncio.sleep(0.01)
                late = await asyncio.gather(*(ask.post("/api/tag", content=b"x") for _ in range(8)))
                assert (await ask.get("/api/health")).status_code == 200  # costs nothing, so is always answered
                assert fake.go is not None
                fake.go.set()
                return [*await asyncio.gather(*first), *late]

        answers = asyncio.run(all_of_them())
        assert [answer.status_code for answer in answers] == [200] * 4 + [503] * 8
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert words(answers[-1], 503)["found"] == "4 requests are waiting"
        assert guard.queue.inside == 0


def test_the_bytes_of_all_bodies_are_bounded(served: Callable[[Guard], Any]) -> None:
    with served(app(megabytes=1.0, concurrency=1)) as address, contextlib.ExitStack() as stack:  # 5 MB in total
        lines = [stack.enter_context(connect(address)) for _ in range(5)]
        for line in lines:
            line.sendall(head("Content-Length: 1000000") + bytes(990_000))
        time.sleep(0.5)
        refused = raw(address, head("Content-Length: 900000"), bytes(900_000))
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"5 MB of recordings are waiting" in refused
        lines[0].close()
        until(lambda: b'{"size": 900000' in raw(address, head("Content-Length: 900000"), bytes(900_000)))


def test_slow_oversize_and_broken_bodies(served: Callable[[Guard], Any]) -> None:
    fake = Fake()
    guard = app(fake, megabytes=0.01, pause=0.2, upload=0.5)
    chunk = b"1000\r\n" + bytes(4096) + b"\r\n"
    with served(guard) as address:
        got = raw(address, head("Content-Length: 10") + b"abc")
        assert got.startswith(b"HTTP/1.1 408")
        assert b"of which only 3 bytes came" in got
        begun = time.monotonic()
        for status, wait, *pieces in (
            (408, 0.12, head("Content-Length: 10"), *[b"a"] * 6),  # each byte in time, but not all
            (413, 0.0, head("Transfer-Encoding: chunked"), *[chunk] * 3, b"0\r\n\r\n"),
            (413, 0.0, head("Content-Length: 20000"), bytes(20000)),
            (413, 0.0, head("Content-Length: 99999999999999999999"), b"x"),
            (400, 0.0, head("Content-Length: many")),
            (400, 0.0, b"\x16\x03\x01 this is no HTTP\r\n\r\n"),
        ):
            assert raw(address, *pieces, wait=wait).startswith(b"HTTP/1.1 %d" % status), pieces[0]
        assert time.monotonic() - begun < 4
        with connect(address) as line:  # cut off in the middle: nobody to answer, and nothing is computed
            line.sendall(head("Content-Length: 10") + b"abc")
        until(lambda: not guard.queue.inside)
        assert not fake.seen
        options = json.dumps({"top": 5, "threshold": 0.5, "window": None, "hop": None}).encode()
        assert raw(address, head("Content-Length: 3"), b"abc").endswith(b'{"size": 3, "options": ' + options + b"}")


def test_slow_uploads_are_dropped_in_favour_of_others(served: Callable[[Guard], Any]) -> None:
    """140 slow uploads, more than are admitted, do not keep others out, nor do the bytes of large ones."""
    guard = app(grace=0.3)
    with served(guard) as address, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(connect(address)) for _ in range(140)]
        for line in lines:
            line.sendall(head("Content-Length: 1000000") + b"a")
        until(lambda: guard.queue.inside == 130)
        time.sleep(0.5)
        assert guard.queue.inside == 130
        for line in lines[:130]:
            with contextlib.suppress(OSError):
                line.sendall(b"a")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: raw(address, head("Content-Length: 3"), b"abc"), range(40)))
        assert all(b'{"size": 3' in answer for answer in answers)
        assert 90 <= guard.queue.inside <= 130
        replies = [line.recv(1000) for line in select.select(lines, [], [], 0)[0]]
        dropped = next(answer for answer in replies if answer.startswith(b"HTTP/1.1 408"))
        assert b"more slowly than all others" in dropped
        assert b"retry-after" in dropped
    guard = app(grace=0.1, megabytes=1.0, concurrency=1)
    with served(guard) as address, contextlib.ExitStack() as stack:
        for _ in range(6):
            line = stack.enter_context(connect(address))
            line.sendall(head("Content-Length: 1000000") + bytes(800_000))
        time.sleep(0.5)
        assert b'{"size": 900000' in raw(address, head("Content-Length: 900000"), bytes(900_000))


def test_an_incomplete_head_holds_no_connection(
    served: Callable[[Guard], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CONNECTIONS", 4)
    monkeypatch.setattr(server, "QUIET", 0.4)
    with served(app()) as address, contextlib.ExitStack() as stack:
        lines = [stack.enter_context(connect(address)) for _ in range(5)]
        for line in lines:
            line.sendall(b"POST /api/tag HTTP/1.1\r\nHost: loc")
        assert raw(address, head("Content-Length: 1"), b"x").startswith(b"HTTP/1.1 503")
        assert [line.recv(1) for line in lines] == [b""] * 5  # closed
        with httpx.Client(base_url=address, trust_env=False) as ask:
            for _ in range(3):  # a connection with a request now and then is kept
                assert ask.post("/api/tag", content=b"x").status_code == 200
                time.sleep(0.25)


def test_a_computation_has_its_time() -> None:
    job = Job(RequestLimits(compute=1e-9))
    job.check()  # the time of waiting does not count
    job.begin()
    time.sleep(0.001)
    with pytest.raises(TooLongError, match="more than 1e-09 s of computing"):
        job.check()


def test_a_closed_connection_leaves_the_queue(served: Callable[[Guard], Any]) -> None:
    fake = Fake()
    fake.go = threading.Event()
    guard = app(fake, concurrency=1)
    with served(guard) as address:
        lines = []
        for body in (b"1", b"2"):
            lines.append(connect(address))
            lines[-1].sendall(head("Content-Length: 1") + body)
            if body == b"1":
                assert fake.started.acquire(timeout=5)
        until(lambda: guard.queue.inside == 2)
        for line in reversed(lines):  # the one that waits, then the one that is computed: it stops at its next check
            line.close()
        until(lambda: guard.queue.inside == 0)
        fake.go.set()
        assert raw(address, head("Content-Length: 1"), b"3").startswith(b"HTTP/1.1 200")
        assert fake.seen == [b"1", b"3"]


def test_requests_inside_are_refused_when_the_server_stops(
    served: Callable[[Guard], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    fake.go = threading.Event()
    guard = app(fake, concurrency=1)
    with ThreadPoolExecutor(3) as pool:
        with served(guard) as address:
            asked = [pool.submit(raw, address, head("Content-Length: 8"), b"computed")]
            assert fake.started.acquire(timeout=5)
            asked.append(pool.submit(raw, address, head("Content-Length: 5"), b"waits"))
            asked.append(pool.submit(raw, address, head("Content-Length: 20"), b"half a bo"))
            until(lambda: guard.queue.inside == 3)
            begun = time.monotonic()
        assert time.monotonic() - begun < 2.5  # uvicorn itself gives up after 3
        for one in asked:
            assert one.result().startswith(b"HTTP/1.1 503")
            assert b"the server is stopping" in one.result()
    assert capfd.readouterr().err == ""
