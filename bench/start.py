"""How long one waits: for `asit --help`, for `import asit`, and for the first step of `asit pretrain`.

    python bench/start.py [--toy] [--files 3000] [--repeats 7] [--size small] [--batch 128]

Each is a fresh process. The first step is done when metrics.jsonl, written at every step, has its line; until then the
command has imported torch, listed and decoded all recordings of the folder, measured mean and std, built the
networks and taken a step. The recordings are WAV of 0.5 to 1.5 s at 16 kHz, freshly written, so the disk's cache is
warm; the catalogue is made again each time. By the clock, and by CPU time of all processes, which a busy machine
stretches less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

ASIT = [sys.executable, "-m", "asit"]
TARGETS = {"asit --help": 0.4, "asit pretrain to its first step": 15.0}


def recordings(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        wave = rng.normal(0, 0.05, int(rng.uniform(0.5, 1.5) * 16000)).cumsum() % 0.5 - 0.25
        soundfile.write(folder / f"{i:05d}.wav", wave.astype(np.float32), 16000)


def whole(command: list[str]) -> float:
    """Wall seconds of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def first_step(data: Path, size: str, batch: int) -> float:
    """Wall seconds from the command to the line of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [*ASIT, "pretrain", "--data", str(data), "--out", str(out), "--encoder.size", size]
        command += ["--batch-size", str(batch), "--records.log-every", "1", "--stop-after", "1"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            metrics = out / "metrics.jsonl"
            while not (metrics.exists() and '"train"' in metrics.read_text()):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{process.stderr.read()}")
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.communicate()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="few files, a tiny encoder, one repeat")
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=7, help="of the short ones; the first step is taken thrice")
    parser.add_argument("--size", default="small")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    files, repeats, size, batch = options.files, options.repeats, options.size, options.batch
    if options.toy:
        files, repeats, size, batch = 12, 1, "tiny", 4
    import torch

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        recordings(data, files)
        works: dict[str, Callable[[], float]] = {
            "python -c pass": lambda: whole([sys.executable, "-c", "pass"]),
            "import asit": lambda: whole([sys.executable, "-c", "import asit"]),
            "asit --help": lambda: whole([*ASIT, "--help"]),
            "asit pretrain --help": lambda: whole([*ASIT, "pretrain", "--help"]),
            "import torch": lambda: whole([sys.executable, "-c", "import torch"]),
            "asit pretrain to its first step": lambda: first_step(data, size, batch),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for turn in range(repeats):
            for name, work in works.items():
                if turn < 3 or not name.endswith("first step"):
                    before = resource.getrusage(resource.RUSAGE_CHILDREN)
                    seconds = work()
                    after = resource.getrusage(resource.RUSAGE_CHILDREN)
                    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                    found[name].append((seconds, cpu))
    print(f"\n{files} recordings, encoder {size}, batch {batch}. The CPU time is that of the whole command.")
    print("\n| | s, median | least | CPU s, median | target, s |\n|---|---|---|---|---|")
    for name, times in found.items():
        seconds = [t[0] for t in times]
        target = TARGETS.get(name, "")
        cpu = statistics.median(t[1] for t in times)
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {cpu:.2f} | {target} |")


if __name__ == "__main__":
    main()
