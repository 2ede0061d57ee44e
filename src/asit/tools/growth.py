"""Steps of growing size: what one more clip costs in time and memory, up to what time and memory allow."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from asit.pretrain import pretrain_dataset
from asit.pretrain.pretrain_setup import Setup, batch_of
from asit.runtime import World
from asit.training import loop, resources
from asit.training.metrics_log import Records

FIRST = 2
"""Clips in the first forward pass that is measured; sizes double from there while time and memory allow."""
LEAST_GROWTH = 0.5
"""Share of a step that is taken to grow with its clips where the measured line is flatter, as on a busy machine."""
MEMORY_SHARE = 0.8
"""Share of the free memory that a larger forward pass may be expected to take before it is tried."""

Say = Callable[[str], None]


def ladder(
    setup: Setup, world: World, clips: list[pretrain_dataset.Sample], micro: int, limit: float, say: Say
) -> list[tuple[int, dict[str, float]]]:
    """Steps of growing size, up to `micro` clips where time and memory allow; at least two where there are two."""
    done: list[tuple[int, dict[str, float]]] = []
    began, size = time.perf_counter(), min(FIRST, micro)
    free = {"cpu": _available() or float("inf")}
    if world.device.type == "cuda":
        free["gpu"] = torch.cuda.mem_get_info(world.device)[0] / 1e9
    while True:
        many = list(itertools.islice(itertools.cycle(clips), size))
        done.append((size, repeated(setup, world, many)))
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
    slope, _ = line([(n, found[name]) for n, found in done])
    return done[-1][1][name] + slope * (size - done[-1][0])


def line(points: list[tuple[int, float]], least: float = 0.0) -> tuple[float, float]:
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


def repeated(setup: Setup, world: World, samples: list[pretrain_dataset.Sample]) -> dict[str, float]:
    """The faster of two steps on these clips after one to warm up, and peak memory so far in GB."""
    batch, marks = batch_of(setup, world, samples), list[float]()
    plan = dataclasses.replace(
        setup.plan,
        total=3,
        batch=len(samples) * world.size,
        accumulate=1,
        stop_after=0,
        checkpoint_every=1 << 60,
        log_every=1 << 60,
    )

    def again() -> Generator[Any]:
        while True:
            synchronise(world.device)
            marks.append(time.perf_counter())
            yield batch

    with Records(None, plan.total, 0, tensorboard=False) as records:
        loop.fit(setup.task, again(), plan, world, setup.precision, records)
    synchronise(world.device)
    marks.append(time.perf_counter())
    return {"seconds": min(b - a for a, b in itertools.pairwise(marks[1:])), **peak_memory(world.device)}


def machine(device: torch.device) -> dict[str, float]:
    """Memory in GB of the machine, and of its GPU."""
    found = {"cpu": resources.machine_memory() / 1e9}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return {name: size for name, size in found.items() if size}


def _available() -> float:
    """GB of the machine's memory that are free; 0 where that cannot be told."""
    table = Path("/proc/meminfo")
    if not table.exists():
        return 0.0
    rows = dict(line.split(":") for line in table.read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024 / 1e9


def peak_memory(device: torch.device) -> dict[str, float]:
    found = {"cpu": resident(resource.RUSAGE_SELF)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def resident(who: int) -> float:
    """Peak resident memory in GB; the system says kilobytes, but bytes on macOS."""
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
