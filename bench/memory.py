"""Whether a long run's memory stays flat: `asit pretrain` over thousands of steps, its processes' memory fitted.

    python bench/memory.py [--toy] [--steps 10000] [--warm 2000] [--workers 1] [--nice 10]

The run is the real command on small recordings: loader processes, masks and local views, figures and checkpoints every
few hundred steps, a probe now and then, and an encoder so small that steps are many and cheap. Read from /proc every
half second: the memory that the training process holds (RSS without shared pages), that of its loader processes
together, and the step that the log has reached. After the warm-up a line is fitted to each; its slope is told in MB for
1,000 steps. Neighbouring samples are alike, so the error is that of a line through ten blocks' means. Linux.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

RATE = 8000
PAGE = os.sysconf("SC_PAGE_SIZE")


def recordings(folder: Path, count: int) -> Path:
    """WAV files of 0.5 to 1.5 s, and a labelled table of two splits over them for the probe."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        t = np.arange(int(rng.uniform(0.5, 1.5) * RATE)) / RATE
        wave = 0.2 * np.sin(2 * np.pi * (300, 900)[i % 2] * t) + 0.05 * rng.standard_normal(len(t))
        soundfile.write(folder / f"{i:04d}.wav", wave.astype(np.float32), RATE)
        rows.append([f"{i:04d}.wav", ("low", "high")[i % 2], ("train", "test")[i // 2 % 2]])
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    return folder / "table.csv"


def own(pid: int) -> float:
    """MB that a process holds by itself; 0 where it is gone."""
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(resident) - int(shared)) * PAGE / 1e6


def children(pid: int) -> list[int]:
    """Processes that this one started and that live, their own included."""
    try:
        first = [
            int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return first + [p for child in first for p in children(child)]


def reached(metrics: Path, offset: int) -> tuple[int, int]:
    """The last step written since `offset` bytes, 0 if there is none, and where the file now ends."""
    if not metrics.exists():
        return 0, 0
    with metrics.open("rb") as file:
        file.seek(offset)
        lines = file.read().split(b"\n")
    whole = lines[:-1]
    steps = [int(json.loads(line)["step"]) for line in whole]
    return max(steps, default=0), offset + sum(len(line) + 1 for line in whole)


def slope(steps: np.ndarray, values: np.ndarray, blocks: int = 10) -> tuple[float, float]:
    """MB for 1,000 steps and its standard error, from a line through the means of equal blocks of samples."""
    x = np.array([b.mean() for b in np.array_split(steps, blocks)]) / 1e3
    y = np.array([b.mean() for b in np.array_split(values, blocks)])
    across = x - x.mean()
    found = (across * y).sum() / (across**2).sum()
    rest = y - y.mean() - found * across
    return float(found), float(np.sqrt((rest**2).sum() / (blocks - 2) / (across**2).sum()))


def watch(command: list[str], metrics: Path, nice: int, every: float, samples: Path) -> np.ndarray:
    """Rows of (step, MB of the trainer, MB of its children, how many children) while it runs, kept in a file."""
    rows, step, offset = [], 0, 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.nice(nice))
    with samples.open("w") as file:
        while process.poll() is None:
            later, offset = reached(metrics, offset)
            step = max(step, later)
            below = children(process.pid)
            rows.append((step, own(process.pid), sum(own(pid) for pid in below), len(below)))
            print(*rows[-1], sep=",", file=file, flush=True)
            time.sleep(every)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}")
    return np.array(rows[:-1], float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few steps: whether it runs")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=2_000, help="steps before the fit begins")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--nice", type=int, default=10)
    parser.add_argument("--samples", help="keep all samples in this CSV file: step, MB, MB of loaders, processes")
    options = parser.parse_args()
    steps, warm, files = (60, 20, 24) if options.toy else (options.steps, options.warm, 400)
    often, seldom = (10, 20) if options.toy else (250, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        table = recordings(folder / "data", files)
        out, batch = folder / "run", 4
        given: dict[str, object] = {
            "--data": folder / "data", "--out": out, "--workers": options.workers, "--threads": 1, "--device": "cpu",
            "--precision": "bf16", "--batch-size": batch, "--epochs": -(-steps // (files // batch)),
            "--stop-after": steps, "--front-end.rate": RATE, "--front-end.mels": 32, "--views.seconds": 0.5,
            "--views.local-views": 1, "--views.local-seconds": 0.2, "--views.stretch": 0.1, "--views.gain-db": 3,
            "--encoder.size": "custom", "--encoder.width": 32, "--encoder.depth": 2, "--encoder.heads": 1,
            "--encoder.drop-path": 0.1, "--heads.hidden": 64, "--heads.bottleneck": 32, "--heads.class-prototypes": 64,
            "--heads.patch-prototypes": 64, "--probe.table": table, "--probe.every": seldom, "--probe.clips": 40,
            "--records.log-every": 10, "--records.figure-every": often, "--records.checkpoint-every": often,
            "--records.keep": 2,
        }  # fmt: skip
        command = [sys.executable, "-m", "asit", "pretrain"]
        command += [str(part) for pair in given.items() for part in pair]
        kept = Path(options.samples) if options.samples else folder / "samples.csv"
        began = time.perf_counter()
        rows = watch(command, out / "metrics.jsonl", options.nice, 0.1 if options.toy else 0.5, kept)
        seconds = time.perf_counter() - began
    after = rows[(rows[:, 0] >= warm) & (rows[:, 3] >= options.workers)]
    print(
        f"{rows[-1, 0]:.0f} steps in {seconds:.0f} s, {len(after)} samples from step {warm} on, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print("\n| | MB at first | at the end | most | MB for 1,000 steps |\n|---|---|---|---|---|")
    for told, column in (("the training process", 1), ("its loader processes", 2)):
        found = after[:, column]
        tenth = max(1, len(found) // 10)
        change, error = slope(after[:, 0], found)
        first, last = found[:tenth].mean(), found[-tenth:].mean()
        print(f"| {told} | {first:.1f} | {last:.1f} | {found.max():.1f} | {change:+.3f} ± {error:.3f} |")


if __name__ == "__main__":
    main()
