"""Pretraining, wired: from resolved settings to a run's folder. It constructs and calls, and knows no arithmetic."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from asit import checkpoint, config, runtime
from asit.data.order import loader, order
from asit.engine import loop
from asit.engine.records import Records, duration
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.pretrain import method
from asit.runs import folder, source
from asit.runs.setup import Setup, collate, keys, model, prepare
from asit.runtime import World
from asit.settings import PretrainSettings

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
    resume: bool = False,
    overwrite: bool = False,
    stream: TextIO | None = sys.stderr,
) -> PretrainResult:
    """Pretrain an encoder and leave a run's folder behind (docs/pretrain.md lists its files).

    Args:
        settings: what to do; `data` and `out` are needed.
        resume: go on with the run in `out`, from its last checkpoint.
        overwrite: delete the run in `out` first.
        stream: where progress goes; None: nowhere.

    Raises:
        AsitError: anything that the user can mend.
    """
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    method.check(settings)  # before hours may go into looking at the recordings
    out = Path(settings.out)
    with runtime.world(settings.device, settings.threads) as world:
        quiet = stream if world.main else None
        going_on = _together(world, lambda: folder.claim(out, resume=resume, overwrite=overwrite))
        before = folder.read_settings(out) if going_on else None
        if before is not None:
            settings = folder.settle(settings, before)
        catalogue = _together(world, lambda: source.catalogue(settings, out, quiet, anew=not going_on), world.main)
        if catalogue is None:
            catalogue = source.catalogue(settings, out, None)
        setup = prepare(settings, catalogue, world)
        if before is not None:
            folder.check_same(before, setup.settings)
        start, optimiser_state = _restore(out, setup) if going_on else (0, {})
        if world.main and not going_on:
            _begin(out, setup, world)
        try:
            return _train(out, setup, world, start, optimiser_state, going_on, quiet)
        except BaseException:
            # With no checkpoint there is nothing to go on with: the next start must find the folder free.
            if world.main and not going_on and checkpoint.latest_state(out / folder.CHECKPOINTS) is None:
                (out / folder.CONFIG).unlink(missing_ok=True)
            raise


def _train(
    out: Path,
    setup: Setup,
    world: World,
    start: int,
    optimiser_state: dict[str, torch.Tensor],
    going_on: bool,
    stream: TextIO | None,
) -> PretrainResult:
    settings, plan = setup.settings, setup.plan
    data = loader(
        setup.clips,
        keys(setup, world, start),
        collate(setup),
        workers=setup.workers,
        pin=world.device.type == "cuda",
    )
    records = Records(
        out if world.main else None, plan.total, start, tensorboard=settings.records.tensorboard, stream=stream
    )
    with contextlib.closing(data), records:
        for note in setup.notes:
            records.say(note)
        records.event(start, f"goes on from step {start}" if going_on else "begins")

        def save(step: int, tensors: dict[str, torch.Tensor]) -> None:
            meta = {
                "step": step,
                "catalogue": setup.catalogue.digest,
                "frames": setup.frames[0],
                "world": world.size,
            }
            # The model first: a run that dies between the two repeats the steps, and writes the model again.
            model(setup, step).save(out / folder.MODEL, overwrite=True)
            checkpoint.save_state(out / folder.CHECKPOINTS, step, tensors, meta, settings.records.keep)

        outcome = loop.fit(
            setup.task,
            data,
            plan,
            world,
            setup.precision,
            records,
            start=start,
            optimiser_state=optimiser_state,
            save=save,
            hooks=_hooks(out, setup, world, records) if world.main else (),
        )
        if outcome.stopped_by:
            records.event(outcome.step, f"stopped by {outcome.stopped_by} at step {outcome.step} of {plan.total}")
        elif outcome.finished:
            records.event(outcome.step, f"finished: {outcome.step} steps in {duration(outcome.seconds)}")
        else:
            records.event(outcome.step, f"stopped as asked after step {outcome.step} of {plan.total}")
    return PretrainResult(
        out,
        out / folder.MODEL,
        outcome.step,
        plan.total,
        outcome.finished,
        outcome.stopped_by,
        outcome.clips_per_second,
    )


def _together(world: World, call: Callable[[], Any], mine: bool = True) -> Any:
    """Do something in this process and fail in all processes if it fails in one, without leaving others waiting."""
    error: BaseException | None = None
    result = None
    if mine:
        try:
            result = call()
        except BaseException as caught:
            error = caught
    if world.any(error is not None):
        raise (
            error if error is not None else ConfigError("another process of this run failed", remedy="see its message")
        )
    return result


def _begin(out: Path, setup: Setup, world: World) -> None:
    out.mkdir(parents=True, exist_ok=True)
    folder.clear(out)
    setup.catalogue.write(out / folder.CATALOGUE)
    reasons = {
        "steps": setup.plan.total,
        "device": str(world.device),
        "device_reason": world.reason,
        "processes": world.size,
    }
    precision = {"precision": setup.precision.name, "precision_reason": setup.precision.reason}
    folder.write_json(out / folder.ENVIRONMENT, runtime.environment() | reasons | precision)
    folder.write_text(out / folder.CONFIG, config.to_yaml(setup.settings))


def _restore(out: Path, setup: Setup) -> tuple[int, dict[str, torch.Tensor]]:
    """Load the last checkpoint into the task; step 0 where none was written yet."""
    last = checkpoint.latest_state(out / folder.CHECKPOINTS)
    if last is None:
        return 0, {}
    tensors, meta = checkpoint.load_state(last)
    if meta.get("catalogue") != setup.catalogue.digest:
        raise CatalogueError(
            f"{last} was made with another list of recordings ({out / folder.CATALOGUE})",
            "the same recordings, of the same lengths, in the same order",
            "put the data back as they were, or start another run in a new --out",
        )
    for key in ("step", "frames"):
        if not isinstance(meta.get(key), int):
            raise CheckpointError(f"{last} does not say its {key}", "a checkpoint written by asit pretrain")
    task = {name.removeprefix("task/"): value for name, value in tensors.items() if name.startswith("task/")}
    setup.task.load_state(task)
    prefix = "optimiser/"
    return meta["step"], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _hooks(out: Path, setup: Setup, world: World, records: Records) -> list[tuple[int, loop.Hook]]:
    settings = setup.settings
    hooks: list[tuple[int, loop.Hook]] = []
    # Matplotlib and scikit-learn take a second to import: only where a figure or a probe was asked for.
    if settings.records.figure_every:
        from asit.engine.figures import write_figure

        count = min(FIGURE_CLIPS, len(setup.clips))
        picked = order(settings.seed, 0, len(setup.clips))[:count]
        # The same clips, cut and masked the same way, in every figure.
        example = collate(setup)([setup.clips[0, int(i)] for i in picked]).to(world.device)
        front_end = settings.front_end

        def figure(step: int) -> None:
            views = setup.task.picture(example, setup.precision)
            arrays = {name: view.numpy() for name, view in views.items()}
            names = [Path(name).name for name in example.ids]
            write_figure(
                out / folder.FIGURES, step, **arrays, ids=names, rate=front_end.rate, shift_ms=front_end.shift_ms
            )

        hooks.append((settings.records.figure_every, figure))
    if settings.probe.table:
        from asit.runs import probe

        clips = probe.labelled(settings.probe.table, settings.probe.clips, settings.seed)

        def measure(step: int) -> None:
            began = time.perf_counter()
            result = probe.probe(model(setup, step), clips, seed=settings.seed, kinds=probe.QUICK)
            records.write("probe", step, result.record())
            records.say(f"step {step}: {result.sentence()} ({duration(time.perf_counter() - began)})")

        hooks.append((settings.probe.every, measure))
    return hooks
