"""Retry policy: which errors are transient, exponential back-off, and a limit on time and attempts."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from asit.errors import ConfigError

T = TypeVar("T")

SECONDS = "ASIT_STORE_SECONDS"
"""Environment variable: for how many seconds an object store is retried before a run stops."""
_CREDENTIALS = 10.0  # s; a cloud machine's own service for credentials may be busy that long
_PERMANENT = (
    *(PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError),
    *(ValueError, TypeError, LookupError),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long an operation is retried. Waits double; they are not drawn at random.

    Attributes:
        seconds: in all, from the first attempt on.
        first_wait, longest_wait: s between attempts.
        answer: s within which a small answer must come, and one more for each megabyte, within `seconds`.
        attempts: in a row that bring nothing.
    """

    seconds: float = 300.0
    first_wait: float = 0.5
    longest_wait: float = 30.0
    answer: float = 30.0
    attempts: float = math.inf

    @classmethod
    def default(cls) -> RetryPolicy:
        """Return the policy for object stores: 300 s, or what the environment variable ASIT_STORE_SECONDS says.

        Raises:
            ConfigError: it is not a number above 0.
        """
        given = os.environ.get(SECONDS, "")
        try:
            seconds = float(given or cls.seconds)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < math.inf:
            raise ConfigError(f"{SECONDS}={given}", "a number of seconds above 0", "correct or unset it")
        return cls(seconds=seconds, answer=min(cls.answer, seconds))


class TransientError(Exception):
    """A failure that another attempt may mend.

    Args:
        reason: for the log.
        wait: least s before the next attempt, as a server requests.
        within: s from the first attempt on, after which there is no other.
        progressed: the attempt brought something, so the count of attempts starts again.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, within: float = math.inf, progressed: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.within, self.progressed = wait, within, progressed


class ExhaustedError(Exception):
    """The policy allows no further attempt."""

    def __init__(self, last: TransientError, attempts: int, seconds: float) -> None:
        super().__init__(str(last))
        self.last, self.attempts, self.seconds = last, attempts, seconds


def retry(attempt: Callable[[float], T], policy: RetryPolicy, name: str) -> T:
    """Call `attempt` until it returns; each failure is logged.

    Args:
        attempt: is given the seconds that are left, at least 1.
        policy: when to stop.
        name: what is fetched or written, for the log.

    Raises:
        ExhaustedError: the last attempt that the policy allows raised a TransientError.
        Exception: anything else that `attempt` raises.
    """
    began, failures = time.monotonic(), 0
    while True:
        try:
            return attempt(max(1.0, policy.seconds - (time.monotonic() - began)))
        except TransientError as caught:
            error = caught
        elapsed = time.monotonic() - began
        failures = 1 if error.progressed else failures + 1
        wait = max(error.wait, min(policy.first_wait * 2 ** min(failures - 1, 32), policy.longest_wait))
        if failures >= policy.attempts or elapsed + wait > min(policy.seconds, error.within):
            raise ExhaustedError(error, failures, elapsed) from None
        log.warning("%s: %s; retry %d in %g s", name, error, failures, wait)
        time.sleep(wait)


def is_transient_status(status: int) -> bool:
    """Whether an HTTP status may pass: request timeout, too early, too many requests, and errors of the server."""
    return status in (408, 425, 429) or status >= 500


def as_transient(error: Exception) -> TransientError | None:
    """Return what a store's error says as a TransientError, or None where a retry does not help.

    Unknown errors count as transient: the limit of time ends them anyhow.
    """
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    if isinstance(status, int) and status >= 400:
        permanent = not is_transient_status(status)
    else:
        permanent = isinstance(error, _PERMANENT)
    within = _CREDENTIALS if "Credentials" in type(error).__name__ else math.inf
    return None if permanent else TransientError(reason(error), within=within)


def reason(error: Exception) -> str:
    """Return what a store's error says, in one line."""
    kind = type(error).__name__
    if "Timeout" in kind:
        return "no answer in time"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip().splitlines()[0][:200]
    text = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return f"{kind}: {text}" if text else kind
