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

from asit.data.catalogue.catalogue import Catalogue, Clip

MANY = 2_000_000


def recordings(folder: Path, count: int) -> None:
    """Ten-second files in folders of 100; a coloured noise, which FLAC compresses to about half like speech."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 100:04d}"
        place.mkdir(parents=True, exist_ok=True)
        wave = np.convolve(rng.normal(0, 0.02, 160_000), np.ones(8) / 2, "same").astype(np.float32)
        soundfile.write(place / f"{i:07d}.flac", wave, 16000)


def linked(folder: Path, names: Path, times: int) -> int:
    """Other names for the same files, so that a scan of headers has enough to do; how many."""
    count = 0
    for i in range(times):
        for file in sorted(folder.rglob("*.flac")):
            place = names / f"{i:04d}" / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            os.link(file, place / file.name)
            count += 1
    return count


def scan(folder: Path, check: str, workers: int, statistics_clips: int = 0) -> tuple[float, float]:
    """Seconds, and MB of memory at the most, of the process that a user starts."""
    code = (
        "import time; from asit.data.catalogue.scan import build; from asit.config import FrontEndSettings\n"
        "if __name__ == '__main__':\n"
        f"    start = time.perf_counter(); build({str(folder)!r}, {str(folder) + '.jsonl'!r}, "
        f"front_end=FrontEndSettings(), check={check!r}, workers={workers}, statistics_clips={statistics_clips})\n"
        "    print(time.perf_counter() - start, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, memory = map(float, result.stdout.split())
    return seconds, memory / 1e3


def scans(folder: Path, count: int) -> None:
    real, quarter = folder / "real", folder / "quarter"
    recordings(real, count)
    recordings(quarter, count // 4)
    sizes = {"full": ((quarter, count // 4), (real, count))}
    few, many = folder / "few", folder / "many"
    sizes["header"] = ((few, linked(real, few, 5)), (many, linked(real, many, 20)))
    print("\n| scan of 10 s FLAC files, 16 kHz | files | workers | ms a file | memory, MB | two million files, h |")
    print("|---|---|---|---|---|---|")
    for check, ((less, small), (more, large)) in sizes.items():
        for workers in (1, 2):
            base = min(scan(less, check, workers) for _ in range(3))[0]
            whole, memory = min(scan(more, check, workers) for _ in range(3))
            cost = (whole - base) / (large - small)
            hours = cost * MANY / 3600
            print(f"| {check} | {large} | {workers} | {cost * 1e3:.2f} | {memory:.0f} | {hours:.2f} |", flush=True)
    without, _ = scan(real, "full", 1)
    measured, _ = scan(real, "full", 1, count)
    each = (measured - without) / count * 1e3
    print(f"\nMean and std, one worker: {each:.2f} ms a sampled file, the import of torch (once) included.")


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
    parser.add_argument("--toy", action="store_true", help="few files and rows: whether it runs, in seconds")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows(Path(folder), [1_000] if options.toy else [10_000, 100_000] + [1_000_000] * options.million)
        if options.files:
            scans(Path(folder), 8 if options.toy else options.files)


if __name__ == "__main__":
    main()
