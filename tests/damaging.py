"""Damaged sound files and tars, and the undamaged ones that they are made of.

A mutant follows from its file and a number alone.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import struct
import tarfile
from collections.abc import Iterator

import numpy as np
import sounds

from asit.audio import ogg

RATE = 16000
BLOCK = 512


def chirp(seconds: float = 0.4, channels: int = 1) -> np.ndarray:
    """A rising tone with some noise, (S, channels)."""
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * (300 + 900 * t) * t) + 0.02 * np.random.default_rng(7).standard_normal(len(t))
    return np.stack([wave * 0.9**c for c in range(channels)], 1).astype(np.float32)


@functools.cache
def recordings() -> dict[str, bytes]:
    """An undamaged file of each kind that can be written here; the name's suffix is the file's.

    libsndfile puts the time into some headers and draws the numbers of Ogg streams: they are the same in one process.
    """
    import soundfile

    kinds = {
        "pcm16.wav": ("WAV", "PCM_16", 1), "pcm24.wav": ("WAV", "PCM_24", 2), "float.wav": ("WAV", "FLOAT", 1),
        "double.wav": ("WAV", "DOUBLE", 1), "ulaw.wav": ("WAV", "ULAW", 1), "adpcm.wav": ("WAV", "IMA_ADPCM", 1),
        "ms-adpcm.wav": ("WAV", "MS_ADPCM", 2),
        "extensible.wav": ("WAVEX", "PCM_16", 6), "rf64.wav": ("RF64", "PCM_16", 1), "mono.flac": ("FLAC", "PCM_16", 1),
        "stereo.flac": ("FLAC", "PCM_24", 2), "layer3.mp3": ("MP3", "MPEG_LAYER_III", 1),
        "vorbis.ogg": ("OGG", "VORBIS", 2), "opus.opus": ("OGG", "OPUS", 1), "pcm.aiff": ("AIFF", "PCM_16", 1),
        "pcm.au": ("AU", "PCM_16", 1), "float.au": ("AU", "FLOAT", 1), "pcm.caf": ("CAF", "PCM_16", 2),
        "pcm.w64": ("W64", "PCM_16", 1),
    }  # fmt: skip
    found = {}
    for name, (kind, subtype, channels) in kinds.items():
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, chirp(channels=channels), RATE, format=kind, subtype=subtype)
        except soundfile.LibsndfileError:  # an older libsndfile writes no MP3
            continue
        found[name] = buffer.getvalue()
    others = {"aac.m4a": ("mp4", "aac"), "opus.webm": ("webm", "libopus"), "raw.aac": ("adts", "aac")}
    others |= {"pcm.mov": ("mov", "pcm_s16le"), "flac.ogg": ("ogg", "flac"), "wma.wma": ("asf", "wmav2")}
    for name, (container, codec) in others.items() if importlib.util.find_spec("av") else ():
        buffer, times = io.BytesIO(), 3 if codec == "libopus" else 1
        sounds.write_av(buffer, np.repeat(chirp(), times, 0), RATE * times, container, codec)
        found[name] = buffer.getvalue()
    return found


# Mutators -----------------------------------------------------------------------------------------------------------

_EXTREMES = np.array([
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1,
], "<u8")  # fmt: skip
_SAMPLES = (3e38, -3e38, float("inf"), float("nan"), 1e30, 1e-42, 32767.0)
_NAMES = (
    b"fmt ", b"data", b"fact", b"ds64", b"LIST", b"COMM", b"SSND", b"desc", b"pakt", b"kuki", b"mdhd", b"mvhd", b"tkhd",
    b"stts", b"stsz", b"stsc", b"stco", b"stsd", b"esds", b"elst", b"moov", b"mdat", b"OpusHead", b"vorbis", b"Xing",
    b"Info", b"OggS", b"ustar",
)  # fmt: skip


KINDS = ("flip", "cut off", "insert", "delete", "field", "swap", "overwrite", "samples", "append", "field")
"""What may be done to a file."""


def mutated(out: bytearray, kind: str, rng: np.random.Generator) -> bytearray:
    """Bits, parts, numbers of the header or floating-point samples changed; half of the changes are near the start."""
    at, size = int(rng.integers(len(out))), int(2 ** rng.uniform(0, 12))
    early = int(rng.integers(1, min(len(out), 200) if rng.random() < 0.5 else len(out)))
    part = (rng.bytes(size), bytes(size), bytes(out[early : early + size]), b"\xff" * size)[int(rng.integers(4))]
    if kind == "cut off":
        return out[:early]
    if kind == "append":
        return out + (bytes(out), rng.bytes(3000), bytes(3000))[int(rng.integers(3))]
    if kind == "insert":
        return out[:at] + part + out[at:]
    if kind == "delete":
        return out[:at] + out[at + size :]
    if kind == "overwrite":
        return out[:at] + part[: len(out) - at] + out[at + len(part) :]
    if kind == "swap":
        first, size = sorted((at, early))[0], min(size, abs(at - early))
        second = max(at, early)
        out[first : first + size], out[second : second + size] = out[second : second + size], out[first : first + size]
    for _ in range(int(2 ** rng.uniform(0, 6)) * (kind == "flip")):
        out[int(rng.integers(early))] ^= 1 << int(rng.integers(8))
    found = [found for name in _NAMES if (found := out.find(name)) >= 0]
    for _ in range(int(rng.integers(1, 5)) * (kind in ("field", "samples"))):
        value = rng.choice(_EXTREMES).tobytes()[: int(rng.choice([1, 2, 4, 8]))]
        at = int(rng.integers(64))
        if kind == "samples":  # huge, infinite or no number, somewhere after the header
            form, value = ("<f", ">f", "<d")[int(rng.integers(3))], float(rng.choice(_SAMPLES))
            at, value = int(rng.integers(44, max(45, len(out) - 8))) // 4 * 4, struct.pack(form, value)
        elif found and rng.random() < 0.6:  # near a chunk's name
            at = found[int(rng.integers(len(found)))] + 4 + int(rng.integers(32))
        out[at : at + len(value)] = value[:: int(rng.choice([1, -1]))][: len(out) - at]
    return out


def mutant(data: bytes, name: str, number: int) -> tuple[str, bytes]:
    """What was done, and the damaged file; one change, or now and then two."""
    rng = np.random.default_rng([number, *name.encode()])
    kinds, out = [KINDS[number % len(KINDS)]], bytearray(data)
    if rng.random() < 0.25:
        kinds.append(str(rng.choice(KINDS)))
    for kind in kinds:
        if len(out) > 8:
            out = mutated(out, kind, rng)
    if out[:4] == b"OggS" and rng.random() < 0.7:  # else nearly every mutant ends at a page's checksum
        out = _with_page_sums(out)
    return "+".join(kinds), bytes(out)


def tars() -> list[bytes]:
    """Undamaged tars: with sidecars and long names, in the formats of PAX and of GNU."""
    made, found = recordings(), []
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        members = {"a.wav": made["pcm16.wav"], "a.cls": b"dog", "b.flac": made["mono.flac"]}
        members |= {"b.json": b'{"label": "cat"}', "c" * 150 + ".wav": made["float.wav"]}
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def tar_mutant(data: bytes, number: int) -> bytes:
    """A damaged tar: a mutant as of sounds, or a header with an extreme size, another type or a name of noise."""
    rng = np.random.default_rng([number, 5])
    if number % 3 == 0:
        out = bytearray(mutant(data, "tar", number)[1])
    else:
        out = bytearray(data)
        heads = [at for at in range(0, len(out) - BLOCK + 1, BLOCK) if out[at + 257 : at + 262] == b"ustar"]
        for _ in range(int(rng.integers(1, 3))):
            at, kind = heads[int(rng.integers(len(heads)))], int(rng.integers(6))
            if kind == 3:
                out[at + 156] = int(rng.choice(list(b"LKxgSXV01234567")))
            elif kind == 4:
                out[at : at + 100] = rng.bytes(100)
            else:  # numbers are octal, or after 0x80 or 0xff in base 256
                size = (b"\xff" * 12, b"\xff" * 4 + (-512).to_bytes(8, "big", signed=True))[int(rng.integers(2))]
                if kind == 2:
                    size = b"\x80" + (1 << int(rng.integers(20, 80))).to_bytes(11, "big")
                elif kind == 5:
                    size = b"%011o\0" % int(rng.integers(0, 1 << 33))
                out[at + 124 : at + 136] = size
    if rng.random() < 0.8:  # else most end at a header's sum
        for at in range(0, len(out) - BLOCK + 1, BLOCK):
            if out[at + 257 : at + 262] == b"ustar":
                out[at + 148 : at + 156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)


def _with_page_sums(data: bytearray) -> bytearray:
    """Ogg pages with the checksums of what is in them now (RFC 3533)."""
    at = 0
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        count = data[at + 26]
        end = at + 27 + count + sum(data[at + 27 : at + 27 + count])
        data[at + 22 : at + 26] = bytes(4)
        data[at + 22 : at + 26] = ogg.checksum(data[at:end]).to_bytes(4, "little")
        at = max(at + 1, min(end, len(data)))
    return data


def cases(count: int) -> Iterator[tuple[str, int, str, bytes]]:
    """(name, number, what was done, damaged bytes), the kinds of files in turn."""
    originals = recordings()
    names = sorted(originals)
    for at in range(count):
        name, number = names[at % len(names)], at // len(names)
        yield name, number, *mutant(originals[name], name, number)


def long_searches() -> dict[str, bytes]:
    """Files that a careless search would take minutes for."""
    many, made = 1_000_000, recordings()
    wav, flac, mp3 = made["pcm16.wav"], made["mono.flac"], made.get("layer3.mp3", b"")
    head = wav[: wav.index(b"data")]
    page = b"OggS\0\2" + bytes(20) + b"\1\x13OpusHead" + bytes(11)
    chunks = b"LIST\0\0\0\0" * many + b"LIST\xff\0\0\0x"
    return {
        "mp3": mp3 + b"\xff\xfb\x90\0" * 4 * many,
        "wav": head + b"JUNK\0\0\0\0" * many,
        "wav stream": head + b"data\xff\xff\xff\xff" + bytes(1000) + b"\1" * 1000 + chunks,
        "wav half": head + b"data\x10\0\0\0" + b"\1" * 1000 + chunks,
        "aiff": b"FORM\0\0\0\0AIFF" + b"JUNK\0\0\0\0" * many,
        "flac": flac + b"fLaC\0\0\0\x22" * many,
        "flac tail": flac + b"\xff\xf8\x12\x08\0\0" * 20_000,
        "ogg": made["opus.opus"] * 4000,
        "ogg pages": page * (many // 2),
        "mp4": b"\0\0\0\x08ftyp" + b"\0\0\0\x08free" * many,
        "id3": b"ID3\4\0\0\0\0\0\0" * many + mp3,
    }
