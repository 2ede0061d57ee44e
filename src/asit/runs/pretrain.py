"""Pretraining, wired: from resolved settings to a run's folder. It constructs and calls, and knows no arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from asit import checkpoint, config, runtime
from asit.audio.fbank import FrontEnd
from asit.data import batches
from asit.data.catalogue import Catalogue
from asit.engine import loop
from asit.engine.figures import write_figure
from asit.engine.records import Records, duration
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.model import vit
from asit.model.audio_model import AudioModel
from asit.pretrain import masking, method
from asit.runs import folder, probe, source
from asit.runtime import Precision, World
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


@dataclass(frozen=True)
class Setup:
    """All that a run needs, resolved and constructed; nothing is written yet."""

    settings: PretrainSettings
    catalogue: Catalogue
    clips: batches.Clips
    frames: tuple[int, int]
    task: method.ASiT
    precision: Precision
    workers: int
    plan: loop.Plan
    notes: list[str]


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
        return _train(out, setup, world, start, optimiser_state, going_on, quiet)


def prepare(settings: PretrainSettings, catalogue: Catalogue, world: World) -> Setup:
    """Resolve every auto and construct all parts; nothing is written.

    Raises:
        ConfigError: settings that cannot go together.
        CatalogueError: the catalogue does not fit the settings.
    """
    settings = method.resolve(settings)
    notes = [f"device {world.device}: {world.reason}"]
    precision = runtime.precision(settings.precision, world.device)
    settings.precision = precision.name  # type: ignore[assignment]
    notes.append(f"precision {precision.name}: {precision.reason}")
    settings.front_end = source.measured(settings.front_end, catalogue)
    patch = (settings.encoder.patch_frames, settings.encoder.patch_mels)
    typical = float(np.median(catalogue.seconds))
    *lengths, told = batches.view_frames(settings.views, FrontEnd(settings.front_end), patch[0], typical)
    frames = (lengths[0], lengths[1])
    # Kept as numbers: the median that auto follows may be another when short recordings have been left out.
    if settings.views.seconds == "auto":
        settings.views.seconds = FrontEnd(settings.front_end).samples_for(frames[0]) / settings.front_end.rate
    if settings.views.local_views and settings.views.local_seconds == "auto":
        settings.views.local_seconds = FrontEnd(settings.front_end).samples_for(frames[1]) / settings.front_end.rate
    notes += told
    catalogue = _long_enough(settings, catalogue, frames[0], notes)
    method.check(settings)
    corruption = batches.Corruption(
        mask=functools.partial(_draw_mask, frames[0], settings.front_end.mels, settings.masking, patch),
        factors=functools.partial(vit.draw_drop_path, rates=vit.drop_path_rates(settings.encoder)),
        noise=settings.masking.fill == "noise",
    )
    clips = batches.Clips(catalogue, settings.front_end, settings.views, frames, corruption, settings.seed, donors=True)
    _fit_batch(settings, len(clips), world, notes)
    micro = settings.batch_size // (world.size * settings.accumulate)
    clips.donors = masking.has_donor(micro)
    if not clips.donors and settings.masking.replace > 0 and settings.masking.replace_probability > 0:
        notes.append("one clip a forward pass: there is no other clip to replace from, so every view is wiped instead")
    workers = _workers(settings, world, notes)
    if _fits_in_memory(settings, catalogue, world, workers, notes):
        clips.keep()
    generator = torch.Generator().manual_seed(settings.seed)
    task = method.ASiT(settings, frames[0], generator, world.device)
    steps = len(clips) // settings.batch_size
    plan = loop.Plan(
        total=settings.epochs * steps,
        steps_per_epoch=steps,
        batch=settings.batch_size,
        accumulate=settings.accumulate,
        betas=settings.optim.betas,
        clip=settings.optim.clip,
        clip_per_parameter=settings.optim.clip_per_parameter,
        log_every=settings.records.log_every,
        checkpoint_every=settings.records.checkpoint_every,
        stop_after=settings.stop_after,
        most_failures=max(10, int(settings.bad_files * len(clips))),
    )
    size = sum(p.numel() for p in task.encoder().parameters()) / 1e6
    whole = sum(p.numel() for p in task.student.parameters()) / 1e6
    notes.append(f"encoder {settings.encoder.size}: {size:.1f} M parameters, {whole:.1f} M with heads")
    hours = catalogue.header["seconds"] / 3600
    notes.append(f"data: {len(catalogue)} recordings, {hours:.2f} h, {len(clips)} clips an epoch")
    notes.append(f"{plan.total} steps: {settings.epochs} epochs of {steps} steps of {settings.batch_size} clips")
    return Setup(settings, catalogue, clips, frames, task, precision, workers, plan, notes)


def dry_run(settings: PretrainSettings, *, stream: TextIO | None = sys.stderr, steps: int = 3) -> dict[str, Any]:
    """Resolve everything, take a few real steps on real clips, write nothing, and say what the run will be.

    Returns:
        settings (resolved), notes, shapes, and, measured here: seconds a step, clips a second, hours, and peak memory
        of this process in GB (of the GPU too, on one).
    """
    method.check(settings)
    with runtime.world(settings.device, settings.threads) as world:
        catalogue = source.catalogue(settings, None, stream if world.main else None)
        setup = prepare(settings, catalogue, world)
        keys = _keys(setup, world, 0)
        data = batches.loader(setup.clips, keys, _donor_rows(setup), workers=setup.workers, pin=False)
        first = next(data)
        times: list[float] = []

        def timed() -> Any:
            for batch in itertools.chain([first], data):
                times.append(time.perf_counter())
                yield batch

        plan = _shorter(setup.plan, steps)
        with contextlib.closing(data), Records(None, plan.total, 0, tensorboard=False) as records:
            outcome = loop.fit(setup.task, timed(), plan, world, setup.precision, records)
        laps = np.diff([*times, times[0] + outcome.seconds])[setup.plan.accumulate :]
        seconds = statistics.median(laps) * setup.plan.accumulate if len(laps) else outcome.seconds
        shapes = {
            "global views": list(first.clean.shape),
            "local views": list(first.local.shape),
            "tokens a global view": setup.task.student.encoder.pos_embed.shape[1],
            "patch grid (time, mel)": list(setup.task.student.encoder.grid),
        }
        memory = {
            "process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (1e9 if sys.platform == "darwin" else 1e6)
        }
        if world.device.type == "cuda":
            memory["gpu_gb"] = torch.cuda.max_memory_allocated(world.device) / 1e9
        return {
            "settings": config.to_yaml(setup.settings),
            "notes": setup.notes,
            "shapes": shapes,
            "seconds_per_step": seconds,
            "clips_per_second": setup.settings.batch_size / seconds,
            "total_seconds": seconds * setup.plan.total,
            "memory": memory,
        }


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
    data = batches.loader(
        setup.clips,
        _keys(setup, world, start),
        _donor_rows(setup),
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


def model(setup: Setup, step: int) -> AudioModel:
    """The encoder as it stands, with its card."""
    settings = setup.settings
    return AudioModel.from_parts(
        setup.task.encoder(),
        settings.front_end,
        settings.encoder,
        setup.frames[0],
        training={
            "method": "ASiT (arXiv 2211.13189)",
            "preset": settings.preset,
            "step": step,
            "steps": setup.plan.total,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "network": "teacher" if setup.task.teacher is not None else "student",
            "clips": len(setup.catalogue),
            "hours": round(setup.catalogue.header["seconds"] / 3600, 3),
            "catalogue": setup.catalogue.digest,
            "precision": setup.precision.name,
        },
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
    if settings.records.figure_every:
        count = min(FIGURE_CLIPS, len(setup.clips))
        picked = batches.order(settings.seed, 0, len(setup.clips))[:count]
        # The same clips, cut and masked the same way, in every figure.
        example = batches.collate([setup.clips[0, int(i)] for i in picked], _donor_rows(setup)).to(world.device)
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
        clips = probe.labelled(settings.probe.table, settings.probe.clips, settings.seed)

        def measure(step: int) -> None:
            began = time.perf_counter()
            result = probe.probe(model(setup, step), clips, seed=settings.seed, kinds=probe.QUICK)
            records.write("probe", step, result.record())
            records.say(f"step {step}: {result.sentence()} ({duration(time.perf_counter() - began)})")

        hooks.append((settings.probe.every, measure))
    return hooks


def _draw_mask(
    frames: int, mels: int, settings: Any, patch: tuple[int, int], rng: np.random.Generator, donor: bool
) -> masking.ViewMask:
    return masking.draw(rng, frames, mels, settings, patch, replace=None if donor else False)


def _donor_rows(setup: Setup) -> Callable[[Any], Any]:
    return functools.partial(masking.donor_rows, pool=setup.settings.masking.donor_pool)


def _keys(setup: Setup, world: World, start: int) -> batches.MicroBatches:
    settings = setup.settings
    micro = settings.batch_size // (world.size * settings.accumulate)
    return batches.MicroBatches(
        settings.seed, len(setup.clips), settings.batch_size, micro, world.rank, world.size, start
    )


def _fit_batch(settings: PretrainSettings, count: int, world: World, notes: list[str]) -> None:
    unit = world.size * settings.accumulate
    if settings.batch_size % unit:
        below, above = settings.batch_size // unit * unit, (settings.batch_size // unit + 1) * unit
        raise ConfigError(
            f"batch_size is {settings.batch_size}, with {world.size} processes and accumulate {settings.accumulate}",
            f"a multiple of {unit}",
            f"use {above}" if below == 0 else f"use {below} or {above}",
        )
    if settings.batch_size > count:
        shrunk = count // unit * unit
        if shrunk == 0:
            raise CatalogueError(
                f"{count} clips for {world.size} processes that accumulate {settings.accumulate} batches each",
                f"at least {unit} clips",
                "add recordings, or use fewer processes or accumulation steps",
            )
        notes.append(
            f"warning: batch_size {settings.batch_size} is larger than the {count} clips of an epoch: now {shrunk}"
        )
        settings.batch_size = shrunk


def _long_enough(settings: PretrainSettings, catalogue: Catalogue, frames: int, notes: list[str]) -> Catalogue:
    """Count recordings shorter than a view; leave them out where the settings say so."""
    front_end = settings.front_end
    least = FrontEnd(front_end).samples_for(frames) / front_end.rate
    short = catalogue.seconds < least - 1e-3
    count = int(short.sum())
    if not count:
        return catalogue
    if settings.views.short_files == "pad":
        notes.append(f"{count} recordings are shorter than a view of {least:.2f} s: padded ({front_end.padding})")
        return catalogue
    if count == len(catalogue):
        raise CatalogueError(
            f"all {count} recordings are shorter than a view of {least:.2f} s",
            "recordings that hold a view",
            "make views.seconds smaller, or pass --views.short-files pad",
        )
    notes.append(f"{count} recordings are shorter than a view of {least:.2f} s: left out")
    return catalogue.subset(~short)


def _workers(settings: PretrainSettings, world: World, notes: list[str]) -> int:
    if settings.workers != "auto":
        notes.append(f"loader workers {settings.workers}: as asked")
        return settings.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cpu":
        workers, why = 1, "on the CPU one reads ahead, the cores are the networks'"
    else:
        workers, why = max(1, min(8, cores // here - 1)), f"{cores} cores for {here} processes"
    notes.append(f"loader workers {workers}: {why}")
    return workers


def _fits_in_memory(
    settings: PretrainSettings, catalogue: Catalogue, world: World, workers: int, notes: list[str]
) -> bool:
    """Whether decoded recordings are kept; the answer stays with the settings, so that a resumed run does the same."""
    limit = settings.views.keep_gb
    if limit == "auto":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
        limit = pages / 10 / 1e9
    copies = max(1, workers) * world.size
    needed = catalogue.header["seconds"] * settings.front_end.rate * 4 * copies / 1e9
    kept = needed <= limit
    settings.views.keep_gb = limit if kept else 0.0
    if kept:
        notes.append(f"decoded recordings are kept in memory: {needed:.2f} GB, at most views.keep_gb {limit:.2f}")
    return kept


def _shorter(plan: loop.Plan, steps: int) -> loop.Plan:
    return dataclasses.replace(plan, stop_after=min(steps, plan.total), checkpoint_every=1 << 60)
