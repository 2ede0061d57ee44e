"""Reading short pieces of an open file, and a virtual file made of byte ranges of another one."""

from __future__ import annotations

import bisect
import io
import os
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, BinaryIO

_TAGS = 100  # most ID3 tags at the beginning
_FIRST, _MOST = 1 << 12, 1 << 17  # fewest and most bytes read ahead; sequential reads take ever more

ByteRange = tuple[int, int] | bytes
"""Offset and length in a file, or the bytes themselves."""


class ByteReader:
    """Reads short pieces of an open file, about in ascending order; `size` is the file's."""

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self.size: int = max(0, file.seek(0, os.SEEK_END))
        self._begin, self._held, self._ahead = 0, b"", _FIRST

    def at(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer at the end of the file, none outside it."""
        begin = offset - self._begin
        if begin >= 0 and begin + length <= len(self._held):
            return self._held[begin : begin + length]
        if not 0 <= offset < self.size or length <= 0:
            return b""
        if 0 <= begin <= 2 * len(self._held):  # sequential: read more
            self._ahead = min(2 * self._ahead, _MOST)
        self._file.seek(offset)
        size, held = max(length, self._ahead), b""
        while len(held) < size and (part := self._file.read(size - len(held))):
            held = held + part if held else part
        self._begin, self._held = offset, held
        return held[:length]


class VirtualFile(io.RawIOBase):
    """A file for a decoder, of which a subclass defines `read` and `seek`."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer)) or b""
        buffer[: len(found)] = found
        return len(found)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


class SplicedFile(VirtualFile):
    """The concatenation of byte ranges of another file, whose position moves."""

    def __init__(self, file: BinaryIO | Any, ranges: Sequence[ByteRange]) -> None:
        self._file, self._ranges = file, ranges
        lengths = (len(part) if isinstance(part, bytes) else part[1] for part in ranges)
        self._starts = [0, *accumulate(lengths)]
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        left = self._starts[-1] - self._at if size is None or size < 0 else size
        out = []
        while left > 0 and self._at < self._starts[-1]:
            index = bisect.bisect_right(self._starts, self._at) - 1
            inner = self._at - self._starts[index]
            most = min(left, self._starts[index + 1] - self._at)
            source = self._ranges[index]
            if isinstance(source, bytes):
                part = source[inner : inner + most]
            else:
                self._file.seek(source[0] + inner)
                part = self._file.read(most)
            if not part:
                break
            out.append(part)
            self._at += len(part)
            left -= len(part)
        return out[0] if len(out) == 1 else b"".join(out)

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._starts[-1])[whence]
        self._at = max(0, base + offset)
        return self._at


def syncsafe(digits: bytes) -> int:
    """Decode a number of ID3: seven bits in each byte."""
    return sum((byte & 127) << 7 * i for i, byte in enumerate(reversed(digits)))


def after_id3(file: ByteReader) -> int:
    """Return the offset after the ID3 tags at the beginning of a file."""
    at = 0
    for _ in range(_TAGS):
        head = file.at(at, 10)
        if head[:3] != b"ID3" or len(head) < 10:
            break
        at += 10 + syncsafe(head[6:10]) + (10 if head[5] & 16 else 0)
    return at
