"""Resolve a run and measure a few of its steps without writing anything: `--dry-run` of `pretrain` and `finetune`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asit import runtime
from asit.config import FinetuneSettings, PretrainSettings, yaml
from asit.data.catalogue.splits import folds
from asit.finetune import cross_validation, finetune_resolve, finetune_setup, init_model
from asit.finetune.finetune_setup import FinetuneSetup
from asit.model.vit import Encoder
from asit.pretrain import continued, pretrain_resolve, pretrain_setup
from asit.pretrain.pretrain_setup import PretrainSetup
from asit.runtime import World
from asit.tools.step_profile import extrapolate, machine, small_costs
from asit.training import open_data

log = logging.getLogger(__name__)


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


def dry_run(settings: PretrainSettings | FinetuneSettings) -> DryRun:
    """Resolve all settings and take a few steps on real clips, in forward passes of 2 and 4 clips; write nothing.

    Of a cross-validation the first fold is measured, and its time multiplied by the number of folds.

    Raises:
        AsitError: whatever would refuse the run before its first step.
    """
    if isinstance(settings, PretrainSettings):
        pretrain_resolve.check(settings)
    else:
        finetune_resolve.check(settings)
    with runtime.world(settings.device, settings.threads) as world:
        setup: PretrainSetup | FinetuneSetup
        if isinstance(settings, PretrainSettings):
            tokens, (setup, runs) = "tokens a global view", _pretraining(settings, world)
        else:
            tokens, (setup, runs) = "tokens an input", _fine_tuning(settings, world)
        resolved = setup.settings
        micro = resolved.batch_size // (world.size * resolved.accumulate)
        costs, loading = small_costs(setup, world, micro)
        cost = extrapolate(costs, micro)
        seconds = cost.seconds * resolved.accumulate
        inputs, encoder = _inputs(setup)
        return DryRun(
            settings=yaml.to_yaml(resolved),
            shapes={
                "a forward pass": f"{micro} clips",
                **{name: [len(x) * micro, *x.shape[1:]] for name, x in inputs.items() if x is not None},
                tokens: encoder.pos_embed.shape[1],
                "patch grid (time, mel)": list(encoder.grid),
            },
            seconds_per_step=seconds,
            seconds_per_clip=loading,
            clips_per_second=resolved.batch_size / seconds,
            total_seconds=seconds * setup.plan.total * runs,
            memory_gb=cost.memory_gb,
            machine_gb=machine(world.device),
            extrapolated=micro > costs[-1].clips,
        )


def _pretraining(settings: PretrainSettings, world: World) -> tuple[PretrainSetup, int]:
    settings, source = continued.start(settings)
    return pretrain_setup.prepare(settings, open_data.of_run(settings, None), world, source), 1


def _fine_tuning(settings: FinetuneSettings, world: World) -> tuple[FinetuneSetup, int]:
    """Return the set-up, of a cross-validation that of the first fold, and the number of runs."""
    model = init_model.pretrained(settings)
    listed = open_data.of_run(settings, None, None if model is None else model.front_end.settings)
    names = folds(listed) if cross_validation.over_folds(settings, resume=False) else []
    if names:
        log.info(f"a run for each of {len(names)} folds: fold {names[0]} is measured")
        settings = settings.changed({"sides": {"fold": names[0]}})
    return finetune_setup.prepare(settings, model, listed, world), len(names) or 1


def _inputs(setup: PretrainSetup | FinetuneSetup) -> tuple[dict[str, Tensor | None], Encoder]:
    """Return the network's inputs of one clip, and the encoder."""
    if isinstance(setup, PretrainSetup):
        first = setup.batch_of([setup.clips[0, 0]])
        return {"global views": first.clean, "local views": first.local}, setup.task.student.encoder
    return {"inputs": setup.batch_of([setup.clips[0, 0]]).x}, setup.task.network.encoder
