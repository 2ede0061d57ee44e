"""The samples of WAV, RF64, W64, AIFF, AU, CAF and SPHERE files whose headers may say a wrong length.

Programs that write to a pipe, that were interrupted, or that exceed the 32 bits of a size leave such headers. `find`
compares the header with the file and, where it is wrong, makes a corrected one for the decoder. Bytes after the samples
that are no samples: chunks up to the end of the file, ID3, APE and Lyrics tags, zeros.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")
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
        return {"wav": _riff, "w64": _w64, "aiff": _aiff, "au": _au, "caf": _caf, "sphere": _sphere}[kind](file)
    except struct.error:  # truncated within the header
        return None


def _riff(file: ByteReader) -> Found | None:
    head = file.at(0, 12)
    order, long = (">" if head[:4] == b"RIFX" else "<"), None
    form = b""
    for name, size, at in _chunks(file, 12, order + "I", 4, 2):
        if name == b"ds64":
            (long,) = struct.unpack("<Q", file.at(at + 8, 8))
        elif name == b"fmt ":
            form = file.at(at, min(size, 1 << 16))
        elif name == b"data" and len(form) >= 16:
            size = long if long is not None and size == 0xFFFFFFFF else size
            tag, _, _, _, block = struct.unpack_from(order + "HHIIH", form)
            if tag == 0xFFFE and len(form) >= 26:  # extensible: the tag begins the GUID of the format
                (tag,) = struct.unpack_from(order + "H", form, 24)
            return _compare(file, at, size, block, order + "I", 2, partial(_wav_head, form, order), tag)
    return None


def _wav_head(form: bytes, order: str, size: int) -> bytes:
    """Make a header of WAV, or of RF64 for more than 32 bits, for so many bytes of samples."""
    form += bytes(len(form) & 1)
    chunk = b"fmt " + struct.pack(order + "I", len(form)) + form
    whole = 4 + len(chunk) + 8 + size
    if whole < 0xFFFFFFF0:
        name = b"RIFF" if order == "<" else b"RIFX"
        return name + struct.pack(order + "I", whole) + b"WAVE" + chunk + b"data" + struct.pack(order + "I", size)
    long = b"ds64" + struct.pack("<IQQQI", 28, whole + 36, size, 0, 0)
    none = struct.pack("<I", 0xFFFFFFFF)
    return b"RF64" + none + b"WAVE" + long + chunk + b"data" + none


def _w64(file: ByteReader) -> Found | None:
    at, form = 40, b""
    for _ in range(_CHUNKS):
        head = file.at(at, 24)
        if len(head) < 24 or head[4:16] != _GUID:
            return None
        (size,) = struct.unpack_from("<Q", head, 16)
        if head[:4] == b"fmt ":
            form = file.at(at + 24, min(size - 24, 1 << 16) if size > 24 else 0)
        elif head[:4] == b"data" and len(form) >= 16:
            tag, _, _, _, block = struct.unpack_from("<HHIIH", form)
            size = size - 24 if size >= 24 else 0
            return _compare(file, at + 24, size, block, "w64", 8, partial(_wav_head, form, "<"), tag)
        at += max(24, size + 7 & ~7)
    return None


def _aiff(file: ByteReader) -> Found | None:
    common = b""
    for name, size, at in _chunks(file, 12, ">I", 4, 2):
        if name == b"COMM":
            common = file.at(at, min(size, 1 << 12))
        elif name == b"SSND" and len(common) >= 18:
            channels, frames, bits = struct.unpack_from(">hIh", common)
            block = max(1, channels * ((bits + 7) // 8))
            offset = min(struct.unpack(">I", file.at(at, 4))[0], 1 << 16)
            head = partial(_aiff_head, file.at(8, 4), common, block)
            stated = size - 8 - offset if size >= 8 + offset else 0
            # An unfinished header has no samples in both fields.
            return _compare(file, at + 8 + offset, 0 if frames == 0 and stated == 0 else stated, block, ">I", 2, head)
    return None


def _aiff_head(form: bytes, common: bytes, block: int, size: int) -> bytes:
    """Make a header of AIFF or AIFC for so many bytes of samples; packed codecs keep the number of packets."""
    if common[18:22] in (b"", b"NONE", b"sowt", b"twos", b"fl32", b"FL32"):
        common = common[:2] + struct.pack(">I", min(size // block, 0xFFFFFFFF)) + common[6:]
    version = b"FVER" + struct.pack(">II", 4, 0xA2805140) if form == b"AIFC" else b""
    inner = form + version + b"COMM" + struct.pack(">I", len(common)) + common + bytes(len(common) & 1)
    data = b"SSND" + struct.pack(">III", min(size + 8, 0xFFFFFFFF), 0, 0)
    return b"FORM" + struct.pack(">I", min(len(inner) + len(data) + size, 0xFFFFFFFF)) + inner + data


def _au(file: ByteReader) -> Found | None:
    order = "<" if file.at(0, 4) == b"dns." else ">"
    start, size, encoding, _, channels = struct.unpack(order + "IIIII", file.at(4, 20))
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(encoding, 1)
    if not 24 <= start <= 1 << 20:
        return None
    return _compare(file, start, size, max(1, width * channels), "", 1, partial(_au_head, file.at(0, start), order))


def _au_head(front: bytes, order: str, size: int) -> bytes:
    return front[:8] + struct.pack(order + "I", min(size, 0xFFFFFFFF)) + front[12:]  # all ones: to the end


def _caf(file: ByteReader) -> Found | None:
    block = 1
    for name, size, at in _chunks(file, 8, ">Q", 8, 1):
        if name == b"desc":
            block = struct.unpack(">I", file.at(at + 16, 4))[0] or 1
        elif name == b"data":
            front = file.at(0, at + 4)
            if len(front) < at + 4 or at > 1 << 24:
                return None
            return _compare(file, at + 4, size - 4 if size >= 4 else 0, block, ">Q", 1, partial(_caf_head, front))
    return None


def _caf_head(front: bytes, size: int) -> bytes:
    return front[:-12] + struct.pack(">Q", size + 4) + front[-4:]


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


def _chunks(file: ByteReader, at: int, size: str, digits: int, even: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield names, sizes and offsets of chunks, as in their headers."""
    for _ in range(_CHUNKS):
        head = file.at(at, 4 + digits)
        if len(head) < 4 + digits:
            return
        (length,) = struct.unpack_from(size, head, 4)
        yield head[:4], length, at + 4 + digits
        at += 4 + digits + length + (length % even and even - length % even)


