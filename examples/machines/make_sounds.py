"""Write synthetic sounds of a fan: normal ones to learn from, and a labelled test set with three faults.

    python make_sounds.py FOLDER [CLIPS]

FOLDER/normal has CLIPS (60) recordings of 2 s. FOLDER/test.csv lists CLIPS/2 normal ones and as many with a fault,
of a bearing (knocks), an imbalance (wobble) or something that rubs (hiss). Load and speed vary in all.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import soundfile

RATE, SECONDS = 16000, 2.0
FAULTS = ("bearing", "imbalance", "rubbing")


def fan(rng: np.random.Generator, fault: str | None) -> np.ndarray:
    """Return a recording (S,): the blades' harmonics, air noise, and the fault."""
    t = np.arange(round(RATE * SECONDS)) / RATE
    turns = rng.uniform(22, 28)  # a second
    phase = 2 * np.pi * np.cumsum(turns * (1 + 0.01 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6) * t))) / RATE
    harmonics = sum(rng.uniform(0.7, 1) / n * np.sin(7 * n * phase + rng.uniform(0, 6)) for n in range(1, 9))
    air = np.convolve(rng.standard_normal(len(t)), np.hanning(24) / 12, "same")
    sound = 0.1 * harmonics + rng.uniform(0.05, 0.08) * air
    if fault == "bearing":
        ring = np.exp(-np.arange(400) / 60) * np.sin(2 * np.pi * 3100 * np.arange(400) / RATE)
        knocks = np.zeros(len(t))
        knocks[np.flatnonzero(np.diff(np.floor(3.6 * phase / (2 * np.pi))))] = rng.uniform(0.15, 0.3)
        sound += np.convolve(knocks, ring)[: len(t)]
    elif fault == "imbalance":
        sound *= 1 + rng.uniform(0.4, 0.7) * np.sin(phase)
    elif fault == "rubbing":
        hiss = np.diff(rng.standard_normal(len(t) + 1))
        sound += rng.uniform(0.02, 0.04) * hiss * (1 + np.sin(phase))
    return 0.5 * sound / np.abs(sound).max()


def main(folder: Path, clips: int = 60) -> None:
    (folder / "normal").mkdir(parents=True, exist_ok=True)
    (folder / "test").mkdir(exist_ok=True)
    for i in range(clips):
        soundfile.write(folder / "normal" / f"{i:03d}.wav", fan(np.random.default_rng([0, i]), None), RATE)
    rows = [("path", "label")]
    for i in range(2 * (clips // 2)):
        fault = FAULTS[i // 2 % len(FAULTS)] if i % 2 else None
        name = f"test/{i:03d}.wav"
        soundfile.write(folder / name, fan(np.random.default_rng([1, i]), fault), RATE)
        rows.append((name, fault or "normal"))
    with (folder / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:3]))
