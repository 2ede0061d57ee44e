"""A small data set of real recordings: instruments of a SoundFont playing notes, chords and phrases.

The bank is TimGM6mb.sf2, which pretty_midi's wheel carries: 520 recordings of 128 instruments and of
drum kits. Its data are under the GPL-2: they are read from the installed wheel and never copied into
this package.
"""

from __future__ import annotations

import csv
import json
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.demo.soundfont import SoundFont, Wave, Zone, bank_path
from asit.errors import AudioError, ConfigError
from asit.io import atomic, lock, parsing
from asit.io.csv_lines import write_csv

DRUMS = 128
"""The bank number of the drum kits."""

INSTRUMENTS: dict[str, tuple[int, int]] = {
    "piano": (0, 0),
    "harpsichord": (0, 6),
    "accordion": (0, 21),
    "nylon_guitar": (0, 24),
    "distortion_guitar": (0, 30),
    "strings": (0, 44),
    "choir": (0, 52),
    "trumpet": (0, 56),
    "soprano_sax": (0, 64),
    "bassoon": (0, 70),
    "flute": (0, 73),
    "drums": (DRUMS, 0),
}
"""Label to (bank, program): twelve that differ to the ear, each with five or more recordings of its own."""

SHORTEST = 0.015
"""Seconds; shorter samples are single cycles for the highest keys, the same whatever the instrument."""

_HEADER = ("path", "label", "split")
VERSION = 2
"""Of what is rendered: a data set of another version is made anew."""


@dataclass(frozen=True)
class DemoDataset:
    """A finished data set.

    `train` and `test` are tables (path, label, split) of all clips of a side, `labelled` one of the labelled
    clips of both; paths are relative to `root`. Clips without a label (several instruments at once) are in
    `train` alone, with an empty label.
    """

    root: Path
    train: Path
    test: Path
    labelled: Path
    labels: tuple[str, ...]
    facts: tuple[str, ...]
    """What a reader should know of the split, in sentences."""


@dataclass(frozen=True)
class Voice:
    """An instrument as one side hears it."""

    zones: tuple[Zone, ...]
    drums: bool
    """Each key is a sound of its own, without a pitch."""

    @classmethod
    def of(cls, zones: Sequence[Zone], place: tuple[int, int]) -> Voice | None:
        """The voice of some zones of a program; None when there are none."""
        return cls(tuple(zones), place[0] == DRUMS) if zones else None

    def draw(self, rng: np.random.Generator) -> Zone:
        """A zone; each recording is equally likely, however many zones it serves."""
        recordings = sorted({zone.sample for zone in self.zones})
        sample = recordings[rng.integers(len(recordings))]
        zones = [zone for zone in self.zones if zone.sample == sample]
        return zones[rng.integers(len(zones))]

    def nearest(self, key: float) -> Zone | None:
        """The zone that serves a key, or whose keys end at most four semitones from it."""

        def distance(zone: Zone) -> float:
            return max(zone.low - key, key - zone.high, 0)

        nearest = min(self.zones, key=distance)
        return nearest if distance(nearest) <= 4 else None


