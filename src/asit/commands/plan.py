"""The verb plan: estimate what a pretraining run will take, from a minute of measurement."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from asit.config import PretrainSettings
from asit.errors import ConfigError
from asit.terminal import stdout
from asit.terminal.options import early, parse_run, pick

if TYPE_CHECKING:
    from asit.tools.run_estimate import Estimate
    from asit.tools.step_profile import StepProfile


class PlanOptions(PretrainSettings):
    """Every setting of the run, and the options of the estimate."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags override it."""
    clips: Annotated[int, Field(gt=0)] | None = None
    """Number of recordings, for data that are not here; instead of --data."""
    clip_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Length of each of these recordings."""
    processes: Annotated[int, Field(gt=0)] = 1
    """Processes that train together, such as GPUs; one is measured."""
    efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Clips/s of the N processes over N times those of one; none: 0.9 is assumed."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price per hour of all machines together."""
    measure_seconds: Annotated[float, Field(ge=1), tyro.conf.arg(aliases=["--budget"])] = 45.0
    """Seconds to measure, about. Its earlier name, --budget, is accepted; the time of a run is asit pretrain's."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print everything as JSON."""


def plan(prog: str, summary: str, given: list[str]) -> int:
    began = time.perf_counter()
    budget = early(given, ("--budget",)).get("--budget", "")
    if re.fullmatch(r"[\d.]+[a-z].*", budget):
        raise ConfigError(
            f"--budget {budget}, a time with its unit",
            "seconds to measure, such as --measure-seconds 45",
            f"for a run that ends within that time: asit pretrain --budget {budget} --dry-run",
        )
    settings, options = parse_run(PretrainSettings, PlanOptions, prog, summary, given)
    if options.data and options.clips is not None:
        raise ConfigError("--data and --clips were both given", "one of the two", "omit --clips to plan for the data")
    if not options.data and options.clips is None:
        raise ConfigError("no data were given", "a catalogue or a number of recordings", "pass --data or --clips N")
    from asit.tools import run_estimate

    request = pick(run_estimate.PlanRequest, options, budget=options.measure_seconds)
    measured, found = run_estimate.plan(settings, request, began)
    result = {"measured": dataclasses.asdict(measured), "prediction": dataclasses.asdict(found)}
    lines = [*_measured(measured), *_estimate(found, options.processes)]
    print(stdout.rendered(options.as_json, result, lambda _: "\n".join(lines)))
    return 0


def _measured(found: StepProfile) -> Iterator[str]:
    fed, waited = statistics.median(found.step_seconds), statistics.median(found.wait_seconds)
    rounds = ", ".join(f"{seconds:.3f}" for seconds in found.step_seconds)
    yield f"Measured on {found.device}, {found.threads} threads, {found.precision}"
    yield f"  step of {found.micro} clips: {fed:.3f} s, of it {waited:.3f} s waiting for the loader (rounds: {rounds})"
    yield f"  a further clip: {found.clip_seconds:.4f} s"
    for name, size in found.memory_gb.items():
        yield f"  memory of the process, {name}: {size:.2f} GB, and {found.clip_gb[name] * 1e3:.0f} MB per further clip"
    if found.workers:
        yield f"  memory of each of {found.workers} loader processes: {found.worker_gb:.2f} GB, shared pages included"
    yield f"  checkpoint: {found.checkpoint_gb:.3f} GB, {found.checkpoint_seconds:.1f} s"
    yield f"  model: {found.model_gb:.3f} GB"


def _estimate(found: Estimate, processes: int) -> Iterator[str]:
    from asit.progress import duration

    work = found.work
    low, high = duration(found.hours_low * 3600), duration(found.hours_high * 3600)
    yield f"Estimated time: {duration(found.hours * 3600)}, between {low} and {high}"
    if found.cost is not None:
        yield f"  cost: {found.cost:,.2f}, between {found.cost_low:,.2f} and {found.cost_high:,.2f}"
    yield f"  data: {work.recordings:,} recordings, {work.hours:,.1f} h, {work.epoch_clips:,} clips per epoch"
    yield f"  {work.steps:,} steps: {work.epochs:.6g} epochs of {work.epoch_steps:,} steps of {work.batch} clips"
    yield f"  {processes} processes, {found.micro} clips per forward pass"
    rate = f"{found.clips_per_second:.1f} clips/s"
    yield f"  step: {found.step_seconds:.3f} s ({found.wait_seconds:.3f} s waiting), {rate}"
    yield f"  start: {duration(found.start_seconds)}; all checkpoints: {duration(found.checkpoint_seconds)}"
    for name, size in found.memory_gb.items():
        available = found.machine_gb.get(name)
        yield f"  memory of each process, {name}: {size:.1f} GB" + (f" of {available:.1f} GB" if available else "")
        if available and size > available:
            yield "  warning: more than the machine has; raise accumulate, or lower batch_size or workers"
    yield f"  disk: {found.disk_gb:.2f} GB"
    yield "Assumed"
    yield from (f"  {sentence}" for sentence in found.assumed)
