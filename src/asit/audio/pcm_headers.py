"""The samples of WAV, RF64, W64, AIFF, AU, CAF and SPHERE files whose headers may say a wrong length.

Programs that write to a pipe, that were interrupted, or that exceed the 32 bits of a size leave such headers. `find`
compares the header with the file and, where it is wrong, makes a corrected one for the decoder. Bytes after the samples
that are no samples: chunks up to the end of the file, ID3, APE and Lyrics tags, zeros.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from asit.audio.byte_ranges import ByteRange, ByteReader

MP3_IN_WAV = 0x55
"""Format tag of MPEG layer III in a WAV."""
_BY_FFMPEG = frozenset({0x28F, 0x65, 0xFF, 0x2000, 0x160, 0x161, 0x162, 0x706D, 0x1610, 0x22, 0x270, 0xF1AC})
"""Format tags of codecs of FFmpeg that libsndfile lacks: G.722, AAC, AC-3, WMA, TrueSpeech, ATRAC3, FLAC."""

_PLACEHOLDERS = (0x7F000000, 0x7FFFF000, 0x80000000, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
"""Sizes that sox, arecord, FFmpeg and others write into pipes, where they cannot know theirs."""
_NEAR = 128  # bytes by which a placeholder may be lower: a header, and rounding down to complete frames
_CHUNKS = 1000  # most chunks examined
_TRIED = 200  # most positions tried for such chunks
_PADDING = 1 << 20  # most zeros after the samples
_TAIL = 1 << 17  # bytes at the end of a file that are searched for chunks after the samples
_TRAILERS = (b"LIST", b"id3 ", b"ID3 ", b"cue ", b"bext", b"iXML", b"smpl", b"inst", b"fact", b"PEAK", b"JUNK", b"FLLR")
_TAGS = (b"TAG", b"ID3", b"APET", b"LYRI")
_AGAIN = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b".snd", b"riff", b"data", b"SSND")
_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # end of all chunk names in W64 except "riff"
_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")


@dataclass(frozen=True)
class Found:
    """The samples of a file.

    Attributes:
        start, size: their bytes.
        promised: their bytes according to a credible header, if more than `size`.
        parts: byte ranges for the decoder; None: the file as it is.
        tag: WAVE format tag, 0 if none.
        joined: where another file, or other samples, begin after these.
        block: bytes of a frame, or of a packet of frames.
    """

    start: int
    size: int
    promised: int | None = None
    parts: tuple[ByteRange, ...] | None = None
    tag: int = 0
    joined: int | None = None
    block: int = 1

    @property
    def by_ffmpeg(self) -> bool:
        """Whether the codec needs FFmpeg."""
        return self.tag in _BY_FFMPEG


def find(kind: str, file: ByteReader) -> Found | None:
    """Find the samples of a file of one of `sniff.HEADED`; None for an invalid header, which the decoder reports."""
    try:
        return {"wav": _wave, "w64": _wave, "aiff": _aiff, "au": _au, "caf": _caf, "sphere": _sphere}[kind](file)
    except struct.error:  # truncated within the header
        return None


def _wave(file: ByteReader) -> Found | None:
    w64, order = file.at(0, 16) == _W64_RIFF, ">" if file.at(0, 4) == b"RIFX" else "<"
    layout, first, even = ("w64", 40, 8) if w64 else (order + "I", 12, 2)
    long, form = 0, b""
    for name, size, at in _chunks(file, first, layout, even):
        if name == b"ds64":
            long = at + 8
        elif name == b"fmt ":
            form = file.at(at, min(size, 1 << 16))
        elif name == b"data" and len(form) >= 16:
            field = (at - 8, "<Q", 24) if w64 else (at - 4, layout, 0)
            if long and size == 0xFFFFFFFF:
                field, (size,) = (long, "<Q", 0), struct.unpack("<Q", file.at(long, 8))
            tag, _, _, _, block = struct.unpack_from(order + "HHIIH", form)
            if tag == 0xFFFE and len(form) >= 26:  # extensible: the tag begins the GUID of the format
                (tag,) = struct.unpack_from(order + "H", form, 24)
            return _compare(file, at, size, max(1, block), field, layout, even, tag)
    return None


def _aiff(file: ByteReader) -> Found | None:
    common = b""
    for name, size, at in _chunks(file, 12, ">I", 2):
        if name == b"COMM":
            common = file.at(at, min(size, 1 << 12))
        elif name == b"SSND" and len(common) >= 18:
            channels, frames, bits = struct.unpack_from(">hIh", common)
            offset = 8 + min(struct.unpack(">I", file.at(at, 4))[0], 1 << 16)
            stated = max(0, size - offset)
            # An unfinished header has no samples in both fields.
            size = 0 if frames == 0 and stated == 0 else stated
            block = max(1, channels * ((bits + 7) // 8))
            return _compare(file, at + offset, size, block, (at - 4, ">I", offset), ">I", 2)
    return None


def _au(file: ByteReader) -> Found | None:
    order = "<" if file.at(0, 4) == b"dns." else ">"
    start, size, encoding, _, channels = struct.unpack(order + "IIIII", file.at(4, 20))
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(encoding, 1)
    if not 24 <= start <= 1 << 20:
        return None
    return _compare(file, start, size, max(1, width * channels), (8, order + "I", 0))


def _caf(file: ByteReader) -> Found | None:
    block = 1
    for name, size, at in _chunks(file, 8, ">Q", 1):
        if name == b"desc":
            block = struct.unpack(">I", file.at(at + 16, 4))[0] or 1
        elif name == b"data":
            return _compare(file, at + 4, max(0, size - 4), block, (at - 8, ">Q", 4), ">Q")
    return None


def _sphere(file: ByteReader) -> Found | None:
    lines = file.at(0, 1024).decode("ascii", "replace").splitlines()
    facts = {words[0]: words[2] for line in lines if len(words := line.split()) == 3}
    try:
        start, count = int(lines[1]), int(facts["sample_count"])
        block = int(facts["sample_n_bytes"]) * int(facts["channel_count"])
    except (ValueError, KeyError, IndexError):
        return None
    held = max(0, file.size - start)  # libsndfile reads all of them
    return Found(
        start=start, size=held, promised=block * count if held < block * count < 1 << 62 else None, block=block
    )


def _chunks(file: ByteReader, at: int, layout: str, even: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield names, sizes and offsets of the content of chunks, as in their headers."""
    w64 = layout == "w64"  # names are GUIDs, and sizes those of the complete chunk
    form, front = ("<Q", 24) if w64 else (layout, 4 + struct.calcsize(layout))
    for _ in range(_CHUNKS):
        head = file.at(at, front)
        if len(head) < front or (w64 and head[4:16] != _GUID):
            return
        (size,) = struct.unpack_from(form, head, front - struct.calcsize(form))
        size = max(0, size - 24) if w64 else size
        at += front
        yield head[:4], size, at
        at += size
        at += -at % even


