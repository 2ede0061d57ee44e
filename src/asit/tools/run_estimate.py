"""How long a pretraining run will take, in what memory, at what cost: from a minute of measuring.

`measure` is in `asit.tools.step_profile`; here is what follows from it. What is assumed and not measured is said: that
several processes are each as fast as the one measured, but for an efficiency; and that the machine stays as busy as it
is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import TypeAdapter

from asit import runtime
from asit.config import PretrainSettings, yaml
from asit.errors import ConfigError
from asit.io import atomic, parsing
from asit.pretrain import method
from asit.pretrain.pretrain_setup import Setup, prepare
from asit.runtime import World
from asit.tools.growth import Say
from asit.tools.step_profile import Measured, measure, noise
from asit.training import open_data, resources

VERSION = 1
"""Of the layout of a file of measurements."""
MARK = "asit_machine"
EFFICIENCY = (0.9, 0.8, 1.0)
"""Assumed of several processes where nothing was given: expected, least, most. `bench/processes.py` measures it."""
DRIFT, EXTRAPOLATED = 0.05, 0.10
"""What the interval is widened by beyond the rounds' own spread: always, and where a larger batch was not measured."""
ROW_BYTES = {"catalogue": 120, "metrics": 900}
"""Bytes of a line of each of the run's files; about."""
NOT_COMPARED = (
    *("data", "out", "splits", "preset", "seed", "epochs", "batch_size", "accumulate", "stop_after", "device"),
    *("workers", "threads", "bad_files", "process_timeout", "probe.", "records.", "optim."),
    *("front_end.mean", "front_end.std", "views.keep_gb", "views.short_files"),
)
"""Settings that change neither a step's work for a clip nor a clip's loading, or that the prediction reckons with."""


