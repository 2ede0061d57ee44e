"""FLAC files of several recordings. Layout: RFC 9639, section 8.2 (the header)."""

from __future__ import annotations

import re

from asit.audio.byte_ranges import ByteRange, ByteReader
from asit.audio.faults import RECORDINGS

_FIRST = re.compile(b"fLaC[\0\x80]\0\0\x22")  # signature, and the header of the first block of metadata
_HEADER = 42  # bytes up to the end of that block
_SEARCHED = 1 << 23  # largest file searched for another one in it


def recordings(file: ByteReader, start: int) -> list[tuple[ByteRange, ...]]:
    """Return the byte ranges for the decoder of each recording in a file, the first of which begins at `start`."""
    starts = [start]
    if file.size - start <= _SEARCHED:
        body = file.at(start, file.size - start)
        starts += [start + found.start() for found in _FIRST.finditer(body, _HEADER)]
    ends = [*starts[1:], file.size - (128 if file.at(file.size - 128, 3) == b"TAG" else 0)]  # before ID3
    return [((at, end - at),) for at, end in zip(starts[: RECORDINGS + 1], ends, strict=False)]
