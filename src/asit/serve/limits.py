"""Limits of a request, the errors of a request beyond them, and a computation that can be stopped."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

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
        upload: longest time for a whole body, in seconds.
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
