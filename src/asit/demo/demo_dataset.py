"""The demo's data set: instruments of a SoundFont playing notes, chords and phrases.

The bank is TimGM6mb.sf2, which pretty_midi's wheel contains: 520 recordings of 128 instruments and of drum kits. It is
under the GPL-2: it is read from the installed wheel and never copied into this package.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.demo.soundfont import SoundFont, Waveform, Zone, bank_path
from asit.errors import AudioError, ConfigError
from asit.io import atomic, lock, parsing
from asit.io.csv_lines import write_csv

DRUMS = 128
"""Bank number of the drum kits."""

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
"""Label to (bank, program): twelve that sound different, each with five or more recordings of its own."""

SECONDS, RATE = 2.0, 16000
"""Length of a clip, and its sample rate in Hz."""
SNR_DB = (20.0, 40.0)
"""Range of the ratio of the instruments to the added noise, in dB."""
LEVEL_DB = (-30.0, -18.0)
"""Range of a clip's RMS level, in dB relative to a full-scale constant."""
TILT_DB = 1.5
"""Largest spectral tilt up or down, in dB per octave."""
VERSION = 2
"""Version of the rendering: a data set of another version is rebuilt."""
_SHORTEST = 0.015  # s; shorter samples are single cycles for the highest keys, the same for all instruments
_HEADER = ("path", "label", "split")


@dataclass(frozen=True)
class Voice:
    """The zones of an instrument that one split uses; for drums each key is a sound of its own, without a pitch."""

    zones: list[Zone]
    drums: bool

    @property
    def recordings(self) -> set[int]:
        return {zone.sample for zone in self.zones}

    def draw(self, rng: np.random.Generator) -> Zone:
        """Draw a zone; each recording is equally likely, however many zones use it."""
        recordings = sorted(self.recordings)
        sample = recordings[rng.integers(len(recordings))]
        zones = [zone for zone in self.zones if zone.sample == sample]
        return zones[rng.integers(len(zones))]

    def nearest(self, key: float) -> Zone | None:
        """Find the zone of a key, or the nearest one at most four semitones away."""

        def distance(zone: Zone) -> float:
            return max(zone.low - key, key - zone.high, 0)

        nearest = min(self.zones, key=distance)
        return nearest if distance(nearest) <= 4 else None


def split_recordings(font: SoundFont) -> tuple[dict[str, tuple[Voice, Voice]], list[Voice], list[str]]:
    """Assign every recording of the bank to one split.

    Of each instrument's recordings, in the order of pitch, every third is for the test; a recording that an earlier
    instrument uses keeps its split. All other recordings of the bank may be used in unlabelled training mixtures.

    Returns:
        label -> voices for training and test; the voices of mixtures; facts in sentences.
    """
    usable = {program: _usable(font, font.zones(*program)) for program in sorted(font.programs)}
    is_test: dict[int, bool] = {}  # by recording
    voices: dict[str, tuple[Voice, Voice]] = {}
    for label, program in INSTRUMENTS.items():
        zones, drums = usable[program], program[0] == DRUMS
        for i, zone in enumerate(sorted({z.sample: z for z in zones}.values(), key=lambda z: (z.low, z.sample))):
            is_test.setdefault(zone.sample, i % 3 == 1)
        train = Voice([zone for zone in zones if not is_test[zone.sample]], drums)
        voices[label] = train, Voice([zone for zone in zones if is_test[zone.sample]], drums)
    rest = {program: [z for z in zones if not is_test.get(z.sample)] for program, zones in usable.items()}
    mixed = [Voice(zones, bank == DRUMS) for (bank, _), zones in rest.items() if zones]
    train_count, test_count = (len(set().union(*(pair[i].recordings for pair in voices.values()))) for i in range(2))
    alone = sum(len(voice.recordings) == 1 for voice in mixed)
    facts = [
        f"{len(voices)} labelled instruments: {train_count} recordings for training, {test_count} others for the test; "
        "no recording is in both splits.",
        f"Unlabelled training mixtures use {len(mixed)} programs and drum kits of the bank, without the test's "
        f"recordings. {alone} of these have one recording, which cannot be split: they are in training only.",
    ]
    return voices, mixed, facts


def _usable(font: SoundFont, zones: list[Zone]) -> list[Zone]:
    """Select zones of long enough recordings, cut to keys 28 to 100 and to an octave where they are open-ended."""
    kept = []
    for zone in zones:
        low = max(zone.low, zone.high - 12) if zone.low < 24 else zone.low
        low, high = max(low, 28), min(zone.high, low + 12, 100)
        if low <= high and font.seconds(zone.sample) >= _SHORTEST:
            kept.append(replace(zone, low=low, high=high))
    return kept


