"""What a catalogue costs: a scan for each file, and reading, writing and holding the list for each row.

    python bench/catalogue.py [--files 200] [--million]

The recordings are noise of 10 s at 16 kHz as FLAC, freshly written, so the disk's cache is warm: a cold disk adds
its own time. The projection is the marginal cost times two million; a scan's fixed start is given apart.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

from asit.data.catalogue import Catalogue, Clip

MANY = 2_000_000


def recordings(folder: Path, count: int) -> None:
    """Ten-second files in folders of 100; a coloured noise, which FLAC compresses to about half like speech."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 100:04d}"
        place.mkdir(parents=True, exist_ok=True)
        wave = np.convolve(rng.normal(0, 0.02, 160_000), np.ones(8) / 2, "same").astype(np.float32)
        soundfile.write(place / f"{i:07d}.flac", wave, 16000)


def scan(folder: Path, out: Path, check: str, workers: int, statistics_clips: int) -> float:
    """Seconds of one scan, in a process of its own as a user would start it."""
    code = (
        "import sys, time; from asit.data.catalogue import build; from asit.settings import FrontEndSettings\n"
        "if __name__ == '__main__':\n"
        f"    start = time.perf_counter(); build({str(folder)!r}, {str(out)!r}, front_end=FrontEndSettings(), "
        f"check={check!r}, workers={workers}, statistics_clips={statistics_clips})\n"
        "    print(time.perf_counter() - start)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(result.stdout)


def scans(folder: Path, count: int) -> None:
    few = folder / "few"
    recordings(few, count // 4)
    recordings(folder / "many", count)
    print(f"\n| scan ({count} files of 10 s, FLAC, 16 kHz) | workers | ms a file | start, s | two million files, h |")
    print("|---|---|---|---|---|")
    for check in ("header", "full"):
        for workers in (1, 2):
            small = min(scan(few, folder / "few.jsonl", check, workers, 0) for _ in range(2))
            large = min(scan(folder / "many", folder / "many.jsonl", check, workers, 0) for _ in range(2))
            cost = (large - small) / (count - count // 4)
            start = large - cost * count
            print(f"| {check} | {workers} | {cost * 1e3:.2f} | {start:.2f} | {cost * MANY / 3600:.2f} |", flush=True)
    without = scan(folder / "many", folder / "many.jsonl", "full", 1, 0)
    measured = scan(folder / "many", folder / "many.jsonl", "full", 1, count)
    each = (measured - without) / count * 1e3
    print(f"\nMean and std, one worker: {each:.2f} ms a sampled file, torch's import included.")


def resident() -> int:
    """Bytes of memory this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(folder: Path, counts: list[int]) -> None:
    print(
        "\n| rows | write, s | read, s | memory, MB | bytes a row | file, MB | one clip, µs | digest, s | pickle, s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for count in counts:
        path = folder / f"{count}.jsonl"
        name = "/data/unbalanced/{:05d}/Y{:011d}.flac"
        clips = [Clip(name.format(i // 1000, i), 9 + i % 200 / 200, 16000, 1) for i in range(count)]
        Catalogue.from_clips(clips, root="/data").write(path)
        # Reading is timed and weighed in a fresh process: this one's heap is full of clips.
        told = subprocess.run(
            [sys.executable, __file__, "--one", path], capture_output=True, text=True, check=True
        ).stdout
        read, memory, write, one, digest, pickled = map(float, told.split())
        print(
            f"| {count} | {write:.2f} | {read:.2f} | {memory / 1e6:.0f} | {memory / count:.0f} | "
            f"{path.stat().st_size / 1e6:.0f} | {one * 1e6:.1f} | {digest:.2f} | {pickled:.3f} |",
            flush=True,
        )
    scale = MANY / count
    print(
        f"\nTwo million rows, from the last line: read {read * scale:.0f} s, write {write * scale:.0f} s, "
        f"{memory * scale / 1e6:.0f} MB."
    )


def one(path: Path) -> None:
    """Figures of one catalogue, for `rows`."""
    before, start = resident(), time.perf_counter()
    catalogue = Catalogue.read(path, look=False)
    read, memory = time.perf_counter() - start, resident() - before
    start = time.perf_counter()
    catalogue.write(path.with_suffix(".again"))
    write, start = time.perf_counter() - start, time.perf_counter()
    for index in range(0, len(catalogue), max(1, len(catalogue) // 10_000)):
        catalogue[index]
    each = (time.perf_counter() - start) / len(range(0, len(catalogue), max(1, len(catalogue) // 10_000)))
    start = time.perf_counter()
    _ = catalogue.digest
    digest, start = time.perf_counter() - start, time.perf_counter()
    pickle.loads(pickle.dumps(catalogue, protocol=5))
    print(read, memory, write, each, digest, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200, help="recordings to scan; 0: no scans")
    parser.add_argument("--million", action="store_true", help="also a million rows")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows(Path(folder), [10_000, 100_000] + [1_000_000] * options.million)
        if options.files:
            scans(Path(folder), options.files)


if __name__ == "__main__":
    main()
