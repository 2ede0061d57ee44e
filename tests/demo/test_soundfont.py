"""The demo's SoundFont: reading, pitch, envelopes, damaged files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from asit.demo import soundfont
from asit.demo.demo_dataset import INSTRUMENTS
from asit.demo.soundfont import SoundFont
from asit.errors import AudioError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pretty_midi") is None, reason="pretty_midi is not installed")


@pytest.fixture(scope="module")
def font() -> SoundFont:
    return SoundFont(soundfont.bank_path())


def test_bank_is_read(font: SoundFont) -> None:
    assert len(font.samples) == 520
    assert font.name(0) == "FluteG6"
    assert {p for b, p in font.programs if b == 0} == set(range(128))
    trumpet = font.zones(0, 56)
    assert [font.name(z.sample) for z in trumpet][:2] == ["TrumpC5", "TrumpD#5"]
    assert [(z.low, z.high) for z in trumpet][:3] == [(12, 56), (57, 63), (64, 67)]
    assert font.seconds(trumpet[0].sample) == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("label", ["accordion", "soprano_sax", "flute", "trumpet"])
def test_a_note_has_its_pitch(font: SoundFont, label: str) -> None:
    zone = next(z for z in font.zones(*INSTRUMENTS[label]) if z.low <= 69 <= z.high)
    sound = font.note(zone, 69, 1.0, 1.0, 16000)[4000:12192]
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 17)) ** 2
    period = np.fft.irfft(power)[:55]  # autocorrelation: from 640 Hz down to 290, so neither octave is in reach
    lag = 25 + int(np.argmax(period[25:]))
    below, at, above = period[lag - 1 : lag + 2]
    lag_exact = lag + 0.5 * (below - above) / (below - 2 * at + above)
    assert 16000 / lag_exact == pytest.approx(440, rel=0.015)


def test_velocity_and_release(font: SoundFont) -> None:
    zone = next(z for z in font.zones(0, 64) if z.low <= 69 <= z.high)
    loud, soft = (font.note(zone, 69, v, 0.5, 16000) for v in (1.0, 0.5))
    np.testing.assert_allclose(soft, loud / 4, rtol=1e-5, atol=1e-7)
    assert len(loud) <= 0.9 * 16000 + 1
    assert np.abs(loud[-20:]).max() < 1e-3 * np.abs(loud).max()


def test_a_damaged_bank_is_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.sf2"
    cut.write_bytes(soundfont.bank_path().read_bytes()[:1_000_000])
    with pytest.raises(AudioError, match=r"cut\.sf2 cannot be read as a SoundFont: chunk .* is truncated"):
        SoundFont(cut)
    cut.write_bytes(b"<html>")
    with pytest.raises(AudioError, match="no RIFF header"):
        SoundFont(cut)