def split_recordings(
    font: SoundFont, instruments: dict[str, tuple[int, int]] = INSTRUMENTS
) -> tuple[dict[str, tuple[Voice, Voice]], list[Voice], tuple[str, ...]]:
    """Give every recording of the bank to one side.

    Of each instrument's recordings, in the order of pitch, every third goes to the test side; a recording that
    an earlier instrument placed keeps its side. Everything else in the bank may be heard in unlabelled training
    mixtures.

    Returns:
        label -> (training voice, test voice); the voices of mixtures; facts in sentences.
    """
    usable = {place: _usable(font, font.zones(*place)) for place in sorted(font.programs)}
    held_out: dict[int, bool] = {}  # recording -> on the test side
    sides: dict[str, tuple[Voice, Voice]] = {}
    single = []
    for label, place in instruments.items():
        zones = usable.get(place, [])
        recordings = sorted({z.sample: z for z in zones}.values(), key=lambda z: (z.low, z.sample))
        for i, zone in enumerate(recordings):
            held_out.setdefault(zone.sample, i % 3 == 1)
        train = Voice.of([z for z in zones if not held_out[z.sample]], place)
        test = Voice.of([z for z in zones if held_out[z.sample]], place)
        if train and test:
            sides[label] = train, test
        else:
            single.append(label)
    voices = [Voice.of([z for z in zones if not held_out.get(z.sample)], place) for place, zones in usable.items()]
    mixed = [voice for voice in voices if voice]
    heard = [{z.sample for pair in sides.values() for z in pair[side].zones} for side in (0, 1)]
    alone = sum(len({z.sample for z in voice.zones}) == 1 for voice in mixed)
    facts = [
        f"{len(sides)} labelled instruments: {len(heard[0])} recordings for training, {len(heard[1])} others for the "
        "test; no recording is on both sides.",
        f"Unlabelled training mixtures draw on {len(mixed)} programs and drum kits of the bank, without the test's "
        f"recordings. {alone} of these have one recording, which cannot be split: they are heard in training only.",
    ]
    if single:
        facts.append(f"Without a label, since their recordings cannot be split: {', '.join(single)}.")
    return sides, mixed, tuple(facts)


def _usable(font: SoundFont, zones: list[Zone]) -> list[Zone]:
    """Zones with a recording worth the name, cut to keys 28 to 100 and at most an octave at the open ends."""
    kept = []
    for zone in zones:
        low = max(zone.low, zone.high - 12) if zone.low < 24 else zone.low
        low, high = max(low, 28), min(zone.high, low + 12, 100)
        if low <= high and font.seconds(zone.sample) >= SHORTEST:
            kept.append(replace(zone, low=low, high=high))
    return kept


