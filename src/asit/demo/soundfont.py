"""Read a SoundFont 2 bank and render single notes: pitch by resampling, loops and volume envelopes, one recording per
note (no layers, filters or effects).

File format: SoundFont Technical Specification 2.01, sections 4 to 8.
"""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from asit.errors import AudioError, ConfigError

Waveform = npt.NDArray[np.float32]

_SAMPLE = np.dtype(
    [("name", "S20")]
    + [(name, "<u4") for name in ("start", "end", "loop_start", "loop_end", "rate")]
    + [("pitch", "u1"), ("correction", "i1"), ("link", "<u2"), ("type", "<u2")]
)
_RECORDS: dict[bytes, np.dtype[Any]] = {
    b"phdr": np.dtype([("name", "S20"), ("program", "<u2"), ("bank", "<u2"), ("bag", "<u2"), ("unused", "<u4", 3)]),
    b"inst": np.dtype([("name", "S20"), ("bag", "<u2")]),
    **dict.fromkeys((b"pbag", b"ibag"), np.dtype([("generator", "<u2"), ("modulator", "<u2")])),
    **dict.fromkeys((b"pgen", b"igen"), np.dtype([("kind", "<u2"), ("amount", "<i2")])),
    b"shdr": _SAMPLE,
}

# Generators (specification, 8.1.2) that are used.
_ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE = 34, 35, 36, 37, 38
_INSTRUMENT, _KEYS, _ATTENUATION, _COARSE, _FINE = 41, 43, 48, 51, 52
_SAMPLE_ID, _LOOP_MODE, _SCALE, _ROOT = 53, 54, 56, 58
_ADDED = (_ATTACK, _HOLD, _DECAY, _SUSTAIN, _RELEASE, _ATTENUATION, _COARSE, _FINE, _SCALE)
_DEFAULTS = {_ATTACK: -12000, _HOLD: -12000, _DECAY: -12000, _RELEASE: -12000, _SCALE: 100, _ROOT: -1}
_ALL_KEYS = 127 << 8


@dataclass(frozen=True)
class Zone:
    """One recording of an instrument with its keys and envelope.

    Attributes:
        sample: index of the recording in the bank.
        low, high: lowest and highest MIDI key.
        root: MIDI key at which the recording plays at its own speed.
        scale: cents per key.
        looped: whether the recording is looped.
        attack, hold: in seconds.
        decay, release: seconds for 100 dB.
        sustain: attenuation in dB at which the decay ends.
        attenuation: attenuation in dB of the note.
    """

    sample: int
    low: int
    high: int
    root: float
    scale: float
    looped: bool
    attack: float
    hold: float
    decay: float
    sustain: float
    release: float
    attenuation: float


class SoundFont:
    """A SoundFont 2 file in memory.

    Raises:
        AudioError: the file is not a complete SoundFont 2.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.digest = zlib.crc32(data)
        try:
            if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
                raise ValueError("no RIFF header of the kind sfbk")
            chunks = dict(_chunks(memoryview(data)[12:]))
            self._pcm = np.frombuffer(chunks[b"smpl"], "<i2")
            tables = {name: np.frombuffer(chunks[name], dtype) for name, dtype in _RECORDS.items()}
        except (KeyError, ValueError) as error:
            raise AudioError(
                f"{path} cannot be read as a SoundFont: {error}",
                "a complete SoundFont 2 file",
                'install it again: pip install --force-reinstall "asit-audio[demo]"',
            ) from error
        self.samples = tables[b"shdr"][:-1]
        self._tables = tables
        presets = tables[b"phdr"]
        self.programs = {(int(row["bank"]), int(row["program"])): i for i, row in enumerate(presets[:-1])}

    def seconds(self, sample: int) -> float:
        """Return the length of a recording in seconds."""
        row = self.samples[sample]
        return float(int(row["end"]) - int(row["start"])) / float(row["rate"])

    def waveform(self, sample: int) -> Waveform:
        """Return a recording at its own rate, float32 (S,) in [-1, 1]."""
        row = self.samples[sample]
        return self._pcm[row["start"] : row["end"]].astype(np.float32) / 32768.0

    def zones(self, bank: int, program: int) -> list[Zone]:
        """Return all zones of a program, in the order of the file."""
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
        """Return the generators of each bag of a preset ("p") or instrument ("i"), with the index the bag points at."""
        owners = self._tables[b"phdr" if level == b"p" else b"inst"]
        bags = self._tables[level + b"bag"]["generator"]
        generators = self._tables[level + b"gen"]
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

    def note(self, zone: Zone, key: float, velocity: float, seconds: float, rate: int) -> Waveform:
        """Render one note: float32 (S,), S <= (seconds + release, at most 0.4 s) * rate.

        Args:
            zone: the recording and its envelope.
            key: MIDI key; fractions are allowed.
            velocity: 0 to 1; the amplitude is its square, the specification's default.
            seconds: time from key down to key up; the release follows.
            rate: sample rate of the output in Hz.
        """
        row = self.samples[zone.sample]
        source = self.waveform(zone.sample)
        source_rate = float(row["rate"]) * 2.0 ** ((key - zone.root) * zone.scale / 1200)
        release = min(zone.release, 0.4)
        total = seconds + release
        needed = math.ceil(total * source_rate) + 1
        loop = slice(int(row["loop_start"]) - int(row["start"]), int(row["loop_end"]) - int(row["start"]))
        if zone.looped and 0 <= loop.start < loop.stop <= len(source) and needed > loop.stop:
            source = np.concatenate([source[: loop.stop], np.resize(source[loop], needed - loop.stop)])
        sound = soxr.resample(source[:needed], source_rate, rate, quality="MQ")[: round(total * rate)]
        t = np.arange(len(sound), dtype=np.float32) / rate
        decibels = zone.attenuation + np.clip((t - zone.attack - zone.hold) * (100 / zone.decay), 0, zone.sustain)
        decibels += np.maximum(t - seconds, 0) * (100 / release)
        gain = velocity**2 * 10.0 ** (-decibels / 20) * np.minimum(t / zone.attack, 1)
        return (sound * gain).astype(np.float32)


def bank_path() -> Path:
    """Find the SoundFont of the installed pretty_midi, which is not imported.

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


def _chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield name and content of every chunk, those inside lists included."""
    while len(data) >= 8:
        name, end = bytes(data[:4]), 8 + int.from_bytes(data[4:8], "little")
        if end > len(data):
            raise ValueError(f"chunk {name!r} is truncated")
        if name == b"LIST":
            yield from _chunks(data[12:end])
        else:
            yield name, data[8:end]
        data = data[end + end % 2 :]