def build_dataset(
    out: Path,
    *,
    seed: int = 0,
    train_clips: int = 2000,
    test_clips: int = 480,
    mixed: float = 0.2,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[str]:
    """Build the data set, unless a complete one that was built with the same arguments is at `out`.

    Every clip has one instrument playing notes, a chord or a phrase (a pattern, for drums), with random start, level,
    spectral tilt and coloured noise; a share of the training clips has two or three instruments at once and no label.
    A clip is a function of (seed, split, index) and the arguments alone.

    Args:
        out: the folder, written atomically: train/*.wav and test/*.wav (16 bit, mono), tables of all clips (train.csv,
            test.csv) and of the labelled ones (labelled.csv) with path, label and split, and dataset.json.
        seed: of every draw.
        train_clips: training clips, mixtures included.
        test_clips: test clips, all labelled.
        mixed: share of the training clips that are mixtures.
        progress: called with (clips rendered, clips in all, 0).

    Returns:
        Sentences about the split for the reader.

    Raises:
        ConfigError: the bank is not installed; `out` holds something else, or another process is writing it.
        AudioError: the bank is damaged.
    """
    font = SoundFont(bank_path())
    sizes = {"train_clips": train_clips, "test_clips": test_clips, "mixed": mixed}
    recipe = {"version": VERSION, "bank": font.digest, "seed": seed, **sizes}
    with lock.writing(out):
        instruments, mixtures, facts = split_recordings(font)
        if _is_complete(out, recipe):
            return facts
        labels = tuple(instruments)
        first_mixture = train_clips - round(mixed * train_clips)
        with atomic.write_folder(out, overwrite=True, sync=False) as draft:
            rows: list[tuple[str, str, str]] = []
            for number, (split, count) in enumerate((("train", train_clips), ("test", test_clips))):
                (draft / split).mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng([seed, number, i])
                    if split == "train" and i >= first_mixture:
                        label = ""
                        chosen = rng.choice(len(mixtures), size=rng.integers(2, 4), replace=False)
                        voices = [mixtures[j] for j in chosen]
                    else:
                        label = labels[i % len(labels)]
                        voices = [instruments[label][number]]
                    rows.append((f"{split}/{label or 'mixture'}_{i:05d}.wav", label, split))
                    # The standard library's writer: libsndfile waits for the disk after every file.
                    with wave.open(str(draft / rows[-1][0]), "wb") as file:
                        file.setparams((1, 2, RATE, 0, "NONE", ""))
                        file.writeframes(_render(font, voices, rng).astype("<i2").tobytes())
                    if progress:
                        progress(len(rows), train_clips + test_clips, 0)
            write_csv(draft / "train.csv", [_HEADER, *rows[:train_clips]])
            write_csv(draft / "test.csv", [_HEADER, *rows[train_clips:]])
            write_csv(draft / "labelled.csv", [_HEADER, *[row for row in rows if row[1]]])
            atomic.write_json(draft / "dataset.json", {"recipe": recipe, "facts": facts})
        return facts


def _render(font: SoundFont, voices: Sequence[Voice], rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Render a clip of some voices, int16 (samples,)."""
    samples = round(SECONDS * RATE)
    clip = np.zeros(samples)
    for voice in voices:
        line = _line(font, voice, rng, samples)
        gain = 10.0 ** (rng.uniform(-4, 4) / 20) / _rms(line)
        clip += gain * line
    frequencies = np.fft.rfftfreq(samples, 1 / RATE)
    octaves = np.log2(np.maximum(frequencies, 50.0) / 1000.0)
    tilt = 10.0 ** (rng.uniform(-TILT_DB, TILT_DB) * octaves / 20)
    colour = np.maximum(frequencies, 50.0) ** -rng.uniform(0.0, 1.0)
    clip = np.fft.irfft(np.fft.rfft(clip) * tilt, samples)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * colour, samples)
    clip += noise * (_rms(clip) / _rms(noise) * 10.0 ** (-rng.uniform(*SNR_DB) / 20))
    clip *= 10.0 ** (rng.uniform(*LEVEL_DB) / 20) / _rms(clip)
    clip *= min(1.0, 0.98 / np.abs(clip).max())
    return np.round(clip * 32767).astype(np.int16)


def _line(font: SoundFont, voice: Voice, rng: np.random.Generator, samples: int) -> Waveform:
    """Render what one voice plays, float32 (samples,), never silent."""
    line = np.zeros(samples, np.float32)
    for _ in range(8):
        score = _pattern(voice, rng, SECONDS) if voice.drums else _melody(voice, rng, SECONDS)
        for start, zone, key, seconds in score:
            note = font.note(zone, key, rng.uniform(0.5, 1.0), seconds, RATE)
            at = round(start * RATE)
            note = note[: samples - at]
            line[at : at + len(note)] += note
        if _rms(line) > 1e-5:
            return line
    raise AudioError(
        "recordings of the SoundFont are silent",
        "recordings with sound",
        'install the bank again: pip install --force-reinstall "asit-audio[demo]"',
    )


Note = tuple[float, Zone, float, float]
"""Start in seconds, zone, MIDI key, length in seconds."""


def _pattern(voice: Voice, rng: np.random.Generator, length: float) -> list[Note]:
    """Draw a pattern of two or three sounds on a grid of random tempo."""
    step = rng.uniform(0.11, 0.22)
    grid = np.arange(rng.uniform(0, 0.2) * length, length - 0.05, step)
    score: list[Note] = []
    for _ in range(rng.integers(2, 4)):
        zone = voice.draw(rng)
        key = (zone.low + zone.high) // 2 + rng.uniform(-1, 1)
        hits = rng.random(len(grid)) < rng.uniform(0.2, 0.6)
        hits[rng.integers(min(4, len(grid)))] = True
        score += [(float(start), zone, key, step) for start in grid[hits]]
    return score


def _melody(voice: Voice, rng: np.random.Generator, length: float) -> list[Note]:
    """Draw one to three notes, a chord, or a phrase."""
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
    score: list[Note] = []
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


def _rms(waveform: npt.NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


def _is_complete(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether the data set at `out` is complete and of this recipe; anything else that is there is refused."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        same = parsing.from_json((out / "dataset.json").read_bytes())["recipe"] == recipe
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{out} exists and is no demo data set (dataset.json is missing or cannot be read)",
            "a new folder, an empty one, or a demo data set",
            "name another folder, or remove this one",
        ) from error
    clips = list(out.glob("t*/*.wav"))
    complete = len(clips) == recipe["train_clips"] + recipe["test_clips"] and (out / "labelled.csv").is_file()
    return same and complete and all(clip.stat().st_size >= 2 * round(SECONDS * RATE) for clip in clips)
