"""One row of `bench/gpu.py`, measured in a process of its own: products, the official step, ours, a run from files."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import step as cpu_step
from measure import memory

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


class Notes(logging.Handler):
    """Keeps what is logged at level INFO or above."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines = list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


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
    from asit.pretrain import method
    from asit.pretrain.pretrain_dataset import DeviceViews
    from asit.training import compilation, loop
    from asit.training.metrics_log import Records
    from asit.training.prefetch import prefetched

    settings, frames = settings_of(row, toy)
    task = method.ASiT(settings, frames, torch.Generator().manual_seed(0), device)
    notes = Notes()
    logging.getLogger("asit").addHandler(notes)
    logging.getLogger("asit").setLevel(logging.INFO)
    if device.type == "cuda":
        notes.lines.append(compilation.attention_backends(device))
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
        prepare = DeviceViews(settings, (frames, 0), device)
    plan = loop.Plan(
        1 << 30, 100, row.clips, 1, settings.optim.betas, settings.optim.clip, settings.optim.clip_per_parameter,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    world = runtime.World(0, 1, device, "the bench")
    attention = sdpa_kernel(SDPBackend.MATH) if row.attention == "plain" else contextlib.nullcontext()
    records = Records(None, 0, 0)
    with attention, plain_losses(row.losses == "plain"), contextlib.suppress(StopIteration):
        batches = prefetched(given(), device, prepare)  # type: ignore[type-var]
        what = {"plan": plan, "world": world, "precision": runtime.Precision(row.precision, ""), "records": records}
        loop.Loop(task=task, batches=batches, step=5000, **what).run()
    if len(marks) < 2:
        raise MemoryError("the steps did not come to their end")
    return {"seconds": (marks[1] - marks[0]) / steps, "notes": notes.lines}


@contextlib.contextmanager
def plain_losses(wanted: bool) -> Iterator[None]:
    """The local loss with the logits of all tokens whole, as the official code has it."""
    from torch.nn import functional as F

    from asit.pretrain import chunked_loss, losses

    def whole(student: Any, teacher: Any, centre: Any, temperatures: Any, *, dtype: Any, **_: Any) -> tuple[Any, Any]:
        cold, warm = temperatures
        probs = losses.teacher_distribution(F.linear(*(x.to(dtype) for x in teacher)), centre, warm)
        logits = F.linear(*(x.to(dtype) for x in student))
        return losses.cross_entropy(logits, probs, cold).mean(), probs.new_zeros(())

    before = chunked_loss.local_loss
    if wanted:
        chunked_loss.local_loss = whole
    try:
        yield
    finally:
        chunked_loss.local_loss = before


def numerics(row: Row, device: Any, toy: bool, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Losses and gradients of one step on the device, in float32 and bf16, against float32 on the CPU."""
    import torch

    from asit import runtime
    from asit.pretrain import method
    from asit.training.trainable import Now

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

    from asit.config import FrontEndSettings, PretrainSettings
    from asit.data.catalogue import scan
    from asit.pretrain.pretrain_run import pretrain

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
        given = {
            **{"data": str(folder / "c.jsonl"), "out": str(folder / "run"), "device": device.type},
            **{"batch_size": min(row.clips, 4 if toy else row.clips), "workers": 0 if toy else "auto"},
            **{"epochs": 20 * steps, "stop_after": steps, "optim": {"warmup": 0.0}},
            "views": {"seconds": "auto", "keep_gb": 0.0},  # so that every batch is decoded
            "records": {"log_every": steps // 4, "checkpoint_every": 1 << 30, "figure_every": 0},
        }
        settings = PretrainSettings(**settings.model_dump()).changed(given)
        pretrain(settings)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
        log = (folder / "run" / "log.txt").read_text("utf-8").splitlines()
    last = [line for line in lines if line["kind"] == "train"][1:]
    rate = statistics.median(line["clips_per_second"] for line in last)
    notes = [line.split(" ", 2)[2] for line in log if any(word in line for word in ("compile", "log-mels", "worker"))]
    waited = statistics.median(line["data_wait"] for line in last)
    return {"seconds": settings.batch_size / rate, "data_wait": waited, "notes": notes}


def settings_of(row: Row, toy: bool) -> tuple[Any, int]:
    """Settings of a row, resolved, and frames of a view."""
    from asit.config.pretrain_settings import resolve

    cpu_step.CLIPS = row.clips
    found: dict[str, Any] = {"precision": row.precision, "compile": row.compile}
    if toy:
        found["encoder"] = {"size": "custom", "width": 32, "depth": 2, "heads": 2}
    settings = resolve(cpu_step.settings_of(toy), found)
    return settings, 64 if toy else cpu_step.FRAMES


def batch_of(row: Row, settings: Any, frames: int) -> Any:
    """A synthetic batch as the loader gives it: with its views, or as crops and bits of masks."""
    import dataclasses

    import torch

    from asit.audio.fbank import FrontEnd
    from asit.data.loading import crops
    from asit.data.loading.crops import StackedCrops

    cpu_step.CLIPS = row.clips
    batch = cpu_step.batch_of(settings, frames)
    if row.logmels == "loader":
        return batch
    samples = FrontEnd(settings.front_end).samples_for(frames + 100)
    return dataclasses.replace(
        batch,
        clean=batch.clean[:, :, :0],
        drop=crops.pack(batch.drop),
        replace=crops.pack(batch.replace),
        crops=StackedCrops(
            torch.randn(row.clips, samples, generator=torch.Generator().manual_seed(0)) * 0.05,
            torch.full((row.clips,), frames + 100),
            torch.tensor([[i % 100, frames] for i in range(2 * row.clips)]),
            torch.tensor([[1.0, 0.0]]).repeat(2 * row.clips, 1),
        ),
    )
