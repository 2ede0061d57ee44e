"""Download one file over HTTP: resumed after a break, retried, bounded, and checked by size and checksum."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from asit import __version__
from asit.errors import AsitError
from asit.io import atomic, parsing
from asit.io.local_files import sha256
from asit.io.retry import ExhaustedError, RetryPolicy, TransientError, is_transient_status, retry

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all, where these are known."""

POLICY = RetryPolicy(seconds=math.inf, first_wait=1.0, longest_wait=16.0, answer=30.0, attempts=6)
"""Waits of 1, 2, 4, 8 and 16 s between attempts in a row that bring nothing; 30 s without a byte end an attempt."""
_LONGEST_WAIT = 60.0
"""Seconds that a server may request before the next attempt."""
_BLOCK = 1 << 18
_LEAST = 1 << 16
"""Bytes that must come within twice the policy's `answer`."""


class DownloadError(AsitError):
    """A file that cannot be downloaded, or that is not what was published."""


@dataclass(frozen=True)
class RemoteFile:
    """A file, and what was published of it.

    Attributes:
        url: http or https.
        name: of the file on this machine.
        size: bytes; None where nothing is published.
        sha256: hexadecimal; None where nothing is published.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None


def fetch(
    remote: RemoteFile,
    folder: Path,
    *,
    most: int | None = None,
    progress: Progress = lambda done, total: None,
    policy: RetryPolicy = POLICY,
) -> Path:
    """Download a file to `folder / remote.name` and check it; a file of that name that exists is checked and kept.

    Until it is complete it is called NAME.partial, with the version that the server gave (ETag or time) in
    NAME.partial.json; a later call resumes from there if the server still has that version and answers range requests.

    Args:
        remote: what to download.
        folder: an existing folder.
        most: bytes that the file may have where its size is not published; None: any number.
        progress: of the transfer.
        policy: of retries; an attempt also ends where twice its `answer` seconds bring next to nothing.

    Raises:
        DownloadError: no such address, no network, the server refuses, the disk is full, or the file has another size
            or checksum than the published ones.
    """
    if urllib.parse.urlsplit(remote.url).scheme not in ("http", "https"):
        raise DownloadError(f"{remote.url} is not an address of the web", "http:// or https://", "check --url")
    target = folder / remote.name
    if target.exists():
        _check(remote, target)
        return target
    transfer = _Transfer(remote, target, most if remote.size is None else remote.size, progress, policy.answer)
    partial = transfer.partial
    try:
        retry(transfer.attempt, policy, remote.name)
    except ExhaustedError as error:
        raise DownloadError(
            f"{remote.url}: {error}, after {error.attempts} attempts; {_size(partial):,} bytes are in {partial}",
            "a server that answers",
            f"run the same command later, which resumes from there{transfer.by_hand}",
        ) from None
    transfer.state.unlink(missing_ok=True)
    try:
        _check(remote, partial)
    except DownloadError:
        os.replace(partial, folder / f"{remote.name}.damaged")  # or the next call would resume from wrong bytes
        raise
    os.replace(partial, target)
    return target


def forget(remote: RemoteFile, folder: Path) -> None:
    """Delete the file, and all that a download of it left."""
    for ending in ("", ".partial", ".partial.json", ".damaged"):
        (folder / f"{remote.name}{ending}").unlink(missing_ok=True)


def remaining(remote: RemoteFile, folder: Path, about: int) -> int:
    """Return the bytes still to come; `about` stands for a size that is not published."""
    if (folder / remote.name).exists():
        return 0
    return max(0, (remote.size or about) - _size(folder / f"{remote.name}.partial"))


class _Transfer:
    """A download in progress, of one or more attempts."""

    def __init__(self, remote: RemoteFile, target: Path, most: int | None, progress: Progress, timeout: float) -> None:
        self.remote, self.most, self.progress, self.timeout = remote, most, progress, timeout
        self.partial = target.with_name(f"{target.name}.partial")
        self.state = target.with_name(f"{target.name}.partial.json")
        self.by_hand = f"; or fetch it by other means, put it at {target} and run the same command"
        self._furthest = _size(self.partial)

    def attempt(self, _: float) -> None:
        """Append to the partial file, or begin it again, until the last byte is there.

        Raises:
            TransientError: another attempt may bring the rest.
            DownloadError: none will.
        """
        try:
            with self._errors():
                self._receive()
        except TransientError as error:
            size = _size(self.partial)
            if size > self._furthest and not isinstance(error, _TrickleError):
                error.progressed, self._furthest = True, size
            raise

    def _receive(self) -> None:
        remote, have, known = self.remote, _size(self.partial), self._version()
        if remote.size is not None and have == remote.size:
            return
        # Without a version only a published checksum can tell that two halves belong together.
        version = known.get("etag") or known.get("modified")
        resume = have > 0 and (remote.size is None or have < remote.size) and bool(version or remote.sha256)
        headers = {"User-Agent": f"asit/{__version__}", "Accept-Encoding": "identity"}
        if resume:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
        with urllib.request.urlopen(
            urllib.request.Request(remote.url, headers=headers), timeout=self.timeout
        ) as answer:
            total = _content_length(answer)
            append = answer.status == 206
            if append:
                first, total = _content_range(answer)
                found = _version_of(answer)  # some servers ignore If-Range
                changed = any(known.get(name) and value and known[name] != value for name, value in found.items())
                if not resume or first != have or changed:
                    self.partial.unlink(missing_ok=True)
                    raise TransientError("the server's file has changed; starting from the beginning")
            self._check_answer(answer, total)
            total = total if total is not None else remote.size
            with self.partial.open("ab" if append else "wb") as out:
                if not append:
                    # After the old bytes are gone: a version must never be beside bytes of another one.
                    have = 0
                    self.state.write_text(json.dumps({"url": remote.url, **_version_of(answer)}), encoding="utf-8")
                have = self._copy(answer, out, have, total)
        if total is not None and have < total:
            raise TransientError(f"the connection ended at byte {have:,} of {total:,}")

    def _copy(self, answer: Any, out: Any, have: int, total: int | None) -> int:
        """Write the answer's body to the file, whose length is then returned."""
        self.progress(have, total)
        since, then = time.monotonic(), have
        while block := answer.read1(_BLOCK):
            have += len(block)
            if self.most is not None and have > self.most:
                raise DownloadError(
                    f"{self.remote.url} sends more than {self.most:,} bytes",
                    f"{self.remote.name} with at most so many",
                    "this is another file: use the address in docs/download.md, or another mirror",
                )
            if time.monotonic() - since > 2 * self.timeout:
                if have - then < _LEAST:
                    raise _TrickleError(f"only {have - then:,} bytes came in {2 * self.timeout:g} s")
                since, then = time.monotonic(), have
            out.write(block)
            self.progress(have, total)
        if total is None:
            self.progress(have, have)
        return have

    def _check_answer(self, answer: Any, total: int | None) -> None:
        remote = self.remote
        if answer.headers.get_content_type() == "text/html":
            raise DownloadError(
                f"{remote.url} answers with a web page instead of {remote.name}",
                "the file",
                "a proxy or a log-in page may be in between: open the address in a browser" + self.by_hand,
            )
        if remote.size is not None and total is not None and total != remote.size:
            raise DownloadError(
                f"{remote.url} has {total:,} bytes",
                f"{remote.size:,} bytes, as published",
                "this is another file: use the address in docs/download.md, or another mirror",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise the errors of network and disk as TransientError or DownloadError."""
        url = self.remote.url
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                self._refused(error)
        except urllib.error.URLError as error:
            self._unreachable(error.reason)
        except TimeoutError:
            raise TransientError("no answer in time") from None
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError(f"{url} is not an address ({error})", "http:// or https://", "check --url") from None
        except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
            raise TransientError(f"the connection broke ({type(error).__name__})") from None
        except OSError as error:
            if not atomic.is_disk_full(error):
                raise
            raise DownloadError(
                f"{self.partial}: the disk is full after {_size(self.partial):,} bytes",
                "room for the archive and what it unpacks to",
                "make room and run the same command, which resumes from there",
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> NoReturn:
        """Raise the error for a status of 400 or above."""
        if error.code == 416:  # the file ends before what we have of it
            self.partial.unlink(missing_ok=True)
            raise TransientError("the server's file is shorter than what has come; starting from the beginning")
        text = f"the server answers {f'{error.code} {error.reason}'.strip()}"
        if is_transient_status(error.code):
            wait = error.headers.get("Retry-After", "")
            raise TransientError(text, wait=min(_LONGEST_WAIT, float(wait)) if wait.isdigit() else 0.0) from None
        raise DownloadError(
            f"{self.remote.url}: {text}",
            "the file at this address",
            "it may have moved, or a proxy may refuse it: look for another mirror and pass --url" + self.by_hand,
        ) from None

    def _unreachable(self, reason: Any) -> NoReturn:
        """Raise the error for a connection that was not made."""
        url = self.remote.url
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{url}: the server's certificate is not trusted ({reason.verify_message})",
                "a certificate that this machine trusts",
                "behind a company's proxy, set SSL_CERT_FILE to its certificates" + self.by_hand,
            ) from None
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise DownloadError(
                f"{url}: no such host ({reason.strerror})",
                "a network that reaches it",
                "check the connection, or set https_proxy" + self.by_hand,
            ) from None
        if isinstance(reason, OSError):
            raise TransientError(f"no connection ({reason.strerror or reason or 'timed out'})") from None
        raise DownloadError(f"{url}: {reason}", "an address that can be opened", "check it" + self.by_hand) from None

    def _version(self) -> dict[str, str]:
        """Return the version that the partial file belongs to; empty if it came from elsewhere."""
        known: Any = None
        with suppress(FileNotFoundError, ValueError):
            known = parsing.from_json(self.state.read_bytes())
        return known if isinstance(known, dict) and known.get("url") == self.remote.url else {}


class _TrickleError(TransientError):
    """What came does not count as progress."""


def _check(remote: RemoteFile, path: Path) -> None:
    """Compare size and checksum with the published ones, where there are any."""
    again = "delete it and run the same command again, or pass another --url"
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        raise DownloadError(f"{path} has {size:,} bytes", f"{remote.size:,} bytes, as published", again)
    if remote.sha256 is None:
        return
    found = sha256(path)
    if found != remote.sha256:
        raise DownloadError(
            f"{path}: SHA-256 {found[:16]}...",
            f"{remote.sha256[:16]}..., as published",
            f"the file is damaged or another one (what was downloaded is kept as {remote.name}.damaged): {again}",
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _version_of(answer: Any) -> dict[str, str]:
    etag, modified = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    # A weak ETag says "much the same", which is not enough to join two halves (RFC 9110, 13.1.5).
    return {"etag": "" if etag.startswith("W/") else etag, "modified": modified}


def _content_length(answer: Any) -> int | None:
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _content_range(answer: Any) -> tuple[int, int | None]:
    """Return the first byte and the file's size from Content-Range, such as "bytes 5-9/10"."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if found is None:
        return -1, None
    return int(found[1]), None if found[2] == "*" else int(found[2])
