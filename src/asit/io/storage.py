"""Files in a store: on this machine's disks, or behind a URL of an object store or a web server, which fsspec reads.

A place is a path or a URL. Local files are read by their descriptors and never go through fsspec. What may pass, such
as a connection that breaks, is tried again after waits that double, each logged by asit.io.storage; then, and at once
for what will not pass, a StoreError says so. fsspec keeps its instances for each process, so that loader processes
have their own, forked or not.
"""

# Paths are text here: a place may be a URL.
# ruff: noqa: PTH100, PTH118, PTH120

from __future__ import annotations

import errno
import functools
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from asit.errors import ConfigError, StoreError
from asit.io import atomic, local_files
from asit.io.descriptors import read_local
from asit.io.retry import MissingError, Patience, RefusalError, tried

_AT_ONCE = 16
"""Requests that are made side by side where many small answers are wanted."""
MOST = 512 << 20
"""Bytes of a remote file that is read whole, such as an index: two million clips and more."""
_LISTING = 32 << 20
"""Bytes of a web server's page that lists a folder."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Extras of fsspec, by what they import: the packages that people must install.
_NEEDS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
# What stores call the mark of a file's content, or when it was written: s3, http and Azure; Google; others.
_MARKS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
# Stores in which a file appears only when all of it has come.
_WEB = frozenset({"http", "https"})
_WHOLE = frozenset({"memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "hf"})


def is_url(text: str) -> bool:
    """Whether this is a URL, such as s3://bucket/folder, and not a path."""
    return _URL.match(text) is not None


def join(root: str, name: str) -> str:
    """The place `name` below `root`, or `name` itself where it is absolute or a URL."""
    if is_url(name):
        return name
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def parent(place: str) -> str:
    """The folder that a place lies in, absolute or a URL."""
    return place.rsplit("/", 1)[0] if is_url(place) else os.path.dirname(os.path.abspath(place))


def absolute(place: str) -> str:
    """The place, absolute; a URL as it is."""
    return place if is_url(place) else os.path.abspath(place)


def read_range(place: str, offset: int, size: int, *, patience: Patience | None = None) -> bytes:
    """`size` bytes from byte `offset` on. Threads may call it at the same time.

    Args:
        place: a path or a URL.
        offset, size: bytes.
        patience: None: the usual one.

    Raises:
        StoreError: no such file, a file that ends before, a store that refuses or is not reached in time.
        ConfigError: a package for this kind of store is missing.
    """
    if size <= 0:
        return b""

    def get(seconds: float) -> bytes:
        data = read_local(place, offset, size) if not is_url(place) else _remote_range(place, offset, size, seconds)
        if len(data) == size:
            return data
        if len(data) > size:
            raise RefusalError(
                f"{place}: the server sends more than the part that was asked for",
                f"{size:,} bytes from byte {offset:,} on (HTTP range requests)",
                "serve the shards with a server or store that answers range requests, or copy them to a disk",
            )
        length = _size(place, seconds)
        if length < offset + size:
            raise RefusalError(
                f"{place} ends at byte {length:,}",
                f"{offset + size:,} bytes at least, as its index says",
                "copy the shard again, whole, or write it again with asit shard",
            )
        raise OSError(f"{len(data):,} of {size:,} bytes came")

    return tried(place, get, patience, size)


def read(place: str, *, patience: Patience | None = None) -> bytes:
    """All of a file; of one in a store at most `MOST` bytes.

    Raises:
        StoreError, ConfigError: as `read_range`; a file in a store that is longer.
    """

    def get(seconds: float) -> bytes:
        if not is_url(place):
            with local_files.open_file(place) as file:
                return file.read()
        files, path = _files(place)
        # A web server's answer is counted as it comes; other packages are trusted to keep to the length that they say.
        if _protocol(place) not in _WEB and (length := _info(place, seconds)["size"]) is not None and length > MOST:
            raise too_much(place, length, MOST)
        data = bytes(files.cat_file(path, **_limit(files, seconds)))
        if len(data) > MOST:
            raise too_much(place, None, MOST)
        return data

    return tried(place, get, patience, MOST)


def size(place: str, *, patience: Patience | None = None) -> int:
    """Length of a file in bytes.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """
    return tried(place, lambda seconds: _size(place, seconds), patience)


