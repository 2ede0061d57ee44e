"""Windows of clips: their number, positions and blocks."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.windows import Windows

RATE = 8000
SETTINGS = FrontEndSettings(rate=RATE, mels=32, mean=-6.0, std=3.0)
SPAN = FrontEnd(SETTINGS).samples_for(32) / RATE


class Seen(Windows):
    """Keeps what is asked of the files."""

    asked: list[tuple[float, float]]

    def watch(self) -> Seen:
        self.asked, real = [], self.waveforms.read

        def read(clip: Clip, start: float, seconds: float) -> np.ndarray:
            self.asked.append((start, seconds))
            return real(clip, start, seconds)

        self.waveforms.read = read  # type: ignore[method-assign]
        return self


def listed(lengths: list[float]) -> Catalogue:
    return Catalogue.from_clips([Clip(f"/nowhere/{i}.wav", s, RATE, 1) for i, s in enumerate(lengths)], root="/nowhere")


@given(
    lengths=st.lists(st.floats(0.01, 4.0), min_size=1, max_size=12),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    block=st.integers(1, 7),
)
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_windows_cover_each_clip(lengths: list[float], overlap: float, block: int) -> None:
    catalogue = listed(lengths)
    rows = np.arange(len(lengths))[::-1].copy()
    windows = Windows(catalogue, rows, SETTINGS, 32, overlap, block)
    total = 0
    for place, row in enumerate(rows.tolist()):
        seconds, count = float(catalogue.seconds[row]), int(windows.counts[place])
        begins = [max(0.0, seconds - SPAN) if i == count - 1 else i * windows.hop for i in range(count)]
        assert begins[0] <= 0.0051  # half a hop of the log-mel is no reason for another window
        assert begins == sorted(begins)
        ends = [begin + SPAN for begin in begins]
        assert ends[-1] >= seconds - 1e-5
        # No gap but what is less than half a hop of the log-mel.
        assert all(b <= a + 0.0051 for a, b in zip(ends, begins[1:], strict=False))
        assert count == 1 or ends[-2] < seconds  # none too many
        total += count
    assert len(windows) == -(-total // block)
    assert windows.done(0) == 0
    assert windows.done(len(windows)) == len(lengths)


def test_where_the_windows_lie(tmp_path: object) -> None:
    path = f"{tmp_path}/a.wav"
    wave = np.random.default_rng(0).standard_normal(round(1.0 * RATE)) * 0.1
    soundfile.write(path, wave, RATE, subtype="FLOAT")
    whole = Catalogue.from_clips([Clip(path, 1.0, RATE, 1), Clip(path, 0.2, RATE, 1, start=0.5)])
    windows = Seen(whole, np.array([0, 1]), SETTINGS, 32, 0.0, 3).watch()
    assert windows.counts.tolist() == [3, 1]
    first, second = windows[0], windows[1]
    assert windows.asked == [
        (0.0, pytest.approx(SPAN)),
        (pytest.approx(SPAN), pytest.approx(SPAN)),
        (pytest.approx(1.0 - SPAN), pytest.approx(SPAN)),  # moved back, to end with the clip
        (0.0, pytest.approx(0.2)),
    ]
    assert first.owner.tolist() == [0, 0, 0]
    assert second.owner.tolist() == [1]
    assert first.x.shape == (3, 1, 32, 32)
    front_end = FrontEnd(SETTINGS)
    samples = front_end.samples_for(32)
    part = np.zeros(samples, np.float32)
    part[:1600] = wave[4000:5600]
    torch.testing.assert_close(
        second.x[0, 0], front_end.normalise(front_end.fbank(torch.from_numpy(part)[None])[0]), rtol=1e-3, atol=1e-3
    )
    assert len(Seen(whole, np.array([0]), SETTINGS, 32, 0.5, 3)) == 2
    assert Windows(whole, np.array([0]), SETTINGS, 32, 0.5, 3).counts.tolist() == [
        1 + int(np.ceil((1 - SPAN) / (SPAN / 2)))
    ]


def test_nothing_to_read(tmp_path: object) -> None:
    nothing = Windows(listed([1.0]), np.array([], np.int64), SETTINGS, 32, 0.0, 3)
    assert len(nothing) == 0
    assert nothing.done(0) == 0
    lost = Windows(listed([1.0]), np.array([0]), SETTINGS, 32, 0.0, 8)[0]
    assert lost.x.shape == (0, 1, 32, 32)
    assert [owner for owner, _ in lost.failures] == [0, 0, 0]
    assert "/nowhere/0.wav" in lost.failures[0][1]
