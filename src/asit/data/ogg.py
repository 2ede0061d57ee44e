"""Ogg pages given a serial number of our own, so that the same sound is the same bytes: libsndfile draws it.

Layout of a page and its checksum: RFC 3533, section 6. The checksum is that of the polynomial 0x04c11db7, begun at 0,
bits not turned, so it is linear: changing four bytes changes it by what these four alone, followed by zeros, give.
"""

from __future__ import annotations

import struct

_POLYNOMIAL = 0x104C11DB7
_HEADER = 27  # bytes of a page's header before its table of segments
_SERIAL, _CHECKSUM = 14, 22  # where these two lie in it


def renumbered(sound: bytes, serial: int = 1) -> bytes:
    """An Ogg file of one stream, whose serial number is `serial`; nothing else changes but the pages' checksums.

    Raises:
        ValueError: it is no Ogg file.
    """
    out, start = bytearray(sound), 0
    while start < len(out):
        if out[start : start + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {start}")
        segments = out[start + 26]
        length = _HEADER + segments + sum(out[start + _HEADER : start + _HEADER + segments])
        (had,) = struct.unpack_from("<I", out, start + _SERIAL)
        (checksum,) = struct.unpack_from("<I", out, start + _CHECKSUM)
        struct.pack_into("<I", out, start + _SERIAL, serial)
        # The four bytes as the page has them, first one highest; 8 powers of x for each byte after them, and 32 more.
        change = int.from_bytes(struct.pack("<I", had ^ serial), "big")
        after = length - _SERIAL - 4
        struct.pack_into("<I", out, start + _CHECKSUM, checksum ^ _times(change, _power(8 * after + 32)))
        start += length
    return bytes(out)


def _times(a: int, b: int) -> int:
    """Product of two polynomials over two elements, by the checksum's polynomial."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a <<= 1
        if a >> 32:
            a ^= _POLYNOMIAL
        b >>= 1
    return product


def _power(exponent: int) -> int:
    """x to this power, by the checksum's polynomial."""
    result, square = 1, 2
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result
