"""Bytes of recordings that lie in shards: read by range, neighbours together, from a file or from a store.

A shard on an object store answers each request after tens of milliseconds, whatever its size: so what a batch needs is
asked for in as few requests as its places allow, and the requests are made at the same time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from asit.data.catalogue.catalogue import Clip
from asit.errors import AsitError, StoreError
from asit.io import storage

WHOLE = 4 << 20
"""Bytes up to which a member is read whole; of a larger one only the blocks that its decoder asks for."""
_BLOCK = 256 << 10  # bytes of such a block
_GAP = 128 << 10  # bytes that are read in vain rather than asking twice: a millisecond at 1 Gbit/s
_RUN = 16 << 20  # bytes of one request at most
_PIECE = 4 << 20  # the same, where each of several threads has one
_AHEAD = 256 << 20  # bytes of a batch that are held at once at most
_THREADS = 16  # requests at the same time, of one process

Place = tuple[str, int, int]
"""(shard, offset, size)."""


class Span(io.RawIOBase):
    """A member of a shard as an open file, of which only the blocks that are asked for are read.

    An error of the store is kept in `failure` and raised: decoders that swallow it leave it there for their caller.

    Args:
        shard: path or URL of the tar.
        offset, size: of the member's bytes in it.
    """

    def __init__(self, shard: str, offset: int, size: int) -> None:
        self.shard, self.offset, self.size = shard, offset, size
        self.failure: StoreError | None = None
        self._at, self._first, self._held = 0, 0, b""

    @property
    def name(self) -> str:
        """For messages."""
        return self.shard

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(f"byte {start + offset} of {self.shard}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer up to the member's end: to a decoder, less is the end."""
        target, done = memoryview(buffer).cast("B"), 0
        while done < len(target) and (found := self._next(len(target) - done)):
            target[done : done + len(found)] = found
            done += len(found)
        return done

    def _next(self, count: int) -> bytes:
        """Up to `count` bytes from where it stands on, out of one block."""
        count = min(count, self.size - self._at)
        if count <= 0:
            return b""
        if not self._first <= self._at < self._first + len(self._held):
            wanted = min(max(count, _BLOCK), self.size - self._at)
            try:
                self._held = storage.read_range(self.shard, self.offset + self._at, wanted)
            except StoreError as error:
                self.failure = error
                raise
            self._first = self._at
        begin = self._at - self._first
        found = self._held[begin : begin + count]
        self._at += len(found)
        return found


@contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """A member as an open file; an error of its store comes out, whatever a decoder made of it.

    Raises:
        StoreError: the shard is missing, or its store cannot be reached.
    """
    span = Span(*place)
    try:
        yield cast(BinaryIO, span)
    except AsitError:
        if span.failure is not None:
            raise span.failure from None
        raise


def place_of(clip: Clip) -> Place | None:
    """Where a clip's bytes lie; None: in a file of its own."""
    return None if clip.shard is None else (clip.shard, clip.offset, clip.size)


def fetch(places: Iterable[Place]) -> Mapping[Place, bytes]:
    """The bytes of members, neighbours by one request, requests to a store at the same time.

    Members above `WHOLE` and those beyond a bound on memory are left out.

    Raises:
        StoreError: a shard is missing, or its store cannot be reached.
    """
    wanted, held = [], 0
    for place in dict.fromkeys(places):
        if place[2] <= WHOLE and held + place[2] <= _AHEAD:
            wanted.append(place)
            held += place[2]
    runs = _runs(sorted(wanted))
    if len(runs) > 1 and storage.is_url(runs[0][0][0]):
        with ThreadPoolExecutor(min(_THREADS, len(runs)), "fetch") as threads:
            found = list(threads.map(_read, runs))
    else:
        found = [_read(run) for run in runs]
    return {place: part for run in found for place, part in run.items()}


def _runs(places: list[Place]) -> list[list[Place]]:
    """Sorted places in groups, each of which one request reads."""
    runs: list[list[Place]] = []
    first = end = 0
    for shard, offset, size in places:
        near = bool(runs) and runs[-1][-1][0] == shard and offset - end <= _GAP
        if near and offset + size - first <= _RUN:
            runs[-1].append((shard, offset, size))
            end = max(end, offset + size)
        else:
            runs.append([(shard, offset, size)])
            first, end = offset, offset + size
    return runs


def _read(run: list[Place]) -> dict[Place, bytes]:
    shard, first, _ = run[0]
    end = max(offset + size for _, offset, size in run)
    whole = memoryview(storage.read_range(shard, first, end - first))
    return {place: bytes(whole[place[1] - first :][: place[2]]) for place in run}


class Ahead:
    """Members in a store that threads ask for one by one, in about this order: neighbours come with one request.

    Args:
        places: of the members; None: not read here.
    """

    def __init__(self, places: Iterable[Place | None]) -> None:
        self._of: dict[int, _Run] = {}
        run: _Run | None = None
        for at, place in enumerate(places):
            if place is None or not storage.is_url(place[0]):
                continue
            if run is None or not run.takes(place):
                run = _Run(place)
            run.end, run.left = max(run.end, place[1] + place[2]), run.left + 1
            self._of[at] = run

    def __contains__(self, at: int) -> bool:
        return at in self._of

    def read(self, at: int, place: Place) -> bytes:
        """The bytes of the member that is number `at`; each is asked for once.

        Raises:
            StoreError: its shard is missing, or the store cannot be reached.
        """
        return self._of[at].read(place)


class _Run:
    """Neighbours that one request reads; held until the last of them has been asked for."""

    def __init__(self, place: Place) -> None:
        self.shard, self.first, self.end, self.left = place[0], place[1], place[1], 0
        self.alone = threading.Lock()
        self.held: bytes | None = None
        self.failure: StoreError | None = None

    def takes(self, place: Place) -> bool:
        shard, offset, size = place
        near = shard == self.shard and self.first <= offset <= self.end + _GAP
        return near and offset + size - self.first <= _PIECE

    def read(self, place: Place) -> bytes:
        with self.alone:
            if self.failure is not None:  # so that threads do not wait one after the other for what is not there
                raise self.failure
            if self.held is None:
                try:
                    self.held = storage.read_range(self.shard, self.first, self.end - self.first)
                except StoreError as error:
                    self.failure = error
                    raise
            begin = place[1] - self.first
            found = self.held[begin : begin + place[2]]
            self.left -= 1
            if self.left <= 0:
                self.held = None
            return found
