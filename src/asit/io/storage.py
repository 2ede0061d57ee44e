"""Read and write files by location: a local path, or a URL of an object store or web server, which fsspec reads.

Local files never go through fsspec. Transient errors are retried, each logged by asit.io.retry; when the policy is
exhausted, and at once for other errors, a StoreError is raised. fsspec keeps its instances for each process, so loader
processes have their own, forked or not.
"""

# Paths are text here: a location may be a URL.
# ruff: noqa: PTH100, PTH118, PTH120

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from asit.errors import AsitError, StoreError
from asit.io import atomic, local_files, remote_files
from asit.io.remote_files import ATOMIC, WEB, MissingError, RefusalError, file_system, protocol_of, timeout, too_long
from asit.io.retry import SECONDS, ExhaustedError, RetryPolicy, as_transient, reason, retry

T = TypeVar("T")

_AT_ONCE = 16
"""Concurrent requests where many small answers are wanted."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_VERSIONS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
"""Fields in which stores give a file's version: s3, http and Azure; Google; others."""


Fingerprint = tuple[int, int]
"""What changes when a file is rewritten: its size, and its time of change in ns or a hash of the store's ETag. It is a
plain tuple because its repr is part of cache digests."""


def is_url(text: str) -> bool:
    """Whether this is a URL, such as s3://bucket/folder, and not a path."""
    return _URL.match(text) is not None