def build_dataset(
    out: Path,
    *,
    seed: int = 0,
    train_clips: int = 2000,
    test_clips: int = 480,
    mixed: float = 0.2,
    seconds: float = 2.0,
    rate: int = 16000,
    snr_db: tuple[float, float] = (20.0, 40.0),
    level_db: tuple[float, float] = (-30.0, -18.0),
    tilt_db: float = 1.5,
    bank: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoDataset:
    """Make the data set, or take up a whole one that was made with the same arguments.

    Every clip has one instrument playing notes, a chord or a phrase (a pattern, for drums), with a random start,
    level, spectral tilt and coloured noise; a share of the training clips has two or three instruments at once
    and no label. The clip at an index is a function of (seed, side, index) and the arguments alone.

    Args:
        out: the folder; it gets train/*.wav and test/*.wav (16 bit, mono), train.csv, test.csv, labelled.csv and
            dataset.json. It appears whole or not at all.
        seed: of every draw.
        train_clips: training clips, mixtures included.
        test_clips: test clips, all labelled.
        mixed: share of the training clips that are mixtures.
        seconds: length of a clip.
        rate: sample rate in Hz.
        snr_db: lowest and highest ratio of the instruments to the added noise, in dB.
        level_db: lowest and highest level of a clip, in dB below a full-scale constant (RMS).
        tilt_db: largest spectral tilt up or down, in dB an octave.
        bank: a SoundFont; by default the one that pretty_midi carries.
        progress: called with (clips made, clips in all).

    Raises:
        ConfigError: the bank is not installed; `out` holds something else, or another process is writing it; the
            arguments make no data set.
        AudioError: the bank is damaged.
    """
    out = Path(out)
    if min(train_clips, test_clips) < 1 or not 0 <= mixed < 1 or seconds < 0.5 or rate < 8000:
        raise ConfigError(
            f"train_clips={train_clips}, test_clips={test_clips}, mixed={mixed}, seconds={seconds}, rate={rate}",
            "at least one clip a side, mixed from 0 to below 1, 0.5 s or more, 8000 Hz or more",
            "change the value that breaks this",
        )
    font = SoundFont(bank or bank_path())
    recipe = {
        "version": VERSION,
        "bank": font.digest,
        "seed": seed,
        "train_clips": train_clips,
        "test_clips": test_clips,
        "mixed": mixed,
        "seconds": seconds,
        "rate": rate,
        "snr_db": list(snr_db),
        "level_db": list(level_db),
        "tilt_db": tilt_db,
    }
    samples = round(seconds * rate)
    with lock.writing(out):
        if (found := _take_up(out, recipe, samples)) is not None:
            return found
        sides, mixtures, facts = split_recordings(font)
        labels = tuple(sides)
        mixed_clips = round(mixed * train_clips)
        finish = _Finish(font, samples, rate, snr_db, level_db, tilt_db)

        with atomic.write_folder(out, overwrite=True, sync=False) as draft:
            rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
            for number, (split, count) in enumerate((("train", train_clips), ("test", test_clips))):
                (draft / split).mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([seed, number, i])
                    if split == "train" and i >= count - mixed_clips:
                        label = ""
                        chosen = rng.choice(len(mixtures), size=rng.integers(2, 4), replace=False)
                        voices = [mixtures[j] for j in chosen]
                    else:
                        label = labels[i % len(labels)]
                        voices = [sides[label][number]]
                    path = f"{split}/{label or 'mixture'}_{i:05d}.wav"
                    _write_wav(draft / path, finish(voices, rng), rate)
                    rows[split].append((path, label, split))
                    if progress:
                        progress(i + 1 + number * train_clips, train_clips + test_clips)
            write_csv(draft / "train.csv", [_HEADER, *rows["train"]])
            write_csv(draft / "test.csv", [_HEADER, *rows["test"]])
            write_csv(draft / "labelled.csv", [_HEADER, *[row for row in rows["train"] + rows["test"] if row[1]]])
            about = {"recipe": recipe, "labels": labels, "facts": facts}
            (draft / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return _dataset(out, about)


@dataclass(frozen=True)
class _Finish:
    """Voices to a finished clip."""

    font: SoundFont
    samples: int
    rate: int
    snr_db: tuple[float, float]
    level_db: tuple[float, float]
    tilt_db: float

    def __call__(self, voices: Sequence[Voice], rng: np.random.Generator) -> npt.NDArray[np.int16]:
        """A clip, int16 (samples,)."""
        clip = np.zeros(self.samples)
        for voice in voices:
            line = self._line(voice, rng)
            gain = 10.0 ** (rng.uniform(-4, 4) / 20) / _rms(line)
            clip += gain * line
        frequencies = np.fft.rfftfreq(self.samples, 1 / self.rate)
        octaves = np.log2(np.maximum(frequencies, 50.0) / 1000.0)
        tilt = 10.0 ** (rng.uniform(-self.tilt_db, self.tilt_db) * octaves / 20)
        colour = np.maximum(frequencies, 50.0) ** -rng.uniform(0.0, 1.0)
        clip = np.fft.irfft(np.fft.rfft(clip) * tilt, self.samples)
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(self.samples)) * colour, self.samples)
        clip += noise * (_rms(clip) / _rms(noise) * 10.0 ** (-rng.uniform(*self.snr_db) / 20))
        clip *= 10.0 ** (rng.uniform(*self.level_db) / 20) / _rms(clip)
        clip *= min(1.0, 0.98 / np.abs(clip).max())
        return np.round(clip * 32767).astype(np.int16)

    def _line(self, voice: Voice, rng: np.random.Generator) -> Wave:
        """What one voice plays: float32 (samples,); never silent."""
        line = np.zeros(self.samples, np.float32)
        length = self.samples / self.rate
        for _ in range(8):
            score = _pattern(voice, rng, length) if voice.drums else _melody(voice, rng, length)
            for start, zone, key, seconds in score:
                note = self.font.note(zone, key, rng.uniform(0.5, 1.0), seconds, self.rate)
                at = round(start * self.rate)
                note = note[: self.samples - at]
                line[at : at + len(note)] += note
            if _rms(line) > 1e-5:
                return line
        raise AudioError(
            f"the recordings {sorted({self.font.name(z.sample) for z in voice.zones})} give silence",
            "recordings that can be heard",
            'install the bank again: pip install --force-reinstall "asit-audio[demo]"',
        )


