"""Measure a few real steps of a run for `--dry-run`, and of pretraining also a checkpoint for `asit plan`."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asit.data.loading.loader import loader
from asit.finetune.finetune_setup import FinetuneSetup
from asit.io import checkpoint
from asit.model.cpu import bf16
from asit.pretrain.pretrain_setup import PretrainSetup
from asit.runtime import World
from asit.training import loop, resources
from asit.training.async_checkpoint import Saver
from asit.training.metrics_log import Records
from asit.training.prefetch import prefetched
from asit.training.setup import Setup

log = logging.getLogger(__name__)

ROUNDS = 3
WARM_UP = 2
"""Steps before the rounds."""
SIZES = (2, 4)
"""Clips of the small forward passes that larger ones are extrapolated from."""
LEAST_GROWTH = 0.5
"""Least share of a step that grows with its clips, where noise makes the measured line flatter."""
MEMORY_SHARE = 0.8
"""Share of the machine's memory that a larger forward pass may be expected to take."""


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


def measure(setup: PretrainSetup, world: World, micro: int, *, budget: float, began: float) -> StepProfile:
    """Measure one process of a run.

    Args:
        setup: the run of one process.
        world: this process.
        micro: clips in a forward pass of the run; fewer are measured where time or memory are short.
        budget: seconds to measure, about.
        began: `time.perf_counter()` when the command began.
    """
    started, device = time.perf_counter(), world.device
    if device.type == "cpu":
        bf16.keep_freed_memory()
    costs, _ = small_costs(setup, world, micro)
    left = max(0.0, budget * 0.9 - (time.perf_counter() - started))
    size = micro
    while size > costs[-1].clips and not _fits(extrapolate(costs, size), left, machine(device)):
        size = max(costs[-1].clips, size // 2)
    steps = max(1, min(20, int(left * 0.8 / (ROUNDS * extrapolate(costs, size).seconds))))
    log.info("%d rounds of %d steps of %d clips%s", ROUNDS, steps, size, " (budget is short)" * (steps == 1))
    keys = dataclasses.replace(setup.sampler, batch=size * world.size, micro=size)
    loaded = loader(setup.clips, keys, setup.collate, workers=setup.workers, pin=device.type == "cuda")
    data = prefetched(loaded, device, setup.on_device)
    requests, waits, saved = list[float](), list[float](), dict[str, float]()

    def fed() -> Generator[Any]:
        while True:
            if (len(waits) - WARM_UP) % steps == 0:  # waits for a GPU between rounds alone
                requests.append(_now(device))
            asked = time.perf_counter()
            batch = next(data)
            waits.append(time.perf_counter() - asked)
            yield batch

    def save(step: int, tensors: dict[str, torch.Tensor]) -> None:
        saved.update(_checkpoint(setup, step, tensors))

    try:  # the loop logs and saves after its last step, which is not measured
        _train(setup, world, fed(), WARM_UP + ROUNDS * steps + 1, size, save=save)
    finally:
        data.close()
    rounds = [(b - a) / steps for a, b in itertools.pairwise(requests[-ROUNDS - 1 :])]
    waited = [statistics.mean(waits[WARM_UP + i * steps :][:steps]) for i in range(ROUNDS)]
    memory, alone = _peak(device), statistics.median(rounds) - statistics.median(waited)
    more = extrapolate([*(cost for cost in costs if cost.clips < size), StepCost(size, alone, memory)], size + 1)
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return StepProfile(
        micro=size,
        step_seconds=rounds,
        wait_seconds=waited,
        clip_seconds=max(LEAST_GROWTH * alone / size, more.seconds - alone),
        workers=setup.workers,
        memory_gb=memory,
        clip_gb={name: more.memory_gb[name] - memory[name] for name in memory},
        worker_gb=_resident(resource.RUSAGE_CHILDREN) if setup.workers else 0.0,
        machine_gb=machine(device),
        checkpoint_seconds=saved["seconds"],
        checkpoint_gb=saved["checkpoints"],
        model_gb=saved["model"],
        start_seconds=started - began + waits[0],
        device=f"{device}{name}",
        threads=torch.get_num_threads(),
        precision=setup.precision.name,
    )


def small_costs(setup: PretrainSetup | FinetuneSetup, world: World, micro: int) -> tuple[list[StepCost], float]:
    """Measure steps of 2 and of 4 clips, at most `micro`. Return them and the seconds to load one clip."""
    began = time.perf_counter()
    samples = [setup.clips[0, i % len(setup.clips)] for i in range(min(SIZES[-1], micro))]
    loading, costs = (time.perf_counter() - began) / len(samples), []
    for size in sorted({min(size, micro) for size in SIZES}):
        batch, times = setup.batch_of(samples[:size]), list[float]()

        def batches(batch: Any = batch, times: list[float] = times) -> Generator[Any]:
            while True:
                times.append(_now(world.device))
                yield batch

        _train(setup, world, batches(), 3, size)  # the first step warms up
        times.append(_now(world.device))
        fastest = min(b - a for a, b in itertools.pairwise(times[1:]))
        costs.append(StepCost(size, fastest, _peak(world.device)))
    return costs, loading


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


def _checkpoint(setup: PretrainSetup, step: int, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Write what a run writes at a checkpoint; return the seconds without a step and the sizes in GB."""
    began, background = time.perf_counter(), setup.settings.records.save_in_background
    if background:
        Saver().copy(tensors)
    written = setup.model(step)
    copied = time.perf_counter() - began
    with tempfile.TemporaryDirectory(prefix="asit-plan-") as scratch:
        folders = Path(scratch, "model"), Path(scratch, "checkpoints")
        written.save(folders[0])
        checkpoint.save_state(folders[1], step, tensors, {"step": step}, keep=1)
        seconds = copied if background else time.perf_counter() - began
        size = {
            one.name: sum(path.stat().st_size for path in one.rglob("*") if path.is_file()) / 1e9 for one in folders
        }
    return {"seconds": seconds, **size}


def _train(setup: Setup[Any], world: World, batches: Iterator[Any], steps: int, clips: int, **options: Any) -> None:
    """Train `steps` steps of one forward pass of `clips` clips per process."""
    plan = dataclasses.replace(
        setup.plan,
        total=steps,
        batch=clips * world.size,
        accumulate=1,
        stop_after=0,
        checkpoint_every=steps,
        log_every=steps,
        save_in_background=False,
    )
    with Records(None, steps, 0) as records:
        what: dict[str, Any] = {"task": setup.task, "batches": batches, "plan": plan, "world": world}
        loop.Loop(**what, precision=setup.precision, records=records, **options).run()


def _peak(device: torch.device) -> dict[str, float]:
    found = {"cpu": _resident(resource.RUSAGE_SELF)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def _fits(cost: StepCost, seconds: float, machine_gb: dict[str, float]) -> bool:
    """Whether two steps per round fit in `seconds`, and a step in the share of the memory."""
    fits = all(cost.memory_gb[name] < MEMORY_SHARE * size for name, size in machine_gb.items())
    return fits and 2 * ROUNDS * cost.seconds < seconds


def _resident(who: int) -> float:
    """Return the peak resident memory in GB; the system counts kilobytes, but bytes on macOS."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
