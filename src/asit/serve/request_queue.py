"""Receive the bodies of requests and compute their answers in threads, a bounded number at a time.

Nothing here depends on a web library: `receive` is a function that returns ASGI's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asit.serve.limits import GoneError, Job, RefusedError, RequestLimits

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_RETRY = 5  # seconds until the next try of a request that was refused because the server is busy


class RequestQueue:
    """Bounds the number of requests and the bytes of their bodies, and owns the threads that compute.

    Args:
        limits: of the requests.
        prepare: called once in each thread, before its first request.
    """

    def __init__(self, limits: RequestLimits, prepare: Callable[[], None] | None = None) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(limits.concurrency, "asit-serve", initializer=prepare)
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._uploads: dict[asyncio.Task[Any] | None, tuple[float, list[bytes]]] = {}
        self._dropped: set[asyncio.Task[Any] | None] = set()
        self._bytes = 0
        self._closed = False

    @property
    def inside(self) -> int:
        """Number of requests that send their body, wait or are computed."""
        return len(self._tasks)

    async def answer(
        self, work: Callable[[Job, bytes], bytes], receive: Receive, length: int | None = None, *, upload: bool = True
    ) -> bytes:
        """Return what `work` computes from a request's body in a thread, when one is free.

        Args:
            work: called with the request's job and body.
            receive: returns ASGI's messages.
            length: of the header Content-Length.
            upload: whether the request has a body.

        Raises:
            RefusedError: 400 an empty body, 408 too slow, 413 too large, 503 too many requests or bytes, or stopping.
            GoneError: the client has closed the connection.
            Exception: what `work` raises.
        """
        most = self.limits.concurrency + self.limits.waiting
        if self._closed or (self.inside >= most and not self._drop_slowest()):
            raise _busy(f"{self.inside} requests are waiting", f"{most} at most")
        task, parts = asyncio.current_task(), list[bytes]()
        self._tasks.add(task)
        try:
            if upload:
                self._uploads[task] = time.monotonic(), parts
                await self._receive(receive, length, parts)
                del self._uploads[task]
            return await self._compute(work, b"".join(parts), receive)
        except asyncio.CancelledError:
            if task in self._dropped:
                found = "a body that came in more slowly than all others while the server is busy"
                raise _too_slow(found, f"all of it within {self.limits.grace:g} s") from None
            if self._closed:
                raise RefusedError(503, "the server is stopping", "a running server", "try again later") from None
            raise
        finally:
            self._tasks.discard(task)
            self._dropped.discard(task)
            self._uploads.pop(task, None)
            self._bytes -= sum(map(len, parts))

    def close(self) -> None:
        """Refuse all requests from now on, and those inside too. Call it in the thread that serves."""
        self._closed = True
        for task in self._tasks:
            if task is not None:
                task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop_slowest(self) -> bool:
        """Cancel the slowest other upload that has taken longer than the grace period; False if there is none."""
        now, current = time.monotonic(), asyncio.current_task()
        speeds = {
            task: sum(map(len, parts)) / (now - since)
            for task, (since, parts) in self._uploads.items()
            if task is not current and now - since > self.limits.grace
        }
        slowest = min(speeds, key=lambda task: speeds[task], default=None)
        if slowest is None:
            return False
        _, parts = self._uploads.pop(slowest)
        self._bytes -= sum(map(len, parts))
        parts.clear()
        self._tasks.discard(slowest)
        self._dropped.add(slowest)
        return slowest.cancel()

    async def _receive(self, receive: Receive, length: int | None, parts: list[bytes]) -> None:
        """Append the pieces of the body as they come in."""
        limits, size, more = self.limits, 0, True
        too_large, most = length is not None and length > limits.bytes, limits.bytes * (limits.concurrency + 4)
        try:
            async with asyncio.timeout(limits.upload):
                while more and not too_large:
                    async with asyncio.timeout(limits.pause):
                        message = await receive()
                    if message["type"] != "http.request":
                        raise GoneError
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    too_large = size > limits.bytes
                    while self._bytes + len(part) > most:
                        if self._drop_slowest():
                            continue
                        found = f"{self._bytes / 1e6:.0f} MB of recordings are waiting"
                        raise _busy(found, f"{most / 1e6:.0f} MB at most")
                    self._bytes += len(part)
                    parts.append(part)
        except TimeoutError:
            found = f"a body of which only {size} bytes came in time"
            expected = f"no pause above {limits.pause:g} s, and all of it within {limits.upload:g} s"
            raise _too_slow(found, expected) from None
        if too_large:
            if more:
                await _drain(receive, limits)
            raise RefusedError(
                413,
                f"a body of {'more than ' if length is None else ''}{(length or limits.bytes) / 1e6:.1f} MB",
                f"{limits.megabytes:g} MB at most",
                "cut the recording, send it compressed (FLAC, Opus), or start the server with a larger --max-mb",
            )
        if not size:
            remedy = "send it as it is: curl --data-binary @clip.wav"
            raise RefusedError(400, "an empty body", "the bytes of an audio file", remedy)

    async def _compute(self, work: Callable[[Job, bytes], bytes], body: bytes, receive: Receive) -> bytes:
        """Run `work` in a thread, unless the client closes the connection first."""
        job = Job(self.limits)

        def timed() -> bytes:
            job.check()
            job.begin()
            return work(job, body)

        answer = asyncio.get_running_loop().run_in_executor(self._pool, timed)
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            waited: list[asyncio.Future[Any]] = [answer, gone]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise GoneError
            return answer.result()
        finally:
            gone.cancel()
            job.stop()
            answer.cancel()  # if it still waits for a thread; else it ends at its next check


def _busy(found: str, expected: str) -> RefusedError:
    return RefusedError(503, found, expected, f"try again in {_RETRY} s", {"retry-after": str(_RETRY)})


def _too_slow(found: str, expected: str) -> RefusedError:
    remedy = "send it again, over a faster line or shorter"
    return RefusedError(408, found, expected, remedy, {"retry-after": str(_RETRY)})


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