def join(root: str, name: str) -> str:
    """Return `name` below `root`, or `name` itself where it is absolute or a URL."""
    if is_url(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def parent(location: str) -> str:
    """Return the folder of a location, absolute or a URL."""
    return location.rsplit("/", 1)[0] if is_url(location) else os.path.dirname(os.path.abspath(location))


def absolute(location: str) -> str:
    """Return the location, absolute; a URL is unchanged."""
    return location if is_url(location) else os.path.abspath(location)


def read_range(location: str, offset: int, size: int) -> bytes:
    """Read `size` bytes from byte `offset` on. Threads may call it concurrently.

    Raises:
        StoreError: no such file, a file that ends before, a store that refuses or is not reached in time.
        ConfigError: the package for this kind of store is missing.
    """
    if size <= 0:
        return b""

    def get(seconds: float) -> bytes:
        if is_url(location):
            files, path = file_system(location)
            data = bytes(files.cat_file(path, start=offset, end=offset + size, **timeout(files, seconds)))
        else:
            data = local_files.read_at(location, offset, size)
        if len(data) == size:
            return data
        if len(data) > size:
            raise RefusalError(
                f"{location}: the server sends more than the requested part",
                f"{size:,} bytes from byte {offset:,} on (HTTP range requests)",
                "serve the shards with a server or store that answers range requests, or copy them to a disk",
            )
        length = _size(location, seconds)
        if length < offset + size:
            raise RefusalError(
                f"{location} ends at byte {length:,}",
                f"{offset + size:,} bytes at least, as its index says",
                "copy the shard again, or write it again with asit shard",
            )
        raise OSError(f"{len(data):,} of {size:,} bytes came")

    return _retried(location, get, size)


def read(location: str) -> bytes:
    """Read a complete file; one in a store has at most `remote_files.MOST` bytes.

    Raises:
        StoreError, ConfigError: as `read_range`; a file in a store that is longer.
    """
    most = remote_files.MOST

    def get(seconds: float) -> bytes:
        if not is_url(location):
            with local_files.open_file(location) as file:
                return file.read()
        files, path = file_system(location)
        # A web server's answer is counted as it comes; other packages are trusted to keep to the length that they say.
        length = None if protocol_of(location) in WEB else _info(location, seconds)["size"]
        if length is not None and length > most:
            raise too_long(location, length, most)
        data = bytes(files.cat_file(path, **timeout(files, seconds)))
        if len(data) > most:
            raise too_long(location, None, most)
        return data

    return _retried(location, get, most)


def size(location: str) -> int:
    """Return the length of a file in bytes.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """
    return _retried(location, lambda seconds: _size(location, seconds))


def fingerprint(location: str) -> Fingerprint:
    """Return what changes when a file is rewritten; its second number is 0 where a store gives neither ETag nor time.

    Raises:
        OSError: there is no such local file, or it cannot be looked at.
        StoreError, ConfigError: as `read_range`, of a file at a URL.
    """
    if not is_url(location):
        status = os.stat(location)  # noqa: PTH116  # there may be a million
        return status.st_size, status.st_mtime_ns

    def get(seconds: float) -> Fingerprint:
        info = _info(location, seconds)
        versions = " ".join(str(info[name]) for name in _VERSIONS if info.get(name))
        digest = int.from_bytes(hashlib.sha256(versions.encode()).digest()[:7]) if versions else 0
        return int(info["size"] or 0), digest

    return _retried(location, get)


def sizes(locations: Iterable[str]) -> dict[str, int]:
    """Return the lengths in bytes of those files that exist; requests are concurrent.

    Many in one folder of an object store come with a listing, a thousand by one request.

    Raises:
        StoreError, ConfigError: as `read_range`, but for files that do not exist.
    """

    def one(location: str) -> tuple[str, int | None]:
        try:
            return location, size(location)
        except MissingError:
            return location, None

    found: dict[str, int] = {}
    rest = [*locations]
    for folder, count in Counter(map(parent, rest)).items():
        if count > _AT_ONCE and is_url(folder) and protocol_of(folder) in ATOMIC:
            try:
                lengths = {join(folder, name): length for name, length in list(folder).items()}
            except RefusalError:  # rights may be to read, and not to list
                continue
            found |= {location: length for location in rest if (length := lengths.get(location)) is not None}
            rest = [location for location in rest if parent(location) != folder]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return found | {location: length for location, length in pool.map(one, rest) if length is not None}


def list(location: str) -> dict[str, int | None]:
    """Return the sorted names in a folder, and the lengths of files where the store gives them.

    A folder that does not exist is empty, as it is in object stores.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """

    def get(seconds: float) -> dict[str, int | None]:
        if not is_url(location):
            with os.scandir(location) as entries:
                found = {entry.name: _length(entry) for entry in entries}
        else:
            files, path = file_system(location)
            files.invalidate_cache()
            found = {
                posixpath.basename(row["name"].rstrip("/")): row.get("size") if row["type"] == "file" else None
                for row in files.ls(path, detail=True, **timeout(files, seconds))
                if row["name"].rstrip("/") != path.rstrip("/")
            }
        return dict(sorted(found.items()))

    try:
        return _retried(location, get)
    except MissingError:
        return {}


def write(location: str, data: bytes) -> None:
    """Write a file atomically; one that exists is replaced, and folders above it are made.

    Raises:
        StoreError, ConfigError: as `create`.
    """
    if is_url(location):
        _put(location, lambda files, path: files.pipe_file(path, data))
        return
    with create(location) as draft:
        draft.write_bytes(data)


@contextmanager
def create(location: str) -> Iterator[Path]:
    """Yield a local draft to fill; when the block ends it becomes the file, atomically, or is sent to the URL.

    Raises:
        StoreError: it cannot be written, or the disk is full.
        ConfigError: the package for this kind of store is missing.
    """
    try:
        if not is_url(location):
            with atomic.write_file(location) as draft:
                yield draft
            return
        with tempfile.TemporaryDirectory(prefix="asit-") as folder:
            draft = Path(folder, posixpath.basename(location))
            yield draft
            _put(location, lambda files, path: files.put_file(str(draft), path))
    except OSError as error:
        raise unwritable(location, error) from None


def remove(location: str) -> None:
    """Delete a file, where it exists.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """

    def go(seconds: float) -> None:
        if not is_url(location):
            Path(location).unlink()
        else:
            files, path = file_system(location)
            files.rm_file(path, **timeout(files, seconds))

    with suppress(MissingError):
        _retried(location, go)


def unwritable(location: str, error: OSError) -> StoreError:
    """Return the error about a local file that cannot be written."""
    return StoreError(
        f"{location} cannot be written: "
        f"{'the disk is full' if atomic.is_disk_full(error) else error.strerror or error}",
        "a folder that can be written, with room",
        "make room, or choose another location",
    )


def _retried(location: str, attempt: Callable[[float], T], size: int = 0) -> T:
    """Return what `attempt` returns when given the seconds that an answer of `size` bytes may take."""
    policy = RetryPolicy.default()

    def once(left: float) -> T:
        try:
            return attempt(min(policy.answer + size / 1e6, left))
        except AsitError:
            raise
        except Exception as caught:  # each kind of store has errors of its own
            error = _cause(caught)
            if isinstance(error, FileNotFoundError):
                raise MissingError(
                    f"there is no {location}",
                    "a shard, as the index says" if location.endswith(".tar") else "a file",
                    "check the path; bring back what is missing, or write it again with asit shard",
                ) from None
            if (transient := as_transient(error)) is None:
                raise RefusalError(
                    f"{location}: {reason(error)}",
                    "a location that can be reached with the rights at hand",
                    "check path and rights",
                ) from None
            raise transient from None

    try:
        return retry(once, policy, location)
    except ExhaustedError as error:
        raise StoreError(
            f"{location} was not reached in {error.attempts} attempts over {error.seconds:.0f} s; "
            f"the last one: {error}",
            "an answer from the store",
            f"check that it is up, then run the same command again (a run continues with --resume); {SECONDS} sets the "
            "seconds for which it is retried"
            if error.last.within == math.inf
            else "give credentials as the store's package wants them, for s3 AWS_ACCESS_KEY_ID and the like "
            "(docs/shard.md)",
        ) from None


def _cause(error: Exception) -> Exception:
    """Return the error behind a missing file: fsspec raises that for all that fails while it asks for a length."""
    behind = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(behind, Exception):
        return error
    status = getattr(behind, "status", None)
    return behind if isinstance(behind, OSError) or (isinstance(status, int) and status not in (404, 410)) else error


def _length(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # a link to itself, or a file that has just gone
        return None


def _size(location: str, seconds: float) -> int:
    if not is_url(location):
        return Path(location).stat().st_size
    length = _info(location, seconds)["size"]
    if length is None:
        raise RefusalError(f"{location}: the server does not give its length", "a Content-Length", "serve it otherwise")
    return int(length)


def _info(location: str, seconds: float) -> dict[str, Any]:
    files, path = file_system(location)
    files.invalidate_cache()  # it may hold what a folder was before other processes wrote there
    return dict(files.info(path, **timeout(files, seconds)))


def _put(location: str, put: Callable[[Any, str], None]) -> None:
    """Call `put` with a file system and a path; where the store is not atomic, with a draft that is then renamed."""

    def attempt(_: float) -> None:
        files, path = file_system(location)
        if protocol_of(location) in ATOMIC:
            put(files, path)
            return
        folder, name = posixpath.split(path)
        draft = f"{folder}/{atomic.draft_of(Path(name)).name}"
        files.makedirs(folder, exist_ok=True)
        put(files, draft)
        files.mv(draft, path)

    _retried(location, attempt)
