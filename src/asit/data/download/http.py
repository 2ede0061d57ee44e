"""One file over HTTP: gone on with after a break, tried again, measured and checked."""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit import __version__
from asit.errors import AsitError
from asit.io import parsing

Progress = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all, where these are known."""

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try in a row that brought nothing."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_BLOCK = 1 << 18
_LEAST = 1 << 16
"""Bytes that must come within twice the timeout."""


class DownloadError(AsitError):
    """A file that cannot be had, or that is not what it should be."""


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


class _PassingError(Exception):
    """What may be over at the next try; `slow`: what the try brought does not count."""

    def __init__(self, what: str, pause: float = 0.0, slow: bool = False) -> None:
        super().__init__(what)
        self.pause, self.slow = pause, slow


def fetch(
    remote: RemoteFile,
    folder: Path,
    *,
    most: int | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    timeout: float = 30.0,
    pauses: tuple[float, ...] = PAUSES,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The file, at `folder / remote.name`, whole and checked.

    While it comes it is called NAME.partial, with the server's mark of its version in NAME.partial.json; a later call
    goes on from there if the server still has that version and sends parts of files, and otherwise starts again. A
    file of that name that is already there is checked and kept: so one fetched by other means is used.

    Args:
        remote: what to fetch.
        folder: an existing folder.
        most: bytes that the file may have where its size is not published; None: any number.
        progress: of the transfer.
        notify: told a line whenever something is tried again.
        timeout: seconds without a byte after which a try ends; it also ends where twice as long brings next to nothing.
        pauses: seconds before each new try in a row that brought nothing new.
        sleep: waits.

    Raises:
        DownloadError: no such address, no network, the server will not give it, the disk is full, or the file has
            another size or checksum than the published ones.
    """
    if urllib.parse.urlsplit(remote.url).scheme not in ("http", "https"):
        raise DownloadError(f"{remote.url} is not an address of the web", "http:// or https://", "check --url")
    target = folder / remote.name
    if target.exists():
        _check(remote, target)
        return target
    partial, state = folder / f"{remote.name}.partial", folder / f"{remote.name}.partial.json"
    failures, furthest = 0, _size(partial)
    most = most if remote.size is None else remote.size
    while True:
        try:
            _receive(remote, partial, state, most, progress, timeout)
            break
        except _PassingError as fault:
            if _size(partial) > furthest and not fault.slow:
                failures, furthest = 0, _size(partial)
            if failures == len(pauses):
                raise DownloadError(
                    f"{remote.url}: {fault}, after {failures + 1} tries; {_size(partial):,} bytes are in {partial}",
                    "a server that answers",
                    f"run the same command later, which goes on from there{_by_hand(target)}",
                ) from None
            pause = max(pauses[failures], fault.pause)
            failures += 1
            if notify:
                notify(f"{remote.name}: {fault}; trying again in {pause:.0f} s")
            sleep(pause)
    if notify and remote.sha256:
        notify(f"{remote.name}: checking")
    state.unlink(missing_ok=True)
    try:
        _check(remote, partial)
    except DownloadError:
        # Out of the way of the next try, which would otherwise go on from wrong bytes.
        os.replace(partial, folder / f"{remote.name}.damaged")
        raise
    os.replace(partial, target)
    return target


def forget(remote: RemoteFile, folder: Path) -> None:
    """Delete the file, and all that a fetch of it left."""
    for ending in ("", ".partial", ".partial.json", ".damaged"):
        (folder / f"{remote.name}{ending}").unlink(missing_ok=True)


def remaining(remote: RemoteFile, folder: Path, about: int) -> int:
    """Bytes still to come; `about` stands for a size that is not published."""
    if (folder / remote.name).exists():
        return 0
    return max(0, (remote.size or about) - _size(folder / f"{remote.name}.partial"))


def _receive(
    remote: RemoteFile, partial: Path, state: Path, most: int | None, progress: Progress | None, timeout: float
) -> None:
    """One try: append to the partial file, or begin it anew, until the last byte is there."""
    have, known = _size(partial), _state(state, remote.url)
    if remote.size is not None and have == remote.size:
        return
    # Without a mark of the version only a published checksum can tell that two halves belong together.
    mark = known.get("etag") or known.get("modified")
    going_on = have > 0 and (remote.size is None or have < remote.size) and bool(mark or remote.sha256)
    headers = {"User-Agent": f"asit/{__version__}", "Accept-Encoding": "identity"}
    if going_on:
        headers["Range"] = f"bytes={have}-"
        if mark:
            headers["If-Range"] = mark
    with _faults(remote, partial):
        answer = _ask(remote, partial, headers, timeout)
    if answer is None:  # 416: the file ends before what we have of it
        partial.unlink()
        raise _PassingError("the server's file is shorter than what has come; starting from the beginning")
    with answer:
        mode, total = "wb", _length(answer)
        if answer.status == 206:
            first, total = _range(answer)
            if not going_on or first != have or not _same(answer, known):
                partial.unlink(missing_ok=True)
                raise _PassingError("the server's file has changed; starting from the beginning")
            mode = "ab"
        else:
            have = 0
        if (answer.headers.get_content_type() or "") == "text/html":
            raise DownloadError(
                f"{remote.url} answers with a web page instead of {remote.name}",
                "the file",
                "a proxy or a log-in page may stand in between: open the address in a browser"
                + _by_hand(partial.with_name(remote.name)),
            )
        if remote.size is not None and total is not None and total != remote.size:
            raise DownloadError(
                f"{remote.url} has {total:,} bytes",
                f"{remote.size:,} bytes, as published",
                "this is another file: use the address in docs/download.md, or another mirror",
            )
        total = total if total is not None else remote.size
        with _disk(partial):
            out = partial.open(mode)
        with out:
            if mode == "wb":
                # After the old bytes are gone: a mark must never stand beside bytes of another version.
                with _disk(partial):
                    state.write_text(json.dumps({"url": remote.url, **_marks(answer)}), encoding="utf-8")
            if progress:
                progress(have, total)
            since, then = time.monotonic(), have
            while True:
                with _faults(remote, partial):
                    block = answer.read1(_BLOCK)
                if not block:
                    break
                have += len(block)
                if most is not None and have > most:
                    raise DownloadError(
                        f"{remote.url} sends more than {most:,} bytes",
                        f"{remote.name} with at most so many",
                        "this is another file: use the address in docs/download.md, or another mirror",
                    )
                if time.monotonic() - since > 2 * timeout:
                    if have - then < _LEAST:
                        raise _PassingError(f"only {have - then:,} bytes came in {2 * timeout:g} s", slow=True)
                    since, then = time.monotonic(), have
                with _disk(partial):
                    out.write(block)
                if progress:
                    progress(have, total)
            with _disk(partial):
                out.flush()
            if progress and total is None:
                progress(have, have)
    if total is not None and have < total:
        raise _PassingError(f"the connection ended at byte {have:,} of {total:,}")


