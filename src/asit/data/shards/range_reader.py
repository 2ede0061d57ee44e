"""Read recordings out of shards by byte range: neighbours by one request, requests to a store concurrently.

An object store answers each request after tens of milliseconds, whatever its size, so a batch is read by few requests.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from asit.audio.byte_ranges import VirtualFile
from asit.data.catalogue.catalogue import Clip
from asit.errors import AsitError, StoreError
from asit.io import storage

AT_ONCE = 4 << 20
"""Bytes up to which a member is read at once; of a larger one only the blocks that its decoder reads."""
_BLOCK = 256 << 10  # bytes of such a block
_GAP = 128 << 10  # bytes that are read in vain rather than making two requests: a millisecond at 1 Gbit/s
_RUN = 16 << 20  # bytes of one request at most
_PIECE = 4 << 20  # the same, where each of several threads has one
_AHEAD = 256 << 20  # bytes of a batch that are held at once at most
_THREADS = 16  # concurrent requests of one process


class ByteSpan(NamedTuple):
    """A member's bytes in a shard, which is a path or a URL."""

    shard: str
    offset: int
    size: int


class _SpanFile(VirtualFile):
    """A member of a shard as a file; an error of the store is kept in `failure`, because some decoders swallow it."""

    def __init__(self, span: ByteSpan) -> None:
        self.span, self.name = span, span.shard
        self.failure: StoreError | None = None
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._at, self.span.size)[whence] + offset
        if start < 0:
            raise OSError(f"byte {start} of {self.span.shard}")
        self._at = start
        return start

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.span.size - self._at)
        try:
            data = storage.read_range(
                self.span.shard, self.span.offset + self._at, left if size < 0 else min(size, left)
            )
        except StoreError as error:
            self.failure = error
            raise
        self._at += len(data)
        return data


@contextmanager
def open_span(span: ByteSpan) -> Iterator[BinaryIO]:
    """Yield a member as an open file, of which only the blocks that are read are fetched.

    Raises:
        StoreError: the shard is missing, or its store cannot be reached, whatever a decoder made of it.
    """
    file = _SpanFile(span)
    try:
        yield io.BufferedReader(file, _BLOCK)
    except AsitError:
        if file.failure is not None:
            raise file.failure from None
        raise


def span_of(clip: Clip) -> ByteSpan | None:
    """Return where a clip's bytes are; None: in a file of its own."""
    return None if clip.shard is None else ByteSpan(clip.shard, clip.offset, clip.size)


def fetch(spans: Iterable[ByteSpan]) -> Mapping[ByteSpan, bytes]:
    """Return the bytes of members; those above `AT_ONCE` and those beyond a bound on memory are left out.

    Raises:
        StoreError: a shard is missing, or its store cannot be reached.
    """
    wanted, total = [], 0
    for span in dict.fromkeys(spans):
        if span.size <= AT_ONCE and total + span.size <= _AHEAD:
            wanted.append(span)
            total += span.size
    runs = _runs(sorted(wanted), _RUN)
    if len(runs) > 1 and storage.is_url(runs[0][0].shard):
        with ThreadPoolExecutor(min(_THREADS, len(runs)), "fetch") as threads:
            found = list(threads.map(_read_run, runs))
    else:
        found = [_read_run(run) for run in runs]
    return {span: data for run in found for span, data in run.items()}


class ReadAhead:
    """Members in a store that threads read one by one, in about this order: neighbours come by one request.

    Args:
        spans: of the members; None, and files that are not in a store: not read here.
    """

    def __init__(self, spans: Iterable[ByteSpan | None]) -> None:
        remote = {at: span for at, span in enumerate(spans) if span is not None and storage.is_url(span.shard)}
        runs = [_SharedRun(run) for run in _runs(remote.values(), _PIECE)]
        self._runs = dict(zip(remote, (run for run in runs for _ in run.spans), strict=True))

    def __contains__(self, at: int) -> bool:
        return at in self._runs

    def read(self, at: int, span: ByteSpan) -> bytes:
        """Return the bytes of member number `at`, which must be read once.

        Raises:
            StoreError: its shard is missing, or the store cannot be reached.
        """
        return self._runs[at].read(span)


class _SharedRun:
    """Neighbours that one request reads; each is dropped when it has been read."""

    def __init__(self, spans: list[ByteSpan]) -> None:
        self.spans, self._lock = spans, threading.Lock()
        self._found: dict[ByteSpan, bytes] | StoreError | None = None

    def read(self, span: ByteSpan) -> bytes:
        with self._lock:
            if self._found is None:
                try:
                    self._found = _read_run(self.spans)
                except StoreError as error:  # kept, so that threads do not wait one after the other for the same
                    self._found = error
            if isinstance(self._found, StoreError):
                raise self._found
            return self._found.pop(span) if self.spans.count(span) == 1 else self._found[span]


def _runs(spans: Iterable[ByteSpan], most: int) -> list[list[ByteSpan]]:
    """Group consecutive spans, each group to be read by one request of about `most` bytes at most."""
    runs: list[list[ByteSpan]] = []
    first = end = 0
    for span in spans:
        stop = span.offset + span.size
        near = bool(runs) and runs[-1][-1].shard == span.shard and first <= span.offset <= end + _GAP
        if near and stop - first <= most:
            runs[-1].append(span)
            end = max(end, stop)
        else:
            runs.append([span])
            first, end = span.offset, stop
    return runs


def _read_run(run: list[ByteSpan]) -> dict[ByteSpan, bytes]:
    first = min(span.offset for span in run)
    end = max(span.offset + span.size for span in run)
    data = memoryview(storage.read_range(run[0].shard, first, end - first))
    return {span: bytes(data[span.offset - first :][: span.size]) for span in run}
