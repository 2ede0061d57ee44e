"""MPEG audio streams (layers I to III, and AAC in ADTS frames): counted frames, and corrected length tags.

A decoder takes the length of an MP3 file from the Xing, Info or VBRI tag in its first frame, or estimates it from the
size and the first bit rates. libsndfile stops at that length, too early for a variable bit rate without a tag, or for
two concatenated files. So the frames are counted here, and where the tag differs the decoder gets a corrected one.

Header of a frame: ISO 11172-3, 2.4.1.3, and ISO 13818-3; ADTS: ISO 13818-7, 6.2.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from asit.audio.byte_ranges import ByteRange, ByteReader, syncsafe

_V1 = {
    1: (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
"""kbit/s by layer, index 1 to 14, of MPEG-1."""
_V2 = {
    1: (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    3: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""The same of MPEG-2 and 2.5."""
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
"""Hz, by the two bits of the version."""
_SEARCHED = 1 << 20  # most bytes before the first frame
_TRIED = 1_000_000  # most bytes of 0xFF examined between two frames
_DELAY = 529  # samples that mpg123 drops at the beginning of a file with a tag
_TAG_KBIT = 64  # bit rate of a frame with only a tag: 192 bytes and more


@dataclass(frozen=True)
class Header:
    """The header of a frame.

    Attributes:
        size: of the frame, bytes.
        samples: of one channel in it.
        rate: Hz.
        layer: 1 to 3; 0: AAC in ADTS.
        kind: equal in all frames of one stream.
        kbit: bit rate, kbit/s; 0: AAC.
    """

    size: int
    samples: int
    rate: int
    layer: int
    kind: tuple[int, int]
    kbit: int = 0


@dataclass(frozen=True)
class Stream:
    """The frames of a file.

    Attributes:
        first: header of the first one.
        frames: their number; None: not counted, since the tag agrees with the size of the file.
        promised: their number according to the tag; None: there is no credible tag.
        parts: byte ranges for the decoder; None: the file as it is.
        other: rate of frames of another kind after the first ones; None: all are alike.
        uneven: whether, in layers I and II, frames differ in size from the first.
    """

    first: Header
    frames: int | None
    promised: int | None
    parts: tuple[ByteRange, ...] | None
    other: str | None = None
    uneven: bool = False


