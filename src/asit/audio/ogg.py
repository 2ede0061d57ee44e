"""Ogg files: the audio streams in one, in sequence or in parallel; and new serial numbers for pages.

Layout of a page and its checksum: RFC 3533, section 6.
FLAC in Ogg: https://xiph.org/flac/ogg_mapping.html.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from asit.audio.byte_ranges import ByteRange, ByteReader
from asit.audio.faults import RECORDINGS

_HEADER = 27  # bytes of a page's header before its table of segments
_SERIAL, _CHECKSUM = 14, 22  # their offsets in it
_REFLECTED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_FLAC_MAPPING = 9  # bytes before the signature of FLAC in its first packet
_MAGIC = (
    (b"\x01vorbis", "vorbis"),
    (b"OpusHead", "opus"),
    (b"\x7fFLAC", "flac"),
    (b"Speex   ", "speex"),
    (b"fishead", "skeleton"),
    (b"\x80theora", "theora"),
    (b"OVP80", "vp8"),
)
_SOUNDS = ("vorbis", "opus", "flac", "speex")


def renumbered(file: bytes, serial: int = 1) -> bytes:
    """Change the serial number of an Ogg file of one stream, and the pages' checksums.

    Raises:
        ValueError: it is no Ogg file.
    """
    out, start = bytearray(file), 0
    while start < len(out):
        if out[start : start + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {start}")
        segments = out[start + 26]
        length = _HEADER + segments + sum(out[start + _HEADER : start + _HEADER + segments])
        struct.pack_into("<I", out, start + _SERIAL, serial)
        struct.pack_into("<I", out, start + _CHECKSUM, 0)
        struct.pack_into("<I", out, start + _CHECKSUM, checksum(out[start : start + length]))
        start += length
    return bytes(out)


def checksum(page: bytes | bytearray) -> int:
    """Return the checksum of a page whose own is 0: CRC-32 with unreflected bits, started and ended without ones."""
    reflected = zlib.crc32(page.translate(_REFLECTED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


@dataclass(frozen=True)
class Link:
    """One of the audio streams that follow each other in an Ogg file.

    Attributes:
        codec: "vorbis", "opus", "flac", "speex".
        parts: byte ranges for the decoder: the pages, or for FLAC the native stream in them.
    """

    codec: str
    parts: tuple[ByteRange, ...]


@dataclass(frozen=True)
class Links:
    """The content of an Ogg file.

    Attributes:
        found: its audio streams, in order.
        cut: whether it ends within a page.
        others: names of streams that are no audio.
    """

    found: tuple[Link, ...]
    cut: bool
    others: tuple[str, ...]


def links(file: ByteReader) -> Links:
    """Scan the pages of a file, skipping other bytes; of several parallel audio streams the first one counts."""
    found: list[tuple[str, list[tuple[int, int]]]] = []
    others: list[str] = []
    at, serial, begun, opening, cut = 0, -1, False, False, False
    while at < file.size and len(found) <= RECORDINGS:
        head = file.at(at, _HEADER)
        if head[:4] != b"OggS"[: len(head)]:
            at = _page_after(file, at + 1)
            continue
        table = file.at(at + _HEADER, head[26]) if len(head) == _HEADER else b""
        front = _HEADER + len(table)
        length = front + sum(table)
        if len(head) < _HEADER or len(table) < head[26] or at + length > file.size:
            cut = True
            break
        (number,) = struct.unpack_from("<I", head, _SERIAL)
        if head[5] & 2:  # the first page of a stream
            if not opening:  # other pages were between: a new link
                begun = False
            opening = True
            packet = file.at(at + front, 16)
            codec = next((name for magic, name in _MAGIC if packet.startswith(magic)), "an unknown stream")
            if codec in _SOUNDS and not begun:
                begun, serial = True, number
                found.append((codec, []))
            elif number != serial or not begun:
                others.append(codec)
        else:
            opening = False
        if begun and number == serial:
            codec, pages = found[-1]
            skip = 0 if codec != "flac" else front if pages else front + _FLAC_MAPPING  # the native stream in the pages
            pages.append((at + skip, length - skip))
        at += length
    return Links(tuple(Link(codec, _joined(pages)) for codec, pages in found), cut, tuple(others))


def _page_after(file: ByteReader, at: int) -> int:
    while at < file.size:
        block = file.at(at, 1 << 16)
        i = block.find(b"OggS")
        if i >= 0:
            return at + i
        at += max(1, len(block) - 3)
    return file.size


def _joined(ranges: list[tuple[int, int]]) -> tuple[ByteRange, ...]:
    """Merge adjacent ranges."""
    out = [ranges[0]]
    for offset, length in ranges[1:]:
        if offset == out[-1][0] + out[-1][1]:
            out[-1] = out[-1][0], out[-1][1] + length
        else:
            out.append((offset, length))
    return tuple(out)
