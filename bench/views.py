"""From FLAC files to two masked log-mel views, on one core.

    python bench/views.py [--toy] [--files 24] [--rounds 15]

The files are 10 s at 16 kHz of tones and noise, freshly written, so the disk's cache is warm. What is timed is
`asit.pretrain.pretrain_dataset.PretrainDataset`: draw, read, decode, log-mel, crop two views of 592 frames, draw masks
and factors. Beside it runs a plain writing of the official transform, from decoded waveforms: a log-mel for each view,
and blocks drawn one by one with the area summed after each. Rounds take turns; clips a second are by this process's CPU
time, medians over rounds, so that they hold on a busy machine; by the clock they are given too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from asit.audio import files
from asit.audio.fbank import FrontEnd, mel_bank
from asit.config import FrontEndSettings, MaskingSettings, PretrainSettings, ViewSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.pretrain.masking import draw
from asit.pretrain.pretrain_dataset import PretrainDataset

FRAMES, MELS, RATE = 592, 128, 16000
FRONT_END = FrontEndSettings(mean=-4.2677393, std=4.5689974)
MASKING = {
    "official-v2": MaskingSettings(drop=0.5, replace=0.3),
    "paper": MaskingSettings(drop=0.7, replace=0.3),
}
Wave = npt.NDArray[np.float32]
Times = dict[str, tuple[float, float]]


def recordings(folder: Path, count: int) -> list[Path]:
    """Ten seconds each: some gliding tones over a coloured noise, which FLAC halves about as it does speech."""
    rng, paths, at = np.random.default_rng(0), [], np.arange(10 * RATE) / RATE
    for i in range(count):
        noise = np.convolve(rng.normal(0, 0.02, len(at)), np.ones(8) / 2, "same")
        tones = sum(0.05 * np.sin(6.28 * f * at + np.cos(at * g)) for f, g in rng.uniform((80, 1), (4000, 9), (5, 2)))
        paths.append(folder / f"{i:03d}.flac")
        soundfile.write(paths[-1], (noise + tones).astype(np.float32), RATE)
    return paths


def clips_of(paths: list[Path], masking: MaskingSettings, roll: float) -> PretrainDataset:
    catalogue = Catalogue.from_clips([Clip(str(p), 10.0, RATE, 1) for p in paths], root=str(paths[0].parent))
    settings = PretrainSettings(front_end=FRONT_END, views=ViewSettings(roll=roll), masking=masking)
    return PretrainDataset(catalogue, settings, (FRAMES, 0))


# The official transform, plainly


class Official:
    """Two crops, two log-mels, two masks; waveforms come decoded."""

    def __init__(self, settings: MaskingSettings) -> None:
        self.settings, self.rng = settings, np.random.default_rng(0)
        self.bank, self.hann = mel_bank(FRONT_END), torch.hann_window(400, periodic=False)

    def fbank(self, wave: torch.Tensor) -> torch.Tensor:
        frames = (wave - wave.mean()).unfold(0, 400, 160)
        frames = frames - frames.mean(1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
        frames = torch.nn.functional.pad((frames - 0.97 * before) * self.hann, (0, 112))
        power = torch.fft.rfft(frames).abs().pow(2.0)
        return torch.mm(power, self.bank).clamp(min=torch.finfo(torch.float32).eps).log()

    def mask(self) -> npt.NDArray[np.float32]:
        rng, drop = self.rng, self.settings.drop
        share = self.settings.replace if rng.random() < 0.5 else rng.uniform(min(0.5, drop), drop)
        mask = np.zeros((FRAMES, MELS), dtype=np.float32)
        while mask.sum() < share * FRAMES * MELS:
            height, width = rng.integers(1, int(0.3 * FRAMES)), rng.integers(1, int(0.3 * MELS))
            top, left = rng.integers(0, FRAMES), rng.integers(0, MELS)
            mask[top : top + height, left : left + width] = 1
        return mask

    def __call__(self, wave: Wave) -> list[tuple[torch.Tensor, torch.Tensor]]:
        out = []
        for _ in range(2):
            start = int(self.rng.integers(len(wave) - 6 * RATE + 1))
            x = self.fbank(torch.from_numpy(wave[start : start + 6 * RATE]))[:FRAMES]
            out.append(((x + 4.2677393) / (2 * 4.5689974), torch.from_numpy(self.mask())))
        return out


# Timing


def timed(work: Callable[[int], object], count: int) -> tuple[float, float]:
    """CPU and wall seconds for each of `count` calls."""
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(count):
        work(i)
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few files, two rounds")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    count, rounds = (3, 2) if options.toy else (options.files, options.rounds)
    torch.set_num_threads(1)
    front_end = FrontEnd(FRONT_END)
    with tempfile.TemporaryDirectory() as folder:
        paths = recordings(Path(folder), count)
        waves = [files.read(path) for path in paths]
        works: dict[str, Callable[[int], object]] = {}
        epochs = iter(range(1 << 30))
        for name, settings in MASKING.items():
            for roll in (0.0, 0.5):
                clips = clips_of(paths, settings, roll)
                works[f"ours, {name} masking, roll {roll:g}"] = lambda i, c=clips: c[next(epochs), i]
        for name, settings in MASKING.items():
            plain = Official(settings)
            works[f"official-like, {name} masking, no decoding"] = lambda i, p=plain: p(waves[i])
        # The span of two random views of 5.935 s in 10 s is 7.29 s on average.
        span = front_end.samples_for(727)
        rng = np.random.default_rng(0)
        parts: dict[str, Callable[[int], object]] = {
            "read and decode 7.3 s": lambda i: files.read(paths[i], rate=RATE, start=1.0, seconds=span / RATE),
            "log-mel of 7.3 s": lambda i: front_end.fbank(torch.from_numpy(waves[i][None, :span])),
            "draw two masks": lambda i: [draw(rng, FRAMES, MELS, MASKING["official-v2"]) for _ in range(2)],
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in [*works, *parts]}
        for turn in range(rounds + 1):
            for name, work in [*works.items(), *parts.items()]:
                each = timed(work, count)
                if turn:  # the first warms up
                    found[name].append(each)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, 1 thread, load {os.getloadavg()[0]:.1f}, {count} files")
    print("\n| two masked views of a 10 s clip | clips/s a core, by CPU time | by the clock | to official-like |")
    print("|---|---|---|---|")
    reference = found["official-like, official-v2 masking, no decoding"]
    for name in works:
        cpu, wall = (statistics.median(f[i] for f in found[name]) for i in (0, 1))
        ratio = statistics.median(r[0] / f[0] for f, r in zip(found[name], reference, strict=True))
        print(f"| {name} | {1 / cpu:.0f} | {1 / wall:.0f} | {ratio:.2f} |")
    print("\n| part of ours | CPU ms a clip |\n|---|---|")
    whole = statistics.median(f[0] for f in found["ours, official-v2 masking, roll 0"])
    rest = whole
    for name in parts:
        cpu = statistics.median(f[0] for f in found[name])
        rest -= cpu
        print(f"| {name} | {cpu * 1e3:.2f} |")
    print(f"| the rest: draws, cutting, normalising, assembling | {rest * 1e3:.2f} |\n| all | {whole * 1e3:.2f} |")


if __name__ == "__main__":
    main()
