"""A few real steps, loads and a checkpoint, measured on this machine: what `asit.tools.run_estimate` reckons with.

One call of the training loop goes through rounds of three phases: steps fed by the loader (as a run has them), the same
batch again and again (the step alone), and batches taken from the loader without a step (the loader alone). So the
three are measured under the same load of the machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from asit import runtime
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.sampler import AHEAD, MicroBatches, loader, order
from asit.io import checkpoint
from asit.model.cpu import bf16
from asit.pretrain import pretrain_dataset
from asit.pretrain.pretrain_setup import Setup, collate, keys, model
from asit.runtime import World
from asit.tools.growth import FIRST, LEAST_GROWTH, Say, ladder, line, machine, peak_memory, resident, synchronise
from asit.training import loop
from asit.training.async_checkpoint import Saver
from asit.training.metrics_log import Records
from asit.training.prefetch import prefetched

ROUNDS = 3
FILES = 32
"""Recordings that are made where there are none; a list names each many times."""


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
        read_cpu_seconds: of the processor's time for it.
        again_seconds: of one that is kept in memory; None where recordings are not kept.
        again_cpu_seconds: of the processor's time for any reading after the first.
        memory_gb: peak of the process with `micro` clips; "cpu", and on a GPU "gpu".
        clip_gb: what one more clip adds to each.
        worker_gb: peak of one loader process, pages shared with the others included.
        machine_gb: what the machine has, by the same names.
        checkpoint_seconds: to write a run's state and its model.
        checkpoint_stall: s of it in which no step is taken: all of it, or the copying where it is written beside steps,
            and on a CPU what the writing takes of the processors.
        checkpoint_gb: of a run's state.
        model_gb: of the model's folder.
        start_seconds: from the command's begin to the first batch.
        start_cpu_seconds: of the processor's time until the first step.
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
    again_cpu_seconds: float
    memory_gb: dict[str, float]
    clip_gb: dict[str, float]
    worker_gb: float
    machine_gb: dict[str, float]
    checkpoint_seconds: float
    checkpoint_stall: float
    checkpoint_gb: float
    model_gb: float
    start_seconds: float
    start_cpu_seconds: float
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
    began, start_cpu = time.perf_counter(), time.process_time()
    if world.device.type == "cpu":
        bf16.keep_freed_memory()  # as a run does
    clips, (read, read_cpu), (again, again_cpu) = _reads(setup, min(micro, 16), kept, budget / 12)
    say(f"one process reads {1 / read:.0f} clips/s, the first time")
    steps_of = ladder(setup, world, clips, micro, budget * 0.35, say)
    size = steps_of[-1][0]
    per_clip, fixed = line([(n, found["seconds"]) for n, found in steps_of], LEAST_GROWTH)
    left = max(0.0, budget * 0.9 - (time.perf_counter() - began))
    rounds = ROUNDS if left > 8 * steps_of[-1][1]["seconds"] else 2
    steps = max(1, min(20, int(left * 0.7 / (2 * rounds * steps_of[-1][1]["seconds"]))))
    if steps == 1:
        say(f"hardly any steps fit into {budget:g} s: a larger --budget narrows the interval")
    say(f"{rounds} rounds of {steps} fed steps, {steps} steps alone and some batches of the loader alone")
    phases = _Phases(rounds, steps, setup.workers, size)
    with tempfile.TemporaryDirectory(prefix="asit-plan-") as scratch:
        saved = _Saved(setup, Path(scratch))
        opened = time.perf_counter()
        chosen = _keys(setup, world, size, kept=kept)
        pin = world.device.type == "cuda"
        loaded = loader(setup.clips, chosen, collate(setup), workers=setup.workers, pin=pin)
        data = prefetched(loaded, world.device, setup.on_device)
        try:
            fed = phases.through(data, lambda: synchronise(world.device))
            plan = dataclasses.replace(
                setup.plan,
                total=phases.total,
                batch=size,
                accumulate=1,
                stop_after=0,
                checkpoint_every=phases.total,
                log_every=phases.total,
                save_in_background=setup.settings.records.save_in_background,
            )
            with Records(None, plan.total, 0, tensorboard=False) as records:
                loop.fit(setup.task, fed, plan, world, setup.precision, records, save=saved)
        finally:
            data.close()
    memory = peak_memory(world.device)
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
        again_cpu_seconds=again_cpu,
        memory_gb=memory,
        clip_gb={name: line([(n, found[name]) for n, found in steps_of])[0] for name in memory},
        worker_gb=resident(resource.RUSAGE_CHILDREN) if setup.workers else 0.0,
        machine_gb=machine(world.device),
        checkpoint_seconds=saved.seconds,
        checkpoint_stall=saved.stall(world.device),
        checkpoint_gb=saved.state_gb,
        model_gb=saved.model_gb,
        start_seconds=prepared + phases.first - opened,
        start_cpu_seconds=start_cpu,
        device=str(world.device)
        + (f" ({torch.cuda.get_device_name(world.device)})" if world.device.type == "cuda" else ""),
        threads=torch.get_num_threads(),
        precision=setup.precision.name,
        environment=runtime.environment(),
    )


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
    """Writes what a run writes at a checkpoint, into a folder that goes away, and notes times and sizes."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup, self.folder = setup, folder
        self.seconds = self.copied = self.cpu = self.state_gb = self.model_gb = 0.0

    def __call__(self, step: int, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
        began = time.perf_counter()
        if self.setup.settings.records.save_in_background:
            Saver(True).copy(tensors)  # once more, since the loop's own copying is over when it comes here
        written = model(self.setup, step)
        self.copied = time.perf_counter() - began

        def write() -> None:
            began, spent = time.perf_counter(), time.thread_time()
            written.save(self.folder / "model", overwrite=True)
            checkpoint.save_state(self.folder / "checkpoints", step, tensors, {"step": step}, keep=1)
            self.seconds, self.cpu = time.perf_counter() - began, time.thread_time() - spent
            self.model_gb, self.state_gb = _size(self.folder / "model"), _size(self.folder / "checkpoints")

        return write

    def stall(self, device: torch.device) -> float:
        """Seconds without a step."""
        if not self.setup.settings.records.save_in_background:
            return self.copied + self.seconds
        return self.copied + (self.cpu / torch.get_num_threads() if device.type == "cpu" else 0.0)


def _reads(
    setup: Setup, count: int, kept: bool, limit: float
) -> tuple[list[pretrain_dataset.Sample], tuple[float, float], tuple[float | None, float]]:
    """Some samples; s by the clock and of the processor's time for one, read first, and again where they are kept."""
    setup.clips[1, 0]  # what is loaded once is not a clip's
    picked = order(setup.settings.seed, 0, len(setup.clips))[:count].tolist()
    found: list[pretrain_dataset.Sample] = []
    began, spent = time.perf_counter(), time.process_time()
    for index in picked:
        found.append(setup.clips[0, index])
        if len(found) >= min(FIRST, count) and time.perf_counter() - began > limit:
            break
    many = len(found)
    first = (time.perf_counter() - began) / many, (time.process_time() - spent) / many
    if not kept:
        return found, first, (None, first[1])
    began, spent = time.perf_counter(), time.process_time()
    for index in picked[:many]:
        setup.clips[0, index]
    return found, first, ((time.perf_counter() - began) / many, (time.process_time() - spent) / many)


def _keys(setup: Setup, world: World, micro: int, *, kept: bool) -> MicroBatches:
    """Micro-batches in a run's order; where recordings are kept, a few again and again, so that most are."""
    if not kept:
        settings = setup.settings.model_copy(update={"batch_size": micro, "accumulate": 1})
        return keys(dataclasses.replace(setup, settings=settings), world, 0)
    seed, count = setup.settings.seed, len(setup.clips)
    # A whole number of turns of the loader's processes: each meets its own clips again.
    few = max(1, min(count // micro, 2 * max(1, setup.workers)))
    few = few // max(1, setup.workers) * max(1, setup.workers) or few
    first = order(seed, 0, count)[: few * micro]
    return MicroBatches(lambda epoch: first, few * micro, micro, micro, 0, 1, 0)


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