Score = list[tuple[float, Zone, float, float]]
"""Notes as (start in seconds, zone, key, seconds)."""


def _pattern(voice: Voice, rng: np.random.Generator, length: float) -> Score:
    """Two or three sounds on a grid of random tempo."""
    step = rng.uniform(0.11, 0.22)
    grid = np.arange(rng.uniform(0, 0.2) * length, length - 0.05, step)
    score: Score = []
    for _ in range(rng.integers(2, 4)):
        zone = voice.draw(rng)
        key = (zone.low + zone.high) // 2 + rng.uniform(-1, 1)
        hits = rng.random(len(grid)) < rng.uniform(0.2, 0.6)
        hits[rng.integers(min(4, len(grid)))] = True
        score += [(float(start), zone, key, step) for start in grid[hits]]
    return score


def _melody(voice: Voice, rng: np.random.Generator, length: float) -> Score:
    """One to three notes, a chord, or a phrase."""
    zone = voice.draw(rng)
    key = float(rng.integers(zone.low, zone.high + 1))
    start = float(rng.uniform(0, 0.25) * length)
    style = rng.choice(["notes", "chord", "phrase"])
    if style == "chord":
        triad = ((0, 4, 7), (0, 3, 7), (0, 5, 9), (0, 7))[rng.integers(4)]
        seconds = float(rng.uniform(0.4, 1.0) * (length - start))
        notes = [(key + interval, voice.nearest(key + interval)) for interval in triad]
        return [(start, served, at, seconds) for at, served in notes if served]
    count = int(rng.integers(1, 4) if style == "notes" else rng.integers(4, 9))
    score: Score = []
    for seconds in (length - start) * rng.dirichlet(np.full(count, 8.0)):
        score.append((start, zone, key, float(seconds * rng.uniform(0.6, 1.0))))
        start += float(seconds)
        key += float(rng.integers(-5, 6))
        served = voice.nearest(key)
        if served is None:
            served = voice.draw(rng)
            key = float(rng.integers(served.low, served.high + 1))
        zone = served
    return score


def _rms(sound: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))


def _write_wav(path: Path, clip: npt.NDArray[np.int16], rate: int) -> None:
    # The standard library's writer: libsndfile waits for the disk after every file, half of the whole time here.
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(clip), "NONE", ""))
        file.writeframes(clip.astype("<i2").tobytes())


def _dataset(out: Path, about: dict[str, Any]) -> DemoDataset:
    tables = (out / "train.csv", out / "test.csv", out / "labelled.csv")
    return DemoDataset(out, *tables, labels=tuple(about["labels"]), facts=tuple(about["facts"]))


def _take_up(out: Path, recipe: dict[str, Any], samples: int) -> DemoDataset | None:
    """The data set at `out` if it is whole and of this recipe; None if it may be made there.

    Raises:
        ConfigError: something else is there; it is left alone.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        about = parsing.from_json((out / "dataset.json").read_bytes())
        made_with = about["recipe"]
        found = _dataset(out, about)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{out} exists and is no demo data set (dataset.json is missing or cannot be read)",
            "a new folder, an empty one, or a demo data set",
            "name another folder, or remove this one",
        ) from error
    if made_with != recipe:
        return None
    for table in (found.train, found.test):
        if not table.is_file():
            return None
        with table.open(newline="", encoding="utf-8") as file:
            clips = [out / row["path"] for row in csv.DictReader(file)]
        if any(not clip.is_file() or clip.stat().st_size < 2 * samples for clip in clips):
            return None
    return found if found.labelled.is_file() else None
