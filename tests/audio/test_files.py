"""Decoding: formats, channels, rates, parts of files, and every way in which a file can be bad."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.signal
import soundfile
from sounds import ENCODINGS, sound, write

from asit.audio import decoders, files
from asit.audio.files import AudioFileError, inspect, probe, read, resample
from asit.errors import AudioError

SHARED = Path(os.environ.get("ASIT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_in_blocks_as_in_one_piece(tmp_path: Path, kind: str, channels: int) -> None:
    x = sound(200_000, 48000, channels)
    path = write(tmp_path / f"a.{kind}", x, 48000)
    info = probe(path)
    assert (info.frames, info.rate, info.channels, info.seconds) == (200_000, 48000, channels, 200_000 / 48000)
    # The oracle decodes in a single call, so nothing can go wrong between blocks.
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(1)
    wave = read(path)
    assert (wave.dtype, wave.shape) == (np.float32, (200_000,))
    assert np.abs(wave - whole).max() < 1e-6
    got = inspect(path, keep=(1.0, 2.5))
    assert got.fault is None
    assert got.info == info
    assert np.array_equal(got.wave, wave[48000 : 48000 + 120_000])
    assert got.info.seconds == info.seconds


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("rate", [None, 16000])
def test_a_part_equals_that_part_of_the_recording(tmp_path: Path, kind: str, rate: int | None) -> None:
    native = 48000 if kind == "opus" else 44100
    path = write(tmp_path / f"a.{kind}", sound(12 * native, native), native)
    whole, target = read(path, rate=rate), rate or native
    rng = np.random.default_rng(3)
    for start, seconds in [
        (0.0, 1.0),
        (11.0, 1.0),
        *zip(rng.uniform(0, 10, 12), rng.uniform(0.01, 2, 12), strict=True),
    ]:
        part = read(path, rate=rate, start=start, seconds=seconds)
        first, count = round(start * target), round(seconds * target)
        assert len(part) == count
        assert np.abs(part - whole[first : first + count]).max() < 1e-5, (start, seconds)


@pytest.mark.parametrize("quality", ["soxr-mq", "soxr-hq", "soxr-vhq"])
@pytest.mark.parametrize(
    ("native", "rate"), [(8000, 16000), (22050, 16000), (96000, 16000), (11127, 16000), (16000, 44100)]
)
def test_a_resampled_part_equals_that_part_of_the_recording(
    tmp_path: Path, native: int, rate: int, quality: files.Resampler
) -> None:
    path = write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, (6 * native, 1)), native, subtype="FLOAT")
    whole = read(path, rate=rate, resampler=quality)
    assert len(whole) == 6 * rate
    for start in (0.0, 0.01, 1.2345, 4.9):
        first = round(start * rate)
        part = read(path, rate=rate, start=start, seconds=1.0, resampler=quality)
        assert np.abs(part - whole[first : first + rate]).max() < 1e-5
    assert np.array_equal(read(path, rate=rate, start=5.5, seconds=9.0, resampler=quality).shape, (rate // 2,))


def test_only_the_part_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", sound(60 * 16000, 16000), 16000)
    decoded = []
    blocks = decoders._SoundFileDecoder.blocks
    monkeypatch.setattr(
        decoders._SoundFileDecoder, "blocks", lambda *a: (decoded.append(len(block)) or block for block in blocks(*a))
    )
    read(path, rate=8000, start=30.0, seconds=1.0)
    assert 16000 < sum(decoded) < 18000


def test_resampling_keeps_tones_and_stops_aliases() -> None:
    n = np.arange(44100)
    for hz, kept in [(1000, True), (6900, True), (8900, False), (15000, False)]:
        tone = np.sin(2 * np.pi * hz / 44100 * n).astype(np.float32)
        out = resample(tone, 44100, 16000)
        assert (len(out), out.dtype) == (16000, np.float32)
        middle = out[2000:-2000].astype(np.float64)
        if kept:
            assert np.abs(middle - np.sin(2 * np.pi * hz / 16000 * np.arange(2000, 14000))).max() < 1e-3  # 0.01 dB
        else:
            assert np.abs(middle).max() < 1e-5  # -100 dB
    assert resample(tone, 44100, 44100) is tone


@pytest.mark.parametrize("channels", [2, 3, 6, 8])
def test_channels_are_averaged(tmp_path: Path, channels: int) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, (70_000, channels)).astype(np.float32)
    path = write(tmp_path / "a.wav", x, 48000, subtype="FLOAT")
    assert np.abs(read(path) - x.astype(np.float64).mean(1)).max() < 1e-6


@pytest.mark.parametrize("samples", [1, 2, 399])
def test_very_short_files(tmp_path: Path, samples: int) -> None:
    path = write(tmp_path / "a.wav", sound(samples, 16000) + 0.1, 16000)
    assert len(read(path)) == samples
    assert len(read(path, rate=32000)) == 2 * samples
    assert len(read(path, seconds=10.0)) == samples


def test_a_long_file_is_inspected_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", np.zeros((16_000_000, 1), np.int16) + np.int16(100), 8000)
    tracemalloc.start()
    got = inspect(path, keep=(1000.0, 1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    read(path)
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (got.info.seconds, len(got.wave)) == (2000.0, 8000)
    assert peak < 4e6
    assert whole < 1.1 * 4 * 16_000_000 + 4e6


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{seed}.{kind}", sound(48000, 48000, seed=seed), 48000) for seed, kind in enumerate(ENCODINGS)
    ]
    alone = [read(path, rate=16000) for path in paths]
    wrong: list[Path] = []

    def work() -> None:
        for _ in range(3):
            wrong.extend(p for p, w in zip(paths, alone, strict=True) if not np.array_equal(read(p, rate=16000), w))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(100, 8000), 8000)
    try:
        odd = path.rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.wav")))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(read(odd)) == 100


@pytest.mark.parametrize("kind", ["m4a", "mp4", "aac"])
def test_aac(tmp_path: Path, kind: str) -> None:
    x = sound(6 * 44100, 44100, 2)
    path = write(tmp_path / f"a.{kind}", x, 44100)
    whole, got = read(path), inspect(path, keep=(2.0, 1.0))
    assert (got.fault, got.info.channels, got.info.rate) == (None, 2, 44100)
    assert got.info.format.endswith("/aac")
    assert got.info.frames == len(whole)
    assert abs(probe(path).seconds - 6) < (0.5 if kind == "aac" else 0.05)
    assert np.array_equal(got.wave, whole[2 * 44100 : 3 * 44100])
    lag = np.argmax(scipy.signal.correlate(whole[:88200], x[:88200].mean(1), method="fft")) - 88199
    assert abs(lag) <= 2048  # the coder's own delay
    likeness = np.corrcoef(whole[88200:200_000], x[88200 - lag : 200_000 - lag].mean(1))[0, 1]
    assert likeness > 0.9  # one channel alone would give 0.7
    for start in (0.0, 0.3, 1.7, 3.3333, 4.9):
        part, first = read(path, start=start, seconds=0.5), round(start * 44100)
        assert np.abs(part - whole[first : first + 22050]).max() < 1e-5, start
    sixteen = read(path, rate=16000)
    assert np.abs(read(path, rate=16000, start=2.5, seconds=1.0) - sixteen[40000:56000]).max() < 1e-5


def test_webm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.webm", sound(3 * 48000, 48000), 48000)
    whole = read(path)
    assert abs(len(whole) / 48000 - 3) < 0.05
    assert np.array_equal(read(path, start=1.5, seconds=1.0), whole[72000:120_000])


def test_m4a_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.m4a", sound(6 * 16000, 16000), 16000)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(AudioFileError, match=r"a.m4a ends within its box 'mdat', which has \d+ bytes more"):
        read(path)


def test_a_header_without_a_codec_or_a_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.m4a", sound(8000, 16000), 16000)
    content = bytearray(path.read_bytes())
    content[content.index(b"hdlr") - 3] = 0xFF  # the length of what says which sound it is
    path.write_bytes(content)
    raw = write(tmp_path / "a.aac", sound(8000, 16000), 16000)
    content, at = bytearray(raw.read_bytes()), 0
    while at < len(content):  # a reserved code for the rate, in each frame's header
        content[at + 2] |= 0b00111100
        at += (content[at + 3] & 3) << 11 | content[at + 4] << 3 | content[at + 5] >> 5
    raw.write_bytes(content)
    for file in (path, raw):
        with pytest.raises(AudioFileError, match="an audio stream without a codec or sample rate"):
            read(file)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.m4a"
    path.write_bytes(b"\0\0\0\x20ftypM4A ")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioFileError, match=r"PyAV is not installed[\s\S]*pip install 'asit-audio\[av\]'"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "text", "reason"),
    [
        ("gone.wav", None, "gone.wav does not exist", "missing"),
        ("", None, "Is a directory", "unreadable"),
        ("none.flac", b"", "none.flac has no bytes", "empty"),
        ("page.mp3", b"<!DOCTYPE html><html>not found</html>" * 50, r"page.mp3 is a web page or XML[\s\S]*server", ""),
        ("clip.mp3", b"\0\0\0\x20ftypM4A " + b"\0" * 99, r"clip.mp3 begins with the bytes 00 [\s\S]*FFmpeg says", ""),
        ("clip.wav", b"\x1aE\xdf\xa3" + b"\1" * 99, r"clip.wav begins with the bytes 1a [\s\S]*FFmpeg says", ""),
        ("a.flac", b"read me", r"a.flac begins with the bytes 72 65 61 64[\s\S]*libsndfile says", ""),
        ("a.wav", np.zeros((0, 1)), r"a.wav \(WAV/PCM_16\) has no samples", "empty"),
    ],
)
def test_files_without_audio(tmp_path: Path, name: str, content: Any, text: str, reason: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content, 16000)
    for read_it in (probe, read, inspect):
        with pytest.raises(AudioFileError, match=text) as caught:
            read_it(path)
        assert caught.value.reason == (reason or "unreadable")
        assert isinstance(caught.value, AudioError)


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ENCODINGS)
def test_cut_off(tmp_path: Path, kind: str, channels: int, share: float) -> None:
    path = cut(write(tmp_path / f"a.{kind}", sound(5 * 48000, 48000, channels), 48000), share)
    with pytest.raises(
        AudioFileError, match=r"a\.\w+ \(\w+/\w+\) (is truncated|ends within a page|cannot be decoded)"
    ) as caught:
        read(path)
    assert caught.value.reason == "truncated"
    try:
        fault = inspect(path).fault
    except AudioFileError as error:
        fault = error
    assert fault is not None
    assert fault.reason == "truncated"


def test_a_truncated_wav_reports_its_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(20000, 8000, 2), 8000)
    path.write_bytes(path.read_bytes()[: 44 + 4 * 5000])
    with pytest.raises(AudioFileError, match=r"5000 samples \(0.625 s\)[\s\S]*the 20000 samples \(2.500 s\)"):
        probe(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    x = sound(100_000, 16000)
    x[90_000] = bad
    path = write(tmp_path / "a.wav", x, 16000, subtype="FLOAT")
    for read_it in (inspect, read):
        with pytest.raises(
            AudioFileError, match=r"a.wav \(WAV/FLOAT\) holds samples that are NaN or infinite"
        ) as caught:
            read_it(path)
        assert caught.value.reason == "non-finite"
    assert len(read(path, seconds=1.0)) == 16000  # the part does not hold it


def test_only_inspect_refuses_silence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps = {"zeros": 0 * rng.integers(-1, 2, (9000, 1)), "dither": rng.integers(-1, 2, (9000, 1))}
    steps["offset"] = steps["dither"] + 5000
    for name, x in steps.items():
        path = write(tmp_path / f"{name}.wav", x.astype(np.int16), 8000)
        fault = inspect(path).fault
        assert fault is not None
        assert fault.reason == "silent"
        assert len(read(path)) == 9000
    assert inspect(write(tmp_path / "faint.wav", (10 * steps["dither"]).astype(np.int16), 8000)).fault is None


@pytest.mark.parametrize(("start", "seconds"), [(-1.0, 1.0), (0.0, 0.0), (0.0, -1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_impossible_parts(tmp_path: Path, start: float, seconds: float) -> None:
    path = write(tmp_path / "a.wav", sound(8000, 8000), 8000)
    with pytest.raises(AudioError, match="start of 0 or more and seconds above 0"):
        read(path, start=start, seconds=seconds)


def test_a_part_after_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(8000, 8000), 8000)
    with pytest.raises(AudioError, match=r"from 2 s[\s\S]*its end at 1.000 s"):
        read(path, start=2.0, seconds=1.0)
    with pytest.raises(AudioError, match="sample rate of 0 Hz"):
        read(path, rate=0)
    assert len(inspect(path, keep=(2.0, 1.0)).wave) == 0


def test_errors_are_pickled_with_their_reason(tmp_path: Path) -> None:
    with pytest.raises(AudioFileError) as caught:
        probe(tmp_path / "gone.wav")
    back = pickle.loads(pickle.dumps(caught.value))
    assert (type(back), str(back), back.reason) == (AudioFileError, str(caught.value), "missing")


def test_neither_torch_nor_pyav_is_imported() -> None:
    code = "import sys, asit.audio.files; sys.exit(any(name in sys.modules for name in ('torch', 'av')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0


def test_real_recordings() -> None:
    words = sorted((SHARED / "arabic-speech-commands" / "dataset").glob("*/*_NO_05.opus"))[:40]
    digits = sorted((SHARED / "free-spoken-digit-dataset" / "recordings").glob("*_7.wav"))[:40]
    if not words or not digits:
        pytest.skip("no recordings: ../shared/data (or ASIT_SHARED_DATA) is absent")
    for path in words + digits:
        assert inspect(path).fault is None, path.name
    assert {len(read(path, rate=16000)) for path in words} == {16000}
    assert {probe(path).rate for path in digits} == {8000}
