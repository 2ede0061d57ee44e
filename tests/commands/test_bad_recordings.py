"""A recording that needs too much memory, or overflows, at every entry point: refused at once, others processed."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asit
from asit.audio.stream import read_sound
from asit.cli import main
from asit.errors import AudioError
from asit.serve import analysis
from asit.serve.request_queue import Job, RequestLimits

Captured = pytest.CaptureFixture[str]


def slow(rate: int = 1) -> bytes:
    """A FLAC of some 500 bytes, whose 160,000 samples would be 2.6 billion at 16 kHz."""
    out = io.BytesIO()
    soundfile.write(out, np.repeat(np.arange(40, dtype=np.int16) * 500, 4096), 44100, format="FLAC")
    content = bytearray(out.getvalue())
    content[18:21] = (rate << 4 | content[20] & 15).to_bytes(3, "big")  # 20 bits of the header
    return bytes(content)


def loud(value: float, channels: int = 1) -> bytes:
    """A float WAV with one sample of that value."""
    x = (0.1 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    x[5000] = value
    out = io.BytesIO()
    soundfile.write(out, np.stack([x] * channels, 1), 16000, format="WAV", subtype="FLOAT")
    return out.getvalue()


def cancelling() -> bytes:
    x = (0.3 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    out = io.BytesIO()
    soundfile.write(out, np.stack([x, -x], 1), 16000, format="WAV")
    return out.getvalue()


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "slow.flac": (slow, "has a sample rate of 1 Hz"),
    "low.flac": (lambda: slow(999), "has a sample rate of 999 Hz"),
    "huge.wav": (lambda: loud(3e38, 2), "holds samples up to 3e+38, far outside [-1, 1]"),
    "int16.wav": (lambda: loud(12000), "holds samples up to 12000, far outside [-1, 1], as int16 values are"),
    "nan.wav": (lambda: loud(float("nan")), "holds samples that are NaN or infinite"),
    "cancelling.wav": (cancelling, "its 2 channels cancel each other"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten good recordings, those of `BAD`, and two files that are none by name."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        soundfile.write(folder / f"good{i}.wav", rng.normal(0, 0.1, 16000), 16000)
    for name, (make, _) in BAD.items():
        (folder / name).write_bytes(make())
    (folder / "notes.txt").write_text("text")
    (folder / "list.csv").write_text("path\n")
    return folder


@pytest.mark.parametrize(
    ("verb", "model", "more", "status", "listed"),
    [
        ("tag", "single", "", 2, None),
        ("embed", "encoder", "--out e.npz --bad-files 1", 2, "e.npz.failures.jsonl"),
        ("index", "encoder", "--out i", 2, "i/failures.jsonl"),
        ("catalogue", None, "--out c.jsonl --front-end.mels 32 --bad-files 1 --workers 1", 0, "c.skipped.jsonl"),
    ],
)
def test_bad_recordings_are_named_and_the_others_are_as_ever(
    models: Path,
    folder: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    model: str | None,
    more: str,
    status: int,
    listed: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = time.monotonic()
    assert main([verb, *([str(models / model)] if model else []), str(folder), *more.split()]) == status
    assert time.monotonic() - begun < 20
    said = capsys.readouterr()
    passed = said.out if verb == "catalogue" else said.err
    assert "not opened, as these are no audio suffixes: 1 .csv, 1 .txt" in passed
    failures = said.err if listed is None else (tmp_path / listed).read_text()
    if verb == "tag":
        rows = [json.loads(line) for line in said.out.splitlines()]
        assert sorted(row["path"] for row in rows) == [f"good{i}.wav" for i in range(10)]
    for name, (_, text) in BAD.items():
        assert name in failures
        assert text in failures
    if verb == "embed":
        vectors = np.load(tmp_path / "e.npz")
        found = next(vectors[name] for name in vectors.files if vectors[name].ndim == 2)
        assert len(found) == 10
        assert np.isfinite(found).all()
    if verb == "catalogue":
        assert "10 clips" in said.out
        assert "measured on 10 clips" in said.out
        assert "nan" not in said.out.split("log-mel mean", 1)[1].split(",")[0]


@pytest.mark.parametrize("name", BAD)
def test_the_page_refuses_them(models: Path, name: str) -> None:
    make, text = BAD[name]
    model = asit.load(str(models / "encoder"))
    begun = time.monotonic()
    with pytest.raises(AudioError) as caught:
        analysis.decode(Job(RequestLimits()), make(), model)
    assert text.split(", ")[0] in str(caught.value)
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize(
    ("sound", "rate", "text"),
    [
        (np.zeros(16000, np.float32), 2**62, "a sample rate of 4611686018427387904 Hz"),
        (np.zeros(16000, np.float32), 1, "the ndarray of shape (16000,) has a sample rate of 1 Hz"),
        (np.full(16000, 12000, np.float32), 16000, "up to 12000, far outside [-1, 1], as int16 values are"),
        (np.full(16000, 3e38), 16000, "holds samples up to 3e+38"),
        (np.stack([np.sin(np.arange(16000) / 5)] * 2) * [[1], [-1]], 16000, "its 2 channels cancel each other"),
        (np.zeros((300, 16000), np.float32), 16000, "has 300 channels"),
        (np.arange(16000, dtype=np.int16), 16000, "holds int16"),
    ],
)
def test_arrays_are_held_to_the_same_bounds(models: Path, sound: np.ndarray, rate: int, text: str) -> None:
    begun = time.monotonic()
    with pytest.raises(AudioError) as caught:
        asit.load(str(models / "encoder")).embed(sound, rate)
    assert text in str(caught.value)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("length_is_known", [True, False])
def test_hours_of_one_value_in_a_few_bytes_are_refused(tmp_path: Path, length_is_known: bool) -> None:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 44100, 1, format="FLAC") as file:
        for _ in range(600):
            file.write(np.full(4096 * 4, 500, np.int16))
    content = bytearray(out.getvalue())
    content[18:21] = (1000 << 4 | content[20] & 15).to_bytes(3, "big")
    assert len(content) / (600 * 16.384) < 10
    if not length_is_known:
        content[21] &= 0xF0
        content[22:26] = bytes(4)
    begun = time.monotonic()
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(AudioError, match=r"claims \d\.\d hours in \d+ bytes"):
        read_sound(tmp_path / "a.flac", None, 16000)
    assert time.monotonic() - begun < 10
