"""Receive the bodies of requests and compute their answers in threads, a bounded number at a time.

Nothing here depends on a web library: `receive` is a function that returns ASGI's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asit.serve.limits import GoneError, Job, RefusedError, RequestLimits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class RequestQueue:
    """Admits requests, bounds their number and the bytes of their bodies, and owns the threads that compute.

    Args:
        limits: of the requests.
        prepare: called once in each thread, before its first request.
    """

    def __init__(self, limits: RequestLimits, prepare: Callable[[], None] | None = None) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(limits.concurrency, "asit-serve", initializer=prepare)
        self._inside: set[AdmittedRequest] = set()
        self._seconds = 1.0  # running mean of a computation's time
        self._closed = False

    @property
    def inside(self) -> int:
        """Number of requests that send their body, wait or are computed."""
        return len(self._inside)

    @contextlib.contextmanager
    def admit(self) -> Iterator[AdmittedRequest]:
        """Admit a request until the block ends.

        Raises:
            RefusedError: 503, there are too many, or the server is stopping.
        """
        most = self.limits.concurrency + self.limits.waiting
        if self._closed or (self.inside >= most and not self._drop_slowest()):
            raise self._busy(f"{self.inside} requests are waiting", f"{most} at most")
        request = AdmittedRequest(self)
        self._inside.add(request)
        try:
            yield request
        finally:
            self._inside.discard(request)

    def reserve(self, request: AdmittedRequest, size: int) -> None:
        """Count `size` more bytes of a request's body, which are released when it leaves.

        Raises:
            RefusedError: 503, the bodies of all requests have too many bytes.
        """
        while (held := sum(other.size for other in self._inside)) + size > self.limits.held:
            if not self._drop_slowest(request):
                found = f"{held / 1e6:.0f} MB of recordings are waiting"
                raise self._busy(found, f"{self.limits.held / 1e6:.0f} MB at most")
        request.size += size

    def _drop_slowest(self, wanted: AdmittedRequest | None = None) -> bool:
        """Drop the slowest upload that has taken longer than the grace period; False if there is none."""
        late = time.monotonic() - self.limits.grace
        slow = [one for one in self._inside if one is not wanted and one.since is not None and one.since < late]
        for slowest in sorted(slow, key=lambda one: one.size / (time.monotonic() - (one.since or 0.0)))[:1]:
            self._inside.discard(slowest)
            found = "a body that came in more slowly than all others while the server is busy"
            slowest.end(_too_slow(found, f"all of it within {self.limits.grace:g} s", self._wait()))
        return bool(slow)

    def submit(self, work: Callable[[Job], bytes], job: Job) -> asyncio.Future[bytes]:
        """Run `work(job)` in a thread, when one is free."""

        def timed() -> bytes:
            job.check()
            job.begin()
            start = time.monotonic()
            try:
                return work(job)
            finally:
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

        return asyncio.get_running_loop().run_in_executor(self._pool, timed)

    def close(self) -> None:
        """Refuse all requests from now on, and those inside too. Call it in the thread that serves."""
        self._closed = True
        for request in self._inside:
            request.end(RefusedError(503, "the server is stopping", "a running server", "try again later"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _busy(self, found: str, expected: str) -> RefusedError:
        wait = self._wait()
        return RefusedError(503, found, expected, f"try again in {wait} s", {"retry-after": str(wait)})

    def _wait(self) -> int:
        return min(60, max(1, math.ceil(self.inside * self._seconds / self.limits.concurrency)))


class AdmittedRequest:
    """A request that was admitted; `body` receives its recording, `run` computes its answer.

    Attributes:
        size: bytes of the body so far.
        since: when the body began to come in; None: nothing is being received.
    """

    def __init__(self, queue: RequestQueue) -> None:
        self.size = 0
        self.since: float | None = None
        self._queue = queue
        self._ended: asyncio.Future[RefusedError] = asyncio.get_running_loop().create_future()

    def end(self, reason: RefusedError) -> None:
        """Refuse the request, wherever it is."""
        if not self._ended.done():
            self._ended.set_result(reason)

    async def body(self, receive: Receive, length: int | None) -> bytes:
        """Return the request's body, counted as it comes in.

        Args:
            receive: returns ASGI's messages.
            length: of the header Content-Length.

        Raises:
            RefusedError: 400 an empty body, 408 too slow, 413 too large, 503 too many bytes of all requests.
            GoneError: the client has closed the connection.
        """
        limits, begun = self._queue.limits, time.monotonic()
        if length is not None and length > limits.bytes:
            await _drain(receive, limits)
            raise _too_large(f"a body of {length / 1e6:.1f} MB", limits)
        parts: list[bytes] = []
        self.since, more = begun, True
        while more:
            left = begun + limits.upload - time.monotonic()
            message = await self._first(receive(), max(0.0, min(limits.pause, left)))
            if message is None:
                found = f"a body of which {self.size} bytes came in {time.monotonic() - begun:.0f} s"
                raise _too_slow(
                    found, f"no pause above {limits.pause:g} s, and all of it within {limits.upload:g} s", 1
                )
            if message["type"] != "http.request":
                raise GoneError
            part, more = message.get("body", b""), message.get("more_body", False)
            if self.size + len(part) > limits.bytes:
                parts.clear()
                if more:
                    await _drain(receive, limits)
                raise _too_large(f"a body of more than {limits.bytes / 1e6:.1f} MB", limits)
            self._queue.reserve(self, len(part))
            parts.append(part)
        self.since = None
        if not self.size:
            raise RefusedError(
                400, "an empty body", "the bytes of an audio file", "send it as it is: curl --data-binary @clip.wav"
            )
        return b"".join(parts)

    async def run(self, work: Callable[[Job], bytes], receive: Receive) -> bytes:
        """Compute in a thread, unless the client closes the connection first.

        Raises:
            GoneError: the client has closed the connection.
            RefusedError: 503, the server is stopping.
            Exception: what `work` raises.
        """
        job = Job(self._queue.limits)
        answer = self._queue.submit(work, job)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            waited: list[asyncio.Future[Any]] = [answer, gone, self._ended]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and not answer.cancelled():  # `close` cancels what waits for a thread
                return answer.result()
            raise self._ended.result() if self._ended.done() else GoneError
        finally:
            gone.cancel()
            job.stop()
            answer.cancel()  # if it still waits for a thread; else it ends at its next check

    async def _first(self, message: Awaitable[MutableMapping[str, Any]], timeout: float) -> Any:
        """The message, or None after the timeout; raises if the request is ended first."""
        task = asyncio.ensure_future(message)
        waited: list[asyncio.Future[Any]] = [task, self._ended]
        try:
            await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                raise self._ended.result()
            return task.result() if task.done() else None
        finally:
            task.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive, limits: RequestLimits) -> None:
    """Discard the rest of a body, up to a limit: a client that is cut off while it sends never reads the reason."""
    left = limits.bytes
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limits.pause / 2):
            while left > 0 and (message := await receive()).get("more_body", False):
                left -= len(message.get("body", b""))


def _too_slow(found: str, expected: str, wait: int) -> RefusedError:
    remedy = "send it again, over a faster line or shorter"
    return RefusedError(408, found, expected, remedy, {"retry-after": str(wait)})


def _too_large(found: str, limits: RequestLimits) -> RefusedError:
    remedy = "cut the recording, send it compressed (FLAC, Opus), or start the server with a larger --max-mb"
    return RefusedError(413, found, f"{limits.megabytes:g} MB at most", remedy)
