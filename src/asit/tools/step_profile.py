"""Measure a few real steps and a checkpoint of a pretraining run, for `asit plan` and `--dry-run`."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from asit import runtime
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.loader import loader
from asit.data.loading.sampler import MicroBatchSampler, permutation
from asit.io import checkpoint
from asit.model.cpu import bf16
from asit.pretrain.pretrain_dataset import PretrainSample
from asit.pretrain.pretrain_setup import PretrainSetup
from asit.runtime import World
from asit.training import loop, resources
from asit.training.async_checkpoint import Saver
from asit.training.metrics_log import Records
from asit.training.prefetch import prefetched

log = logging.getLogger(__name__)

ROUNDS = 3
FILES = 32
"""Files of noise that stand in for recordings that are not here."""
SIZES = (2, 4)
"""Clips of the small forward passes that larger ones are extrapolated from."""
LEAST_GROWTH = 0.5
"""Least share of a step that grows with its clips, where noise makes the measured line flatter."""
MEMORY_SHARE = 0.8
"""Share of the free memory that a larger forward pass may be expected to take."""


@dataclass(frozen=True)
class StepCost:
    """A step of one forward pass: seconds of the fastest, and the process's peak memory so far ("cpu", "gpu") in GB."""

    clips: int
    seconds: float
    memory_gb: dict[str, float]


@dataclass(frozen=True)
class StepProfile:
    """Costs of one process of a run. Lists hold one value per round; dicts have "cpu", and on a GPU "gpu"."""

    micro: int
    """Clips of the largest forward pass measured."""
    step_seconds: list[float]
    """A step of `micro` clips fed by the loader, as in a run."""
    wait_seconds: list[float]
    """Time of it spent waiting for the loader."""
    clip_seconds: float
    """Added to a step by one more clip in its forward passes."""
    workers: int
    memory_gb: dict[str, float]
    """Peak of the process with `micro` clips."""
    clip_gb: dict[str, float]
    """Added by one more clip."""
    worker_gb: float
    """Peak of one loader process, shared pages included."""
    machine_gb: dict[str, float]
    checkpoint_seconds: float
    """In which no step is taken; of a checkpoint written in the background, the copying."""
    checkpoint_gb: float
    model_gb: float
    start_seconds: float
    """From the start of the command to the first batch."""
    device: str
    threads: int
    precision: str
    environment: dict[str, Any]