def stamp(place: str, *, patience: Patience | None = None) -> tuple[int, int]:
    """What changes when a file is written anew: its length, and its time of change in ns; of a file at a URL a number
    made of the store's mark or time of it, 0 where the store has none.

    Raises:
        OSError: there is no such local file, or it cannot be looked at.
        StoreError, ConfigError: as `read_range`, of a file at a URL.
    """
    if not is_url(place):
        status = os.stat(place)  # noqa: PTH116  # there may be a million
        return status.st_size, status.st_mtime_ns

    def get(seconds: float) -> tuple[int, int]:
        told = _info(place, seconds)
        marks = " ".join(str(told[name]) for name in _MARKS if told.get(name))
        number = int.from_bytes(hashlib.sha256(marks.encode()).digest()[:7]) if marks else 0
        return int(told["size"] or 0), number

    return tried(place, get, patience)


def sizes(places: Iterable[str], *, patience: Patience | None = None) -> dict[str, int]:
    """Lengths of those of the files that are there, in bytes; several are asked for at the same time.

    Many in one folder of an object store come with a listing, a thousand by one request.

    Raises:
        StoreError, ConfigError: as `read_range`, but for files that are not there.
    """

    def one(place: str) -> tuple[str, int | None]:
        try:
            return place, size(place, patience=patience)
        except MissingError:
            return place, None

    found: dict[str, int] = {}
    rest = [*places]
    for folder, count in Counter(map(parent, rest)).items():
        if count > _AT_ONCE and is_url(folder) and _protocol(folder) in _WHOLE:
            try:
                lengths = {join(folder, name): length for name, length in list(folder, patience=patience).items()}
            except RefusalError:  # rights may be to read, and not to list
                continue
            found |= {place: length for place in rest if (length := lengths.get(place)) is not None}
            rest = [place for place in rest if parent(place) != folder]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return found | {place: length for place, length in pool.map(one, rest) if length is not None}


def exists(place: str, *, patience: Patience | None = None) -> bool:
    """Whether there is a file.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """
    return bool(sizes([place], patience=patience))


def list(place: str, *, patience: Patience | None = None) -> dict[str, int | None]:
    """Names of the files and folders in a folder, sorted, and the lengths of files where the store tells them.

    A folder that is not there is empty, as it is in object stores.

    Raises:
        StoreError, ConfigError: as `read_range`.
    """

    def get(seconds: float) -> dict[str, int | None]:
        if not is_url(place):
            with os.scandir(place) as entries:
                found = {entry.name: _length(entry) for entry in entries}
        else:
            files, path = _files(place)
            files.invalidate_cache()
            rows = files.ls(path, detail=True, **_limit(files, seconds))
            found = {
                posixpath.basename(row["name"].rstrip("/")): row.get("size") if row["type"] == "file" else None
                for row in rows
                if row["name"].rstrip("/") != path.rstrip("/")
            }
        return dict(sorted(found.items()))

    try:
        return tried(place, get, patience)
    except MissingError:
        return {}


def write(place: str, data: bytes, *, patience: Patience | None = None) -> None:
    """Write a file whole or not at all; one that is there is replaced, and folders above it are made.

    Raises:
        StoreError: it cannot be written, or the disk is full.
        ConfigError: a package for this kind of store is missing.
    """
    if is_url(place):
        _put(place, lambda files, path: files.pipe_file(path, data), patience)
        return
    try:
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        with atomic.write_file(place) as draft:
            draft.write_bytes(data)
    except OSError as error:
        raise unwritable(place, error) from None


def send(file: str, place: str, *, patience: Patience | None = None) -> None:
    """Bring a file of this machine to a URL, whole or not at all.

    Raises:
        StoreError, ConfigError: as `write`.
    """
    _put(place, lambda files, path: files.put_file(file, path), patience)


def remove(place: str, *, patience: Patience | None = None) -> None:
    """Delete a file, where it is there.

    Raises:
        StoreError, ConfigError: as `write`.
    """

    def go(seconds: float) -> None:
        if not is_url(place):
            Path(place).unlink()
        else:
            files, path = _files(place)
            files.rm_file(path, **_limit(files, seconds))

    try:
        tried(place, go, patience)
    except MissingError:
        return


