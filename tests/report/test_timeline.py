"""The picture of a recording's labels."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.report import timeline
from asit.report.timeline import Spectrogram

SETTINGS = FrontEndSettings(mels=32, mean=-6.0, std=3.0)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)


def test_columns_are_the_log_mel_where_it_is_short_and_blocks_do_not_matter() -> None:
    front_end, wave = FrontEnd(SETTINGS), noise(2.0)
    whole = Spectrogram([wave], front_end)
    torch.testing.assert_close(torch.from_numpy(whole.columns), front_end.fbank(torch.from_numpy(wave[None]))[0])
    cut = Spectrogram(np.split(wave, [7, 333, 5000, 5001, 21000]), front_end)
    np.testing.assert_allclose(cut.columns, whole.columns, atol=1e-5)
    assert cut.seconds == whole.seconds == 2.0


def test_a_long_sound_is_averaged_into_a_bounded_number_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "COLUMNS", 8)
    front_end, wave = FrontEnd(SETTINGS), noise(1.0)
    logmel = front_end.fbank(torch.from_numpy(wave[None]))[0].numpy()  # 98 frames
    for blocks in ([wave], np.array_split(wave, 13)):
        found = Spectrogram(blocks, front_end).columns
        assert len(found) == 13  # 8 frames each: 4 would be 25 columns
        np.testing.assert_allclose(found[:12], logmel[:96].reshape(12, 8, -1).mean(1), atol=1e-5)
        np.testing.assert_allclose(found[12], logmel[96:].mean(0), atol=1e-5)


def test_a_sound_shorter_than_a_window_has_one_column() -> None:
    found = Spectrogram([noise(0.01)], FrontEnd(SETTINGS))
    assert found.columns.shape == (1, 32)
    assert np.isfinite(found.columns).all()


LABELS = ("dog", "السيارات والشاحنات والدراجات النارية في الشارع المزدحم جدا قبل الغروب بقليل", "犬", "$a_b$")


@pytest.mark.parametrize("seconds", [0.02, 1.0, 30.0])
def test_a_picture_of_any_length(tmp_path: Path, seconds: float) -> None:
    count = max(1, int(seconds))
    starts = np.linspace(0, seconds, count, endpoint=False, dtype=np.float32)
    rng = np.random.default_rng(1)
    tracks = [(label, rng.random(count).astype(np.float32)) for label in LABELS]
    spectrogram = Spectrogram([noise(seconds)], FrontEnd(SETTINGS))
    out = tmp_path / "timeline.png"
    timeline.draw(out, spectrogram, SETTINGS, tracks, starts, starts + seconds / count, "name\x1b of a file " * 20)
    pixels = imread(out)
    assert pixels.shape[1] == 1200
    assert pixels[:, :, :3].std() > 0.05
    # Nothing touches the picture's edges: no name is cut off.
    assert all((edge[..., :3] == 1.0).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    assert os.listdir(tmp_path) == ["timeline.png"]  # noqa: PTH208


def test_pictures_can_be_drawn_in_threads(tmp_path: Path) -> None:
    spectrogram = Spectrogram([noise(1.0)], FrontEnd(SETTINGS))
    one = np.ones(1, np.float32)

    def draw(name: str) -> None:
        timeline.draw(tmp_path / name, spectrogram, SETTINGS, [("dog", 0.5 * one)], 0 * one, one, "a")

    threads = [threading.Thread(target=draw, args=(f"{i}.png",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(3)}) == 1


@pytest.mark.parametrize(
    ("seconds", "step", "text"),
    [(0.25, 0.05, "0.25"), (12.0, 5, "12"), (65.0, 5, "1:05"), (61.5, 0.5, "1:01.5"), (7200.0, 600, "2:00:00")],
)
def test_times_on_the_axis(seconds: float, step: float, text: str) -> None:
    assert timeline.clock(seconds, step) == text


def test_other_fonts_are_searched_only_for_missing_characters() -> None:
    assert timeline.fonts("dog نباح собака") == ["DejaVu Sans"]
