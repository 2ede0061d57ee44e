"""Files, bytes, arrays and tensors give the same samples, in blocks or at once; what is refused."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sounds import write, write_av

from asit.audio import files
from asit.audio.stream import name_of, open_sound, read_sound
from asit.errors import AudioError

RATE = 44100
KINDS = ("wav", "flac", "mp3", "ogg", "opus", "m4a", "aac", "webm")


def noise(seconds: float, rate: int = RATE, channels: int = 2) -> np.ndarray:
    """Smoothed noise (samples, channels)."""
    x = np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).cumsum(0)
    return (0.3 * np.sin(x / 5)).astype(np.float32)


def rate(kind: str) -> int:
    return 48000 if kind in ("opus", "m4a", "aac", "webm") else RATE


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_its_bytes_and_an_open_file_give_the_same_blocks(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", noise(6, rate(kind)), rate(kind))
    content = path.read_bytes()
    for start, seconds in [(0.0, None), (1.2345, 2.5)]:
        whole = files.read(path, rate=16000, start=start, seconds=seconds)
        for sound in (path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content)):
            with open_sound(sound, None, 16000, start=start, seconds=seconds) as opened:
                blocks = list(opened.blocks())
            assert all(len(block) and block.dtype == np.float32 for block in blocks)
            assert len(blocks) > 1
            np.testing.assert_array_equal(np.concatenate(blocks), whole)
    with path.open("rb") as file:
        file.seek(100)
        np.testing.assert_array_equal(read_sound(file, None, 16000, start=1.2345, seconds=2.5), whole)
        assert file.tell() == 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_without_a_suffix_goes_by_its_content(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", noise(0.5, rate(kind)), rate(kind))
    plain = tmp_path / "upload-1"
    plain.write_bytes(path.read_bytes())
    np.testing.assert_array_equal(read_sound(plain, None, 16000), read_sound(path, None, 16000))


def test_what_a_browser_records_has_no_length_and_is_read(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        """Cannot seek, so the length never comes into the header."""

        def __init__(self) -> None:
            self.content = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, part: Any) -> int:
            self.content += bytes(part)
            return len(part)

    pipe = Pipe()
    write_av(pipe, noise(1.0, 48000), 48000, "webm", "libopus", live="1")  # type: ignore[arg-type]
    with open_sound(bytes(pipe.content), None, 16000) as opened:
        assert opened.seconds is None
        assert sum(map(len, opened.blocks())) == 16000


def test_a_flac_from_a_stream_has_no_length_and_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", noise(3), RATE)
    whole = read_sound(path, None, 16000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number of samples: the lower 36 bits of bytes 18 to 25
    content[22:26] = bytes(4)
    with open_sound(content, None, 16000) as opened:
        assert opened.seconds is None
        np.testing.assert_array_equal(np.concatenate(list(opened.blocks())), whole)
    path.write_bytes(content)
    np.testing.assert_array_equal(files.read(path, rate=16000), whole)
    np.testing.assert_array_equal(
        files.read(path, rate=RATE, start=1.0, seconds=0.5), files.read(path)[RATE : RATE * 3 // 2]
    )


@pytest.mark.parametrize("native", [16000, 44100, 8000])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_tensors_are_streamed_as_files_are(tmp_path: Path, native: int, channels: int) -> None:
    x = noise(40, native, channels)
    path = tmp_path / "a.wav"
    soundfile.write(path, x, native, subtype="FLOAT")
    for start, seconds in [(0.0, None), (33.3, 4.0)]:
        expected = files.read(path, rate=16000, start=start, seconds=seconds)
        for sound in (x.T, torch.from_numpy(x.T), x.T.astype(">f8"), np.asfortranarray(x).T):
            with open_sound(sound, native, 16000, start=start, seconds=seconds) as opened:
                assert opened.seconds == pytest.approx(len(expected) / 16000)
                assert (opened.rate, opened.channels) == (native, channels)
                blocks = list(opened.blocks())
            np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-6)
    half = torch.from_numpy(x.T).bfloat16()
    np.testing.assert_allclose(read_sound(half, native, native), half.float().mean(0).numpy(), atol=1e-6)
    assert read_sound(x[:, 0], None, 16000).shape == (len(x),)


def test_a_stream_that_cannot_seek_is_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(1), RATE)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        piped = read_sound(process.stdout, None, 16000)
    np.testing.assert_array_equal(piped, read_sound(path, None, 16000))


def test_a_long_sound_is_streamed_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for _ in range(20):
            file.write(noise(60, 8000, 1))
    for sound in (path, path.open("rb")):
        tracemalloc.start()
        with open_sound(sound, None, 16000) as opened:
            assert opened.seconds == 1200
            longest, total = 0, 0
            for block in opened.blocks():
                longest, total = max(longest, len(block)), total + len(block)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == 1200 * 16000
        assert longest <= 30 * 16000
        assert peak < 10e6
    sound.close()  # type: ignore[union-attr]


class Failing(io.BytesIO):
    """A file on a disk that goes away."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 20_000:
            raise OSError("the network is gone")
        return super().read(size)


