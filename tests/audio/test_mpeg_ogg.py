"""MP3, Ogg and formats of FFmpeg: all samples are read, whatever length is estimated or how many streams a file has."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import sounds

from asit.audio import mpeg
from asit.audio.files import AudioFileError, inspect, probe, read

RATE = 44100


def noise(seconds: float, level: float = 0.2, rate: int = RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
    return level * scipy.signal.sosfilt(scipy.signal.butter(4, 0.4, output="sos"), x, axis=0).clip(-3, 3)


KINDS = {
    "vbr": {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.5},
    "cbr": {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5},
    "vorbis": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}


def encoded(x: np.ndarray, kind: str, rate: int = RATE) -> bytes:
    return sounds.encoded(x, rate, **KINDS[kind])


def untagged(mp3: bytes) -> bytes:
    """Without the first frame, which holds nothing but the tag with the number of frames."""
    assert b"Xing" in mp3[:200] or b"Info" in mp3[:200]
    return mp3[mp3.find(mp3[:2], 4) :]


def oracle(content: bytes) -> np.ndarray:
    """As FFmpeg decodes it."""
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra asit-audio[av])")
    with av.open(io.BytesIO(content)) as file:
        planes = [frame.to_ndarray() for frame in file.decode(audio=0)]
    return np.concatenate([np.atleast_2d(plane).mean(0) for plane in planes])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44100, 22050, 8000])
@pytest.mark.parametrize("kind", ["vbr", "cbr"])
def test_an_mp3_without_a_length_is_read_whole_from_the_same_zero(kind: str, rate: int, channels: int) -> None:
    x = np.concatenate([noise(6, 1e-4, rate, channels), noise(6, 0.2, rate, channels)])
    content = untagged(encoded(x, kind, rate))
    expected = oracle(content)
    assert len(expected) > 12 * rate
    info, got = probe(content), read(content)
    assert info.frames == len(got) == len(expected)
    assert np.abs(got - expected).max() < 1e-4
    assert inspect_fault(content) is None
    for start in (0.0, 0.01, 5.9, 11.5):
        part = read(content, start=start, seconds=0.4)
        first = round(start * rate)
        assert np.abs(part - got[first : first + len(part)]).max() < 1e-5


def inspect_fault(content: bytes) -> AudioFileError | None:
    return inspect(io.BytesIO(content)).fault  # type: ignore[arg-type]


def test_joined_mp3_files_are_read_to_the_end() -> None:
    one, two = encoded(noise(2), "vbr"), encoded(noise(3, seed=1), "cbr")
    tag = b"ID3\4\0\0\0\0\0\x14" + bytes(20)
    for content in (one + two, one + tag + two, tag + one + two + b"TAG" + bytes(125), untagged(one) + untagged(two)):
        got = read(content)
        assert len(got) == probe(content).frames
        assert abs(len(got) / RATE - 5.05) < 0.07
        rest = read(two)
        at = np.argmax(scipy.signal.correlate(got, rest[RATE : 2 * RATE], "valid", "fft"))
        assert 0 <= at - 3 * RATE <= 4000  # behind the first, and a coder's delay
    assert abs(len(read(one + two)) - len(oracle(one + two))) <= 1152
    alone = read(one)
    assert np.abs(read(one + two)[: len(alone) - 1200] - alone[:-1200]).max() < 1e-5  # the same time zero
    with pytest.raises(AudioFileError, match="several recordings in one file: after 44100 Hz come frames of 22050 Hz"):
        read(one + encoded(noise(2, rate=22050), "cbr", 22050))


def test_an_mp3_with_a_tag_is_read_as_it_ever_was() -> None:
    x = noise(3)
    for kind in ("vbr", "cbr"):
        content = encoded(x, kind)
        got = read(content)
        assert len(got) == len(x)
        assert np.abs(got - soundfile.read(io.BytesIO(content), dtype="float32")[0]).max() < 1e-6
        for end in (b"TAG" + bytes(125), b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8)):
            assert np.array_equal(read(content + end), got)


def test_a_file_that_ends_within_its_length_tag() -> None:
    content = encoded(noise(1), "vbr")
    tag = next(content.find(name) for name in (b"Xing", b"Info") if name in content[:200])
    for end in range(tag, tag + 20):
        with pytest.raises(AudioFileError):
            read(content[:end])


def test_a_length_tag_is_held_against_the_frames() -> None:
    for kind in ("vbr", "cbr"):
        content = encoded(noise(4), kind)
        tag = next(content.find(name) for name in (b"Xing", b"Info") if name in content[:200])
        count, size = struct.unpack_from(">II", content, tag + 8)
        raw = untagged(content)

        def says(frames: int, length: int, content: bytes = content, tag: int = tag) -> bytes:
            out = bytearray(content)
            struct.pack_into(">II", out, tag + 8, frames, length)
            return bytes(out)

        for frames, length in ((count // 2, size), (count // 2, size // 2), (1, 1), (0, 0)):
            got = read(says(frames, length))
            assert 4 * RATE <= len(got) <= 4 * RATE + 2 * 1152 + 529  # what a coder adds at the end included
            assert np.abs(got[: 4 * RATE - 1200] - read(content)[:-1200]).max() < 1e-5 or not frames
        with pytest.raises(AudioFileError, match="is truncated"):
            probe(says(2 * count, size))
        frame = bytearray(content[: content.find(content[:2], 4)])  # the tag of another encoder in a frame of its own
        frame[4:] = bytes(len(frame) - 4)
        for said in (count, count // 2):
            struct.pack_into(">4sHHHII", frame, 36, b"VBRI", 1, 0, 75, len(raw) + len(frame), said)
            assert np.array_equal(read(bytes(frame) + raw), read(raw))


def test_an_mp3_in_a_wav_is_as_long_as_its_frames() -> None:
    for kind in ("vbr", "cbr"):
        stream = untagged(encoded(np.concatenate([noise(3, 1e-4), noise(3)]), kind))
        form = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 16000, 1, 0, 12, 1, 2, 1152, 1, 1393)
        for size in (len(stream), 0xFFFFFFFF, 0x7FFFF000):
            wav = b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", len(form)) + form
            content = wav + b"data" + struct.pack("<I", size) + stream
            assert probe(content).format == "WAV/MPEG_LAYER_III"
            assert np.array_equal(read(content), read(stream))
        with pytest.raises(AudioFileError, match="ends within its samples"):
            probe(wav + b"data" + struct.pack("<I", 2 * len(stream)) + stream)


class Counted(io.BytesIO):
    """An open file that counts its reads and their bytes."""

    reads = total = 0

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.reads, self.total = self.reads + 1, self.total + len(part)
        return part


def test_counting_frames_reads_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = untagged(encoded(noise(20), "cbr")) * 30  # 600 s, no length anywhere
    file = Counted(content)
    assert abs(probe(file).seconds - 600) < 3
    assert len(content) <= file.total < 1.1 * len(content)
    assert file.reads < 100 + len(content) / (1 << 16)  # blocks of 128 KiB, not frames
    scans = []
    real = mpeg.stream
    monkeypatch.setattr(mpeg, "stream", lambda *given: scans.append(1) or real(*given))
    path = tmp_path / "a.mp3"
    path.write_bytes(content)
    assert abs(probe(path).seconds - 600) < 3
    assert len(read(path, start=500.0, seconds=1.0)) == RATE
    assert len(scans) == 1


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_chained_ogg_is_all_of_its_links(kind: str) -> None:
    rate = 48000
    parts = [encoded(noise(seconds, rate=rate, seed=i), kind, rate) for i, seconds in enumerate((1.0, 2.5, 0.7))]
    content = b"".join(parts)
    expected = np.concatenate([read(part) for part in parts])
    assert probe(content).frames == len(expected) == round(4.2 * rate)
    got = read(content)
    assert np.array_equal(got, expected)
    assert abs(len(oracle(content)) - len(got)) <= 1024
    for start, seconds in ((0.5, 1.0), (0.9, 3.0), (3.4, 0.5), (1.0, None)):
        part, first = read(content, start=start, seconds=seconds), round(start * rate)
        assert np.abs(part - got[first : first + len(part)]).max() < 1e-5
    assert inspect_fault(content) is None
    same = parts[0] + parts[0]  # one serial number
    assert np.array_equal(read(same), np.concatenate([read(parts[0])] * 2))
    with pytest.raises(AudioFileError, match="ends within a page of Ogg"):
        probe(content[:-100])
    for other in (encoded(noise(1, rate=24000), kind, 24000), encoded(noise(1, rate=rate, channels=2), kind, rate)):
        with pytest.raises(AudioFileError, match=r"several recordings in one file: 48000 Hz with 1 channels, then"):
            probe(parts[0] + other)


def page(serial: int, body: bytes, first: bool = False) -> bytes:
    table = bytes([255] * (len(body) // 255) + [len(body) % 255])
    return b"OggS\0" + bytes([2 * first]) + struct.pack("<QIIIB", 0, serial, 0, 0, len(table)) + table + body


def test_ogg_beside_other_streams_is_its_sound() -> None:
    content = encoded(noise(3), "vorbis")
    starts = [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]
    pages = [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]
    mixed = page(7, b"fishead\0" + bytes(56), True) + page(8, b"\x80theora" + bytes(35), True) + pages[0]
    for one in pages[1:]:
        mixed += page(8, b"picture" * 60) + one
    assert np.array_equal(read(mixed), read(content))
    with pytest.raises(AudioFileError, match="has no audio, but skeleton, theora"):
        probe(page(7, b"fishead\0" + bytes(56), True) + page(8, b"\x80theora" + bytes(35), True))
    assert np.array_equal(read(content + b"TAG" + bytes(125)), read(content))


OTHERS = {"m4a": ("ipod", "alac"), "wav": ("wav", "adpcm_g722")}
KEPT = ("oga", "mka", "mov", "3gp", "wma", "wv", "mp2", "aac", "caf", *OTHERS)


@pytest.mark.parametrize("suffix", KEPT)
def test_what_ffmpeg_writes_is_read_completely(tmp_path: Path, suffix: str) -> None:
    rate = 16000 if suffix == "wav" else 44100
    x, path = noise(2.0, rate=rate)[:, 0], tmp_path / f"a.{suffix}"
    sounds.write_av(str(path), x[:, None], rate, *(sounds.AV | OTHERS)[suffix])
    got, info = read(path), probe(path)
    assert info.rate == rate
    assert -1024 <= len(got) - len(x) <= 3 * 2048
    lag = int(np.argmax(scipy.signal.correlate(got, x, "full"))) - len(x) + 1
    assert abs(lag) <= 2048  # the coder's own delay
    assert np.corrcoef(got[max(0, lag) :][:60_000], x[max(0, -lag) :][: len(got[max(0, lag) :][:60_000])])[0, 1] > 0.9
    assert inspect(path).fault is None
    half = path.read_bytes()[: path.stat().st_size // 2]
    if suffix in ("oga", "m4a", "mov", "3gp", "caf", "mka", "wv"):  # the others may end anywhere
        with pytest.raises(AudioFileError):
            read(half)


def test_two_mpeg4_files_joined_are_refused(tmp_path: Path) -> None:
    content = sounds.write(tmp_path / "a.m4a", noise(1.0), RATE).read_bytes()
    with pytest.raises(AudioFileError, match="several recordings in one file: a second one begins before byte"):
        read(content + content)
