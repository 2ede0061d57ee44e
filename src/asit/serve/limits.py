"""What one request may cost, and how many are let in: sizes, lengths, times, places, and the threads that compute.

Nothing here knows of a web library: `receive` is a function that gives ASGI's messages.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from asit.errors import AsitError, AudioError, ConfigError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        megabytes: largest body, in 10^6 bytes.
        seconds: longest sound.
        concurrency: requests computed at once, each in a thread of its own.
        waiting: requests that may wait for such a thread, or send their body, beside them.
        channels: most channels of a sound: decoding holds a block of all of them.
        pause: longest silence between two pieces of a body, in seconds.
        upload: longest time for a whole body, in seconds.
        patience: seconds after which a body that still comes in may lose its place to another request.
        decode: longest time for decoding a sound, in seconds.
        compute: longest time for all that is done with a sound, in seconds.
        numbers: most numbers of an answer, of the frames of `embed`: JSON of ten bytes each.
    """

    megabytes: float = 50.0
    seconds: float = 600.0
    concurrency: int = 2
    waiting: int = 128
    channels: int = 32
    pause: float = 10.0
    upload: float = 120.0
    patience: float = 1.0
    decode: float = 60.0
    compute: float = 600.0
    numbers: int = 5_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "waiting" and not 0 < value < math.inf:
                raise ConfigError(f"a limit of {value} {name}", "a number above 0", "raise it")
        if self.waiting < 0:
            raise ConfigError(f"{self.waiting} places to wait in", "0 or more", "raise it")

    @property
    def bytes(self) -> int:
        """Largest body in bytes."""
        return round(self.megabytes * 1e6)

    @property
    def held(self) -> int:
        """Bytes of bodies that are held at once, of all requests together."""
        return self.bytes * (self.concurrency + 4)


class RefusedError(AsitError):
    """A request that is not answered, with the status that says so.

    Args:
        status: of HTTP.
        found, expected, remedy: as in `AsitError`.
        retry: seconds after which to ask again.
        allow: methods, for status 405.
    """

    def __init__(
        self, status: int, found: str, expected: str = "", remedy: str = "", retry: int | None = None, allow: str = ""
    ) -> None:
        super().__init__(found, expected, remedy)
        self.status, self.retry, self.allow = status, retry, allow

    def __reduce__(self) -> tuple[type[Any], tuple[Any, ...]]:  # type: ignore[override]
        return type(self), (self.status, self.found, self.expected, self.remedy, self.retry, self.allow)


class TooLongError(AudioError):
    """A sound beyond the limits: of length, channels, time to decode or to compute, or with too long an answer."""


class GoneError(Exception):
    """Whoever asked has hung up; there is nobody to answer."""