class Gone(io.BytesIO):
    """A file whose maker has errors of its own."""

    def seek(self, *_: int) -> int:
        raise LookupError("the server hung up")


@pytest.mark.parametrize(
    ("sound", "text"),
    [
        (b"", "the 0 bytes given has no bytes"),
        (b"<html>not found", "is a web page or XML"),
        (b"no audio, but text of some length", "the 33 bytes given begins with the bytes 6e 6f"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "begins with the bytes 23 45 58"),
        (np.zeros(0, np.float32), "the ndarray of shape (0,) is empty"),
        (np.zeros((0, 0), np.float32), "is empty"),
        (np.zeros(5, np.int16), "the ndarray of shape (5,) holds int16"),
        (np.zeros(5, np.complex64), "holds complex64"),
        (np.array([None]), "holds object"),
        (torch.zeros(5, dtype=torch.int32), "holds torch.int32"),
        (np.zeros((10, 2), np.float32), "the ndarray of shape (10, 2) is not a clip"),
        (torch.zeros(1, 1, 5), "the Tensor of shape (1, 1, 5) is not a clip"),
        (np.float32([0, np.nan, np.inf]), "has 2 samples that are not finite"),
        (io.StringIO("text"), "the StringIO given gives text"),
        (Gone(), "the Gone given cannot be read: the server hung up"),
        ("", "an empty path"),
        ([0.1, 0.2], "a list"),
        (None, "a NoneType"),
    ],
)
def test_what_is_no_sound_is_refused(sound: Any, text: str) -> None:
    with pytest.raises(AudioError) as caught:
        read_sound(sound, None, 16000)
    assert text in str(caught.value)
    assert caught.value.expected
    assert caught.value.remedy


def test_a_playlist_never_opens_other_files(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed (the extra asit-audio[av])")
    inner = write(tmp_path / "inner.m4a", noise(0.5), RATE)
    for text in (f"ffconcat version 1.0\nfile {inner.name}\n", f"#EXTM3U\n#EXTINF:1,\n{inner.name}\n#EXT-X-ENDLIST\n"):
        playlist = tmp_path / "clip.mp4"
        playlist.write_text(text)
        with pytest.raises(AudioError, match="begins with the bytes"):
            read_sound(playlist, None, 16000)


def test_a_file_that_fails_on_the_way_is_said_not_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AudioError, match=r"the Failing given \(WAV/PCM_16\) cannot be read after .* network is gone"):
        read_sound(Failing(write(tmp_path / "a.wav", noise(1), RATE).read_bytes()), None, 16000)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path.read_bytes()])
def test_truncated_and_not_finite(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = write(tmp_path / "a.ogg", noise(10), RATE)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(AudioError, match="ends within a page"):
        read_sound(make(path), None, 16000)
    bad = noise(3)
    bad[50_000] = np.nan
    soundfile.write(tmp_path / "b.wav", bad, RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_sound(make(tmp_path / "b.wav"), None, 16000)
    assert len(read_sound(make(tmp_path / "b.wav"), None, RATE, seconds=1.0)) == RATE


def test_parts_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(1), RATE)
    with pytest.raises(AudioError, match=r"a part from 2 s\n.*a start before its end at 1.000 s"):
        read_sound(path, None, 16000, start=2.0)
    with pytest.raises(AudioError, match=r"a part of 1\.0 s from nan s"):
        read_sound(path, None, 16000, start=float("nan"), seconds=1.0)
    with pytest.raises(AudioError, match="a sample rate of 0 Hz"):
        read_sound(noise(1)[:, 0], 0, 16000)
    for rate in (0.5, float("nan"), float("inf")):
        with pytest.raises(AudioError, match=f"a sample rate of {rate} Hz"):
            read_sound(noise(1)[:, 0], rate, 16000)  # type: ignore[arg-type]
    with pytest.raises(AudioError, match="shorter than a sample at 16000 Hz"):
        read_sound(np.float32([0.5]), 44100, 16000)
    assert read_sound(np.float32([0.5]), None, 16000) == 0.5


def test_a_sound_that_is_open_already_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", noise(3), RATE)
    with open_sound(path, None, 16000, start=1.0, seconds=1.5) as opened:
        assert opened.given == 0
        assert name_of(opened) == opened.name
        expected = files.read(path, rate=16000, start=1.0, seconds=1.5)
        np.testing.assert_array_equal(read_sound(opened, None, 16000), expected)
        assert opened.given == 24000


def test_names() -> None:
    assert name_of(Path("a/b.wav")) == "a/b.wav"
    assert name_of(bytes(12_300)) == "the 12 kB of bytes given"
    assert name_of(np.zeros((2, 100))) == "the ndarray of shape (2, 100)"
    assert name_of(sys.stdin.buffer if hasattr(sys.stdin, "buffer") else io.BytesIO()).startswith("the ")
