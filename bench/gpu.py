"""One GPU, all of it: what each measure adds to the official settings, in clips a second and as a share of its peak.

    python bench/gpu.py [--device cuda] [--toy] [--clips 64] [--steps 10] [--out FOLDER] [--only NAME ...]

Every row is a process of its own, so that one that runs out of memory leaves the others alone. A step is the real one
(`asit.engine.loop.fit`, base encoder, two views of 592 frames, losses of preset official-v2 without local views), its
batches copied from pinned memory each time. Beside it stand bf16 matrix products, measured before and after; the
official settings written plainly (`bench/step.py`) in float32, with and without TF32; the same step's losses and
gradients on the device and on the CPU; and a run from FLAC files that are made for it. It ends with the targets: 8
times the official settings, and 0.45 of the bf16 rate. `--device cpu --toy` takes the same path anywhere, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import step as cpu_step
from measure import memory

TARGET_SPEEDUP, TARGET_SHARE = 8.0, 0.45
WARM = 3


@dataclass
class Row:
    """What one process measures."""

    name: str
    kind: str
    clips: int
    precision: str = "float32"
    tf32: bool = False
    attention: str = "plain"
    losses: str = "plain"
    compile: bool = False
    logmels: str = "loader"
    found: dict[str, Any] = field(default_factory=dict)


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


# One row, in its own process


class Turns:
    """Stands in for a pipe: asks a number of times, and keeps the time at which it is asked."""

    def __init__(self, count: int, wait: Callable[[], None]) -> None:
        self.count, self.wait, self.at = count, wait, list[float]()

    def recv(self) -> str:
        self.wait()
        self.at.append(time.perf_counter())
        return "go" if len(self.at) <= self.count else "end"

    def send(self, answer: Any) -> None:
        """What is measured is measured here."""

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.at[WARM:], self.at[WARM + 1 :], strict=False)]


def measure(row: Row, kind: str, toy: bool, steps: int) -> dict[str, Any]:
    import torch

    device = torch.device(kind)
    on_gpu = device.type == "cuda"
    if toy:
        torch.set_num_threads(1)
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = row.tf32
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else (lambda: None)
    works: dict[str, Callable[..., dict[str, Any]]] = {
        "products": products, "official": official, "ours": ours, "numerics": numerics, "files": files,
    }  # fmt: skip
    found = works[row.kind](row, device, toy, steps, wait)
    found["memory"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else memory()
    found["device"] = torch.cuda.get_device_name() if on_gpu else "the CPU"
    found["torch"] = torch.__version__
    return found


def products(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """The best rate among bf16 products of large squares and of the step's own shapes, FLOP/s."""
    import torch

    tokens = 2 * row.clips * 297
    shapes = [(8192, 8192, 8192), (4096, 4096, 4096), (tokens, 768, 3072), (tokens, 3072, 768)]
    rates = {}
    for m, k, n in [(256, 256, 256)] if toy else shapes:
        a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((m, k), (k, n)))
        seconds = []
        for _ in range(3 if toy else 10):
            wait()
            began = time.perf_counter()
            for _ in range(4):
                a @ b
            wait()
            seconds.append((time.perf_counter() - began) / 4)
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / min(seconds)
    return {"rates": rates, "peak": max(rates.values())}


