"""Pretraining, wired: from resolved settings to a run's folder. It constructs and calls, and knows no arithmetic."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from asit.config import PretrainSettings
from asit.data.loading.sampler import permutation
from asit.errors import ConfigError
from asit.pretrain import method
from asit.pretrain.pretrain_setup import Setup, batch_of, feed, model, prepare
from asit.progress import duration
from asit.runtime import World
from asit.training import loop, open_data, run_dir
from asit.training import run as lifecycle
from asit.training.metrics_log import Records

log = logging.getLogger(__name__)

FIGURE_CLIPS = 5


@dataclass(frozen=True)
class PretrainResult:
    """How a call of pretraining ended.

    Attributes:
        out: the run's folder.
        model: the model's folder, for `asit.load`.
        step: optimiser steps done.
        total: steps of the schedule.
        finished: whether the schedule is at its end.
        stopped_by: the signal that stopped it, or None.
        clips_per_second: over this call's steps.
    """

    out: Path
    model: Path
    step: int
    total: int
    finished: bool
    stopped_by: str | None
    clips_per_second: float


def pretrain(
    settings: PretrainSettings,
    *,
    resume: lifecycle.Resume = False,
    overwrite: bool = False,
) -> PretrainResult:
    """Pretrain an encoder and leave a run's folder behind (docs/pretrain.md lists its files).

    Args:
        settings: what to do; `data` and `out` are needed.
        resume: go on with the run in `out`, from its last checkpoint; "auto": where there is one.
        overwrite: delete the run in `out` first.

    Raises:
        AsitError: anything that the user can mend.
    """
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    method.check(settings)  # before hours may go into looking at the recordings
    out = Path(settings.out)
    with (
        lifecycle.processes(settings) as world,
        lifecycle.opened(settings, out, world, resume=resume, overwrite=overwrite) as opened,
    ):
        wanted = open_data.Wanted.of(opened.settings)
        catalogue = lifecycle.catalogue(wanted, out, world, going_on=opened.going_on)
        setup = prepare(opened.settings, catalogue, world)
        run = lifecycle.Run(
            out,
            setup.settings,
            setup.catalogue,
            setup.frames[0],
            setup.task,
            setup.precision,
            setup.plan,
            setup.settings.records,
            lambda step: model(setup, step),
            opened.log,
        )
        begun = lifecycle.start(run, opened, world)
        with lifecycle.free_if_nothing_came(out, world, opened.going_on):
            data = feed(setup, world, begun[0])
            outcome = lifecycle.train(
                run,
                data,
                world,
                begun,
                going_on=opened.going_on,
                hooks=lambda records: _hooks(out, setup, world, records),
            )
    return PretrainResult(
        out,
        out / run_dir.MODEL,
        outcome.step,
        setup.plan.total,
        outcome.finished,
        outcome.stopped_by,
        outcome.clips_per_second,
    )


def _hooks(out: Path, setup: Setup, world: World, records: Records) -> list[tuple[int, loop.Hook]]:
    settings = setup.settings
    hooks: list[tuple[int, loop.Hook]] = []
    if not world.main and settings.parallel != "fsdp":  # where the weights are in shards, all have a part in each
        return hooks
    # Matplotlib takes long to import: only where a figure is requested.
    if settings.records.figure_every:
        from asit.training.figures import write_figure

        count = min(FIGURE_CLIPS, len(setup.clips))
        picked = permutation(settings.seed, 0, len(setup.clips))[:count]
        # The same clips, cut and masked the same way, in every figure.
        example = batch_of(setup, world, [setup.clips[0, int(i)] for i in picked])

        def figure(step: int) -> None:
            views = setup.task.picture(example, setup.precision)
            if not world.main:
                return
            arrays = {name: view.numpy() for name, view in views.items()}
            names = [Path(name).name for name in example.ids]
            write_figure(out / run_dir.FIGURES, step, **arrays, ids=names, front_end=settings.front_end)

        hooks.append((settings.records.figure_every, figure))
    if settings.probe.table:
        from asit.evaluate import baseline_comparison

        clips = baseline_comparison.labelled_clips(settings.probe.table, settings.probe.clips, settings.seed)

        def measure(step: int) -> None:
            began = time.perf_counter()
            encoder = model(setup, step)
            if not world.main:
                return
            pooling = baseline_comparison.PRETRAINING_POOLINGS
            results = baseline_comparison.probe_encoder(encoder, clips, seed=settings.seed, pooling=pooling)
            records.write("probe", step, baseline_comparison.metrics_entry(results))
            accuracies = ", ".join(f"{kind} {result.accuracy:.3f}" for kind, result in results.items())
            log.info(f"step {step}: probe accuracy: {accuracies} ({duration(time.perf_counter() - began)})")

        hooks.append((settings.probe.every, measure))
    return hooks
