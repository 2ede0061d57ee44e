"""What grows with the number of recordings: time and memory from 1,000 to a million made-up entries, with fits.

    python bench/scaling.py [--toy] [--most 1000000] [--repeats 1] [--json FILE]

Each size of each kind is a fresh process; nothing is decoded, no recording is there. Memory is what the process held
more at its peak than before the work began. The exponent is the slope of log time (and memory) over log entries, by
least squares, over sizes from 10,000 on, with its standard error; the linear fit is a + b N, from which two million
follow. By CPU time, which a busy machine stretches little, and by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from asit.data.catalogue.catalogue import Catalogue
from asit.data.loading import sampler

MANY = 2_000_000
NAME = "unbalanced/{:05d}/Y{:011d}.flac"
HEADER = {"mean": -4.3, "std": 4.6, "skipped": {}, "ignored": {}}


def write_list(path: Path, count: int, *, shards: bool) -> None:
    """A catalogue's file, or a shard index, line by line, without any of the code that is measured."""
    with path.open("w") as file:
        seconds = sum(10.0 - i % 200 / 400 for i in range(count))
        header = {"asit_catalogue": 3 if shards else 1, **HEADER, "root": "/data", "clips": count, "seconds": seconds}
        file.write(json.dumps(header) + "\n")
        for i in range(count):
            row: dict[str, Any] = {"path": NAME.format(i // 1000, i), "seconds": 10.0 - i % 200 / 400}
            row |= {"rate": 16000, "channels": 1, "label": f"class {i * 7919 % 527}", "split": "train"}
            if shards:
                row |= {"shard": f"part-{i // 1000:06d}.tar", "offset": 512 + i % 1000 * 170_000, "size": 160_000}
            file.write(json.dumps(row) + "\n")


def resident(field: str) -> int:
    """Bytes that this process holds (VmRSS), or held at the most (VmHWM); Linux."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def spent(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """What a piece of work took, and its result; the first in its process, since the peak is the process's."""
    before = resident("VmRSS")
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {
        "clock": clock,
        "cpu": cpu,
        "held": max(0, resident("VmRSS") - before),
        "peak": max(0, resident("VmHWM") - before),
    }, result


def _read(path: Path, count: int) -> dict[str, float]:
    return spent(lambda: Catalogue.read(path, look=False))[0]


def _write(path: Path, count: int) -> dict[str, float]:
    catalogue = Catalogue.read(path, look=False)
    return spent(lambda: catalogue.write(path.with_suffix(".again")))[0]


def _listing(path: Path, count: int) -> dict[str, float]:
    from asit.data.catalogue.listing import list_rows
    from asit.data.catalogue.tables import TableRow

    def rows() -> Iterator[TableRow]:
        for i in range(count):
            yield TableRow("/data/" + NAME.format(i // 1000, i), label=f"class {i % 527}", split="train")

    def work() -> Any:
        listing = list_rows("/data", rows())
        listing.draw(1000, 0)
        return listing

    return spent(work)[0]


def _settings() -> Any:
    from asit.config import FrontEndSettings, PretrainSettings

    return PretrainSettings(front_end=FrontEndSettings(mean=-4.3, std=4.6))


def _pretraining(path: Path, count: int) -> dict[str, float]:
    """From the catalogue in memory to the first micro-batch's keys, as a run has them."""
    from asit.pretrain import pretrain_dataset

    catalogue, settings = Catalogue.read(path, look=False), _settings()

    def work() -> Any:
        clips = pretrain_dataset.PretrainDataset(catalogue, settings.changed({"views": {"seconds": 6.0}}), (592, 0))
        keys = sampler.MicroBatchSampler(order=sampler.shuffled(0, len(clips)), count=len(clips), batch=128, micro=32)
        return clips, next(iter(keys))

    return spent(work)[0]


def _finetuning(path: Path, count: int) -> dict[str, float]:
    """The same for a balanced draw of labelled clips, labels read and weighed."""
    from asit.data.catalogue.labels import balanced_weights, read_labels

    catalogue = Catalogue.read(path, look=False)

    def work() -> Any:
        rows = np.arange(len(catalogue))
        labels = read_labels(catalogue, "multi")
        drawn = sampler.weighted(0, balanced_weights(labels, rows), count)
        return labels, next(
            iter(sampler.MicroBatchSampler(order=drawn, count=count, batch=128, micro=32, positions=True))
        )

    return spent(work)[0]


def _shuffle(path: Path, count: int) -> dict[str, float]:
    return spent(lambda: sampler.permutation(0, 1, count))[0]


def _pickle(path: Path, count: int) -> dict[str, float]:
    catalogue = Catalogue.read(path, look=False)
    return spent(lambda: pickle.loads(pickle.dumps(catalogue, protocol=5)))[0]


def _clip(path: Path, count: int) -> dict[str, float]:
    """10,000 clips looked up at random: the same for any size."""
    catalogue, rng = Catalogue.read(path, look=False), np.random.default_rng(0)
    rows = rng.integers(count, size=10_000).tolist()
    return spent(lambda: [catalogue[row].path for row in rows][-1])[0]


KINDS: dict[str, tuple[str, Callable[[Path, int], dict[str, float]]]] = {
    "catalogue: read": ("list", _read),
    "catalogue: write": ("list", _write),
    "scan: its list and sample": ("list", _listing),
    "shard index: read": ("shards", _read),
    "shard index: write": ("shards", _write),
    "pretraining: to the first keys": ("list", _pretraining),
    "pretraining from shards: to the first keys": ("shards", _pretraining),
    "fine-tuning, balanced: to the first keys": ("list", _finetuning),
    "an epoch's shuffle": ("list", _shuffle),
    "catalogue to a spawned loader": ("list", _pickle),
    "10,000 clips looked up": ("list", _clip),
}


def slope(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """Exponent of a power law and its standard error (0 where two points leave none)."""
    x, y = np.log(sizes), np.log(np.maximum(values, 1e-9))
    if len(x) < 2:
        return float("nan"), float("nan")
    centred = x - x.mean()
    found = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - found * centred
    return found, float(np.sqrt((rest**2).sum() / max(1, len(x) - 2) / (centred**2).sum())) if len(x) > 2 else 0.0


def line(sizes: list[int], values: list[float]) -> tuple[float, float]:
    """a and b of a + b N, weighed by 1 / N so that no size decides alone."""
    x, y = np.asarray(sizes, float), np.asarray(values)
    b, a = np.polyfit(x, y, 1, w=1 / x)
    return float(a), float(b)


def report(found: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Print the tables; the fits for the JSON."""
    fits: dict[str, Any] = {}
    sizes = sorted(next(iter(found.values())))
    print("\n| CPU s (by the clock) | " + " | ".join(f"{n:,}" for n in sizes) + " | exponent | 2 million, s |")
    print("|---|" + "---|" * (len(sizes) + 2))
    for name, rows in found.items():
        fitted = [n for n in sizes if n >= 10_000] if len(sizes) > 3 else sizes
        power, error = slope(fitted, [rows[n]["cpu"] for n in fitted])
        a, b = line(fitted, [rows[n]["cpu"] for n in fitted])
        fits[name] = {"exponent": power, "error": error, "a": a, "b": b, "two_million_s": a + b * MANY}
        cells = " | ".join(f"{rows[n]['cpu']:.3g} ({rows[n]['clock']:.3g})" for n in sizes)
        print(f"| {name} | {cells} | {power:.2f} ± {error:.2f} | {a + b * MANY:.3g} |")
    print(
        "\n| MB at the peak (held after) | " + " | ".join(f"{n:,}" for n in sizes) + " | B an entry | 2 million, MB |"
    )
    print("|---|" + "---|" * (len(sizes) + 2))
    for name, rows in found.items():
        fitted = [n for n in sizes if n >= 10_000] if len(sizes) > 3 else sizes
        a, b = line(fitted, [rows[n]["peak"] for n in fitted])
        fits[name] |= {"bytes_an_entry": b, "two_million_mb": (a + b * MANY) / 1e6}
        cells = " | ".join(f"{rows[n]['peak'] / 1e6:.3g} ({rows[n]['held'] / 1e6:.3g})" for n in sizes)
        print(f"| {name} | {cells} | {b:.0f} | {(a + b * MANY) / 1e6:.0f} |")
    worse = [name for name, fit in fits.items() if fit["exponent"] - 2 * fit["error"] > 1.1]
    print("\nWorse than linear: " + (", ".join(worse) if worse else "none") + ".")
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few hundred entries: whether it runs")
    parser.add_argument("--most", type=int, default=1_000_000, help="the largest size")
    parser.add_argument(
        "--repeats", type=int, default=1, help="processes for each figure, of which the median is taken"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, path, count = options.one
        print(json.dumps(KINDS[name][1](Path(path), int(count))))
        return
    sizes = [200, 600] if options.toy else [n for n in (1_000, 10_000, 100_000, 1_000_000) if n <= options.most]
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for count in sizes:
            paths = {kind: Path(folder) / f"{kind}-{count}.jsonl" for kind in ("list", "shards")}
            for kind, path in paths.items():
                write_list(path, count, shards=kind == "shards")
            for name, (kind, _) in KINDS.items():
                given = [sys.executable, __file__, "--one", name, str(paths[kind]), str(count)]
                runs = [
                    json.loads(subprocess.run(given, capture_output=True, text=True, check=True).stdout)
                    for _ in range(options.repeats)
                ]
                found[name][count] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                print(f"{name}, {count}: {found[name][count]['cpu']:.3f} s", file=sys.stderr, flush=True)
            for path in Path(folder).iterdir():
                path.unlink()
    fits = report(found)
    if options.json:
        options.json.write_text(json.dumps({"measured": found, "fits": fits}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
