"""Write synthetic recordings of three species, with Raven selection tables, and others without.

    python make_recordings.py FOLDER [RECORDINGS [SECONDS]]

FOLDER/recordings has RECORDINGS (12) of SECONDS (30) each, site-00.wav and so on, and beside each what Raven Pro would
have saved: site-00.Table.1.selections.txt. FOLDER/new has a third as many without tables; FOLDER/truth.csv says what is
in these.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile

RATE = 22050
BANDS = {"wren": (3500, 6500), "owl": (350, 750), "cricket": (4300, 5000)}
HEADER = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tSpecies"


def call(rng: np.random.Generator, species: str) -> np.ndarray:
    """Return one call (S,): a fast trill of chirps, two or three hoots, or pulses of one tone."""
    t = np.arange(round(RATE * rng.uniform(1.2, 2.4))) / RATE
    if species == "wren":
        notes = (t * rng.uniform(9, 12)) % 1.0
        wave = np.sin(2 * np.pi * np.cumsum(rng.uniform(3600, 4200) + 2200 * notes) / RATE) * np.sin(np.pi * notes) ** 2
    elif species == "owl":
        hoots = (t * rng.uniform(1.2, 1.8)) % 1.0
        pitch = rng.uniform(400, 480) * (1 - 0.1 * hoots)
        wave = sum(np.sin(2 * np.pi * n * np.cumsum(pitch) / RATE) / n**3 for n in (1, 2))
        wave *= np.sin(np.pi * np.minimum(hoots / 0.6, 1.0)) ** 2
    else:
        pulses = (t * rng.uniform(28, 34)) % 1.0
        wave = np.sin(2 * np.pi * rng.uniform(4500, 4800) * t) * (pulses < 0.5)
    return wave * np.minimum(1.0, np.minimum(t, t[::-1]) / 0.05)


def soundscape(rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, list[tuple[float, float, str]]]:
    """Return a recording (S,) of wind, rain and calls, and where these are."""
    noise = rng.standard_normal(round(RATE * seconds))
    wind = np.convolve(noise, np.hanning(256) / 128, "same")
    sound, found, at = 0.02 * wind + 0.002 * noise, [], rng.uniform(0.5, 2.0)
    while at < seconds - 3.0:
        species = list(BANDS)[rng.integers(len(BANDS))]
        wave = call(rng, species)
        first = round(at * RATE)
        sound[first : first + len(wave)] += rng.uniform(0.02, 0.1) * wave
        found.append((at, at + len(wave) / RATE, species))
        at += len(wave) / RATE + rng.uniform(0.5, 3.0)
    return sound, found


def main(folder: Path, recordings: int = 12, seconds: float = 30.0) -> None:
    truth = [("path", "start", "end", "label")]
    for part, count in (("recordings", recordings), ("new", max(1, recordings // 3))):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            sound, found = soundscape(np.random.default_rng([part == "new", i]), seconds)
            path = folder / part / f"site-{i:02d}.wav"
            soundfile.write(path, sound, RATE)
            if part == "new":
                truth += [(f"new/{path.name}", f"{start:.3f}", f"{end:.3f}", name) for start, end, name in found]
                continue
            rows = [HEADER]
            for number, (start, end, name) in enumerate(found, 1):
                low, high = BANDS[name]
                rows.append(f"{number}\tSpectrogram 1\t1\t{start:.6f}\t{end:.6f}\t{low}\t{high}\t{name}")
            path.with_suffix(".Table.1.selections.txt").write_text("\n".join(rows) + "\n", "utf-8")
    with (folder / "truth.csv").open("w", newline="") as file:
        csv.writer(file).writerows(truth)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
