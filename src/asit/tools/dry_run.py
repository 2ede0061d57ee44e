"""Resolve a pretraining run and measure a few of its steps without writing anything: `asit pretrain --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asit import runtime
from asit.config import PretrainSettings, yaml
from asit.pretrain import continued, pretrain_resolve
from asit.pretrain.pretrain_setup import prepare
from asit.tools.step_profile import extrapolate, machine, small_costs
from asit.training import open_data


@dataclass(frozen=True)
class DryRun:
    """A resolved run and its measured cost.

    Attributes:
        settings: YAML, without any auto.
        shapes: of the networks' inputs.
        seconds_per_step: of the whole batch, over all accumulation steps.
        seconds_per_clip: to load one clip in one process.
        total_seconds: of the run, if loading keeps up.
        memory_gb: of one process, "cpu" and on a GPU "gpu"; machine_gb: what the machine has.
        extrapolated: whether the run's forward pass is larger than those measured.
    """

    settings: str
    shapes: dict[str, Any]
    seconds_per_step: float
    seconds_per_clip: float
    clips_per_second: float
    total_seconds: float
    memory_gb: dict[str, float]
    machine_gb: dict[str, float]
    extrapolated: bool


def dry_run(settings: PretrainSettings) -> DryRun:
    """Resolve all settings and take a few steps on real clips, in forward passes of 2 and 4 clips; write nothing.

    Raises:
        AsitError: whatever would refuse the run before its first step.
    """
    pretrain_resolve.check(settings)
    with runtime.world(settings.device, settings.threads) as world:
        settings, source = continued.start(settings)
        listed = open_data.of_run(settings, None)
        setup = prepare(settings, listed, world, source)
        settings = setup.settings
        micro = settings.batch_size // (world.size * settings.accumulate)
        costs, loading = small_costs(setup, world, micro)
        cost = extrapolate(costs, micro)
        seconds = cost.seconds * settings.accumulate
        first, encoder = setup.batch_of([setup.clips[0, 0]]), setup.task.student.encoder
        views = {"global views": first.clean, "local views": first.local}
        return DryRun(
            settings=yaml.to_yaml(settings),
            shapes={
                "a forward pass": f"{micro} clips",
                **{name: [len(x) * micro, *x.shape[1:]] for name, x in views.items() if x is not None},
                "tokens a global view": encoder.pos_embed.shape[1],
                "patch grid (time, mel)": list(encoder.grid),
            },
            seconds_per_step=seconds,
            seconds_per_clip=loading,
            clips_per_second=settings.batch_size / seconds,
            total_seconds=seconds * setup.plan.total,
            memory_gb=cost.memory_gb,
            machine_gb=machine(world.device),
            extrapolated=micro > costs[-1].clips,
        )
