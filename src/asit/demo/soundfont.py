"""A small data set of real recordings: instruments of a SoundFont playing notes, chords and phrases.

The bank is TimGM6mb.sf2, which pretty_midi's wheel carries: 520 recordings of 128 instruments and of
drum kits. Its data are under the GPL-2: they are read from the installed wheel and never copied into
this package. The clips are played from the recordings by a few lines of our own: pitch by resampling,
the bank's loops and volume envelopes, one recording a note (no layers, filters or effects).

File format: SoundFont Technical Specification 2.01, sections 4 to 8.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import shutil
import wave
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from asit.errors import AudioError, ConfigError

Wave = npt.NDArray[np.float32]

DRUMS = 128
"""The bank number of the drum kits."""

INSTRUMENTS: dict[str, tuple[int, int]] = {
    "piano": (0, 0),
    "electric_piano": (0, 4),
    "harpsichord": (0, 6),
    "clavinet": (0, 7),
    "accordion": (0, 21),
    "harmonica": (0, 22),
    "nylon_guitar": (0, 24),
    "jazz_guitar": (0, 26),
    "muted_guitar": (0, 28),
    "distortion_guitar": (0, 30),
    "violin": (0, 40),
    "strings": (0, 44),
    "choir": (0, 52),
    "trumpet": (0, 56),
    "trombone": (0, 57),
    "soprano_sax": (0, 64),
    "alto_sax": (0, 65),
    "baritone_sax": (0, 67),
    "oboe": (0, 68),
    "english_horn": (0, 69),
    "bassoon": (0, 70),
    "clarinet": (0, 71),
    "flute": (0, 73),
    "drums": (DRUMS, 0),
}
"""Label to (bank, program): those with five or more recordings of their own."""

SHORTEST = 0.015
"""Seconds; shorter samples are single cycles for the highest keys, the same whatever the instrument."""

VERSION = 1
"""Of what is rendered: a data set of another version is made anew."""

_SAMPLE = np.dtype(
    [
        ("name", "S20"),
        ("start", "<u4"),
        ("end", "<u4"),
        ("loop_start", "<u4"),
        ("loop_end", "<u4"),
        ("rate", "<u4"),
        ("pitch", "u1"),
        ("correction", "i1"),
        ("link", "<u2"),
        ("type", "<u2"),
    ]
)
_RECORDS: dict[bytes, np.dtype[Any]] = {
    b"phdr": np.dtype([("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("unused", "<u4", 3)]),
    b"inst": np.dtype([("name", "S20"), ("bag", "<u2")]),
    b"pbag": np.dtype([("generator", "<u2"), ("modulator", "<u2")]),
    b"ibag": np.dtype([("generator", "<u2"), ("modulator", "<u2")]),
    b"pgen": np.dtype([("kind", "<u2"), ("amount", "<i2")]),
    b"igen": np.dtype([("kind", "<u2"), ("amount", "<i2")]),
    b"shdr": _SAMPLE,
}

# Generators (specification, 8.1.2) that are heeded.
_ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE = 34, 35, 36, 37, 38
_INSTRUMENT, _KEYS, _ATTENUATION, _COARSE, _FINE = 41, 43, 48, 51, 52
_SAMPLE_ID, _LOOP_MODE, _SCALE, _ROOT = 53, 54, 56, 58
_ADDED = (_ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE, _ATTENUATION, _COARSE, _FINE, _SCALE)
_DEFAULTS = {_ATTACK: -12000, _HOLD: -12000, _DECAY: -12000, _RELEASE: -12000, _SCALE: 100, _ROOT: -1}
_ALL_KEYS = 127 << 8


@dataclass(frozen=True)
class Zone:
    """One recording of an instrument with the keys and the envelope that it is played with."""

    sample: int
    """Index of the recording in the bank."""
    low: int
    high: int
    """Lowest and highest MIDI key."""
    root: float
    """MIDI key at which the recording sounds at its own speed."""
    scale: float
    """Cents a key."""
    looped: bool
    attack: float
    hold: float
    decay: float
    """Seconds; decay and release are the times for 100 dB."""
    sustain: float
    """Attenuation in dB that the decay ends at."""
    release: float
    attenuation: float
    """Attenuation in dB of the whole."""


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


class SoundFont:
    """A SoundFont 2 file in memory.

    Args:
        path: the file.

    Raises:
        AudioError: the file is not a whole SoundFont 2.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.digest = zlib.crc32(data)
        try:
            if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
                raise ValueError("no RIFF header of the kind sfbk")
            chunks = dict(_chunks(data))
            self._pcm = np.frombuffer(chunks[b"smpl"], "<i2")
            tables = {name: np.frombuffer(chunks[name], dtype) for name, dtype in _RECORDS.items()}
        except (KeyError, ValueError) as error:
            raise AudioError(
                f"{path} cannot be read as a SoundFont: {error}",
                "a whole SoundFont 2 file",
                'install it again: pip install --force-reinstall "asit-audio[demo]"',
            ) from error
        self.samples = tables[b"shdr"][:-1]
        self._tables = tables
        presets = tables[b"phdr"]
        self.programs = {(int(row["bank"]), int(row["program"])): i for i, row in enumerate(presets[:-1])}

    def name(self, sample: int) -> str:
        """The bank's own name of a recording."""
        return str(self.samples[sample]["name"].split(b"\0")[0].decode("ascii", "replace"))

    def seconds(self, sample: int) -> float:
        """Length of a recording in seconds."""
        row = self.samples[sample]
        return float(int(row["end"]) - int(row["start"])) / float(row["rate"])

    def wave(self, sample: int) -> Wave:
        """A recording at its own rate: float32 (S,) within plus or minus 1."""
        row = self.samples[sample]
        return self._pcm[row["start"] : row["end"]].astype(np.float32) / 32768.0

    def zones(self, bank: int, program: int) -> list[Zone]:
        """All zones of a program, in the order of the file."""
        found = []
        for preset, instrument in self._bags(b"p", self.programs[bank, program], _INSTRUMENT):
            for own, sample in self._bags(b"i", instrument, _SAMPLE_ID):
                added = {k: own.get(k, _DEFAULTS.get(k, 0)) + preset.get(k, 0) for k in _ADDED}
                keys, within = own.get(_KEYS, _ALL_KEYS), preset.get(_KEYS, _ALL_KEYS)
                row = self.samples[sample]
                root = own.get(_ROOT, -1)
                root = int(row["pitch"]) if root < 0 else root
                cents = 100 * added[_COARSE] + added[_FINE] + int(row["correction"])
                found.append(
                    Zone(
                        sample=sample,
                        low=max(keys & 255, within & 255),
                        high=min(keys >> 8 & 255, within >> 8 & 255),
                        root=root - cents / 100,
                        scale=float(added[_SCALE]),
                        looped=own.get(_LOOP_MODE, 0) in (1, 3),
                        attack=2.0 ** (added[_ATTACK] / 1200),
                        hold=2.0 ** (added[_HOLD] / 1200),
                        decay=2.0 ** (added[_DECAY] / 1200),
                        sustain=min(max(added[_SUSTAIN], 0), 1000) / 10,
                        release=2.0 ** (added[_RELEASE] / 1200),
                        attenuation=max(added[_ATTENUATION], 0) / 10,
                    )
                )
        return found

    def _bags(self, level: bytes, index: int, target: int) -> list[tuple[dict[int, int], int]]:
        """Generators of each bag of a preset ("p") or instrument ("i"), with what the bag points at."""
        owners, bags, generators = (
            self._tables[{b"p": b"phdr", b"i": b"inst"}[level]],
            self._tables[level + b"bag"]["generator"],
            self._tables[level + b"gen"],
        )
        common: dict[int, int] = {}
        found = []
        for bag in range(int(owners[index]["bag"]), int(owners[index + 1]["bag"])):
            rows = generators[bags[bag] : bags[bag + 1]]
            values = {int(kind): int(amount) for kind, amount in zip(rows["kind"], rows["amount"], strict=True)}
            if target in values:
                found.append((common | values, values[target]))
            elif not found:  # a first bag that points at nothing holds defaults for the others
                common = values
        return found

    def note(self, zone: Zone, key: float, velocity: float, seconds: float, rate: int) -> Wave:
        """Play one note.

        Args:
            zone: the recording and its envelope.
            key: MIDI key; fractions are allowed.
            velocity: 0 to 1; the amplitude is its square, as in the specification's default.
            seconds: until the key is let go; the release follows.
            rate: sample rate of the answer in Hz.

        Returns:
            float32 (S,), S <= (seconds + release, at most 0.4 s) * rate.
        """
        row = self.samples[zone.sample]
        source = self.wave(zone.sample)
        source_rate = float(row["rate"]) * 2.0 ** ((key - zone.root) * zone.scale / 1200)
        total = seconds + min(zone.release, 0.4)
        needed = math.ceil(total * source_rate) + 1
        loop = slice(int(row["loop_start"]) - int(row["start"]), int(row["loop_end"]) - int(row["start"]))
        if zone.looped and 0 <= loop.start < loop.stop <= len(source) and needed > loop.stop:
            source = np.concatenate([source[: loop.stop], np.resize(source[loop], needed - loop.stop)])
        sound = soxr.resample(source[:needed], source_rate, rate, quality="MQ")[: round(total * rate)]
        t = np.arange(len(sound), dtype=np.float32) / rate
        decibels = zone.attenuation + np.clip((t - zone.attack - zone.hold) * (100 / zone.decay), 0, zone.sustain)
        decibels += np.maximum(t - seconds, 0) * (100 / min(zone.release, 0.4))
        gain = velocity**2 * 10.0 ** (-decibels / 20) * np.minimum(t / zone.attack, 1)
        return (sound * gain).astype(np.float32)


