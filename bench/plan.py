"""What `asit plan` predicts beside what `asit pretrain` then takes.

    python bench/plan.py [--toy] [--rounds 2] [--data CATALOGUE] [--steps 300]

Two configurations: the preset speech on a catalogue of short clips (--data, left out where it is not given), and a tiny
encoder on 5 s clips made here. Prediction and run take turns, so that both meet the same load of the machine. The run
is the command line's own, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ASIT = [sys.executable, "-m", "asit"]


def recordings(folder: Path, count: int, seconds: float) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = np.convolve(rng.normal(0, 0.02, round(seconds * 16000)), np.ones(8) / 2, "same")
        soundfile.write(folder / f"{i:04d}.flac", noise.astype(np.float32), 16000)


def compare(name: str, flags: list[str], budget: float, scratch: Path) -> dict[str, float]:
    plan = subprocess.run(
        [*ASIT, "plan", *flags, "--json", "--budget", str(budget)], capture_output=True, text=True, check=True
    )
    found = json.loads(plan.stdout)["prediction"]
    out = scratch / "run"
    began = time.perf_counter()
    subprocess.run(
        [*ASIT, "pretrain", *flags, "--out", str(out), "--overwrite"], capture_output=True, text=True, check=True
    )
    clock = time.perf_counter() - began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    rate = statistics.median(line["clips_per_second"] for line in steps)
    figures = {
        "predicted, s": 3600 * found["hours"],
        "low, s": 3600 * found["hours_low"],
        "high, s": 3600 * found["hours_high"],
        "real, s": clock,
        "predicted clips/s": found["clips_per_second"],
        "real clips/s": rate,
        "predicted memory, GB": found["memory_gb"]["cpu"],
    }
    ratio = figures["predicted, s"] / clock
    print(
        f"| {name} | {figures['predicted, s']:.0f} "
        f"({figures['low, s']:.0f} to {figures['high, s']:.0f}) | {clock:.0f} | "
        f"{ratio:.2f} | "
        f"{found['clips_per_second']:.1f} | {rate:.1f} | {os.getloadavg()[0]:.1f} |",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a few steps of a tiny encoder: whether it runs")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=300, help="steps of the first configuration; the second has a fifth"
    )
    parser.add_argument("--budget", type=float, default=45.0, help="seconds of measuring, for asit plan")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--data", type=Path, help="a catalogue of short clips for the preset speech")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        count = 8 if options.toy else 320
        recordings(scratch / "made", count, 1.0 if options.toy else 5.0)
        listed = scratch / "made.jsonl"
        subprocess.run(
            [*ASIT, "catalogue", str(scratch / "made"), "--out", str(listed)], check=True, capture_output=True
        )
        common = ["--records.figure-every", "0", "--threads", str(options.threads), "--device", "cpu"]
        cases: dict[str, list[str]] = {}
        if options.data:
            cases[f"speech, {options.steps} steps of 64 clips of {options.data.stem}"] = [
                *("--preset", "speech", "--data", str(options.data), "--stop-after", str(options.steps)),
                *common,
            ]
        few = 4 if options.toy else max(1, options.steps // 5)
        small = ["--encoder.size", "custom", "--encoder.width", "32", "--encoder.depth", "2", "--encoder.heads", "2"]
        cases[f"{'toy' if options.toy else 'tiny'} encoder, {few} steps of 8 clips made here"] = [
            *(small if options.toy else ["--encoder.size", "tiny"]),
            *("--data", str(listed), "--batch-size", "4" if options.toy else "8", "--stop-after", str(few), *common),
        ]
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        print(
            "| run | predicted, s (interval) | real, s | ratio | predicted clips/s | real | load |\n"
            "|---|---|---|---|---|---|---|"
        )
        found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for _ in range(1 if options.toy else options.rounds):
            for name, flags in cases.items():
                found[name].append(compare(name, flags, 2.0 if options.toy else options.budget, scratch))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