def measure(setup: PretrainSetup, world: World, micro: int, *, kept: bool, budget: float, began: float) -> StepProfile:
    """Measure one process of a run.

    Args:
        setup: the run of one process.
        world: this process.
        micro: clips in a forward pass of the run; fewer are measured where time or memory are short.
        kept: whether loaders keep decoded recordings in memory.
        budget: seconds to measure, about.
        began: `time.perf_counter()` when the command began.
    """
    prepared = time.perf_counter()
    if world.device.type == "cpu":
        bf16.keep_freed_memory()
    free = _free_memory(world.device)
    costs, _ = small_costs(setup, world, micro)
    left = max(0.0, budget * 0.9 - (time.perf_counter() - prepared))
    size = micro
    while size > costs[-1].clips and not _fits(costs, size, left, free):
        size = max(costs[-1].clips, size // 2)
    expected = extrapolate(costs, size)
    steps = max(1, min(20, int(left * 0.8 / (ROUNDS * expected.seconds))))
    log.info("%d rounds of %d steps of %d clips%s", ROUNDS, steps, size, " (budget is short)" * (steps == 1))
    rounds = _Rounds(steps, world.device)
    with tempfile.TemporaryDirectory(prefix="asit-plan-") as scratch:
        saved = _Save(setup, Path(scratch))
        opened = time.perf_counter()
        chosen = _keys(setup, world, size, kept)
        loaded = loader(setup.clips, chosen, setup.collate, workers=setup.workers, pin=world.device.type == "cuda")
        data = prefetched(loaded, world.device, setup.on_device)
        try:
            _train(setup, world, rounds.batches(data), 2 + ROUNDS * steps + 1, size, save=saved)
        finally:
            data.close()
    memory = _peak(world.device)
    alone = statistics.median(rounds.seconds) - statistics.median(rounds.waits)
    costs = [*(cost for cost in costs if cost.clips < size), StepCost(size, alone, memory)]
    more = extrapolate(costs, size + 1)
    name = f" ({torch.cuda.get_device_name(world.device)})" if world.device.type == "cuda" else ""
    return StepProfile(
        micro=size,
        step_seconds=rounds.seconds,
        wait_seconds=rounds.waits,
        clip_seconds=max(LEAST_GROWTH * alone / size, more.seconds - alone),
        workers=setup.workers,
        memory_gb=memory,
        clip_gb={name: more.memory_gb[name] - memory[name] for name in memory},
        worker_gb=_resident(resource.RUSAGE_CHILDREN) if setup.workers else 0.0,
        machine_gb=machine(world.device),
        checkpoint_seconds=saved.seconds,
        checkpoint_gb=saved.state_gb,
        model_gb=saved.model_gb,
        start_seconds=prepared - began + rounds.first - opened,
        device=f"{world.device}{name}",
        threads=torch.get_num_threads(),
        precision=setup.precision.name,
        environment=runtime.environment(),
    )


def small_costs(setup: PretrainSetup, world: World, micro: int) -> tuple[list[StepCost], float]:
    """Measure steps of 2 and of 4 clips, at most `micro`. Return them and the seconds to load one clip."""
    began = time.perf_counter()
    samples = [setup.clips[0, i % len(setup.clips)] for i in range(min(SIZES[-1], micro))]
    loading = (time.perf_counter() - began) / len(samples)
    return [step_cost(setup, world, samples[:size]) for size in sorted({min(size, micro) for size in SIZES})], loading


def step_cost(setup: PretrainSetup, world: World, samples: list[PretrainSample]) -> StepCost:
    """Measure three steps on these clips, the first of which warms up."""
    batch, times = setup.batch_of(samples), list[float]()

    def batches() -> Generator[Any]:
        while True:
            times.append(_now(world.device))
            yield batch

    _train(setup, world, batches(), 3, len(samples))
    times.append(_now(world.device))
    return StepCost(len(samples), min(b - a for a, b in itertools.pairwise(times[1:])), _peak(world.device))


def extrapolate(costs: Sequence[StepCost], clips: int) -> StepCost:
    """Return the cost at `clips` on the lines through the last two costs, or through 0 and the only one."""
    last = costs[-1]
    before = costs[-2] if len(costs) > 1 else StepCost(0, 0.0, dict.fromkeys(last.memory_gb, 0.0))
    share = (clips - last.clips) / (last.clips - before.clips)

    def line(start: float, end: float) -> float:
        return end + share * max(0.0, end - start)

    memory = {name: line(before.memory_gb[name], size) for name, size in last.memory_gb.items()}
    return StepCost(clips, line(before.seconds, last.seconds), memory)


def machine(device: torch.device) -> dict[str, float]:
    """Return the memory in GB of the machine and its GPU, where known."""
    found = {"cpu": resources.machine_memory() / 1e9}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return {name: size for name, size in found.items() if size}


def noise(scratch: Path, rate: int, seconds: float, count: int) -> Catalogue:
    """Return a catalogue of `count` recordings: some FLAC files of coloured noise, which compress about as speech."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(min(FILES, count)):
        x = rng.normal(0.0, 0.02, round(seconds * rate) + 7)
        wave = np.convolve(x, np.ones(8) / 2, "valid").astype(np.float32)
        names.append(str(scratch / f"{i:02d}.flac"))
        soundfile.write(names[-1], wave, rate)
    clips = [Clip(names[i % len(names)], seconds, rate, 1) for i in range(count)]
    return Catalogue.from_clips(clips, root=scratch, header={"mean": -8.0, "std": 4.0})  # any values cost the same


@dataclass
class _Rounds:
    """Times of the rounds, taken where the training loop requests its next batch."""

    steps: int
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    first: float = 0.0

    def batches(self, data: Iterator[Any]) -> Generator[Any]:
        batch = next(data)
        self.first = time.perf_counter()
        yield batch
        yield next(data)
        for _ in range(ROUNDS):
            start, waited = _now(self.device), list[float]()
            for _ in range(self.steps):
                requested = time.perf_counter()
                batch = next(data)
                waited.append(time.perf_counter() - requested)
                yield batch
            self.seconds.append((_now(self.device) - start) / self.steps)
            self.waits.append(statistics.mean(waited))
        yield batch  # the loop logs and saves after its last step, which is not measured


@dataclass
class _Save:
    """Write what a run writes at a checkpoint, and keep its time and sizes."""

    setup: PretrainSetup
    folder: Path
    seconds: float = 0.0
    state_gb: float = 0.0
    model_gb: float = 0.0

    def __call__(self, step: int, tensors: dict[str, torch.Tensor]) -> Callable[[], None]:
        began, background = time.perf_counter(), self.setup.settings.records.save_in_background
        if background:
            Saver(True).copy(tensors)  # the loop's own copy was made before this call
        written = self.setup.model(step)
        self.seconds = time.perf_counter() - began

        def write() -> None:
            began = time.perf_counter()
            written.save(self.folder / "model", overwrite=True)
            checkpoint.save_state(self.folder / "checkpoints", step, tensors, {"step": step}, keep=1)
            self.seconds += 0.0 if background else time.perf_counter() - began
            self.model_gb, self.state_gb = (
                sum(path.stat().st_size for path in (self.folder / name).rglob("*") if path.is_file()) / 1e9
                for name in ("model", "checkpoints")
            )

        return write


def _train(setup: PretrainSetup, world: World, batches: Iterator[Any], steps: int, clips: int, **options: Any) -> None:
    """Train `steps` steps of one forward pass of `clips` clips per process."""
    plan = dataclasses.replace(
        setup.plan,
        total=steps,
        batch=clips * world.size,
        accumulate=1,
        stop_after=0,
        checkpoint_every=steps,
        log_every=steps,
        save_in_background=setup.settings.records.save_in_background,
    )
    with Records(None, steps, 0, tensorboard=False) as records:
        loop.fit(setup.task, batches, plan, world, setup.precision, records, **options)


def _keys(setup: PretrainSetup, world: World, micro: int, kept: bool) -> MicroBatchSampler:
    """Return micro-batches in a run's order; where recordings are kept, the same few again, so that most are kept."""
    if not kept:
        return dataclasses.replace(setup.sampler, batch=micro * world.size, micro=micro)
    seed, count, workers = setup.settings.seed, len(setup.clips), max(1, setup.workers)
    few = max(1, min(count // micro, 2 * workers))
    few = few // workers * workers or few  # each loader process gets its own clips again
    first = permutation(seed, 0, count)[: few * micro]
    return MicroBatchSampler(order=lambda epoch: first, count=few * micro, batch=micro, micro=micro)


def _peak(device: torch.device) -> dict[str, float]:
    found = {"cpu": _resident(resource.RUSAGE_SELF)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def _free_memory(device: torch.device) -> dict[str, float]:
    """Return the free memory of the machine and its GPU in GB; the machine's only if known."""
    free, table = dict[str, float](), Path("/proc/meminfo")
    if table.exists():
        rows = dict(line.split(":") for line in table.read_text().splitlines())
        free["cpu"] = int(rows["MemAvailable"].split()[0]) * 1024 / 1e9
    if device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(device)[0] / 1e9
    return free


def _fits(costs: Sequence[StepCost], clips: int, seconds: float, free: dict[str, float]) -> bool:
    """Whether two steps per round fit in `seconds`, and a step in the share of the memory that was free at first."""
    cost = extrapolate(costs, clips)
    grown = {name: cost.memory_gb[name] - costs[0].memory_gb[name] for name in free}
    return 2 * ROUNDS * cost.seconds < seconds and all(grown[name] < MEMORY_SHARE * free[name] for name in free)


def _resident(who: int) -> float:
    """Return the peak resident memory in GB; the system counts kilobytes, but bytes on macOS."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
