"""The verb plan: what a pretraining run will take, from a minute of measuring."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from asit.config import PretrainSettings, presets
from asit.errors import ConfigError
from asit.terminal import stdout
from asit.terminal.options import early, parse, settings_of

if TYPE_CHECKING:
    from asit.tools.run_estimate import Prediction, Taken


class PlanOptions(PretrainSettings):
    """Every setting of the run, and what to tell of it."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags go over it."""
    clips: Annotated[int, Field(gt=0)] | None = None
    """Recordings of data that are not here, instead of --data."""
    clip_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Length of each of these recordings."""
    processes: Annotated[int, Field(gt=0)] = 1
    """Processes that will train together, such as GPUs; one is measured."""
    efficiency: Annotated[float, Field(gt=0, le=1)] | None = None
    """Clips/s of these processes over as many times those of one; none: 0.9 is assumed."""
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    """What an hour of all machines together costs."""
    machine: str | None = None
    """Predict for the machine that this file of measurements is of; nothing is measured here."""
    measure_only: bool = False
    """Measure and predict nothing."""
    save: str | None = None
    """Write the measurements to this file."""
    overwrite: bool = False
    """Write over that file."""
    budget: Annotated[float, Field(ge=1)] = 45.0
    """About how long to measure, in seconds."""
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print everything as JSON."""


def plan(prog: str, summary: str, given: list[str]) -> int:
    began = time.perf_counter()
    chosen = early(given, ("--preset", "--config"))
    base = presets.build_for(PretrainSettings, "", chosen.get("--preset"), chosen.get("--config"), {}, resume=False)
    options = parse(PlanOptions, prog, summary, given, default=PlanOptions(**base.model_dump()))
    settings = settings_of(PretrainSettings, base, options, given)
    _check(options)
    from asit.io import atomic
    from asit.tools import run_estimate as runs

    asked = runs.Asked(
        options.clips,
        options.clip_seconds,
        options.processes,
        options.efficiency,
        options.price_per_hour,
        options.budget,
    )
    if options.save:
        atomic.check_free(Path(options.save), options.overwrite)
    if options.machine:
        taken = runs.load(Path(options.machine))
        work = runs.work_of(settings, asked, taken, stream=sys.stderr)
    else:
        taken, work = runs.take(settings, asked, began=began, stream=sys.stderr)
    if options.save:
        runs.save(Path(options.save), taken)
    found = None if options.measure_only else runs.predict(taken.measured, work, asked)
    if options.as_json:
        stdout.for_data()
        print(json.dumps(runs.record(taken, found), indent=1, ensure_ascii=False))
        return 0
    stdout.for_people()
    _tell_measured(taken)
    if found is not None:
        _tell(found)
    if options.save:
        print(f"the measurements are in {options.save}; use them by --machine {options.save}")
    return 0


def _check(options: PlanOptions) -> None:
    if options.data and options.clips is not None:
        raise ConfigError(
            "--data and --clips were both given", "one of the two", "leave --clips out to plan for the data"
        )
    if not options.data and options.clips is None:
        raise ConfigError(
            "no data were given", "a catalogue, or how many recordings there will be", "pass --data or --clips 2000000"
        )
    if options.machine and (options.measure_only or options.save):
        raise ConfigError(
            "--machine was given with --measure-only or --save",
            "measurements to be made, or those of a file",
            "leave --machine out to measure",
        )
    if options.measure_only and not (options.save or options.as_json):
        raise ConfigError("--measure-only was given and no place for the measurements", "--save FILE.json", "pass it")


def _tell_measured(taken: Taken) -> None:
    from asit.training.metrics_log import duration

    found = taken.measured
    alone, fed = statistics.median(found.step_seconds), statistics.median(found.fed_seconds)
    rounds = ", ".join(f"{seconds:.3f}" for seconds in found.fed_seconds)
    print(f"measured on {found.device}, {found.threads} threads, {found.precision}")
    print(f"  a step of {found.micro} clips: {alone:.3f} s; fed by the loader: {fed:.3f} s (rounds: {rounds})")
    print(f"  of it {found.fixed_seconds:.3f} s whatever the clips, and {found.clip_seconds:.4f} s for each clip")
    rate = statistics.median(found.loader_clips)
    print(
        f"  the loader alone, {found.workers} processes: {rate:.0f} clips/s; one process: {1 / found.read_seconds:.0f}"
    )
    for name, size in found.memory_gb.items():
        print(f"  memory of the process, {name}: {size:.2f} GB, and {found.clip_gb[name] * 1e3:.0f} MB a further clip")
    if found.workers:
        print(f"  memory of a loader process: {found.worker_gb:.2f} GB, pages that all share included")
    told = duration(found.checkpoint_seconds)
    print(f"  a checkpoint: {found.checkpoint_gb:.3f} GB in {told}; the model: {found.model_gb:.3f} GB")


def _tell(found: Prediction) -> None:
    from asit.training.metrics_log import duration

    work = found.work
    print("predicted")
    print(f"  data: {work.recordings} recordings, {work.hours:.1f} h, {work.epoch_clips} clips an epoch")
    print(
        f"  {work.steps} steps: {work.epochs} epochs of {work.epoch_steps} steps of {work.batch} clips, "
        f"{work.processes} processes with {found.micro} clips a forward pass"
    )
    print(
        f"  a step: {found.step_seconds:.3f} s, {found.clips_per_second:.1f} clips/s; the {found.slower} decides "
        f"(step {found.compute_seconds:.3f} s, loader {found.loader_seconds:.3f} s)"
    )
    low, high = duration(found.hours_low * 3600), duration(found.hours_high * 3600)
    print(f"  the whole run: {duration(found.hours * 3600)}, between {low} and {high}")
    print(f"    of it to begin {duration(found.start_seconds)}, for checkpoints {duration(found.checkpoint_seconds)}")
    print(f"    and {duration(found.cpu_hours * 3600)} of the processors' time")
    for name, size in found.memory_gb.items():
        there = found.machine_gb.get(name)
        of = "" if there is None else f" of {there:.1f} GB there"
        print(f"  memory of each process, {name}: {size:.1f} GB{of}")
        if there is not None and size > there:
            print("  warning: that is more than there is; raise accumulate, or lower batch_size or workers")
    print(f"  disk: {found.disk_gb:.2f} GB")
    if found.cost is not None:
        print(f"  cost: {found.cost:.2f}, between {found.cost_low:.2f} and {found.cost_high:.2f}")
    print("assumed")
    for sentence in found.assumed:
        print(f"  {sentence}")
