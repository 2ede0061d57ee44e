"""Download one file over HTTP: retried, resumed after a break, and checked by size and SHA-256."""

from __future__ import annotations

import http.client
import math
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from asit import __version__
from asit.data.download.registry import Archive
from asit.errors import AsitError
from asit.io import atomic
from asit.io.local_files import sha256
from asit.io.retry import ExhaustedError, RetryPolicy, TransientError, is_transient_status, retry

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all, where these are known."""

POLICY = RetryPolicy(seconds=math.inf, first_wait=1.0, longest_wait=16.0, answer=30.0, attempts=6)
"""Waits of 1, 2, 4, 8 and 16 s between attempts in a row that bring nothing; 30 s without a byte end an attempt."""
_LONGEST_WAIT = 60.0
"""Seconds that a server may request before the next attempt."""
_BLOCK = 1 << 18


class DownloadError(AsitError):
    """A file that cannot be downloaded, or that is not what was published."""


def fetch(archive: Archive, folder: Path, progress: Progress = lambda done, total: None) -> Path:
    """Download an archive to `folder / archive.name` and check it; a file of that name that exists is checked and kept.

    Until it is complete it is called NAME.partial, from which a later call resumes if the server answers range
    requests. The checksum, or after unpacking the digest of the recordings, finds parts that do not belong together.

    Raises:
        DownloadError: no such address, no network, the server refuses, or the file has another size or checksum than
            the published ones.
        CheckpointError: the disk is full, or the folder may not be written.
    """
    target, partial = folder / archive.name, partial_of(archive, folder)
    if target.exists():
        _check(archive, target)
        return target
    furthest = size_of(partial)

    def attempt(_: float) -> None:
        nonlocal furthest
        try:
            _receive(archive, partial, progress)
        except TransientError as error:
            error.progressed, furthest = size_of(partial) > furthest, max(furthest, size_of(partial))
            raise

    failed = ""
    try:
        with atomic.disk_errors(partial):
            retry(attempt, POLICY, archive.name)
    except ExhaustedError as error:
        failed = f"{error}, after {error.attempts} attempts; {size_of(partial):,} bytes are in {partial}"
    except _PermanentError as error:
        failed = str(error)
    if failed:
        raise DownloadError(
            f"{archive.url}: {failed}",
            f"a server that sends {archive.name}",
            "check address, connection and proxy (https_proxy; SSL_CERT_FILE for its certificates) and run the same "
            f"command, which resumes; or pass --url, or put the file at {target}",
        )
    try:
        _check(archive, partial)
    except DownloadError:
        os.replace(partial, folder / f"{archive.name}.damaged")  # or the next call would resume from wrong bytes
        raise
    os.replace(partial, target)
    return target


def partial_of(archive: Archive, folder: Path) -> Path:
    """Return the path of an incomplete download."""
    return folder / f"{archive.name}.partial"


def size_of(path: Path) -> int:
    """Return the bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


class _PermanentError(Exception):
    """A failure that no other attempt mends."""


def _receive(archive: Archive, partial: Path, progress: Progress) -> None:
    """Append to the partial file, or begin it again, until the last byte is there."""
    have, most = size_of(partial), archive.size if archive.sha256 else 4 * archive.size
    if archive.sha256 and have == archive.size:
        return
    if urllib.parse.urlsplit(archive.url).scheme not in ("http", "https"):
        raise _PermanentError("not an address of the web")
    headers = {"User-Agent": f"asit/{__version__}", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    try:
        request = urllib.request.Request(archive.url, headers=headers)
        with urllib.request.urlopen(request, timeout=POLICY.answer) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise _PermanentError("a web page instead of the file, perhaps of a proxy or a log-in")
            have = have if answer.status == 206 else 0
            total = None if answer.length is None else have + answer.length
            if archive.sha256 and total not in (None, archive.size):
                raise _PermanentError(f"{total:,} bytes in place of {archive.size:,}, as published")
            with partial.open("ab" if have else "wb") as out:
                progress(have, total)
                while block := answer.read1(_BLOCK):
                    have += len(block)
                    if have > most:
                        raise _PermanentError(f"more than {most:,} bytes are sent")
                    out.write(block)
                    progress(have, total)
    except urllib.error.HTTPError as error:
        _refused(error, partial)
    except urllib.error.URLError as error:
        reason = error.reason
        text = getattr(reason, "verify_message", "") or getattr(reason, "strerror", "") or str(reason)
        unknown = isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN
        kind = _PermanentError if unknown or isinstance(reason, ssl.SSLCertVerificationError) else TransientError
        raise kind(f"no connection ({text})") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise _PermanentError(f"not an address ({error})") from None
    except TimeoutError:
        raise TransientError("no answer in time") from None
    except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
        raise TransientError(f"the connection broke ({type(error).__name__})") from None
    if total is None:
        progress(have, have)
    elif have < total:
        raise TransientError(f"the connection ended at byte {have:,} of {total:,}")


def _refused(error: urllib.error.HTTPError, partial: Path) -> None:
    """Raise the error for a status of 400 or above."""
    with error:
        text = f"the server answers {error.code} {error.reason}".strip()
        if error.code == 416:
            partial.unlink(missing_ok=True)
            raise TransientError("the server's file is shorter than what has come; starting from the beginning")
        if not is_transient_status(error.code):
            raise _PermanentError(text)
        wait = error.headers.get("Retry-After", "")
        raise TransientError(text, wait=min(_LONGEST_WAIT, float(wait)) if wait.isdigit() else 0.0)


def _check(archive: Archive, path: Path) -> None:
    """Compare size and checksum with the published ones, where there are any."""
    if archive.sha256 is None:
        return
    size, found = size_of(path), sha256(path)
    if (size, found) != (archive.size, archive.sha256):
        raise DownloadError(
            f"{path} has {size:,} bytes and the SHA-256 {found[:16]}...",
            f"{archive.size:,} bytes and {archive.sha256[:16]}..., as published",
            f"delete it and run the same command, or pass another --url (a download is kept as {archive.name}.damaged)",
        )