def _compare(
    file: ByteReader,
    start: int,
    size: int,
    block: int,
    layout: str,
    even: int,
    head: Callable[[int], bytes],
    tag: int = 0,
) -> Found:
    """Compare the size in a header with the file.

    Args:
        file: the complete file.
        start, size: where the samples begin, and their bytes according to the header.
        block: bytes of a frame.
        layout: struct format of chunk sizes; "w64"; empty: there are no chunks.
        even: alignment of chunks.
        head: makes a header for another number of bytes.
        tag: WAVE format tag.
    """
    held = max(0, file.size - start)
    stream = size == 0 or any(0 <= base - size < block + _NEAR for base in _PLACEHOLDERS)
    if size > held and not stream:
        return Found(start=start, size=held, promised=size, parts=(head(held), (start, held)), tag=tag, block=block)
    if not stream or (size == 0 and held):
        end = start + size
        rest, joined = _after(file, end, layout, even)
        if joined is not None:
            return Found(start=start, size=size, tag=tag, joined=joined)
        if not rest or held - size < block:
            return Found(start=start, size=size, tag=tag)
    real = _end(file, start, size, layout, even) - start
    return Found(start=start, size=real, parts=None if real == size else (head(real), (start, real)), tag=tag)


def _after(file: ByteReader, end: int, layout: str, even: int) -> tuple[bool, int | None]:
    """Return whether the bytes after the samples may be samples too, and where another file begins instead."""
    if end >= file.size:
        return False, None
    first = file.at(end, 16)
    if first[:4] in _AGAIN[:-2] and _again(first):
        return False, end
    if first.startswith(_TAGS) or (not first.strip(b"\0") and _zeros(file, end)):
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


def _zeros(file: ByteReader, at: int) -> bool:
    """Whether only zeros follow, not more than a disk's or recorder's padding."""
    if file.size - at > _PADDING:
        return False
    while at < file.size:
        if file.at(at, 1 << 16).strip(b"\0"):
            return False
        at += 1 << 16
    return True


def _chain(file: ByteReader, at: int, layout: str, even: int, exact: bool = False) -> list[tuple[bytes, int]] | None:
    """Return the chunks from this byte to the end of the file; None if they do not reach it.

    Unless `exact`, the last one with a known name may be truncated.
    """
    found, digits = list[tuple[bytes, int]](), struct.calcsize(layout) if layout != "w64" else 20
    while at < file.size:
        if len(found) == _CHUNKS:
            return None
        head = file.at(at, 4 + digits)
        if file.size - at < 8 or head.startswith(_TAGS):  # no chunk, such as a byte of padding
            return found or None
        name = head[:4]
        if layout == "w64":
            if head[4:16] != _GUID or len(head) < 24:
                return None
            size = max(4, struct.unpack_from("<Q", head, 16)[0] - 20)
        elif len(head) < 4 + digits or not all(32 <= byte < 127 for byte in name):
            return None
        else:
            (size,) = struct.unpack_from(layout, head, 4)
        found.append((name, at))
        at += 4 + digits + size
        if at > file.size and (exact or name not in _TRAILERS + _AGAIN):
            return None
        at += -at % even if even > 1 else 0
    return found or None


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
