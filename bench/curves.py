"""What a pretraining step and its loader cost as batch, length, encoder and workers grow, with fits.

    python bench/curves.py [--toy] [--threads 1] [--rounds 3] [--only batch length size loader] [--json FILE]

The step is the real one, `asit.training.loop.Loop` over the pretraining method, preset default, on a batch that is
there already; each point is a process of its own, started again in each round, so that slow times of the machine are
shared by all. The least of a few steps in a process, the median over rounds. Fits: batch, a + b x (a: clipping,
optimiser, teacher); length, a + b T + c T^2 over T tokens of a view (c: attention); size, seconds a GFLOP. The loader
reads clips made here: FLAC of 10 s and Opus of 1 s, by 0 (this process), 1 and 2 processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0)
SIZES = ("tiny", "small", "base")
TOY = {"size": "custom", "width": 64, "depth": 2, "heads": 2}
WORKERS = (0, 1, 2)


def settings_of(encoder: str, batch: int, seconds: float, threads: int, workers: int = 0) -> Any:
    from asit.config import PretrainSettings

    return PretrainSettings.model_validate(
        {
            **{"batch_size": batch, "device": "cpu", "threads": threads, "workers": workers},
            "precision": "float32" if encoder == "toy" else "bf16",
            "encoder": TOY if encoder == "toy" else {"size": encoder},
            "front_end": {"mean": -8.0, "std": 4.0},
            "views": {"keep_gb": 0, "segment_seconds": max(10.0, seconds)},
        }
    )


def step(encoder: str, batch: int, seconds: float, threads: int) -> dict[str, float]:
    """Least seconds of a few steps, by the clock and of the processor's time; tokens of a view; peak memory."""
    from measure import memory

    from asit import runtime
    from asit.model.cpu import bf16
    from asit.pretrain.pretrain_setup import prepare
    from asit.tools.run_estimate import noise
    from asit.training import loop
    from asit.training.metrics_log import Records

    bf16.keep_freed_memory()
    settings = settings_of(encoder, batch, seconds, threads)
    with runtime.world("cpu", threads) as world, tempfile.TemporaryDirectory() as scratch:
        setup = prepare(settings, noise(Path(scratch), settings.front_end.rate, seconds, max(16, batch)), world)
        few = [setup.clips[0, i] for i in range(min(8, batch))]
        given = setup.batch_of(list(itertools.islice(itertools.cycle(few), batch)))
        marks: list[tuple[float, float]] = []
        until = time.perf_counter() + 6.0

        def batches() -> Iterator[Any]:
            while len(marks) < 3 or (time.perf_counter() < until and len(marks) < 12):
                marks.append((time.perf_counter(), time.process_time()))
                yield given

        many = 1 << 30
        plan = loop.Plan(many, 1000, batch, 1, (0.9, 0.999), 3.0, True, log_every=many, checkpoint_every=many)
        try:
            loop.Loop(
                task=setup.task,
                batches=batches(),
                plan=plan,
                world=world,
                precision=setup.precision,
                records=Records(None, many, 0),
                step=5000,
            ).run()
        except (StopIteration, RuntimeError):
            marks.append((time.perf_counter(), time.process_time()))
        spans = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(marks[1:])]
        grid = setup.task.student.encoder.grid
        width, depth = setup.task.student.encoder.width, settings.encoder.depth
    tokens = grid[0] * grid[1] + 1
    flops = 2 * (12 * width**2 * tokens + 2 * width * tokens**2) * (depth or 12) * batch * 2 * 4
    return {
        "clock": min(clock for clock, _ in spans),
        "cpu": min(cpu for _, cpu in spans),
        "tokens": tokens,
        "memory": memory(),
        "gflop": flops / 1e9,
    }


def recordings(folder: Path, kind: str, count: int, seconds: float) -> Any:
    """Clips of coloured noise as files, and their list."""
    from asit.data.catalogue.catalogue import Catalogue, Clip

    rng, clips = np.random.default_rng(0), []
    for i in range(32):
        wave = np.convolve(rng.normal(0, 0.02, round(seconds * 16000) + 7), np.ones(8) / 2, "valid").astype(np.float32)
        path = folder / f"{i:02d}.{'flac' if kind == 'FLAC' else 'opus'}"
        given = {} if kind == "FLAC" else {"format": "OGG", "subtype": "OPUS"}
        soundfile.write(path, wave, 16000, **given)
        clips.append(Clip(str(path), seconds, 16000, 1))
    return Catalogue.from_clips([clips[i % 32] for i in range(count)], root=folder, header={"mean": -8.0, "std": 4.0})


def load(kind: str, seconds: float, workers: int, toy: bool) -> dict[str, float]:
    """Clips a second of the loader with nothing else to do, after what was ready has been taken out."""
    from asit import runtime
    from asit.pretrain.pretrain_setup import prepare

    with runtime.world("cpu", 1) as world, tempfile.TemporaryDirectory() as scratch:
        batch, many = 16, 2 if toy else 12
        listed = recordings(Path(scratch), kind, 4096, seconds)
        setup = prepare(settings_of("toy", batch, seconds, 1, workers), listed, world)
        data = setup.feed(0)
        for _ in range(1 + 4 * workers):
            next(data)
        began = time.perf_counter()
        for _ in range(many):
            next(data)
        seconds_taken = time.perf_counter() - began
        data.close()
    return {"clips": batch * many / seconds_taken}


