"""FLAC files with a wrong length in the header: several concatenated, or continued after the header was written.

Layout: RFC 9639, sections 8.2 (the header) and 9.1 (headers of frames, and their checksums).
"""

from __future__ import annotations

import re

from asit.audio.byte_ranges import ByteRange, ByteReader
from asit.audio.faults import RECORDINGS

_FIRST = re.compile(b"fLaC[\0\x80]\0\0\x22")  # signature, and the header of the first block of metadata, or the only
_HEADER = 42  # bytes up to the end of that block
_TOTAL = 21  # the number of samples: the lower 36 bits from here on
_SEARCHED = 1 << 23  # largest file searched for another one in it
_TAIL = 1 << 16  # bytes at the end searched for the last frame
_TRIED = 8  # most candidates there whose checksum is computed
_BLOCKS = {
    1: 192,
    **{code: 576 << code - 2 for code in range(2, 6)},
    **{code: 256 << code - 8 for code in range(8, 16)},
}


def recordings(file: ByteReader, start: int) -> list[tuple[ByteRange, ...]]:
    """Return the byte ranges for the decoder of each recording in a file, the first of which begins at `start`.

    A header with fewer samples than its last frame says is replaced by one without a length.
    """
    starts = [start]
    if file.size - start <= _SEARCHED:
        body = file.at(start, file.size - start)
        starts += [start + found.start() for found in _FIRST.finditer(body, _HEADER)]
    del starts[RECORDINGS + 1 :]
    return [_parts(file, at, end) for at, end in zip(starts, [*starts[1:], file.size], strict=True)]


def _parts(file: ByteReader, start: int, end: int) -> tuple[ByteRange, ...]:
    if file.at(end - 128, 3) == b"TAG":  # ID3, which stops a decoder that does not know the length
        end -= 128
    head = file.at(start, _HEADER)
    total = int.from_bytes(head[_TOTAL : _TOTAL + 5], "big") & 0xFFFFFFFFF
    if len(head) == _HEADER and total and _last_sample(file, start, end, head, total) > total:
        none = bytes([head[_TOTAL] & 0xF0, 0, 0, 0, 0])
        return head[:_TOTAL] + none + head[_TOTAL + 5 :], (start + _HEADER, end - start - _HEADER)
    return ((start, end - start),)


def _last_sample(file: ByteReader, start: int, end: int, head: bytes, total: int) -> int:
    """Return the end of the last frame in samples; `total` if it is not found or ends there."""
    first = max(start + _HEADER, end - _TAIL)
    tail = file.at(first, end - first)
    found, at = list[tuple[int, int]](), len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        last = _frame(tail[at : at + 16], int.from_bytes(head[10:12], "big"))
        if last == total:
            return total
        if last is not None:
            found.append((at, last))
    return next((last for at, last in found[:_TRIED] if last > total and _crc(tail[at:], 16, 0x8005) == 0), total)


def _frame(head: bytes, block: int) -> int | None:
    """Return the end of the frame at these 16 bytes, samples, if any; `block`: samples of all frames but the last."""
    if len(head) < 6 or head[1] & 0xFE != 0xF8 or head[2] >> 4 == 0 or head[2] & 15 == 15 or head[3] & 1:
        return None
    lead = head[4]
    more = next((n for n in range(8) if not lead << n & 0x80), 8)  # ones that begin the number, coded as in UTF-8
    length = max(1, more)
    if more in (1, 8):
        return None
    number = lead & (0x7F >> more) if more else lead
    for byte in head[5 : 4 + length]:
        if byte & 0xC0 != 0x80:
            return None
        number = number << 6 | byte & 0x3F
    at, code, rate = 4 + length, head[2] >> 4, head[2] & 15
    samples = _BLOCKS.get(code, 0)
    if code in (6, 7):
        samples = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    at += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if len(head) <= at or _crc(head[: at + 1], 8, 0x07) != 0:
        return None
    return (number if head[1] & 1 else number * block) + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Return the checksum of bytes that end with theirs: 0 if it is right."""
    value, top = 0, 1 << bits - 1
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & ((1 << bits) - 1)
    return value
