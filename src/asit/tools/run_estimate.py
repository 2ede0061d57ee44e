"""Estimate the time, memory, disk and cost of a pretraining run from a short measurement, for `asit plan`;
resolve a run and measure a few of its steps for `--dry-run`."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from asit import runtime
from asit.config import FinetuneSettings, PretrainSettings, finetune_settings, pretrain_settings, yaml
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.splits import folds
from asit.errors import ConfigError
from asit.finetune import cross_validation, finetune_setup, init_model
from asit.finetune.finetune_setup import FinetuneSetup
from asit.model.vit import Encoder
from asit.pretrain import continued, pretrain_setup
from asit.pretrain.pretrain_setup import PretrainSetup, prepare
from asit.runtime import World
from asit.tools.step_profile import StepProfile, extrapolate, machine, measure, small_costs
from asit.training import open_data, resources

log = logging.getLogger(__name__)

EFFICIENCY = (0.9, 0.8, 1.0)
"""Of several processes where none is given: expected, least, most. `bench/processes.py` measures it."""
FILES = 32
"""Files of noise that stand in for recordings that are not here."""
DRIFT, EXTRAPOLATED = 0.05, 0.10
"""Added to the interval besides the spread of the rounds: always, and where the batch was not measured."""


@dataclass(frozen=True)
class PlanRequest:
    """What `asit plan` is given besides the settings of the run; see its options."""

    clips: int | None = None
    clip_seconds: float = 10.0
    processes: int = 1
    efficiency: float | None = None
    price_per_hour: float | None = None
    budget: float = 45.0


@dataclass(frozen=True)
class Workload:
    """What a run has to do; `batch` is over all processes, `kept_gb` of decoded recordings is for each loader."""

    recordings: int
    hours: float
    epoch_clips: int
    epoch_steps: int
    epochs: float
    steps: int
    batch: int
    accumulate: int
    kept_gb: float
    checkpoint_every: int
    keep: int


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take; memory is of each process, `checkpoint_seconds` and `hours` of the whole run."""

    work: Workload
    micro: int
    step_seconds: float
    wait_seconds: float
    clips_per_second: float
    start_seconds: float
    checkpoint_seconds: float
    hours: float
    hours_low: float
    hours_high: float
    memory_gb: dict[str, float]
    machine_gb: dict[str, float]
    disk_gb: float
    cost: float | None
    cost_low: float | None
    cost_high: float | None
    assumed: list[str]


def plan(settings: PretrainSettings, request: PlanRequest, began: float | None = None) -> tuple[StepProfile, Estimate]:
    """Measure this machine for about `request.budget` seconds and estimate the run; keep no file.

    Args:
        settings: of the run.
        request: what else is given.
        began: `time.perf_counter()` when the command began; None: now.

    Raises:
        AsitError: whatever would refuse the run before its first step.
    """
    began = time.perf_counter() if began is None else began
    with prepared(settings, request) as (setup, work, world):
        micro = setup.settings.batch_size // setup.settings.accumulate
        measured = measure(setup, world, micro, budget=request.budget, began=began)
        return measured, estimate(measured, work, request)


def estimate(measured: StepProfile, work: Workload, request: PlanRequest) -> Estimate:
    """Return time, memory, disk and cost of a run."""
    micro = work.batch // (request.processes * work.accumulate)
    clips = micro * work.accumulate
    fed, waited = statistics.median(measured.step_seconds), statistics.median(measured.wait_seconds)
    compute = fed - waited + measured.clip_seconds * (clips - measured.micro)
    loading = compute + waited / measured.micro * clips
    expected, least, most = EFFICIENCY if request.efficiency is None else (request.efficiency,) * 3
    if request.processes == 1:
        expected = least = most = 1.0
    step = max(compute / expected, loading)
    training = work.steps * step
    written = math.ceil(work.steps / work.checkpoint_every) * measured.checkpoint_seconds
    spread = DRIFT + (EXTRAPOLATED if micro != measured.micro else 0.0)
    low = training * min(measured.step_seconds) / fed * (1 - spread) * (expected / most)
    high = training * max(measured.step_seconds) / fed * (1 + spread) * (expected / least)
    hours, low, high = ((measured.start_seconds + t + written) / 3600 for t in (training, low, high))
    more = micro - measured.micro
    memory = {name: size + max(0.0, more * measured.clip_gb[name]) for name, size in measured.memory_gb.items()}
    memory["cpu"] += measured.workers * measured.worker_gb + max(1, measured.workers) * work.kept_gb
    price = request.price_per_hour
    return Estimate(
        work=work,
        micro=micro,
        step_seconds=step,
        wait_seconds=step - compute / expected,
        clips_per_second=work.batch / step,
        start_seconds=measured.start_seconds,
        checkpoint_seconds=written,
        hours=hours,
        hours_low=low,
        hours_high=high,
        memory_gb=memory,
        machine_gb=measured.machine_gb,
        disk_gb=work.keep * measured.checkpoint_gb + measured.model_gb + work.recordings * 120e-9,  # catalogue lines
        cost=None if price is None else hours * price,
        cost_low=None if price is None else low * price,
        cost_high=None if price is None else high * price,
        assumed=_assumed(measured, work, request, micro),
    )