def official(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """`bench/step.py`'s official step, all of whose tensors are made on the device."""
    import torch

    cpu_step.CLIPS = row.clips
    made = cpu_step.batch_of
    cpu_step.batch_of = lambda *given: made(*given).to(device)
    turns = Turns(WARM + steps, wait)
    with torch.device(device):
        cpu_step.official(turns, toy, torch.get_num_threads())  # type: ignore[arg-type]
    return {"seconds": statistics.median(turns.seconds())}


def ours(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from asit import runtime
    from asit.data.batches import OnDevice
    from asit.engine import compiling, loop
    from asit.engine.prefetch import prefetched
    from asit.engine.records import Records
    from asit.pretrain import method

    settings, frames = settings_of(row, toy)
    task = method.ASiT(settings, frames, torch.Generator().manual_seed(0), device)
    said = list[str]()
    task.say.tell(said.append)
    said.append(compiling.attention_backends(device))
    batch = batch_of(row, settings, frames)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    marks = list[float]()

    def given() -> Iterator[Any]:
        for i in range(WARM + steps + 2):
            if i in (WARM + 1, WARM + steps + 1):  # one batch is always ahead
                wait()
                marks.append(time.perf_counter())
            yield batch

    prepare = None
    if row.logmels == "device":
        prepare = OnDevice(settings.front_end, settings.views, (frames, 0), device)
    plan = loop.Plan(
        1 << 30, 100, row.clips, 1, settings.optim.betas, settings.optim.clip, settings.optim.clip_per_parameter,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    world = runtime.World(0, 1, device, "the bench")
    attention = sdpa_kernel(SDPBackend.MATH) if row.attention == "plain" else contextlib.nullcontext()
    records = Records(None, 0, 0, tensorboard=False, stream=None)
    with attention, plain_losses(row.losses == "plain"), contextlib.suppress(StopIteration):
        batches = prefetched(given(), device, prepare)  # type: ignore[type-var]
        loop.fit(task, batches, plan, world, runtime.Precision(row.precision, ""), records, start=5000)
    if len(marks) < 2:
        raise MemoryError("the steps did not come to their end")
    return {"seconds": (marks[1] - marks[0]) / steps, "notes": said}


@contextlib.contextmanager
def plain_losses(wanted: bool) -> Iterator[None]:
    """The local loss with the logits of all tokens whole, as the official code has it."""
    from torch.nn import functional as F

    from asit.pretrain import losses, method

    def whole(student: Any, teacher: Any, centre: Any, temperatures: Any, *, dtype: Any, **_: Any) -> tuple[Any, Any]:
        cold, warm = temperatures
        probs = losses.teacher_distribution(F.linear(*(x.to(dtype) for x in teacher)), centre, warm)
        logits = F.linear(*(x.to(dtype) for x in student))
        return losses.cross_entropy(logits, probs, cold).mean(), probs.new_zeros(())

    before = method.fused.local_loss
    if wanted:
        method.fused.local_loss = whole
    try:
        yield
    finally:
        method.fused.local_loss = before


def numerics(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Losses and gradients of one step on the device, in float32 and bf16, against float32 on the CPU."""
    import torch

    from asit import runtime
    from asit.engine.loop import Now
    from asit.pretrain import method

    settings, frames = settings_of(row, toy)
    batch = batch_of(row, settings, frames)

    def once(where: Any, precision: str) -> tuple[dict[str, float], Any]:
        task = method.ASiT(settings, frames, torch.Generator().manual_seed(0), where)
        now, world = Now(5000, 1 << 30, 100), runtime.World(0, 1, where, "the bench")
        output = task.step(batch.to(where), now, runtime.Precision(precision, ""), world)
        output.loss.backward()
        gradients = [p.grad.flatten().cpu() for p in task.student.parameters() if p.grad is not None]
        return {name: float(value.detach()) for name, value in output.parts.items()}, torch.cat(gradients)

    losses, gradient = once(torch.device("cpu"), "float32")
    found: dict[str, Any] = {}
    for precision in ("float32", "bf16"):
        theirs, other = once(device, precision)
        found[precision] = {name: abs(theirs[name] - value) / abs(value) for name, value in losses.items()}
        found[precision]["gradient"] = float((other - gradient).norm() / gradient.norm())
    return {"errors": found}


def files(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """A run as a user starts it, from FLAC files on the disk: its clips a second and its wait for data."""
    import numpy as np
    import soundfile

    from asit.data import scan
    from asit.runs.pretrain import pretrain
    from asit.settings import FrontEndSettings

    settings, _ = settings_of(row, toy)
    steps = 4 if toy else 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        (folder / "sounds").mkdir()
        for i in range(8 if toy else max(256, row.clips)):
            wave = rng.normal(0, 0.05, 16000 * (2 if toy else 10))
            soundfile.write(folder / "sounds" / f"{i:04d}.flac", wave, 16000)
        scan.build(folder / "sounds", folder / "c.jsonl", front_end=FrontEndSettings(mean=-4.27, std=4.57), workers=1)
        settings.data, settings.out = str(folder / "c.jsonl"), str(folder / "run")
        settings.batch_size = min(row.clips, 4 if toy else row.clips)
        settings.epochs, settings.stop_after, settings.device = 20 * steps, steps, device.type
        settings.optim.warmup, settings.views.seconds = 0.0, "auto"
        settings.records.log_every, settings.records.checkpoint_every = steps // 4, 1 << 30
        settings.records.figure_every, settings.workers = 0, 0 if toy else "auto"
        pretrain(settings, stream=None)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
        log = (folder / "run" / "log.txt").read_text("utf-8").splitlines()
    last = [line for line in lines if line["kind"] == "train"][1:]
    rate = statistics.median(line["clips_per_second"] for line in last)
    notes = [line.split(" ", 2)[2] for line in log if any(word in line for word in ("compile", "log-mels", "worker"))]
    waited = statistics.median(line["data_wait"] for line in last)
    return {"seconds": settings.batch_size / rate, "data_wait": waited, "notes": notes}


def settings_of(row: Row, toy: bool) -> tuple[Any, int]:
    """Settings of a row, resolved, and frames of a view."""
    from asit.pretrain import method

    cpu_step.CLIPS = row.clips
    settings = method.resolve(cpu_step.settings_of(toy))
    if toy:
        encoder = settings.encoder
        encoder.size, encoder.width, encoder.depth, encoder.heads = "custom", 32, 2, 2
    settings.precision, settings.compile = row.precision, row.compile  # type: ignore[assignment]
    return settings, 64 if toy else cpu_step.FRAMES


def batch_of(row: Row, settings: Any, frames: int) -> Any:
    """A synthetic batch as the loader hands it over: with its views, or as waveforms and bits of masks."""
    import dataclasses

    import torch

    from asit.audio.fbank import FrontEnd
    from asit.data import views

    cpu_step.CLIPS = row.clips
    batch = cpu_step.batch_of(settings, frames)
    if row.logmels == "loader":
        return batch
    samples = FrontEnd(settings.front_end).samples_for(frames + 100)
    return dataclasses.replace(
        batch,
        clean=batch.clean[:, :, :0],
        drop=views.pack(batch.drop),
        replace=views.pack(batch.replace),
        waves=torch.randn(row.clips, samples, generator=torch.Generator().manual_seed(0)) * 0.05,
        have=torch.full((row.clips,), frames + 100),
        places=torch.tensor([[i % 100, frames] for i in range(2 * row.clips)]),
        changes=torch.tensor([[1.0, 0.0]]).repeat(2 * row.clips, 1),
    )


# The table


def apart(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds for a row, or why it found nothing."""
    given = {key: value for key, value in asdict(row).items() if key != "found"}
    command = [sys.executable, __file__, "--row", json.dumps(given), "--device", options.device]
    command += ["--steps", str(options.steps), *(["--toy"] if options.toy else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {options.limit} s"}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    short = any("out of memory" in line.lower() for line in lines)
    return {"failed": "out of memory" if short else lines[-1][:200]}


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
            ratio = f"{rate[row.name] / rate[base.name]:.2f}" if base else ""
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
    if mine and base and not toy:
        best = max(mine, key=lambda name: rate[name])
        for found, target, what in (
            (rate[best] / rate[base.name], TARGET_SPEEDUP, "times the official settings"),
            (shares[best], TARGET_SHARE, "of the measured bf16 rate"),
        ):
            lines.append(f"- target, {target:g} {what}: {found:.2f} ({best}): {'met' if found >= target else 'missed'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--toy", action="store_true", help="a tiny network, few rows: whether it runs, in seconds")
    parser.add_argument("--clips", type=int, default=64, help="clips a step of the first rows")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--limit", type=int, default=300, help="seconds that a row may take")
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
    for row in wanted:
        row.found = apart(row, options)
        print(f"{row.name}: {row.found.get('failed', 'done')}", file=sys.stderr, flush=True)
    text = table(wanted, options.toy)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.md").write_text(text + "\n", "utf-8")
        (options.out / "gpu.json").write_text(json.dumps([asdict(row) for row in wanted], indent=1), "utf-8")
    if options.toy and any("failed" in row.found for row in wanted):
        sys.exit("a row failed")


if __name__ == "__main__":
    main()
