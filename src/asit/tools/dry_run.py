"""What a run will be, before it is begun: everything resolved, and a few real steps measured."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any, TextIO

from asit import runtime
from asit.config import PretrainSettings, yaml
from asit.pretrain import method
from asit.pretrain.pretrain_setup import batch_of, prepare
from asit.tools.growth import machine, repeated
from asit.training import open_data

SMALL, LARGE = 2, 4
"""Clips in the two forward passes that are measured; a larger one is extrapolated, so that looking costs little."""


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What was resolved and measured.

    Attributes:
        settings: as YAML, every auto a number.
        notes: choices with their reasons.
        shapes: of what the networks see.
        seconds_per_step: of the whole batch, over all accumulation steps.
        seconds_per_clip: of loading one clip in one process.
        total_seconds: of the whole run, if loading keeps up.
        memory_gb: of one process, "cpu" and on a GPU "gpu".
        machine_gb: what the machine has, by the same names, where it can be told.
        extrapolated: whether a forward pass of the run is larger than those measured.
    """

    settings: str
    notes: list[str]
    shapes: dict[str, Any]
    seconds_per_step: float
    seconds_per_clip: float
    clips_per_second: float
    total_seconds: float
    memory_gb: dict[str, float]
    machine_gb: dict[str, float]
    extrapolated: bool


def dry_run(settings: PretrainSettings, *, stream: TextIO | None = sys.stderr) -> DryRun:
    """Resolve everything, take a few real steps on real clips at two small sizes, and write nothing.

    Raises:
        AsitError: all that a run would be refused for before its first step.
    """
    method.check(settings)
    with runtime.world(settings.device, settings.threads) as world:
        listed = open_data.catalogue(open_data.Wanted.of(settings), None, stream if world.main else None)
        setup = prepare(settings, listed, world)
        settings, plan = setup.settings, setup.plan
        micro = settings.batch_size // (world.size * settings.accumulate)
        began = time.perf_counter()
        samples = [setup.clips[0, i % len(setup.clips)] for i in range(min(LARGE, micro))]
        loading = (time.perf_counter() - began) / len(samples)
        sizes = sorted({min(SMALL, micro), min(LARGE, micro)})
        measured = [repeated(setup, world, samples[:size]) for size in sizes]
        seconds = _line(sizes, [m["seconds"] for m in measured], micro) * settings.accumulate
        first = batch_of(setup, world, samples)
        encoder = setup.task.student.encoder
        return DryRun(
            yaml.to_yaml(settings),
            setup.notes,
            {
                "a forward pass": f"{micro} clips",
                "global views": [len(first.clean) // len(samples) * micro, *first.clean.shape[1:]],
                "local views": [len(first.local) // len(samples) * micro, *first.local.shape[1:]],
                "tokens a global view": encoder.pos_embed.shape[1],
                "patch grid (time, mel)": list(encoder.grid),
            },
            seconds,
            loading,
            settings.batch_size / seconds,
            seconds * plan.total,
            {name: _line(sizes, [m[name] for m in measured], micro) for name in ("cpu", "gpu") if name in measured[0]},
            machine(world.device),
            micro > sizes[-1],
        )


def _line(sizes: list[int], values: list[float], at: int) -> float:
    """The straight line through what was measured, at another size; never below what was measured."""
    if len(sizes) == 1 or at == sizes[-1]:
        return values[-1]
    slope = max(0.0, (values[-1] - values[0]) / (sizes[-1] - sizes[0]))
    return values[-1] + slope * (at - sizes[-1])
