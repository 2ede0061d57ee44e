"""Receive the bodies of requests and compute their answers in threads, a bounded number at a time.

Nothing here depends on a web library: `receive` is a function that returns ASGI's messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from asit.errors import AsitError, AudioError, ConfigError


@dataclass(frozen=True)
class RequestLimits:
    """What a request may cost.

    Attributes:
        megabytes: largest body, in 10^6 bytes.
        seconds: longest recording.
        concurrency: requests computed at once, each in a thread of its own.
        waiting: further requests that may send their body or wait for a thread.
        channels: most channels of a recording; decoding holds a block of all of them.
        pause: longest time between two pieces of a body, in seconds.
        upload: longest time for a complete body, in seconds.
        grace: time after which the slowest upload is dropped in favour of others while the server is busy, in seconds.
        compute: longest time for decoding a recording and all that is done with it, in seconds.
        numbers: most numbers in the frames of an answer; ten bytes of JSON each.
    """

    megabytes: float = 50.0
    seconds: float = 600.0
    concurrency: int = 2
    waiting: int = 128
    channels: int = 32
    pause: float = 10.0
    upload: float = 120.0
    grace: float = 1.0
    compute: float = 600.0
    numbers: int = 5_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf or (value == 0 and name != "waiting"):
                raise ConfigError(f"a limit of {value} {name}", "a number above 0, or no waiting requests", "raise it")

    @property
    def bytes(self) -> int:
        """Largest body in bytes."""
        return round(self.megabytes * 1e6)


class RefusedError(AsitError):
    """A request that is answered with an error status.

    Args:
        status: of HTTP.
        found, expected, remedy: as in `AsitError`.
        headers: of the answer.
    """

    def __init__(
        self, status: int, found: str, expected: str = "", remedy: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(found, expected, remedy)
        self.status, self.headers = status, dict(headers or {})


class TooLongError(AudioError):
    """A recording beyond the limits: of length, channels, computing time, or size of the answer."""


class GoneError(Exception):
    """The client has closed the connection."""


class Job:
    """A request's computation, which calls `check` between its steps and can be stopped there.

    Args:
        limits: of the request; its computing time counts from `begin` on.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self._stop, self._end = threading.Event(), math.inf

    def begin(self) -> None:
        """Start the clock."""
        self._end = time.monotonic() + self.limits.compute

    def stop(self) -> None:
        """Make the next `check` raise."""
        self._stop.set()

    def check(self) -> None:
        """Raise GoneError after `stop`, and TooLongError when the computing time is over."""
        if self._stop.is_set():
            raise GoneError
        if time.monotonic() > self._end:
            raise TooLongError(
                f"more than {self.limits.compute:g} s of computing",
                "a request that this machine answers faster",
                "send a shorter recording, or leave hop out or make it larger",
            )


Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_RETRY = 5  # seconds until the next try of a request that was refused because the server is busy


@dataclass(eq=False)
class _Request:
    """A request inside: its task, and the pieces of its body so far."""

    task: asyncio.Task[Any] | None
    uploading: bool
    since: float = field(default_factory=time.monotonic)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def cancel(self) -> bool:
        return self.task is not None and self.task.cancel()


class RequestQueue:
    """Bounds the number of requests and the bytes of their bodies, and owns the threads that compute.

    Args:
        limits: of the requests.
        prepare: called once in each thread, before its first request.
    """

    def __init__(self, limits: RequestLimits, prepare: Callable[[], None] | None = None) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(limits.concurrency, "asit-serve", initializer=prepare)
        self._inside: list[_Request] = []
        self._closed = False

    @property
    def inside(self) -> int:
        """Number of requests that send their body, wait or are computed."""
        return len(self._inside)

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
        request = _Request(asyncio.current_task(), upload)
        self._inside.append(request)
        try:
            if upload:
                await self._receive(receive, length, request)
                request.uploading = False
            return await self._compute(work, b"".join(request.parts), receive)
        except asyncio.CancelledError:
            if request not in self._inside:
                found = "a body that came in more slowly than all others while the server is busy"
                raise _too_slow(found, f"all of it within {self.limits.grace:g} s") from None
            if self._closed:
                raise RefusedError(503, "the server is stopping", "a running server", "try again later") from None
            raise
        finally:
            with contextlib.suppress(ValueError):  # it was dropped
                self._inside.remove(request)

    def close(self) -> None:
        """Refuse all requests from now on, and those inside too. Call it in the thread that serves."""
        self._closed = True
        for request in self._inside:
            request.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop_slowest(self) -> bool:
        """Cancel the slowest other upload that has taken longer than the grace period; False if there is none."""
        now, current = time.monotonic(), asyncio.current_task()
        late = [one for one in self._inside if one.uploading and now - one.since > self.limits.grace]
        slow = [one for one in late if one.task is not current]
        slowest = min(slow, key=lambda one: one.size / (now - one.since), default=None)
        if slowest is None:
            return False
        self._inside.remove(slowest)
        return slowest.cancel()

    async def _receive(self, receive: Receive, length: int | None, request: _Request) -> None:
        """Append the pieces of the body as they come in."""
        limits, more = self.limits, True
        too_large, most = length is not None and length > limits.bytes, limits.bytes * (limits.concurrency + 4)
        try:
            async with asyncio.timeout(limits.upload):
                while more and not too_large:
                    async with asyncio.timeout(limits.pause):
                        message = await receive()
                    if message["type"] != "http.request":
                        raise GoneError
                    part, more = message.get("body", b""), message.get("more_body", False)
                    too_large = request.size + len(part) > limits.bytes
                    while (held := sum(one.size for one in self._inside)) + len(part) > most:
                        if not self._drop_slowest():
                            raise _busy(
                                f"{held / 1e6:.0f} MB of recordings are waiting", f"{most / 1e6:.0f} MB at most"
                            )
                    request.parts.append(part)
                    request.size += len(part)
        except TimeoutError:
            found = f"a body of which only {request.size} bytes came in time"
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
        if not request.size:
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