def unwritable(place: str, error: OSError) -> StoreError:
    """The error about a local file that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return StoreError(
        f"{place} cannot be written: {'the disk is full' if full else error.strerror or error}",
        "a folder that can be written, with room",
        "make room, or choose another place",
    )


def _length(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:  # a link to itself, or a file that has just gone
        return None


def too_much(place: str, length: int | None, most: int) -> RefusalError:
    """The error about a remote file, or an answer of a server, beyond a limit; `length` None: not known."""
    told = "sends more bytes than that" if length is None else f"has {length:,} bytes"
    return RefusalError(
        f"{place} {told}",
        f"{most:,} bytes at most, to be read at once",
        "check the address; copy a larger index to a disk and read it there",
    )


def _size(place: str, seconds: float) -> int:
    if not is_url(place):
        return Path(place).stat().st_size
    length = _info(place, seconds)["size"]
    if length is None:
        raise RefusalError(f"{place}: the server does not tell its length", "a Content-Length", "serve it otherwise")
    return int(length)


def _info(place: str, seconds: float) -> dict[str, Any]:
    """What a store says of a file."""
    files, path = _files(place)
    files.invalidate_cache()  # it may hold what a folder was before other processes wrote there
    return dict(files.info(path, **_limit(files, seconds)))


def _remote_range(place: str, offset: int, size: int, seconds: float) -> bytes:
    files, path = _files(place)
    return bytes(files.cat_file(path, start=offset, end=offset + size, **_limit(files, seconds)))


def _put(place: str, go: Callable[[Any, str], None], patience: Patience | None) -> None:
    def put(_: float) -> None:
        files, path = _files(place)
        if _protocol(place) in _WHOLE:
            go(files, path)
            return
        folder, name = posixpath.split(path)
        draft = f"{folder}/{atomic.draft_of(Path(name)).name}"
        files.makedirs(folder, exist_ok=True)
        go(files, draft)
        files.mv(draft, path)

    tried(place, put, patience)


def _protocol(place: str) -> str:
    return place.split("://", 1)[0].lower()


def _files(place: str) -> tuple[Any, str]:
    """This process's file system for a URL, and the path in it."""
    import fsspec  # type: ignore[import-untyped]

    protocol = _protocol(place)
    try:
        files, path = fsspec.core.url_to_fs(place, **(_web_options(protocol) if protocol in _WEB else {}))
    except (ImportError, ValueError) as error:
        needed = _NEEDS.get(protocol)
        if needed is None:
            raise ConfigError(
                f"{place}: {protocol}:// is no kind of store that fsspec knows here ({error})",
                "such as https://, s3:// or gs://",
                "correct the URL, or install the package of fsspec for it",
            ) from None
        how = "'asit-audio[remote]'" if needed == "aiohttp" else needed
        raise ConfigError(
            f"{place} needs {needed}, which is not installed", "the package that reads it", f"pip install {how}"
        ) from None
    return files, path


@functools.cache
def _web_options(protocol: str) -> dict[str, Any]:
    """Arguments of fsspec's file system for the web, under which no answer is longer than it may be."""
    import aiohttp
    import fsspec

    class Counted(aiohttp.ClientResponse):
        """An answer that is read until it is longer than allowed; fsspec would take whatever a server sends."""

        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            if asked is None and (self.content_length or 0) > MOST:
                self.close()
                raise too_much(str(self.url), self.content_length, MOST)
            return await self._read(int(asked[2]) - int(asked[1]) + 1 if asked else MOST)

        async def text(self, *args: Any, **options: Any) -> str:
            if len(await self._read(_LISTING)) > _LISTING:
                raise too_much(str(self.url), None, _LISTING)
            return await super().text(*args, **options)

        async def _read(self, most: int) -> bytes:
            if self._body is None:
                parts, held = [], 0
                async for part in self.content.iter_chunked(1 << 20):
                    parts.append(part)
                    held += len(part)
                    if held > most:
                        self.close()
                        break
                self._body = b"".join(parts)
            return self._body

    own = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {})
    return {"client_kwargs": {**own, "response_class": Counted}}


def _limit(files: Any, seconds: float) -> dict[str, float]:
    """The argument that bounds an answer's time, where the file system takes one."""
    return {"timeout": seconds} if getattr(files, "async_impl", False) else {}
