"""The demo's SoundFont and data set: notes, the split of recordings, the clips, the atomic folder."""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit.demo import soundfont
from asit.demo.demo_dataset import INSTRUMENTS, build_dataset, split_recordings
from asit.demo.soundfont import SoundFont
from asit.errors import AudioError, ConfigError

SMALL: dict[str, Any] = {"train_clips": 70, "test_clips": 48, "mixed": 0.3}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pretty_midi") is None, reason="pretty_midi is not installed")


@pytest.fixture(scope="module")
def font() -> SoundFont:
    return SoundFont(soundfont.bank_path())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "set"
    build_dataset(root, **SMALL)
    return root


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_no_recording_is_in_both_splits(font: SoundFont) -> None:
    instruments, mixtures, facts = split_recordings(font)
    assert list(instruments) == list(INSTRUMENTS)
    train = set().union(*(voice.recordings for voice in [*mixtures, *(train for train, _ in instruments.values())]))
    test = set().union(*(voice.recordings for _, voice in instruments.values()))
    assert not train & test
    for label, (own, others) in instruments.items():
        assert (len(own.recordings) >= 2, len(others.recordings) >= 1) == (True, True), label
    # Nor the same sound under another name.
    assert not {font.waveform(i).tobytes() for i in train} & {font.waveform(i).tobytes() for i in test}
    assert "no recording is in both splits" in facts[0]
    assert "one recording, which cannot be split" in facts[1]


def test_clips_use_the_recordings_of_their_split(
    font: SoundFont, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_global_draws: None
) -> None:
    test = set().union(*(voice.recordings for _, voice in split_recordings(font)[0].values()))
    made, played = 0, []
    original = SoundFont.note

    def note(self: SoundFont, zone: soundfont.Zone, *args: Any) -> Any:
        played.append((made, zone.sample))
        return original(self, zone, *args)

    def progress(done: int, total: int, _: int) -> None:
        nonlocal made
        made = done
        assert total == 118

    monkeypatch.setattr(SoundFont, "note", note)
    build_dataset(tmp_path / "set", **SMALL, progress=progress)
    assert made == 118
    assert len(played) > 200
    assert all((clip >= 70) == (sample in test) for clip, sample in played)


def test_clips_are_finite_and_audible(small: Path) -> None:
    listed = rows(small / "train.csv") + rows(small / "test.csv")
    assert len(listed) == 118
    assert {str(p.relative_to(small)) for p in small.rglob("*.wav")} == {row["path"] for row in listed}
    levels = []
    for row in listed:
        sound, rate = soundfile.read(small / row["path"], dtype="float32")
        assert (rate, sound.shape) == (16000, (32000,))
        assert 0.005 < np.sqrt(np.mean(sound**2)) < 0.3
        assert np.abs(sound).max() <= 0.981
        levels.append(np.sqrt(np.mean(sound**2)))
    assert max(levels) > 3 * min(levels)


def test_labels_are_in_both_splits(small: Path) -> None:
    train, test = (Counter(row["label"] for row in rows(small / f"{split}.csv")) for split in ("train", "test"))
    assert train.pop("") == 21  # mixtures
    assert set(train) == set(test) == set(INSTRUMENTS)
    assert max(train.values()) - min(train.values()) <= 1
    labelled = rows(small / "labelled.csv")
    assert Counter(r["split"] for r in labelled) == {"train": 49, "test": 48}
    assert all(r["label"] and r["path"].startswith(r["split"] + "/") for r in labelled)


def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    build_dataset(tmp_path / "again", **SMALL)
    assert content(tmp_path / "again") == content(small)
    build_dataset(tmp_path / "other", **SMALL, seed=1)
    other = content(tmp_path / "other")
    assert not {v for k, v in other.items() if k.endswith("wav")} & set(content(small).values())


def test_a_complete_set_is_reused_and_a_damaged_one_rebuilt(tmp_path: Path) -> None:
    out = tmp_path / "set"
    size: dict[str, Any] = {"train_clips": 6, "test_clips": 6}
    facts = build_dataset(out, **size)
    before = content(out)
    stamp = (out / "train.csv").stat().st_mtime_ns
    assert build_dataset(out, **size) == facts
    assert (out / "train.csv").stat().st_mtime_ns == stamp
    next((out / "test").glob("*.wav")).unlink()
    assert build_dataset(out, **size) == facts
    assert content(out) == before
    build_dataset(out, train_clips=7, test_clips=6)
    assert len(rows(out / "train.csv")) == 7


def test_an_interrupted_build_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    def stop(done: int, *_: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dataset(tmp_path / "set", train_clips=6, test_clips=6, progress=stop)
    assert not (tmp_path / "set").exists()
    build_dataset(tmp_path / "set", train_clips=6, test_clips=6)
    assert len(rows(tmp_path / "set" / "test.csv")) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is no demo data set(?s:.*)name another folder"):
        build_dataset(tmp_path, train_clips=6, test_clips=6)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pretty_midi(?s:.*)pip install "asit-audio\[demo\]"'):
        build_dataset(tmp_path / "set")
    assert not (tmp_path / "set").exists()


# --- the SoundFont ----------------------------------------------------------------------------------------------------


def test_bank_is_read(font: SoundFont) -> None:
    assert len(font.samples) == 520
    assert {p for b, p in font.programs if b == 0} == set(range(128))
    trumpet = font.zones(0, 56)
    assert [font.samples[z.sample]["name"].split(b"\0")[0] for z in trumpet][:2] == [b"TrumpC5", b"TrumpD#5"]
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