def bank_path() -> Path:
    """Where the installed pretty_midi keeps its SoundFont; pretty_midi itself is not imported.

    Raises:
        ConfigError: pretty_midi, or its bank, is not installed.
    """
    spec = importlib.util.find_spec("pretty_midi")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "TimGM6mb.sf2"
        if path.is_file():
            return path
    raise ConfigError(
        "the demo's recordings are not installed: no TimGM6mb.sf2 of the package pretty_midi",
        "the SoundFont that pretty_midi's wheel carries",
        'pip install "asit-audio[demo]"',
    )


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
        distance, zone = min(((max(z.low - key, key - z.high, 0), z) for z in self.zones), key=lambda pair: pair[0])
        return zone if distance <= 4 else None


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


def build_dataset(
    out: Path,
    *,
    seed: int = 0,
    train_clips: int = 1200,
    test_clips: int = 400,
    mixed: float = 0.3,
    seconds: float = 2.0,
    rate: int = 16000,
    snr_db: tuple[float, float] = (10.0, 30.0),
    level_db: tuple[float, float] = (-38.0, -14.0),
    tilt_db: float = 3.0,
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
        ConfigError: the bank is not installed; `out` holds something else; the arguments make no data set.
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
    if (found := _take_up(out, recipe, samples)) is not None:
        return found
    sides, mixtures, facts = split_recordings(font)
    labels = tuple(sides)
    mixed_clips = round(mixed * train_clips)
    finish = _Finish(font, samples, rate, snr_db, level_db, tilt_db)

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
    for number, (split, count) in enumerate((("train", train_clips), ("test", test_clips))):
        (partial / split).mkdir(parents=True)
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
            _write_wav(partial / path, finish(voices, rng), rate)
            rows[split].append((path, label, split))
            if progress:
                progress(i + 1 + number * train_clips, train_clips + test_clips)
    _write_table(partial / "train.csv", rows["train"])
    _write_table(partial / "test.csv", rows["test"])
    _write_table(partial / "labelled.csv", [row for row in rows["train"] + rows["test"] if row[1]])
    about = {"recipe": recipe, "labels": labels, "facts": facts}
    (partial / "dataset.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)
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


def _usable(font: SoundFont, zones: list[Zone]) -> list[Zone]:
    """Zones with a recording worth the name, cut to keys 28 to 100 and at most an octave at the open ends."""
    kept = []
    for zone in zones:
        low, high = (max(zone.low, zone.high - 12), zone.high) if zone.low < 24 else (zone.low, zone.high)
        low, high = max(low, 28), min(high, low + 12, 100)
        if low <= high and font.seconds(zone.sample) >= SHORTEST:
            kept.append(replace(zone, low=low, high=high))
    return kept


def _chunks(data: bytes, start: int = 12, stop: int | None = None) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of every chunk, those inside lists included."""
    stop = len(data) if stop is None else stop
    view = memoryview(data)
    while start + 8 <= stop:
        name, size = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if start + 8 + size > stop:
            raise ValueError(f"chunk {name!r} is cut short")
        if name == b"LIST":
            yield from _chunks(data, start + 12, start + 8 + size)
        else:
            yield name, view[start + 8 : start + 8 + size]
        start += 8 + size + size % 2


def _write_wav(path: Path, clip: npt.NDArray[np.int16], rate: int) -> None:
    # The standard library's writer: libsndfile waits for the disk after every file, half of the whole time here.
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, len(clip), "NONE", ""))
        file.writeframes(clip.astype("<i2").tobytes())


def _write_table(path: Path, rows: list[tuple[str, str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])


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
        about = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
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