@functools.lru_cache(maxsize=4096)
def _header(second: int, third: int) -> Header | None:
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    bits, rates = third >> 4, third >> 2 & 3
    if second < 0xE0 or version == 1 or layer == 4 or bits in (0, 15) or rates == 3:
        return None
    rate, kbit = _RATES[version][rates], (_V1 if version == 3 else _V2)[layer][bits - 1]
    padding = third >> 1 & 1
    if layer == 1:
        size, samples = (12_000 * kbit // rate + padding) * 4, 384
    else:
        samples = 576 if layer == 3 and version != 3 else 1152
        size = samples * 125 * kbit // rate + padding
    return Header(size, samples, rate, layer, (second & 0x1E, rates), kbit)


def header_of(head: bytes) -> Header | None:
    """Decode the header of a frame that begins with these bytes; None if none does."""
    if len(head) < 4 or head[0] != 0xFF:
        return None
    if head[1] & 0xF6 != 0xF0:
        return _header(head[1], head[2])
    if len(head) < 7:  # layer bits of 0: ADTS
        return None
    rate = head[2] >> 2 & 15
    size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
    if rate > 12 or size < 7:
        return None
    rates = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
    return Header(size, 1024 * ((head[6] & 3) + 1), rates[rate], 0, (head[1] & 8, rate))


def begins(file: ByteReader, at: int) -> Header | None:
    """Return the header of the frame at this offset if another of its kind, or the end of the file, follows."""
    found = header_of(file.at(at, 7))
    if found is None:
        return None
    after = at + found.size
    follows = header_of(file.at(after, 7))
    if follows is not None and follows.kind == found.kind:
        return found
    return found if after >= file.size or _tag(file, after) else None


def first_frame(file: ByteReader, start: int) -> tuple[int, Header] | None:
    """Return offset and header of the first frame at or after `start`; None: none within 1 MB."""
    return _next(file, start, min(file.size, start + _SEARCHED), None)


def stream(file: ByteReader, start: int) -> Stream | None:
    """Examine a stream of layer I, II or III from `start`; None if there is no frame."""
    found = first_frame(file, start)
    if found is None:
        return None
    at, first = found
    after = None if at == start else ((at, file.size - at),)
    tag = file.at(at, first.size)
    where, count, size = _length_tag(tag) if first.layer == 3 else (0, None, None)
    rest = file.size - at - _trailer(file)
    if size is not None and abs(rest - size) <= first.size and _even(file, tag, where, at + first.size, count, size):
        return Stream(first=first, frames=None, promised=count, parts=after)
    body = at + first.size if where else at
    frames, runs, other = _walk(file, body, first)
    if count is not None and frames <= count + 1 and where and tag[where : where + 4] != b"VBRI":
        return Stream(first=first, frames=frames, promised=count, parts=after, other=other)
    held = sum(end - begin for begin, end in runs)
    parts: tuple[ByteRange, ...] | None = tuple((begin, end - begin) for begin, end in runs)
    if first.layer == 3:
        head = _corrected(tag, where, frames, len(tag) + held) if tag[where : where + 4] in (b"Xing", b"Info") else b""
        parts = (head or _made(tag, frames, held, first.samples), *parts)  # type: ignore[misc]
    uneven = first.layer < 3 and abs(held - frames * first.size) > max(frames, first.size)
    promised = count if count is not None and frames < count else None
    return Stream(first=first, frames=frames, promised=promised, parts=parts, other=other, uneven=uneven)


def _even(file: ByteReader, tag: bytes, where: int, after: int, count: int | None, size: int) -> bool:
    """Whether a tag says a constant bit rate, and as many frames as its bytes hold at that of the first one."""
    first = header_of(file.at(after, 7))
    if count is None or tag[where : where + 4] != b"Info" or first is None or not first.layer:
        return False
    mean = first.samples * 125 * first.kbit / first.rate  # bytes
    return abs(count * mean - (size - len(tag))) <= 2 * mean + 2


def count(file: ByteReader, start: int) -> tuple[Header, int] | None:
    """Return the first frame at or after `start`, and the number of frames of its kind."""
    found = first_frame(file, start)
    if found is None:
        return None
    return found[1], _walk(file, *found)[0]


def _walk(file: ByteReader, at: int, first: Header) -> tuple[int, list[tuple[int, int]], str | None]:
    """Count the frames from `at` on; returns also the byte runs they fill, and a change of kind."""
    count, runs, begin, other = 0, list[tuple[int, int]](), at, None
    kind, size = first.kind, file.size
    while at < size:
        head = file.at(at, 40)
        found = header_of(head)
        same = found is not None and found.kind == kind
        joined = same and (b"Xing" in head or b"Info" in head)  # a tag, at the beginning of another file
        if found is not None and same and not joined:
            if at + found.size > size:  # truncated frame
                break
            count += 1
            at += found.size
            continue
        if at > begin:
            runs.append((begin, at))
        if found is not None and not same and other is None and begins(file, at):
            other = f"{found.rate} Hz"
        after = at + (found.size if found is not None and joined else _tag(file, at))
        step = _next(file, after if after > at else at + 1, size, kind)
        if step is None:
            return count, runs, other
        begin = at = step[0]
    if at > begin:
        runs.append((begin, min(at, size)))
    return count, runs, other


def _next(file: ByteReader, at: int, end: int, kind: tuple[int, int] | None) -> tuple[int, Header] | None:
    """Return the first frame in these bytes that another one follows; None also after too many false headers."""
    tried = 0
    while at < end and tried < _TRIED:
        block = file.at(at, min(4096, end - at))
        if not block:
            return None
        i = block.find(b"\xff")
        while i >= 0:
            found = begins(file, at + i)
            if found is not None and (kind is None or found.kind == kind):
                return at + i, found
            i, tried = block.find(b"\xff", i + 1), tried + 1
        at += len(block)
    return None


def _tag(file: ByteReader, at: int) -> int:
    """Return the length of the ID3, APE or Lyrics tag at this offset, 0 if there is none."""
    head = file.at(at, 32)
    if head[:3] == b"ID3" and len(head) >= 10:
        return 10 + syncsafe(head[6:10]) + (10 if head[5] & 16 else 0)
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        return 32 + int(struct.unpack_from("<I", head, 12)[0])
    if head[:11] == b"LYRICSBEGIN":
        return max(0, file.size - at - (128 if file.at(file.size - 128, 3) == b"TAG" else 0))
    return 0


def _trailer(file: ByteReader) -> int:
    """Return the bytes of ID3v1 and APE tags at the end of the file."""
    end = 128 if file.size > 128 and file.at(file.size - 128, 3) == b"TAG" else 0
    foot = file.at(file.size - end - 32, 32)
    if foot[:8] == b"APETAGEX" and len(foot) == 32:
        size, flags = struct.unpack_from("<I4xI", foot, 12)
        end += size + (32 if flags >> 31 else 0)
    return end


def _length_tag(frame: bytes) -> tuple[int, int | None, int | None]:
    """Return the offset of a length tag in a frame (0: there is none), and the frames and bytes it says."""
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        size, frames = struct.unpack_from(">II", frame, 46)
        return 36, frames, size
    where = _side(frame)
    if frame[where : where + 4] not in (b"Xing", b"Info") or len(frame) < where + 16:
        return 0, None, None  # there is none, or the file ends within it
    (flags,) = struct.unpack_from(">I", frame, where + 4)
    frames = struct.unpack_from(">I", frame, where + 8)[0] if flags & 1 else None
    at = where + 8 + 4 * (flags & 1)
    size = struct.unpack_from(">I", frame, at)[0] if flags & 2 and len(frame) >= at + 4 else None
    return where, frames or None, size or None


def _side(frame: bytes) -> int:
    """Return the bytes before a Xing tag in a frame of layer III: header and side information."""
    one, mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    return 4 + ((17 if mono else 32) if one else (9 if mono else 17))


def _corrected(frame: bytes, where: int, frames: int, size: int) -> bytes:
    """Return a frame whose tag says so many frames and bytes and no padding at the end; b"" if the tag has no count."""
    out = bytearray(frame)
    (flags,) = struct.unpack_from(">I", out, where + 4)
    if not flags & 1:
        return b""
    struct.pack_into(">I", out, where + 8, frames)
    at = where + 12
    if flags & 2:
        struct.pack_into(">I", out, at, size)
    lame = at + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if len(out) >= lame + 24:  # delay and padding in samples: 12 bits each
        out[lame + 22] &= 0xF0
        out[lame + 23] = 0
    return bytes(out)


def _made(frame: bytes, frames: int, size: int, samples: int) -> bytes:
    """Make two frames: one with a tag for the frames after it, and a silent one."""
    # mpg123 drops 529 samples wherever there is a tag: the tag's delay adds up to one frame with them.
    heads = (bytes([0xFF, frame[1] | 1, bits << 4 | frame[2] & 0x0C, frame[3]]) for bits in range(1, 15))
    head, length = next((h, found.size) for h in heads if (found := header_of(h)) and found.kbit == _TAG_KBIT)
    silent, side = head + bytes(length - 4), _side(head)
    out = bytearray(silent)
    struct.pack_into(">4sIII9s", out, side, b"Xing", 3, frames + 1, size + 2 * length, b"LAME")
    out[side + 37 : side + 40] = ((samples - _DELAY) << 12).to_bytes(3, "big")
    return bytes(out) + silent