def _compare(
    file: ByteReader,
    start: int,
    size: int,
    block: int,
    field: tuple[int, str, int],
    layout: str = "",
    even: int = 1,
    tag: int = 0,
) -> Found:
    """Compare the size in a header with the file; `field`: its offset, struct format and bytes beside samples."""
    held = max(0, file.size - start)
    stream = size == 0 or any(0 <= base - size < block + _NEAR for base in _PLACEHOLDERS)
    if size > held and not stream:
        parts = _corrected(start, held, *field)
        return Found(start=start, size=held, promised=size, parts=parts, tag=tag, block=block)
    if not stream or (size == 0 and held):
        rest, joined = _after(file, start + size, layout, even)
        if joined is not None or not rest or held - size < block:
            return Found(start=start, size=size, tag=tag, joined=joined)
    real = _end(file, start, size, layout, even) - start
    return Found(start=start, size=real, parts=None if real == size else _corrected(start, real, *field), tag=tag)


def _corrected(start: int, size: int, at: int, form: str, extra: int) -> tuple[ByteRange, ...]:
    """Return the byte ranges of a file whose header says so many bytes of samples; arguments as in `_compare`."""
    ones, width = b"\xff" * 4, struct.calcsize(form)
    if form == "<I" and at == start - 4 and start + size > 0xFFFFFFF0:  # RF64 instead of WAV
        head = b"RF64" + ones + b"WAVEds64" + struct.pack("<IQQQI", 28, start + size + 28, size, 0, 0)
        return head, (12, at - 12), ones, (start, size)
    said = struct.pack(form, min(size + extra, (1 << 8 * width) - 1))  # all ones: to the end
    return (0, at), said, (at + width, start + size - at - width)


def _after(file: ByteReader, end: int, layout: str, even: int) -> tuple[bool, int | None]:
    """Return whether the bytes after the samples may be samples too, and where another file begins instead."""
    if end >= file.size:
        return False, None
    first = file.at(end, 16)
    if first[:4] in _AGAIN[:-2] and _again(first):
        return False, end
    if first.startswith(_TAGS) or (file.size - end <= _PADDING and not file.at(end, _PADDING).strip(b"\0")):
        return False, None
    if not layout:
        return True, None
    for at in {end, end + (-end % even)}:
        chain = _chain(file, at, layout, even)
        if chain is not None:
            again = next((at for name, at in chain if name in _AGAIN), None)
            return False, again
    return True, None


def _again(first: bytes) -> bool:
    """Whether these bytes begin a file: more than its first four are compared."""
    return (
        (first[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and first[8:12] == b"WAVE")
        or (first[:4] == b"FORM" and first[8:11] == b"AIF")
        or first[:8] in (b"caff\0\1\0\0", b".snd\0\0\0\x18", b".snd\0\0\0\x20")
        or first[:16] == _W64_RIFF
    )


def _chain(file: ByteReader, at: int, layout: str, even: int, exact: bool = False) -> list[tuple[bytes, int]] | None:
    """Return the chunks up to the end of the file, or None; unless `exact`, a known last one may be truncated."""
    found = list[tuple[bytes, int]]()
    for name, size, body in _chunks(file, at, layout, even):
        if name.startswith(_TAGS):
            return found or None
        end = body + size
        if not name.isascii() or not name.decode("ascii").isprintable():
            return None
        if end > file.size and (exact or name not in _TRAILERS + _AGAIN):
            return None
        found.append((name, at))
        at = end + -end % even
    return (found or None) if file.size - at < 8 else None  # no chunk, such as a byte of padding


def _end(file: ByteReader, start: int, size: int, layout: str, even: int) -> int:
    """Return the end of samples of unknown size: at known chunks at the end of the file, or at its end."""
    for more in range(1, 65):  # sizes of 32 bits are modulo 4 GB
        if start + size + (more << 32) >= file.size:
            break
        if size and not _after(file, start + size + (more << 32), layout, even)[0]:
            return start + size + (more << 32)
    if not layout:
        return file.size
    first = max(start, file.size - _TAIL)
    tail = file.at(first, file.size - first)
    for match in islice(re.finditer(b"(?=" + b"|".join(_TRAILERS) + b")", tail), _TRIED):
        at = first + match.start()
        if at % even == 0 and _chain(file, at, layout, even, exact=True) is not None:
            return at
    return file.size