def points(toy: bool) -> dict[str, list[dict[str, Any]]]:
    encoders = ("toy",) if toy else SIZES
    batches, lengths = ((1, 2), (1.0, 2.0)) if toy else (BATCHES, LENGTHS)
    small = encoders[0]
    return {
        "batch": [{"encoder": small, "batch": n, "seconds": 1.0 if toy else 10.0} for n in batches],
        "length": [{"encoder": small, "batch": 2 if toy else 8, "seconds": s} for s in lengths],
        "size": [{"encoder": e, "batch": 2 if toy else 4, "seconds": 1.0 if toy else 10.0} for e in encoders],
        "loader": [
            {"kind": kind, "seconds": s, "workers": w, "toy": toy}
            for kind, s in (("FLAC", 1.0 if toy else 10.0), ("Opus", 1.0))
            for w in WORKERS
        ],
    }


def measured(group: str, point: dict[str, Any], threads: int) -> dict[str, float]:
    given = point if group == "loader" else {**point, "threads": threads}
    code = [sys.executable, __file__, "--one", "load" if group == "loader" else "step", json.dumps(given)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    told = subprocess.run(code, capture_output=True, text=True, check=True, env=env).stdout
    answer: dict[str, float] = json.loads(told.splitlines()[-1])
    return answer


def fit(x: list[float], y: list[float], degree: int) -> tuple[list[float], float]:
    """Coefficients from the constant up, by least squares of the relative error, and its largest share."""
    xs, ys = np.asarray(x), np.asarray(y)
    degree = min(degree, len(x) - 1)
    found = np.polyfit(xs, ys, degree, w=1 / ys)
    return found[::-1].tolist(), float(np.max(np.abs(np.polyval(found, xs) / ys - 1)))


def report(found: dict[str, list[dict[str, float]]], all_points: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    fits: dict[str, Any] = {}
    for group in [name for name in found if name != "loader"]:
        rows = found[group]
        print(f"\n| {group} | tokens a view | CPU s a step | by the clock | clips/s of CPU time | memory, GB |")
        print("|---|---|---|---|---|---|")
        for point, row in zip(all_points[group], rows, strict=True):
            name = {"batch": f"{point['batch']}", "length": f"{point['seconds']:g} s", "size": point["encoder"]}[group]
            print(
                f"| {name} | {row['tokens']:.0f} | {row['cpu']:.3g} | {row['clock']:.3g} | "
                f"{point['batch'] / row['cpu']:.3g} | {row['memory']:.2f} |"
            )
        y = [row["cpu"] for row in rows]
        if group == "batch":
            (a, b), off = fit([float(p["batch"]) for p in all_points[group]], y, 1)
            print(f"\nCPU s of a step: {a:.3g} + {b:.3g} x clips; off by at most {off:.0%}.")
            fits[group] = {"a": a, "b": b, "off": off}
        elif group == "length":
            coefficients, off = fit([row["tokens"] for row in rows], y, 2)
            told = " + ".join(f"{c:.3g}" + ("", " T", " T^2")[i] for i, c in enumerate(coefficients))
            print(f"\nCPU s of a step: {told} over T tokens; off by at most {off:.0%}.")
            fits[group] = {"coefficients": coefficients, "off": off}
        else:
            rates = {p["encoder"]: row["gflop"] / row["cpu"] for p, row in zip(all_points[group], rows, strict=True)}
            told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
            print(f"\nGFLOP of the encoder a second of CPU time: {told}.")
            fits[group] = rates
    if "loader" in found:
        print("\n| loader alone, clips/s | " + " | ".join(f"{w} workers" for w in WORKERS) + " |")
        print("|---|" + "---|" * len(WORKERS))
        for first in range(0, len(found["loader"]), len(WORKERS)):
            point = all_points["loader"][first]
            cells = " | ".join(f"{row['clips']:.0f}" for row in found["loader"][first : first + len(WORKERS)])
            print(f"| {point['kind']}, {point['seconds']:g} s | {cells} |")
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny encoder, two points each: whether it runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=("batch", "length", "size", "loader"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work, given = options.one
        measures: dict[str, Callable[..., Any]] = {"step": step, "load": load}
        print(json.dumps(measures[work](**json.loads(given))))
        return
    chosen = {name: rows for name, rows in points(options.toy).items() if not options.only or name in options.only}
    print(f"{os.cpu_count()} cores, {options.threads} threads a step, load {os.getloadavg()[0]:.1f}")
    rounds: list[dict[str, list[dict[str, float]]]] = []
    for i in range(1 if options.toy else options.rounds):
        rounds.append({})
        for name, rows in chosen.items():
            rounds[-1][name] = [measured(name, row, options.threads) for row in rows]
            print(f"round {i + 1}: {name}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    found = {
        name: [
            {key: statistics.median(r[name][i][key] for r in rounds) for key in rounds[0][name][i]}
            for i in range(len(rows))
        ]
        for name, rows in chosen.items()
    }
    fits = report(found, chosen)
    if options.json:
        options.json.write_text(
            json.dumps({"measured": found, "points": chosen, "fits": fits}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
