"""A few real steps, loads and a checkpoint, measured on this machine: what `asit.runs.plan` reckons with.

One call of the training loop goes through rounds of three phases: steps fed by the loader (as a run has them), the same
batch again and again (the step alone), and batches taken from the loader without a step (the loader alone). So the
three are measured under the same load of the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from asit import checkpoint, runtime
from asit.data import batches
from asit.data.catalogue import Catalogue, Clip
from asit.data.order import MicroBatches, loader, order
from asit.engine import loop
from asit.engine.records import Records
from asit.model import cpu
from asit.runs.setup import Setup, collate, model
from asit.runtime import World

FIRST = 2
"""Clips in the first forward pass that is measured; sizes double from there while time and memory allow."""
ROUNDS = 3
FILES = 32
"""Recordings that are made where there are none; a list names each many times."""
AHEAD = 4
"""Batches that each loader process holds ready (`asit.data.order.loader`)."""
LEAST_GROWTH = 0.5
"""Share of a step that is taken to grow with its clips where the measured line is flatter, as on a busy machine."""
MEMORY_SHARE = 0.8
"""Share of the free memory that a larger forward pass may be expected to take before it is tried."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one process of a run costs on a machine.

    Attributes:
        micro: clips of the largest forward pass measured.
        step_seconds: a step of `micro` clips on a batch that is there already, for each round.
        fed_seconds: the same step fed by the loader, as a run has it, for each round.
        fed_cpu_seconds: of the processor's time in this process, for such a step; loaders' not included.
        clip_seconds: what one more clip in a forward pass adds to a step.
        fixed_seconds: what a step costs whatever its clips: clipping, optimiser, teacher.
        loader_clips: clips/s of the loader's processes while no step runs, for each round.
        workers: loader processes.
        read_seconds: of one clip read for the first time in one process, to its views.
        read_cpu_seconds: of the processor's time for it; for `again_seconds` where recordings are kept.
        again_seconds: of one that is kept in memory; None where recordings are not kept.
        memory_gb: peak of the process with `micro` clips; "cpu", and on a GPU "gpu".
        clip_gb: what one more clip adds to each.
        worker_gb: peak of one loader process, pages shared with the others included.
        machine_gb: what the machine has, by the same names.
        checkpoint_seconds: to write a run's state and its model.
        checkpoint_gb: of a run's state.
        model_gb: of the model's folder.
        start_seconds: from settings and catalogue to the first batch.
        device: of the steps.
        threads: of the process.
        precision: arithmetic of the networks.
        environment: versions and machine.
    """

    micro: int
    step_seconds: list[float]
    fed_seconds: list[float]
    fed_cpu_seconds: list[float]
    clip_seconds: float
    fixed_seconds: float
    loader_clips: list[float]
    workers: int
    read_seconds: float
    read_cpu_seconds: float
    again_seconds: float | None
    memory_gb: dict[str, float]
    clip_gb: dict[str, float]
    worker_gb: float
    machine_gb: dict[str, float]
    checkpoint_seconds: float
    checkpoint_gb: float
    model_gb: float
    start_seconds: float
    device: str
    threads: int
    precision: str
    environment: dict[str, Any]


def measure(
    setup: Setup, world: World, micro: int, *, kept: bool, budget: float, prepared: float, say: Say
) -> Measured:
    """Measure the parts of a run with forward passes of at most `micro` clips.

    Args:
        setup: the run, of one process.
        world: one process.
        micro: clips in a forward pass of the run; less is measured where these take too long or too much memory.
        kept: whether loaders keep decoded recordings in memory.
        budget: s; about how long to measure.
        prepared: s; what it took to come here, a part of a run's start.
        say: told what goes on.
    """
    began = time.perf_counter()
    if world.device.type == "cpu":
        cpu.keep_freed_memory()  # as a run does
    clips, read, again, read_cpu = _reads(setup, min(micro, 16), kept, budget / 12)
    say(f"one process reads {1 / read:.0f} clips/s, the first time")
    ladder = _ladder(setup, world, clips, micro, budget * 0.35, say)
    size = ladder[-1][0]
    per_clip, fixed = _line([(n, found["seconds"]) for n, found in ladder], LEAST_GROWTH)
    left = max(0.0, budget * 0.9 - (time.perf_counter() - began))
    rounds = ROUNDS if left > 8 * ladder[-1][1]["seconds"] else 2
    steps = max(1, min(20, int(left * 0.7 / (2 * rounds * ladder[-1][1]["seconds"]))))
    say(f"{rounds} rounds of {steps} fed steps, {steps} steps alone and some batches of the loader alone")
    phases = _Phases(rounds, steps, setup.workers, size)
    with tempfile.TemporaryDirectory(prefix="asit-plan-") as scratch:
        saved = _Saved(setup, Path(scratch))
        opened = time.perf_counter()
        data = loader(
            setup.clips,
            _keys(setup, size, kept=kept),
            collate(setup),
            workers=setup.workers,
            pin=world.device.type == "cuda",
        )
        try:
            fed = phases.through(data, lambda: _synchronise(world.device))
            plan = dataclasses.replace(
                setup.plan,
                total=phases.total,
                batch=size,
                accumulate=1,
                stop_after=0,
                checkpoint_every=phases.total,
                log_every=phases.total,
            )
            with Records(None, plan.total, 0, tensorboard=False) as records:
                loop.fit(setup.task, fed, plan, world, setup.precision, records, save=saved)
        finally:
            data.close()
    memory = _memory(world.device)
    return Measured(
        micro=size,
        step_seconds=phases.alone,
        fed_seconds=phases.fed,
        fed_cpu_seconds=phases.fed_cpu,
        clip_seconds=per_clip,
        fixed_seconds=fixed,
        loader_clips=phases.loaded,
        workers=setup.workers,
        read_seconds=read,
        read_cpu_seconds=read_cpu,
        again_seconds=again,
        memory_gb=memory,
        clip_gb={name: _line([(n, found[name]) for n, found in ladder])[0] for name in memory},
        worker_gb=_kilobytes(resource.RUSAGE_CHILDREN) if setup.workers else 0.0,
        machine_gb=machine(world.device),
        checkpoint_seconds=saved.seconds,
        checkpoint_gb=saved.state_gb,
        model_gb=saved.model_gb,
        start_seconds=prepared + phases.first - opened,
        device=str(world.device)
        + (f" ({torch.cuda.get_device_name(world.device)})" if world.device.type == "cuda" else ""),
        threads=torch.get_num_threads(),
        precision=setup.precision.name,
        environment=runtime.environment(),
    )


def machine(device: torch.device) -> dict[str, float]:
    """Memory in GB of the machine, and of its GPU."""
    found = {"cpu": memory_of_machine()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return {name: size for name, size in found.items() if size}


def memory_of_machine(name: str = "MemTotal") -> float:
    """GB of the machine's memory, or "MemAvailable" of it; 0 where that cannot be told."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return 0.0
    rows = dict(line.split(":") for line in table.read_text().splitlines())
    return int(rows[name].split()[0]) * 1024 / 1e9


