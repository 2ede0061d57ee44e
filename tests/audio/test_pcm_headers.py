"""Headers with a wrong length: the samples in the file are read, or the file is refused with one message."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asit.audio.files import AudioFileError, inspect, probe, read

N, RATE = 3000, 8000
LIST = b"LIST" + struct.pack("<I", 12) + b"INFOISFT\0\0\0\0"
ID3 = b"ID3\3\0\0\0\0\0\x20" + b"x" * 32
BLOCKS = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4, "PCM_U8": 1, "ULAW": 1}


def made(kind: str, subtype: str = "PCM_16", channels: int = 1, samples: int = N) -> bytes:
    x = 0.2 * np.random.default_rng(channels).standard_normal((samples, channels)).clip(-3, 3)
    out = io.BytesIO()
    soundfile.write(out, x, RATE, format=kind, subtype=subtype)
    return out.getvalue()


def whole(content: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0].mean(1)


def same(content: bytes, oracle: np.ndarray) -> None:
    assert probe(content).frames in (len(oracle), 0)  # 0: the header says none
    got = read(content)
    assert len(got) == len(oracle)
    assert np.abs(got - oracle).max() < 1e-6
    assert np.array_equal(read(content, start=0.25, seconds=0.05), got[2000:2400])


def placeholders(block: int) -> Iterator[int]:
    """Sizes that sox, arecord, FFmpeg and others write into a pipe."""
    for base in (0x7F000000, 0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF):
        yield base // block * block
    yield from (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF - 36)


def test_a_wav_whose_frames_have_no_bytes() -> None:
    content = bytearray(made("WAV", "DOUBLE"))
    struct.pack_into("<H", content, content.index(b"fmt ") + 20, 0)
    with pytest.raises(AudioFileError):
        read(bytes(content[:-1000]))


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("subtype", BLOCKS)
def test_wav_whatever_its_size_says(subtype: str, channels: int) -> None:
    content = made("WAV", subtype, channels)
    at, block, oracle = content.index(b"data"), BLOCKS[subtype] * channels, whole(content)
    head, body = content[:at], content[at + 8 : at + 8 + N * block]

    def wav(size: int, behind: bytes = b"", samples: bytes = body) -> bytes:
        return head + b"data" + struct.pack("<I", size) + samples + behind

    for size in placeholders(block):
        same(wav(size), oracle)
        same(wav(size, LIST), oracle)
    for size in (0, N // 2 * block // 2 * 2):
        same(wav(size), oracle)
        same(wav(size, LIST), oracle)
    pad = b"\0" * (len(body) % 2)
    for behind in (LIST, b"id3 " + struct.pack("<I", len(ID3)) + ID3, b"TAG" + bytes(125), ID3, bytes(5000), b"\0"):
        same(wav(len(body), pad + behind), oracle)
    same(ID3 + wav(len(body)), oracle)
    same(ID3 + wav(0x7FFFF000), oracle)
    with pytest.raises(AudioFileError, match=rf"is truncated: {N // 2} samples[\s\S]*the {N} samples"):
        probe(wav(len(body), b"", body[: len(body) // 2]))
    with pytest.raises(AudioFileError, match="several recordings in one file: another one begins at byte"):
        probe(wav(len(body), pad) + wav(len(body)))


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
def test_codecs_of_blocks_in_a_wav(subtype: str) -> None:
    content = made("WAV", subtype, samples=4 * N)
    at, oracle = content.index(b"data"), whole(content)
    size = struct.unpack_from("<I", content, at + 4)[0]
    for said in (size, 0xFFFFFFFF, 0x7FFFF000, 0):
        same(content[: at + 4] + struct.pack("<I", said) + content[at + 8 : at + 8 + size], oracle)
    with pytest.raises(AudioFileError, match="is truncated"):
        probe(content[: at + 8 + size // 2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_24"), ("RF64", "FLOAT")],
)
def test_every_container_is_held_to_the_same(kind: str, subtype: str, channels: int) -> None:
    content = bytearray(made(kind, subtype, channels))
    size, oracle = BLOCKS[subtype] * channels * N, whole(bytes(content))
    half = size // 2
    end = {"CAF": content.index(b"data") + 16 + size} if kind == "CAF" else {}
    content = content[: end.get("CAF", len(content))]

    def says(samples: int) -> bytes:
        """The file with a header for so many bytes of samples; below 0: the largest number."""
        out = bytearray(content)
        if kind == "AIFF":
            frames = samples // (BLOCKS[subtype] * channels) if samples >= 0 else 0xFFFFFFFF
            struct.pack_into(">I", out, out.index(b"COMM") + 10, frames)
            struct.pack_into(">I", out, out.index(b"SSND") + 4, samples + 8 if samples > 0 else samples & 0xFFFFFFFF)
        elif kind == "AU":
            struct.pack_into(">I", out, 8, samples & 0xFFFFFFFF)
        elif kind == "CAF":
            struct.pack_into(">q", out, out.index(b"data") + 4, samples + 4 if samples >= 0 else -1)
        elif kind == "W64":
            struct.pack_into("<q", out, out.index(b"data\xf3") + 16, samples + 24 if samples >= 0 else -1)
        else:
            struct.pack_into("<q", out, out.index(b"ds64") + 16, samples)
        return bytes(out)

    for said in (size, 0, half, -1):
        same(says(said), oracle)
    with pytest.raises(AudioFileError, match=r"is truncated: \d+ samples"):
        probe(bytes(content[: len(content) - half]))
    with pytest.raises(AudioFileError, match="several recordings in one file"):
        probe(bytes(content + content))


def test_a_sphere_file_that_is_cut_off() -> None:
    content = made("NIST")
    same(content, whole(content))
    with pytest.raises(AudioFileError, match=r"is truncated: 987 samples[\s\S]*the 3000 samples"):
        probe(content[: len(content) // 3 + 658])


def test_a_size_beyond_32_bits(tmp_path: Path) -> None:
    path, seconds = tmp_path / "long.wav", 68_000  # 16 kHz of 32 bits: 4.35 GB, nothing of it on the disk but its end
    size = 16000 * 4 * seconds
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    end = (0.1 * np.sin(np.arange(16000) / 5)).astype("<f4").tobytes()
    for behind in (b"", LIST):
        with path.open("wb") as file:
            file.write(b"RIFF" + struct.pack("<I", (size + 36) % 2**32) + b"WAVEfmt " + struct.pack("<I", 16) + form)
            file.write(b"data" + struct.pack("<I", size % 2**32))
            try:
                file.truncate(44 + size - len(end))
            except OSError:
                pytest.skip("this disk has no sparse files")
            file.seek(0, 2)
            file.write(end + behind)
        assert probe(path).seconds == seconds
        assert np.array_equal(read(path, start=seconds - 1.0), np.frombuffer(end, "<f4"))
        assert np.array_equal(read(path, start=10.0, seconds=1.0), np.zeros(16000))  # behind the 9.77 s that it says


def test_a_truncated_file_of_3_gb_is_no_stream(tmp_path: Path) -> None:
    content = bytearray(made("WAV"))
    struct.pack_into("<I", content, content.index(b"data") + 4, 3_000_000_000)
    with pytest.raises(AudioFileError, match=r"is truncated: 3000 samples[\s\S]*1500000000 samples"):
        probe(bytes(content))


def test_flac_that_says_less_or_more_or_is_two() -> None:
    content = bytearray(made("FLAC", samples=10_000))
    oracle = whole(bytes(content))

    def says(samples: int) -> bytes:
        out = bytearray(content)
        out[21] = out[21] & 0xF0 | samples >> 32
        struct.pack_into(">I", out, 22, samples & 0xFFFFFFFF)
        return bytes(out)

    for said in (10_000, 5000, 1, 0):
        same(says(said), oracle)
    same(ID3 + says(10_000), oracle)
    same(says(5000) + b"TAG" + bytes(125), oracle)
    with pytest.raises(AudioFileError, match=r"is truncated: 10000 samples[\s\S]*the 10001 samples"):
        read(says(10_001))
    with pytest.raises(AudioFileError, match="hours long"):
        probe(says(2**36 - 1))
    other = made("FLAC", samples=4321)
    assert np.array_equal(read(bytes(content) + other), np.concatenate([read(bytes(content)), read(other)]))
    stereo = made("FLAC", channels=2)
    with pytest.raises(
        AudioFileError, match=r"several recordings.*8000 Hz with 1 channels, then 8000 Hz with 2 channels"
    ):
        read(bytes(content) + stereo)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.ogg", "a.m4a", "a.aiff", "a.webm", "a"])
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG", "AIFF", "AU", "CAF", "W64"])
def test_the_bytes_choose_the_decoder_and_not_the_name(tmp_path: Path, kind: str, name: str) -> None:
    out = io.BytesIO()
    soundfile.write(out, 0.2 * np.sin(np.arange(16000) / 9), 16000, format=kind)
    (tmp_path / name).write_bytes(out.getvalue())
    assert len(read(tmp_path / name)) == 16000
    assert np.array_equal(read(tmp_path / name), read(out.getvalue()))


def test_channels_that_cancel_are_said_to() -> None:
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal(8000).clip(-3, 3)
    dither = rng.integers(-1, 2, (8000, 2)) / 32768
    for channels in ([x, -x], [x, -x, 0 * x], [x, -x + 1e-5 * x]):
        out = io.BytesIO()
        soundfile.write(out, np.stack(channels, 1) + dither[:, :1], RATE, format="WAV", subtype="FLOAT")
        with pytest.raises(
            AudioFileError, match=r"its \d channels cancel each other: the loudest has a range of 1\."
        ) as e:
            read(out.getvalue())
        assert e.value.reason == "cancelled"
        assert inspect(io.BytesIO(out.getvalue())).fault is not None  # type: ignore[arg-type]
    silent = io.BytesIO()
    soundfile.write(silent, dither, RATE, format="WAV")
    fault = inspect(silent).fault  # type: ignore[arg-type]
    assert fault is not None
    assert fault.reason == "silent"
    wide = io.BytesIO()
    soundfile.write(wide, np.stack([x, -0.98 * x], 1), RATE, format="WAV")
    assert len(read(wide.getvalue())) == 8000


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("sox")), reason="ffmpeg and sox make the files")
def test_what_ffmpeg_and_sox_write_into_pipes_is_read_as_ffmpeg_reads_it(tmp_path: Path) -> None:
    source = tmp_path / "source.wav"
    soundfile.write(source, 0.2 * np.random.default_rng(0).standard_normal(5 * 16000).clip(-3, 3), 16000)
    sox = [["-b", "24"], ["-b", "32"], ["-b", "8"], ["-e", "floating-point"], ["-e", "ima-adpcm"], ["-e", "mu-law"]]
    made: list[tuple[str, list[str]]] = []
    for more in sox:
        for channels in ("1", "2", "3", "6"):
            if "ima-adpcm" in more and channels in "36":
                continue
            made.append((".wav", ["sox", str(source), *more, "-t", "wav", "-", "remix", *["1"] * int(channels)]))
    made += [(f".{kind}", ["sox", str(source), "-t", kind, "-"]) for kind in ("aiff", "au", "flac", "ogg")]
    ffmpeg = ["ffmpeg", "-v", "error", "-i", str(source), "-f"]
    made += [(f".{kind}", [*ffmpeg, kind, "-"]) for kind in ("wav", "caf", "au", "flac", "ogg", "mp3", "mp2", "adts")]
    made += [(".webm", [*ffmpeg, "webm", "-"]), (".opus", [*ffmpeg, "opus", "-"]), (".mka", [*ffmpeg, "matroska", "-"])]
    codecs = ("libmp3lame", "adpcm_ima_wav", "adpcm_ms", "pcm_s24le", "pcm_f32le", "pcm_u8", "pcm_alaw", "g722")
    made += [(".wav", [*ffmpeg, "wav", "-c:a", codec, "-"]) for codec in codecs]
    for number, (suffix, command) in enumerate(made):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        rate = str(probe(path).rate)  # libsndfile decodes Opus at the rate of what was encoded
        decoded = ["ffmpeg", "-v", "error", "-i", str(path), "-f", "f32le", "-ac", "1", "-ar", rate, "-"]
        oracle = np.frombuffer(subprocess.run(decoded, check=True, capture_output=True).stdout, np.float32)
        got = read(path)
        if suffix == ".webm":  # Opus in Matroska: releases of FFmpeg differ in what they leave out at the beginning
            assert abs(len(got) - len(oracle)) <= 312
            continue
        assert abs(len(got) - len(oracle)) <= 1, (suffix, command)
        assert np.corrcoef(got[: len(oracle)], oracle[: len(got)])[0, 1] > 0.98, (suffix, command)