def _assumed(measured: StepProfile, work: Workload, request: PlanRequest, micro: int) -> list[str]:
    assumed = ["the machine stays as busy as during the measurement"]
    if micro != measured.micro:
        assumed.append(f"a forward pass of {micro} clips follows the line through smaller ones, up to {measured.micro}")
    if request.processes > 1:
        assumed_range = "{:g}, between {:g} and {:g} (not measured)".format(*EFFICIENCY)
        how = assumed_range if request.efficiency is None else f"{request.efficiency:g}, as given"
        assumed.append(f"{request.processes} processes like the measured one, with an efficiency of {how}")
    if request.clips is not None:
        assumed.append(f"recordings of {request.clip_seconds:g} s load like FLAC files of noise")
    if work.kept_gb:
        assumed.append("recordings are decoded in each epoch; from memory later ones may be faster")
    return [*assumed, "figures and probes are not counted"]


@contextlib.contextmanager
def prepared(settings: PretrainSettings, request: PlanRequest) -> Iterator[tuple[PretrainSetup, Workload, World]]:
    """Set up one of the run's processes, with its share of the batch, and the workload of all of them."""
    pretrain_settings.check(settings)
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(runtime.world(settings.device, settings.threads))
        if world.size > 1:
            raise ConfigError(
                f"asit plan was started by torchrun in {world.size} processes",
                "one process",
                f"start it without torchrun, with --processes {world.size}",
            )
        settings, source = continued.start(settings)
        scale, rate = 1.0, settings.front_end.rate
        if request.clips is None:
            listed = open_data.of_run(settings, None)
        else:
            count = min(max(256, 2 * settings.batch_size), request.clips)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asit-plan-")))
            listed = noise(scratch, rate, request.clip_seconds, count)
            scale = request.clips / count
        decoded = listed.header["seconds"] * scale * rate * 4 / 1e9
        kept = decoded <= resources.memory_limit(settings.views.keep_gb)
        everyone = World(0, request.processes, world.device, world.reason)
        expected = max(1, round(len(listed) * scale))
        batch = resources.fit_batch(settings.batch_size, settings.accumulate, expected, everyone)
        # All the data decide whether recordings are kept.
        mine = {"batch_size": batch // request.processes, "views": {"keep_gb": decoded + 1.0 if kept else 0.0}}
        setup = prepare(settings.changed(mine), listed, world, source)
        yield setup, workload(setup, batch, decoded if kept else 0.0, scale), world


def workload(setup: PretrainSetup, batch: int, kept_gb: float, scale: float = 1.0) -> Workload:
    """Return the workload of a run.

    Args:
        setup: of one of its processes.
        batch: clips of a step, over all processes.
        kept_gb: of decoded recordings that each loader keeps.
        scale: clips of the run over those of the set-up.
    """
    settings, epoch = setup.settings, round(len(setup.clips) * scale)
    total = max(1, round(settings.epochs * (epoch // batch)))
    return Workload(
        recordings=round(len(setup.catalogue) * scale),
        hours=setup.catalogue.header["seconds"] * scale / 3600,
        epoch_clips=epoch,
        epoch_steps=epoch // batch,
        epochs=settings.epochs,
        steps=min(total, settings.stop_after) if settings.stop_after else total,
        batch=batch,
        accumulate=settings.accumulate,
        kept_gb=kept_gb,
        checkpoint_every=settings.records.checkpoint_every,
        keep=settings.records.keep,
    )


def noise(scratch: Path, rate: int, seconds: float, count: int) -> Catalogue:
    """Return a catalogue of `count` recordings: some FLAC files of coloured noise, which compress about as speech."""
    rng = np.random.default_rng(0)
    names = [str(scratch / f"{i:02d}.flac") for i in range(min(FILES, count))]
    for name in names:
        noise = np.convolve(rng.normal(0.0, 0.02, round(seconds * rate) + 7), np.ones(8) / 2, "valid")
        soundfile.write(name, noise.astype(np.float32), rate)
    clips = [Clip(names[i % len(names)], seconds, rate, 1) for i in range(count)]
    return Catalogue.from_clips(clips, root=scratch, header={"mean": -8.0, "std": 4.0})  # any values cost the same


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
        pretrain_settings.check(settings)
    else:
        finetune_settings.check(settings)
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
