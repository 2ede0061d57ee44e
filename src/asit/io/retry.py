"""How a store is asked again: what may pass and what will not, waits that double, and an end with a clear error."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from asit.errors import AsitError, ConfigError, StoreError

T = TypeVar("T")

SECONDS = "ASIT_STORE_SECONDS"
"""Environment variable: how long a store may stay silent, in seconds, before a run stops."""
_PASSING = frozenset({408, 425, 429})
"""Answers of web servers that blame the asker and may pass all the same: timeout, too early, too many requests."""
_GONE = frozenset({404, 410})
_NEVER = (
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
    LookupError,
)
"""Errors that asking again does not mend."""
_CREDENTIALS = 10.0  # s that no credentials are borne: a cloud machine's own service for them may be busy that long
_NO_CREDENTIALS = "give them as the store's package wants them, for s3 AWS_ACCESS_KEY_ID and the like (docs/shard.md)"


@dataclass(frozen=True)
class Patience:
    """How often and how long a store is asked again.

    Attributes:
        seconds: in all, from the first try on.
        first: s; the wait after the first failure; each further one is twice as long. Waits are not drawn at random.
        longest: s; the longest wait.
        answer: s; within which a small answer must come, and one second more for each megabyte, within `seconds`.
    """

    seconds: float = 300.0
    first: float = 0.5
    longest: float = 30.0
    answer: float = 30.0

    @classmethod
    def usual(cls) -> Patience:
        """That of this machine: 300 s, or what the environment variable ASIT_STORE_SECONDS says.

        Raises:
            ConfigError: it is no number above 0.
        """
        told = os.environ.get(SECONDS, "")
        if not told:
            return cls()
        try:
            seconds = float(told)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise ConfigError(f"{SECONDS}={told}", "a number of seconds above 0", "correct or unset it")
        return cls(seconds=seconds, answer=min(cls.answer, seconds))


_log = logging.getLogger("asit.io.storage")
"""Hears of each try that failed. Without handlers its lines go to the standard error as they are."""


class RefusalError(StoreError):
    """What will not pass."""


class MissingError(RefusalError):
    """There is no such file."""


def tried(place: str, go: Callable[[float], T], patience: Patience | None, much: int = 0) -> T:
    """What `go` (given the seconds that an answer may take) gives, tried again while that may help."""
    limits = patience or Patience.usual()
    began, wait, tries = time.monotonic(), limits.first, 0
    while True:
        tries += 1
        try:
            left = limits.seconds - (time.monotonic() - began)
            return go(min(limits.answer + much / 1e6, max(1.0, left)))
        except AsitError:
            raise
        except Exception as caught:  # each kind of store has errors of its own
            error = _cause(caught)
            last, gone = _said(error), time.monotonic() - began
            if isinstance(error, FileNotFoundError):
                raise MissingError(
                    f"there is no {place}",
                    "a shard, as the index says" if place.endswith(".tar") else "a file",
                    "check the place; bring back what is missing, or write it again with asit shard",
                ) from None
            if not _may_pass(error):
                raise RefusalError(
                    f"{place}: {last}", "a place that can be reached with the rights at hand", "check place and rights"
                ) from None
            unknown = "Credentials" in type(error).__name__
            if gone + wait > (min(limits.seconds, _CREDENTIALS) if unknown else limits.seconds):
                raise StoreError(
                    f"{place} was not reached in {tries} tries over {gone:.0f} s; the last one: {last}",
                    "an answer from the store",
                    _NO_CREDENTIALS
                    if unknown
                    else f"see whether it is there, then run the same command again (a run goes on with --resume); "
                    f"{SECONDS} says how many seconds are waited",
                ) from None
        line = f"{place}: {last}; try {tries + 1} in {wait:g} s"
        _log.warning(line)
        time.sleep(wait)
        wait = min(wait * 2, limits.longest)


def _cause(error: Exception) -> Exception:
    """fsspec calls all that fails on its way to a file's length a missing file; what it was stands behind it."""
    behind = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(behind, Exception):
        return error
    status = getattr(behind, "status", None)
    return behind if isinstance(behind, OSError) or (isinstance(status, int) and status not in _GONE) else error


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help; unknown errors count as such, for the limit of time ends them anyhow."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING
    return not isinstance(error, _NEVER)


def _said(error: Exception) -> str:
    kind = type(error).__name__
    if "Timeout" in kind:
        return "no answer in time"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip().splitlines()[0][:200]
    text = (error.strerror if isinstance(error, OSError) else "") or str(error)
    return f"{kind}: {text}" if text else kind
