"""One GPU, all of it: what each measure adds to the official settings, in clips a second and as a share of its peak.

    python bench/gpu.py [--device cuda] [--toy] [--clips 64] [--steps 10] [--minutes 9] [--out FOLDER] [--only NAME ...]

Every row is a process of its own, so that one that runs out of memory or time leaves the others alone; the table is
rewritten after each, and a row for which no time is left says so. A step is the real one
(`asit.training.loop.Loop`, base encoder, two views of 592 frames, losses of preset official-v2 without local views),
its batches copied from pinned memory each time. Beside it stand bf16 matrix products, measured before and after; the
official settings written plainly (`bench/step.py`) in float32, with and without TF32; the same step's losses and
gradients on the device and on the CPU; and a run from FLAC files that are made for it. It ends with the targets: 8
times the official settings, and 0.45 of the bf16 rate. `--device cpu --toy` takes the same path anywhere, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import step as cpu_step
from gpu_rows import Row, measure

TARGET_SPEEDUP, TARGET_SHARE = 8.0, 0.45


def rows(clips: int) -> list[Row]:
    """Each row of ours adds one thing to the row above it."""
    plain = Row("ours, float32, plain attention and losses", "ours", clips)
    out = [
        Row("bf16 products", "products", clips),
        Row("official, float32", "official", clips),
        Row("official, TF32", "official", clips, tf32=True),
        plain,
    ]
    added: list[tuple[str, dict[str, Any]]] = [
        ("+ bf16", {"precision": "bf16"}),
        ("+ fused attention", {"attention": "fused"}),
        ("+ losses in chunks", {"losses": "chunks"}),
        ("+ compiled blocks", {"compile": True}),
        ("+ log-mels on the device", {"logmels": "device"}),
        ("+ batch x 2", {"clips": 2 * clips}),
        ("+ batch x 4", {"clips": 4 * clips}),
    ]
    for name, change in added:
        last = {key: value for key, value in asdict(out[-1]).items() if key not in ("name", "found")}
        out.append(Row(name, **{**last, **change}))
    return [
        *out,
        Row("device against CPU", "numerics", 2),
        Row("from FLAC files", "files", clips, precision="bf16", compile=True),
        Row("bf16 products, again", "products", clips),
    ]


# The table


def apart(row: Row, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """What a process of its own finds for a row, or why it found nothing."""
    if limit < 5:
        return {"failed": f"no time left of {options.minutes:g} minutes"}
    given = {key: value for key, value in asdict(row).items() if key != "found"}
    command = [sys.executable, __file__, "--row", json.dumps(given), "--device", options.device]
    command += ["--steps", str(options.steps), *(["--toy"] if options.toy else [])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said, complained = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            _end(process)
            return {"failed": f"longer than {limit:.0f} s"}
        except BaseException:
            _end(process)
            raise
    if process.returncode == 0:
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found
    lines = [line for line in complained.splitlines() if line.strip()] or [f"exit status {process.returncode}"]
    short = any("out of memory" in line.lower() for line in lines)
    return {"failed": "out of memory" if short else lines[-1][:200], "stderr": complained[-4000:]}


def _end(process: subprocess.Popen[str]) -> None:
    """With its loaders and the compiler's processes, which would hold the GPU and the pipes."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def table(done: list[Row], toy: bool) -> str:
    """The rows as Markdown, and the targets; a toy's rates say nothing of them."""
    peak = max((row.found["peak"] for row in done if "peak" in row.found), default=0.0)
    base = next((row for row in done if row.name == "official, float32" and "seconds" in row.found), None)
    rate = {row.name: row.clips / row.found["seconds"] for row in done if "seconds" in row.found}
    any_row = next((row.found for row in done if "device" in row.found), {})
    lines = [
        f"{any_row.get('device')}, torch {any_row.get('torch')}; bf16 products {peak / 1e12:.1f} TFLOP/s",
        "",
        "| step | clips | ms | clips/s | to official | share of the bf16 rate | memory, GB | |",
        "|---" * 8 + "|",
    ]
    shares: dict[str, float] = {}
    for row in done:
        found = row.found
        if "failed" in found:
            lines.append(f"| {row.name} | {row.clips} | | | | | | {found['failed']} |")
        elif "seconds" in found:
            shares[row.name] = rate[row.name] * cpu_step.CLIP_FLOPS / peak if peak else 0.0
            ratio = f"{rate[row.name] / rate[base.name]:.2f}" if base and not toy else ""
            waited = f"waits for data {found['data_wait']:.1%}" if "data_wait" in found else ""
            lines.append(
                f"| {row.name} | {row.clips} | {1e3 * found['seconds']:.1f} | {rate[row.name]:.1f} | {ratio} | "
                f"{'' if toy else format(shares[row.name], '.3f')} | {found['memory']:.2f} | {waited} |"
            )
    for row in done:
        for precision, errors in row.found.get("errors", {}).items():
            told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            lines += ["", f"Relative error of one step in {precision} to float32 on the CPU: {told}."]
    notes = [note for row in done for note in row.found.get("notes", [])]
    lines += [""] + [f"- {note}" for note in dict.fromkeys(notes)]
    mine = [row.name for row in done if row.kind == "ours" and row.name in rate]
    if not toy and base is not None and mine and peak:
        best = max(mine, key=lambda name: rate[name])
        for reached, target, what in (
            (rate[best] / rate[base.name], TARGET_SPEEDUP, "times the official settings"),
            (shares[best], TARGET_SHARE, "of the measured bf16 rate"),
        ):
            judged = "met" if reached >= target else "missed"
            lines.append(f"- target, {target:g} {what}: {reached:.2f} ({best}): {judged}")
    elif not toy:
        lines.append("- targets: not told; they need the rows of products, of the official step and of ours")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--toy", action="store_true", help="a tiny network, few rows: whether it runs, in seconds")
    parser.add_argument("--clips", type=int, default=64, help="clips a step of the first rows")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--limit", type=int, default=180, help="seconds that a row may take")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these")
    parser.add_argument("--out", type=Path, help="folder for gpu.md and gpu.json")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(Row(**json.loads(options.row)), options.device, options.toy, options.steps)))
        return
    if options.device == "auto":
        import torch

        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.toy:
        options.clips, options.steps = 4, 2
    wanted = rows(options.clips)
    if options.toy:  # one of each kind; the compiler alone would take a minute
        names = ("bf16 products", "official, float32", "ours, float32, plain attention and losses")
        names += ("+ log-mels on the device", "device against CPU", "from FLAC files")
        wanted = [row for row in wanted if row.name in names]
        for row in wanted:
            row.compile = False
    if options.only:
        wanted = [row for row in wanted if any(text in row.name for text in options.only)]
    end = time.monotonic() + 60 * options.minutes
    for i, row in enumerate(wanted):
        began = time.monotonic()
        row.found = apart(row, options, min(options.limit, end - began))
        told = row.found.get("failed") or (
            "{seconds:.4f} s a step".format(**row.found) if "seconds" in row.found else ""
        )
        took = time.monotonic() - began
        print(f"{row.name}: {told or 'done'} ({took:.0f} s)", file=sys.stderr, flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.md").write_text(table(wanted[: i + 1], options.toy) + "\n", "utf-8")
            (options.out / "gpu.json").write_text(json.dumps([asdict(r) for r in wanted[: i + 1]], indent=1), "utf-8")
    print(table(wanted, options.toy))
    if options.toy and any("failed" in row.found for row in wanted):
        sys.exit("a row failed")


if __name__ == "__main__":
    main()