def _ask(remote: RemoteFile, partial: Path, headers: dict[str, str], timeout: float) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and "Range" in headers:
                return None
            told = f"{error.code} {error.reason}".strip()
            if error.code in _PASSING:
                wait = error.headers.get("Retry-After", "")
                raise _PassingError(
                    f"the server answers {told}", min(60.0, float(wait)) if wait.isdigit() else 0.0
                ) from None
            raise DownloadError(
                f"{remote.url}: the server answers {told}",
                "the file at this address",
                "it may have moved, or a proxy may refuse it: look for another mirror and pass --url"
                + _by_hand(partial.with_name(remote.name)),
            ) from None


@contextmanager
def _faults(remote: RemoteFile, partial: Path) -> Iterator[None]:
    """The network's errors in two kinds: those that may pass, and those that will not."""
    hand = _by_hand(partial.with_name(remote.name))
    try:
        yield
    except urllib.error.URLError as error:
        reason = error.reason
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise DownloadError(
                f"{remote.url}: the server's certificate is not trusted ({reason.verify_message})",
                "a certificate that this machine trusts",
                "behind a company's proxy, set SSL_CERT_FILE to its certificates" + hand,
            ) from None
        if isinstance(reason, socket.gaierror) and reason.errno != socket.EAI_AGAIN:
            raise DownloadError(
                f"{remote.url}: no such host ({reason.strerror})",
                "a network that reaches it",
                "check the connection, or set https_proxy" + hand,
            ) from None
        if isinstance(reason, OSError):
            raise _PassingError(f"no connection ({reason.strerror or reason or 'timed out'})") from None
        raise DownloadError(f"{remote.url}: {reason}", "an address that can be opened", "check it" + hand) from None
    except TimeoutError:
        raise _PassingError("no answer in time") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise DownloadError(f"{remote.url} is not an address ({error})", "http:// or https://", "check --url") from None
    except (http.client.HTTPException, ConnectionError, ssl.SSLError) as error:
        raise _PassingError(f"the connection broke ({type(error).__name__})") from None


@contextmanager
def _disk(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DownloadError(
            f"{partial}: the disk is full after {_size(partial):,} bytes",
            "room for the archive and what it unpacks to",
            "make room and run the same command, which goes on from there",
        ) from None


def _check(remote: RemoteFile, path: Path) -> None:
    """Size and checksum against the published ones, where there are any."""
    again = "delete it and run the same command again, or pass another --url"
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        raise DownloadError(f"{path} has {size:,} bytes", f"{remote.size:,} bytes, as published", again)
    if remote.sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != remote.sha256:
        raise DownloadError(
            f"{path}: SHA-256 {found[:16]}...",
            f"{remote.sha256[:16]}..., as published",
            f"the file is damaged or another one (what was downloaded is kept as {remote.name}.damaged): {again}",
        )


def _by_hand(target: Path) -> str:
    return f"; or fetch it by other means, put it at {target} and run the same command"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _state(state: Path, url: str) -> dict[str, str]:
    """The marks of the version that the partial file belongs to; none if it came from elsewhere."""
    try:
        known = parsing.from_json(state.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return known if isinstance(known, dict) and known.get("url") == url else {}


def _marks(answer: Any) -> dict[str, str]:
    etag, modified = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    # A weak ETag says "much the same", which is not enough to join two halves (RFC 9110, 13.1.5).
    return {"etag": "" if etag.startswith("W/") else etag, "modified": modified}


def _same(answer: Any, known: dict[str, str]) -> bool:
    """Whether no mark of this part contradicts the one kept: some servers pass over If-Range."""
    return not any(mark and known.get(name) and known[name] != mark for name, mark in _marks(answer).items())


def _length(answer: Any) -> int | None:
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _range(answer: Any) -> tuple[int, int | None]:
    """First byte and whole size from Content-Range: bytes 5-9/10."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if told is None:
        return -1, None
    return int(told[1]), None if told[2] == "*" else int(told[2])