@dataclass(frozen=True)
class Asked:
    """What a plan is to be of, besides the settings.

    Attributes:
        clips: recordings of a data set that is not there; None: `settings.data` is.
        clip_seconds: length of each of them.
        processes: processes that train together.
        efficiency: their clips/s over as many times one's; None: 0.9 is assumed.
        price_per_hour: of all machines together, in any currency.
        budget: s, about how long to measure.
    """

    clips: int | None = None
    clip_seconds: float = 10.0
    processes: int = 1
    efficiency: float | None = None
    price_per_hour: float | None = None
    budget: float = 45.0


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        recordings: in the data.
        epoch_clips: samples an epoch, where long recordings count several times.
        hours: of sound.
        batch: clips a step, over all processes.
        processes, accumulate, epochs: as in the settings.
        steps: that will be taken.
        epoch_steps: steps an epoch.
        kept_gb: decoded recordings that each loader process keeps; 0: none are kept.
        checkpoint_every, log_every, keep: as in the settings.
    """

    recordings: int
    epoch_clips: int
    hours: float
    batch: int
    processes: int
    accumulate: int
    epochs: int
    steps: int
    epoch_steps: int
    kept_gb: float
    checkpoint_every: int
    log_every: int
    keep: int


@dataclass(frozen=True)
class Prediction:
    """What is to be expected; `assumed` are the sentences that qualify it.

    Attributes:
        micro: clips in a forward pass of one process.
        step_seconds: of a whole step, loading included.
        compute_seconds: of the step alone; loader_seconds: of loading its clips in one process's loaders.
        slower: "step" or "loader".
        clips_per_second: over all processes.
        start_seconds, checkpoint_seconds: of the whole run.
        cpu_hours: of the processor's time, networks and loaders, over all processes.
        hours: expected; hours_low and hours_high: its interval.
        memory_gb: of each process, "cpu" with its loaders, and on a GPU "gpu".
        machine_gb: what the measured machine has.
        disk_gb: checkpoints, model and records.
        cost: in the price's currency; None without a price.
        extrapolated: whether the forward pass is another than the largest that was measured.
    """

    work: Work
    micro: int
    step_seconds: float
    compute_seconds: float
    loader_seconds: float
    slower: str
    clips_per_second: float
    start_seconds: float
    checkpoint_seconds: float
    cpu_hours: float
    hours: float
    hours_low: float
    hours_high: float
    memory_gb: dict[str, float]
    machine_gb: dict[str, float]
    disk_gb: float
    cost: float | None
    cost_low: float | None
    cost_high: float | None
    extrapolated: bool
    assumed: list[str]


@dataclass(frozen=True)
class Taken:
    """Measurements, with the settings that they were made under."""

    settings: PretrainSettings
    measured: Measured


def take(
    settings: PretrainSettings, asked: Asked, *, began: float | None = None, stream: TextIO | None = sys.stderr
) -> tuple[Taken, Work]:
    """Measure this machine under these settings, in about `asked.budget` seconds; nothing is kept.

    Args:
        settings: of the run.
        asked: what else there is to know of it.
        began: `time.perf_counter()` when the command began, before torch was imported; None: now.
        stream: where progress goes; None: nowhere.

    Raises:
        AsitError: all that a run would be refused for before its first step.
    """
    began = time.perf_counter() if began is None else began
    say = _teller(stream)
    with _prepared(settings, asked, stream) as (setup, work, world):
        micro = setup.settings.batch_size // setup.settings.accumulate
        taken = measure(
            setup,
            world,
            micro,
            kept=work.kept_gb > 0,
            budget=asked.budget,
            prepared=time.perf_counter() - began,
            say=say,
        )
        return Taken(setup.settings, taken), work


def work_of(settings: PretrainSettings, asked: Asked, taken: Taken, *, stream: TextIO | None = sys.stderr) -> Work:
    """What the run has to do, where the measurements are another machine's.

    Raises:
        ConfigError: the measurements were made under other settings.
    """
    autos = [name for name in ("precision", "front_end_on") if getattr(settings, name) == "auto"]  # the machine decides
    settings = settings.model_copy(update={name: getattr(taken.settings, name) for name in autos})
    # Only the networks' shapes are needed here, whatever the machine of the run has.
    here = settings.model_copy(update={"device": "cpu", "workers": 0, "compile": False})
    with _prepared(here, asked, stream) as (setup, work, _):
        wanted = setup.settings.model_copy(update={"compile": settings.compile})
        changed = {
            name: values
            for name, values in yaml.differences(taken.settings, wanted).items()
            if not any(name == free or (free.endswith(".") and name.startswith(free)) for free in NOT_COMPARED)
        }
    if changed:
        lines = "\n    ".join(f"{name}: {was} there, {now} asked for" for name, (was, now) in changed.items())
        raise ConfigError(
            f"the machine was measured under other settings:\n    {lines}",
            "the same networks, views, masks and front end",
            "measure it again with these settings: asit plan --measure-only --save FILE.json",
        )
    return work


def predict(measured: Measured, work: Work, asked: Asked) -> Prediction:
    """Time, memory and cost that follow from what was measured."""
    micro = work.batch // (work.processes * work.accumulate)
    clips = micro * work.accumulate
    alone, fed = statistics.median(measured.step_seconds), statistics.median(measured.fed_seconds)
    rate = statistics.median(measured.loader_clips)
    line = measured.fixed_seconds + measured.clip_seconds * measured.micro
    compute = alone / line * (measured.fixed_seconds + measured.clip_seconds * clips)
    loading = clips / rate
    waits = measured.micro / rate > alone
    if waits:  # fed steps show what loaders do while the networks work
        loading = max(loading, fed / measured.micro * clips)
    else:  # loaders that share the machine with the networks slow them down
        compute *= max(1.0, fed / alone)
    several = work.processes > 1
    expected, least, most = EFFICIENCY if asked.efficiency is None else (asked.efficiency,) * 3
    if not several:
        expected = least = most = 1.0
    step = max(compute / expected, loading)
    first = step
    if work.kept_gb and measured.again_seconds:
        slower = measured.read_seconds / measured.again_seconds
        extra = clips * (measured.read_seconds - measured.again_seconds)
        shared = extra / max(1, measured.threads) if measured.device.startswith("cpu") else 0.0
        first = max(step + max(0.0, shared), loading * max(1.0, slower))
    early = min(work.steps, work.epoch_steps)
    training = early * first + (work.steps - early) * step
    # The last one is waited for, whoever writes it.
    many = math.ceil(work.steps / work.checkpoint_every)
    written = many * measured.checkpoint_stall + measured.checkpoint_seconds
    seconds = measured.start_seconds + training + written
    extrapolated = micro != measured.micro
    spread = DRIFT + EXTRAPOLATED * extrapolated
    low = training * min(measured.fed_seconds) / fed * (1 - spread) * (expected / most)
    high = training * max(measured.fed_seconds) / fed * (1 + spread) * (expected / least)
    hours, low, high = (t / 3600 for t in (seconds, seconds - training + low, seconds - training + high))
    each = statistics.median(measured.fed_cpu_seconds) / line * (measured.fixed_seconds + measured.clip_seconds * clips)
    busy = work.steps * (each + clips * measured.again_cpu_seconds) + measured.start_cpu_seconds
    busy += early * clips * (measured.read_cpu_seconds - measured.again_cpu_seconds)
    price = asked.price_per_hour
    more = micro - measured.micro
    memory = {name: size + max(0.0, more * measured.clip_gb[name]) for name, size in measured.memory_gb.items()}
    memory["cpu"] += measured.workers * measured.worker_gb + max(1, measured.workers) * work.kept_gb
    disk = work.keep * measured.checkpoint_gb + measured.model_gb
    disk += (work.recordings * ROW_BYTES["catalogue"] + work.steps / work.log_every * ROW_BYTES["metrics"]) / 1e9
    return Prediction(
        work=work,
        micro=micro,
        step_seconds=step,
        compute_seconds=compute / expected,
        loader_seconds=loading,
        slower="loader" if loading > compute / expected else "step",
        clips_per_second=work.batch / step,
        start_seconds=measured.start_seconds,
        checkpoint_seconds=written,
        cpu_hours=busy * work.processes / 3600,
        hours=hours,
        hours_low=low,
        hours_high=high,
        memory_gb=memory,
        machine_gb=measured.machine_gb,
        disk_gb=disk,
        cost=None if price is None else hours * price,
        cost_low=None if price is None else low * price,
        cost_high=None if price is None else high * price,
        extrapolated=extrapolated,
        assumed=_assumed(measured, work, asked, micro),
    )


def _assumed(measured: Measured, work: Work, asked: Asked, micro: int) -> list[str]:
    told = ["the machine stays as busy as it was while this was measured; files come from the disk's cache"]
    if micro != measured.micro:
        told.append(
            f"a forward pass of {micro} clips follows from smaller ones, up to {measured.micro}, in a straight line"
        )
    if work.processes > 1:
        how = (
            f"{asked.efficiency:g}, as given"
            if asked.efficiency is not None
            else "{:g}, between {:g} and {:g}, without a measurement (bench/processes.py makes one)".format(*EFFICIENCY)
        )
        told.append(f"{work.processes} processes, each with what the measured one had, at an efficiency of {how}")
    if asked.clips is not None:
        told.append(f"recordings of {asked.clip_seconds:g} s are like FLAC files of noise at the front end's rate")
    told.append("figures and probes are not counted")
    return told


def save(path: Path, taken: Taken) -> None:
    """Write measurements as JSON, whole or not at all."""
    settings = taken.settings.model_dump(mode="json")
    atomic.write_json(path, {MARK: VERSION, "settings": settings, "measured": dataclasses.asdict(taken.measured)})


def load(path: Path) -> Taken:
    """Measurements that `save` wrote.

    Raises:
        ConfigError: no such file, or another kind of file.
    """
    try:
        found = parsing.from_json(path.read_bytes())
        if found[MARK] != VERSION:
            raise ConfigError(
                f"{path} holds measurements of version {found[MARK]}", f"version {VERSION}", "measure the machine again"
            )
        return Taken(
            yaml.build(PretrainSettings, found["settings"], str(path)),
            TypeAdapter(Measured).validate_python(found["measured"]),
        )
    except OSError as error:
        told = f"{path} cannot be read: {error.strerror}"
        raise ConfigError(told, "a file of measurements", "check the path") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} holds no measurements of a machine",
            "a file written by asit plan --measure-only --save FILE.json",
            "measure the machine again",
        ) from None


@contextlib.contextmanager
def _prepared(settings: PretrainSettings, asked: Asked, stream: TextIO | None) -> Iterator[tuple[Setup, Work, World]]:
    """The run of one process out of those that there will be, and what all of them have to do."""
    method.check(settings)
    processes = asked.processes
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(runtime.world(settings.device, settings.threads))
        if world.size > 1:
            raise ConfigError(
                f"asit plan was started by torchrun in {world.size} processes",
                "one process",
                f"start it plainly, with --processes {world.size}",
            )
        if asked.clips is None:
            listed = open_data.catalogue(open_data.Wanted.of(settings), None, stream)
            scale = 1.0
        else:
            count = max(256, 2 * settings.batch_size)
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asit-plan-")))
            listed = noise(scratch, settings.front_end.rate, asked.clip_seconds, min(count, asked.clips))
            scale = asked.clips / len(listed)
        rate = settings.front_end.rate
        decoded = listed.header["seconds"] * scale * rate * 4 / 1e9
        kept = decoded <= resources.memory_limit(settings.views.keep_gb)
        # With one process this much of the batch is what each has; kept or not is decided by all the data.
        everyone = World(0, processes, world.device, world.reason)
        batch = resources.fit_batch(
            settings.batch_size, settings.accumulate, max(1, round(len(listed) * scale)), everyone, []
        )
        mine = settings.model_copy(deep=True)
        mine.batch_size = batch // processes
        mine.views.keep_gb = decoded + 1.0 if kept else 0.0
        setup = prepare(mine, listed, world)
        epoch = round(len(setup.clips) * scale)
        steps = epoch // batch
        total = settings.epochs * steps
        yield (
            setup,
            Work(
                recordings=round(len(setup.catalogue) * scale),
                epoch_clips=epoch,
                hours=setup.catalogue.header["seconds"] * scale / 3600,
                batch=batch,
                processes=processes,
                accumulate=settings.accumulate,
                epochs=settings.epochs,
                steps=min(total, settings.stop_after) if settings.stop_after else total,
                epoch_steps=steps,
                kept_gb=decoded if kept else 0.0,
                checkpoint_every=settings.records.checkpoint_every,
                log_every=settings.records.log_every,
                keep=settings.records.keep,
            ),
            world,
        )


def _teller(stream: TextIO | None) -> Say:
    began = time.perf_counter()

    def say(text: str) -> None:
        if stream is not None:
            stream.write(f"{time.perf_counter() - began:5.1f} s  {text}\n")
            stream.flush()

    return say


def record(taken: Taken, prediction: Prediction | None) -> dict[str, Any]:
    """All of it, for JSON."""
    found: dict[str, Any] = {"measured": dataclasses.asdict(taken.measured)}
    return found | ({"prediction": dataclasses.asdict(prediction)} if prediction else {})