def noise(scratch: Path, rate: int, seconds: float, count: int) -> Catalogue:
    """A list of `count` recordings that are some files of coloured noise, which FLAC compresses about as speech."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(min(FILES, count)):
        x = rng.normal(0.0, 0.02, round(seconds * rate) + 7)
        wave = np.convolve(x, np.ones(8) / 2, "valid").astype(np.float32)
        names.append(str(scratch / f"{i:02d}.flac"))
        soundfile.write(names[-1], wave, rate)
    clips = [Clip(names[i % len(names)], seconds, rate, 1) for i in range(count)]
    # Mean and std move no operation, so that any will do.
    return Catalogue.from_clips(clips, root=scratch, header={"mean": -8.0, "std": 4.0})


class _Phases:
    """The rounds, as the loop's source of batches: the loop's calls for the next batch are the marks between steps."""

    def __init__(self, rounds: int, steps: int, workers: int, size: int) -> None:
        self.rounds, self.steps, self.workers, self.size = rounds, steps, workers, size
        self.alone, self.fed, self.fed_cpu, self.loaded = (list[float]() for _ in range(4))
        self.first = 0.0
        self.total = 2 + 2 * rounds * steps + 1

    def through(self, data: Iterator[Any], synchronise: Callable[[], None]) -> Generator[Any]:
        def now() -> float:
            synchronise()
            return time.perf_counter()

        batch = next(data)
        self.first = time.perf_counter()
        yield batch
        yield next(data)
        for _ in range(self.rounds):
            mark, spent = now(), time.process_time()
            for _ in range(self.steps):
                batch = next(data)
                yield batch
            self.fed.append((now() - mark) / self.steps)
            self.fed_cpu.append((time.process_time() - spent) / self.steps)
            mark = now()
            yield from itertools.repeat(batch, self.steps)
            self.alone.append((now() - mark) / self.steps)
            for _ in range(AHEAD * self.workers):  # what was ready; from there on they come as they are made
                next(data)
            mark, many = time.perf_counter(), max(2, 2 * self.workers)
            for _ in range(many):
                next(data)
            self.loaded.append(many * self.size / (time.perf_counter() - mark))
            # In a run the loader has been ahead for long: let it be, where a step takes longer than its batch.
            time.sleep(min(AHEAD * self.workers * self.size / self.loaded[-1], 2 * self.steps * self.alone[-1]))
        yield batch  # the loop logs and saves after its last step, which is not measured


class _Saved:
    """Writes what a run writes at a checkpoint, into a folder that goes away, and notes time and sizes."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.seconds = self.state_gb = self.model_gb = 0.0

    def __call__(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        began = time.perf_counter()
        model(self.setup, step).save(self.folder / "model", overwrite=True)
        checkpoint.save_state(self.folder / "checkpoints", step, tensors, {"step": step}, keep=1)
        self.seconds = time.perf_counter() - began
        self.model_gb, self.state_gb = _size(self.folder / "model"), _size(self.folder / "checkpoints")


def _reads(
    setup: Setup, count: int, kept: bool, limit: float
) -> tuple[list[batches.Sample], float, float | None, float]:
    """Some samples; s for one the first time, again where they are kept in memory, and of the processor's time."""
    setup.clips[1, 0]  # what is loaded once is not a clip's
    picked = order(setup.settings.seed, 0, len(setup.clips))[:count].tolist()
    found: list[batches.Sample] = []
    began, spent = time.perf_counter(), time.process_time()
    for index in picked:
        found.append(setup.clips[0, index])
        if len(found) >= min(FIRST, count) and time.perf_counter() - began > limit:
            break
    first = (time.perf_counter() - began) / len(found)
    cpu_first = (time.process_time() - spent) / len(found)
    if not kept:
        return found, first, None, cpu_first
    began, spent = time.perf_counter(), time.process_time()
    for index in picked[: len(found)]:
        setup.clips[0, index]
    return (
        found,
        first,
        (time.perf_counter() - began) / len(found),
        (time.process_time() - spent) / len(found),
    )


def _ladder(
    setup: Setup, world: World, clips: list[batches.Sample], micro: int, limit: float, say: Say
) -> list[tuple[int, dict[str, float]]]:
    """Steps of growing size, up to `micro` clips where time and memory allow; at least two where there are two."""
    done: list[tuple[int, dict[str, float]]] = []
    began, size = time.perf_counter(), min(FIRST, micro)
    free = {"cpu": memory_of_machine("MemAvailable") or float("inf")}
    if world.device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(world.device)[0] / 1e9
    while True:
        many = list(itertools.islice(itertools.cycle(clips), size))
        done.append((size, _repeated(setup, world, many)))
        say(f"steps of {size} clips: {done[-1][1]['seconds']:.3f} s")
        left = limit - (time.perf_counter() - began)
        at, last = done[-1]
        # The whole batch at once if it fits, or else twice as much; a step is taken three times.
        fits = [
            n
            for n in (micro, min(micro, 2 * size))
            if n > size
            and (len(done) < 2 or 3 * last["seconds"] * n / at < left)
            and (len(done) > 1 or n == min(micro, 2 * size))
            and all(_at(done, name, n) - done[0][1][name] < MEMORY_SHARE * space for name, space in free.items())
        ]
        if not fits:
            return done
        size = fits[0]


def _at(done: list[tuple[int, dict[str, float]]], name: str, size: int) -> float:
    slope, _ = _line([(n, found[name]) for n, found in done])
    return done[-1][1][name] + slope * (size - done[-1][0])


def _line(points: list[tuple[int, float]], least: float = 0.0) -> tuple[float, float]:
    """Slope and intercept, neither below 0, of the line through the largest two sizes; one point is all slope.

    Args:
        points: (clips, value), in growing size.
        least: share of the last value that grows with the clips at least, whatever noise says.
    """
    (n, last) = points[-1]
    if len(points) == 1:
        return last / n, 0.0
    (m, before) = points[-2]
    slope = min(max(least * last / n, (last - before) / (n - m)), last / n)
    return slope, last - slope * n


def _repeated(setup: Setup, world: World, samples: list[batches.Sample]) -> dict[str, float]:
    """The faster of two steps on these clips after one to warm up, and peak memory so far in GB."""
    batch, marks = collate(setup)(samples), list[float]()
    plan = dataclasses.replace(
        setup.plan, total=3, batch=len(samples), accumulate=1, stop_after=0, checkpoint_every=1 << 60, log_every=1 << 60
    )

    def repeated() -> Generator[Any]:
        while True:
            _synchronise(world.device)
            marks.append(time.perf_counter())
            yield batch

    with Records(None, plan.total, 0, tensorboard=False) as records:
        loop.fit(setup.task, repeated(), plan, world, setup.precision, records)
    _synchronise(world.device)
    marks.append(time.perf_counter())
    return {"seconds": min(b - a for a, b in itertools.pairwise(marks[1:])), **_memory(world.device)}


def _keys(setup: Setup, micro: int, *, kept: bool) -> MicroBatches:
    """Micro-batches of the first epoch's order; where recordings are kept, a few again and again, so that most are."""
    seed, count = setup.settings.seed, len(setup.clips)
    if not kept:
        return MicroBatches(lambda epoch: order(seed, epoch, count), count, micro, micro, 0, 1, 0)
    # A whole number of turns of the loader's processes: each meets its own clips again.
    few = max(1, min(count // micro, 2 * max(1, setup.workers)))
    few = few // max(1, setup.workers) * max(1, setup.workers) or few
    first = order(seed, 0, count)[: few * micro]
    return MicroBatches(lambda epoch: first, few * micro, micro, micro, 0, 1, 0)


def _memory(device: torch.device) -> dict[str, float]:
    found = {"cpu": _kilobytes(resource.RUSAGE_SELF)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def _kilobytes(who: int) -> float:
    """Peak resident memory in GB; the system says kilobytes, but bytes on macOS."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