class Job:
    """A request's computation, which looks here, between its steps, whether it should go on.

    Args:
        seconds: that it may take from `begin` on.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._stop = threading.Event()
        self._seconds, self._end = seconds, math.inf

    def begin(self) -> None:
        """Its time counts from now on."""
        self._end = time.monotonic() + self._seconds

    def stop(self) -> None:
        """Ask for an end at the next look."""
        self._stop.set()

    def check(self) -> None:
        """Look.

        Raises:
            GoneError: `stop` was called.
            TooLongError: its time is over.
        """
        if self._stop.is_set():
            raise GoneError
        if time.monotonic() > self._end:
            raise TooLongError(
                f"more than {self._seconds:g} s of computing",
                "a question that this machine answers faster",
                "send a shorter recording, or leave hop out or make it larger",
            )


class Place:
    """A request that was let in: its body, and its computation."""

    def __init__(self, gate: Gate, task: asyncio.Task[Any]) -> None:
        self._gate, self._task = gate, task
        self.held = 0
        self.since: float | None = None  # when its body began to come in; None: nothing is being received
        self.dropped = False

    def rate(self) -> float:
        """Bytes a second of the body so far."""
        return self.held / max(1e-3, time.monotonic() - (self.since or 0.0))

    def drop(self) -> None:
        """Make room for another: what has come of the body is thrown away, and its sender gets 408."""
        self.dropped = True
        self._task.cancel()
        self._gate.forget(self)

    async def body(self, receive: Receive, length: int | None) -> bytes:
        """The request's body, counted as it comes in.

        Args:
            receive: gives ASGI's messages.
            length: what the header Content-Length promised.

        Raises:
            RefusedError: 400 without a byte, 408 too slow, or slowest where its place is wanted, 413 too large, 503 too
                much held for all requests together.
            GoneError: the sender hung up.
        """
        self.since = time.monotonic()
        try:
            return await self._receive(receive, length)
        finally:
            self.since = None

    async def _receive(self, receive: Receive, length: int | None) -> bytes:
        limits, start = self._gate.limits, time.monotonic()
        if length is not None and length > limits.bytes:
            await _drain(receive, limits)
            raise _too_large(f"a body of {length / 1e6:.1f} MB", limits)
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            left = limits.upload - (time.monotonic() - start)
            try:
                async with asyncio.timeout(max(0.0, min(limits.pause, left))):
                    message = await receive()
            except TimeoutError:
                raise RefusedError(
                    408,
                    f"a body of which {size} bytes came in {time.monotonic() - start:.0f} s",
                    f"no pause above {limits.pause:g} s and the whole of it within {limits.upload:g} s",
                    "send it again, over a faster line or shorter",
                ) from None
            if message["type"] != "http.request":
                raise GoneError
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > limits.bytes:
                parts.clear()
                if more:
                    await _drain(receive, limits)
                raise _too_large(f"a body of more than {limits.bytes / 1e6:.1f} MB", limits)
            self._gate.take(self, len(part))
            parts.append(part)
        if not size:
            raise RefusedError(
                400,
                "an empty body",
                "the bytes of an audio file",
                "send it as it is: curl --data-binary @clip.wav",
            )
        return b"".join(parts)

    async def run(self, work: Callable[[Job], bytes], receive: Receive) -> bytes:
        """Compute in one of the threads, when one is free; whoever hangs up before is dropped from the queue.

        Raises:
            GoneError: the sender hung up.
            Exception: what `work` raises.
        """
        job = self._gate.begin()
        waiting = asyncio.get_running_loop().run_in_executor(self._gate.pool, self._gate.timed, work, job)
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            both: list[asyncio.Future[Any]] = [waiting, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            raise GoneError
        finally:
            gone.cancel()
            job.stop()
            waiting.cancel()  # takes it from the queue; one that has begun ends at its next look
            self._gate.end(job)


class Gate:
    """Places for requests, and the threads that compute.

    Args:
        limits: how many of each.
        prepare: called once in each thread, before its first request.
    """

    def __init__(self, limits: Limits, prepare: Callable[[], None] | None = None) -> None:
        self.limits = limits
        self.pool = ThreadPoolExecutor(limits.concurrency, "asit-serve", initializer=prepare)
        self._places: set[Place] = set()
        self._held = 0
        self._jobs: set[Job] = set()
        self._tasks: set[asyncio.Task[Any]] = set()  # of the requests inside
        self._seconds = 1.0  # of a computation, a running mean
        self._closed = False

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place, from before the body is read until the answer is there; in the request's own task.

        Raises:
            RefusedError: 503, all are taken, or the server is stopped meanwhile.
        """
        limits, task = self.limits, asyncio.current_task()
        assert task is not None
        most = limits.concurrency + limits.waiting
        if self._closed or (self.inside >= most and not self._make_room()):
            raise self._busy(f"{self.inside} requests are waiting", f"{most} at most")
        place = Place(self, task)
        self._places.add(place)
        self._tasks.add(task)
        try:
            yield place
        except asyncio.CancelledError:
            if not (self._closed or place.dropped):
                raise
            task.uncancel()  # by `close` or `drop`; there is an answer yet to be sent
            if place.dropped:
                raise RefusedError(
                    408,
                    "a body that came in more slowly than all others, and its place was wanted",
                    f"the whole of it within {limits.patience:g} s while the server is busy",
                    "send it again, over a faster line or shorter",
                    retry=self._wait(),
                ) from None
            raise RefusedError(503, "the server is being stopped", "a server that runs", "ask again later") from None
        finally:
            self._tasks.discard(task)
            self.forget(place)

    @property
    def inside(self) -> int:
        """Requests that have a place."""
        return len(self._places)

    def forget(self, place: Place) -> None:
        """Give back a place and the bytes that it holds; once is enough."""
        self._places.discard(place)
        self._held -= place.held
        place.held = 0

    def _make_room(self, wanted: Place | None = None) -> bool:
        """Drop the slowest of the bodies that have been coming in for longer than `patience`; False: there is none."""
        late = time.monotonic() - self.limits.patience
        slow = [p for p in self._places if p is not wanted and p.since is not None and p.since < late]
        if slow:
            min(slow, key=Place.rate).drop()
        return bool(slow)

    def take(self, place: Place, size: int) -> None:
        """Count bytes of a body; they are given back with the place.

        Raises:
            RefusedError: 503, too many are held.
        """
        while self._held + size > self.limits.held:
            if self._make_room(place):
                continue
            raise self._busy(
                f"{self._held / 1e6:.0f} MB of recordings are waiting", f"{self.limits.held / 1e6:.0f} MB at most"
            )
        self._held += size
        place.held += size

    def begin(self) -> Job:
        """A computation that `close` will stop."""
        job = Job(self.limits.compute)
        self._jobs.add(job)
        return job

    def end(self, job: Job) -> None:
        """Forget a computation."""
        self._jobs.discard(job)

    def timed(self, work: Callable[[Job], bytes], job: Job) -> bytes:
        """Run in a thread of the pool."""
        job.check()
        job.begin()
        start = time.monotonic()
        try:
            return work(job)
        finally:
            self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

    def close(self) -> None:
        """Let nobody in, tell those who are inside, and stop what is computed. Called in the thread that serves."""
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        for job in list(self._jobs):
            job.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _busy(self, found: str, expected: str) -> RefusedError:
        wait = self._wait()
        return RefusedError(503, found, expected, f"ask again in {wait} s", retry=wait)

    def _wait(self) -> int:
        return min(60, max(1, math.ceil(self.inside * self._seconds / self.limits.concurrency)))


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive, limits: Limits) -> None:
    """Throw a body away, up to a point: a sender that is cut off in the middle never reads the reason."""
    most = limits.bytes
    try:
        async with asyncio.timeout(limits.pause / 2):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(found: str, limits: Limits) -> RefusedError:
    return RefusedError(
        413,
        found,
        f"{limits.megabytes:g} MB at most",
        "cut the recording, send it compressed (FLAC, Opus), or start the server with a larger --max-mb",
    )
