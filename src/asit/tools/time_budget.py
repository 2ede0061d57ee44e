"""Choose the settings of a pretraining run that ends within a given time: `asit pretrain --budget`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit import runtime
from asit.config import PretrainSettings, presets, pretrain_settings, yaml
from asit.config.presets import Resume
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import ConfigError
from asit.model.vit import shape_of
from asit.pretrain import continued
from asit.pretrain.pretrain_setup import PretrainSetup, prepare
from asit.progress import duration
from asit.runtime import World
from asit.tools.run_estimate import PlanRequest, estimate, workload
from asit.tools.step_profile import MEMORY_SHARE, extrapolate, machine, measure, small_costs
from asit.training import open_data, resources, run_dir

log = logging.getLogger(__name__)

DEFAULT_SECONDS = {"cpu": 3600.0, "mps": 3600.0, "cuda": 86400.0}
"""The budget where neither a budget nor a length is given: an hour on a CPU, a day on a GPU."""
ENCODERS = ((192, 6, 3), (192, 12, 3), (384, 12, 6), (768, 12, 12))
"""(width, blocks, heads) to choose from, smallest first."""
ENOUGH_STEPS = 5000
"""Steps that a larger encoder must get to be chosen. A run of 5,040 steps on keywords had reached after 2,500 most of
what it gave at the end, and its global loss began to fall after about 500 (docs/experiments.md)."""
FEW_STEPS = 500
"""Steps below which a warning is logged: the global loss has hardly begun to fall by then (docs/experiments.md)."""
LEAST_STEPS = 20
RATE_WIDTH, RATE_PRESETS = 192, ("default", "speech")
"""Width that these presets' learning rate was measured at; wider encoders get less in proportion, which at 768 is
near the paper's. Not measured for the widths between."""
WARM_UP = 0.05
"""Share of the run in which the learning rate rises, where no warm-up is given."""
MEASURED_SECONDS = 15.0
"""Time to measure the chosen encoder for, about."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Chosen:
    """A run that fits a budget.

    Attributes:
        settings: of the run.
        summary: lines that say what was chosen and why, and what to expect.
        warning: why the run is not worth its time; empty: it is.
    """

    settings: PretrainSettings
    summary: tuple[str, ...]
    warning: str = ""


def seconds_of(text: str) -> float:
    """Return the seconds of a duration such as 45m, 8h, 3d or 1h30m.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise ConfigError(
            f"a budget of {text!r}", "a time above 0 with its unit (s, m, h or d)", "write it as 45m, 8h, 3d or 1h30m"
        )
    return seconds


def apply(
    settings: PretrainSettings,
    budget: str | None,
    given: Collection[str],
    *,
    config: str | Path | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    began: float | None = None,
) -> PretrainSettings:
    """Return the settings that fit a budget, and log what was chosen and why.

    Without a budget, that of `DEFAULT_SECONDS` is assumed where the default preset is used and nothing says how long
    the run is. Settings are returned as they are where a run is resumed, or where there is no budget.

    Args:
        settings: of the run.
        budget: as for `seconds_of`; None: not given.
        given: dotted names of the settings that the user gave; these are kept.
        config: the file that further settings are from; they are kept too, but for the length of the run.
        resume, overwrite: as for the run.
        began: `time.perf_counter()` when the command began; the time since then counts towards the budget.

    Raises:
        ConfigError: a budget together with epochs, for a run that is resumed, or for several processes; the run's
            folder is not free; or the run cannot end within the budget.
    """
    resumed = resume is True or (resume == "auto" and not overwrite and (Path(settings.out) / run_dir.CONFIG).exists())
    length = sorted({"epochs", "stop_after"} & set(given))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    default = settings.preset == settings.DEFAULT_RECIPE and config is None and "preset" not in given
    if not settings.data or not (settings.out or budget):  # the run refuses them; a dry run needs no folder
        return settings
    if budget is None and (resumed or length or processes > 1 or not default):
        return settings
    if resumed:
        raise ConfigError(
            "a budget for a run that is resumed",
            "the length that it began with",
            "leave out the budget, or overwrite it",
        )
    if length:
        raise ConfigError(
            f"a budget and {' and '.join(length)} were both given", "one of them", f"leave out {length[0]}"
        )
    if processes > 1:
        raise ConfigError(
            f"a budget, in {processes} processes",
            "one process: the choice is measured in one",
            "give --epochs; `asit plan --processes N` estimates the time",
        )
    seconds = None if budget is None else seconds_of(budget)
    if settings.out and not overwrite:
        run_dir.claim(Path(settings.out), resume=False, overwrite=False)
    names = set(given)
    if config:
        names |= {name for name, _ in yaml.flat(presets.read_file(PretrainSettings, Path(config)))}
    chosen = choose(settings, seconds, names, began=began)
    log.info("\n".join(chosen.summary))
    if chosen.warning:
        log.warning(chosen.warning)
    return chosen.settings


def choose(
    settings: PretrainSettings, seconds: float | None, given: Collection[str], *, began: float | None = None
) -> Chosen:
    """Choose encoder, batch, epochs and warm-up so that the run ends within `seconds`.

    The encoder is the largest of `ENCODERS` that gets `ENOUGH_STEPS` steps and fits in memory, else the smallest;
    then the run is as long as the time allows. Measured by a few steps of each size, and some more of the chosen one.

    Args:
        settings: of the run.
        seconds: from `began` to the end of the run; None: `DEFAULT_SECONDS` of the device.
        given: dotted names of settings that are kept.
        began: as for `apply`; None: now.

    Raises:
        ConfigError: the smallest encoder does not fit in memory, or the budget is too short; states the least one.
        AsitError: whatever would refuse the run before its first step.
    """
    began = time.perf_counter() if began is None else began
    pretrain_settings.check(settings)
    with runtime.world(settings.device, settings.threads) as world:
        why = "Budget"
        if seconds is None:
            seconds, why = DEFAULT_SECONDS[world.device.type], "No --budget and no --epochs: assuming a budget"
        why = f"{why} of {duration(seconds)}"
        with _quiet():
            settings, source = continued.start(settings)
            listed = open_data.of_run(settings, None)
        kept = source is not None or any(name.startswith("encoder.") for name in given)
        fixed_batch = bool({"batch_size", "accumulate"} & set(given))
        chosen: PretrainSetup | None = None
        reason = "as given" if kept else "the largest there is"
        for own in [settings] if kept else [_with_encoder(settings, shape) for shape in ENCODERS]:
            larger = f"the next larger one, {own.encoder.width} x {own.encoder.depth}"
            with _quiet():
                fitting = _fitting(own, listed, world, source, fixed_batch)
            if fitting is None:
                if chosen is None:
                    raise ConfigError(
                        f"the {'given' if kept else 'smallest'} encoder does not fit in memory, one clip at a time",
                        f"at most {MEMORY_SHARE:.0%} of the machine's memory",
                        "set views.seconds or encoder.width lower, or use a larger machine",
                    )
                reason = f"{larger}, does not fit in memory"
                break
            setup, step_seconds = fitting
            steps = seconds / step_seconds
            if chosen is not None and steps < ENOUGH_STEPS:
                reason = f"{larger}, would get {_rounded(steps)} steps of the {ENOUGH_STEPS:,} it needs"
                break
            chosen = setup
        assert chosen is not None
        return _lengthen(chosen, settings, seconds, given, began, (why, reason))


def _lengthen(
    setup: PretrainSetup,
    settings: PretrainSettings,
    seconds: float,
    given: Collection[str],
    began: float,
    reasons: tuple[str, str],
) -> Chosen:
    """Measure the chosen set-up for a while and return the longest run that fits."""
    world, resolved = setup.world, setup.settings
    micro = resolved.batch_size // resolved.accumulate
    with _quiet():
        found = measure(setup, world, micro, budget=min(MEASURED_SECONDS, seconds / 20), began=time.perf_counter())
    decoded = setup.catalogue.header["seconds"] * resolved.front_end.rate * 4 / 1e9
    kept_gb = decoded if decoded <= resources.memory_limit(resolved.views.keep_gb) else 0.0
    expected = estimate(found, workload(setup, resolved.batch_size, kept_gb), PlanRequest())
    step = expected.step_seconds + found.checkpoint_seconds / resolved.records.checkpoint_every
    # The run scans the recordings and constructs everything again, which takes about as long as it took here.
    elapsed = time.perf_counter() - began
    per_epoch = setup.plan.steps_per_epoch
    steps = int((seconds - 2 * elapsed) / step)
    if steps < LEAST_STEPS:
        least = duration(math.ceil((2 * elapsed + LEAST_STEPS * step) * 1.2))
        raise ConfigError(
            f"a budget of {duration(seconds)}: {max(0, steps)} steps of {step:.2f} s after a start of {elapsed:.0f} s",
            f"time for at least {LEAST_STEPS} steps",
            f"give at least {least}, or a smaller encoder or batch",
        )
    epochs = round(steps / per_epoch, 4)
    epochs = int(epochs) if epochs == int(epochs) else epochs
    shape = ("size", "width", "depth", "heads")
    changes: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": resolved.batch_size,
        "accumulate": resolved.accumulate,
    }
    if not settings.model:
        changes["encoder"] = {name: getattr(resolved.encoder, name) for name in shape}
    width, depth, _ = shape_of(resolved.encoder)
    changes["optim"] = {}
    if "optim.warmup" not in given:
        changes["optim"]["warmup"] = round(WARM_UP * epochs, 4)
    if settings.preset in RATE_PRESETS and "optim.lr" not in given and width > RATE_WIDTH:
        changes["optim"]["lr"] = settings.optim.lr * RATE_WIDTH / width
    why, reason = reasons
    summary = [
        f"{why}: encoder {width} x {depth} ({reason})",
        f"  {steps:,} steps of {resolved.batch_size} clips, {epochs:.4g} epochs of {len(setup.clips):,} clips",
        f"  time: {duration(2 * elapsed + steps * step)}, at {step:.2f} s a step (measured)",
        "  memory: "
        + ", ".join(
            f"{size:.1f} of {expected.machine_gb.get(name, math.inf):.0f} GB ({name})"
            for name, size in expected.memory_gb.items()
        ),
    ]
    warning = ""
    if steps < FEW_STEPS:
        warning = f"{steps} steps: below about {FEW_STEPS} an encoder reads hardly better than an untrained one"
        warning += f"; give at least {duration(2 * elapsed + FEW_STEPS * step)}"
    return Chosen(settings.changed(changes), tuple(summary), warning)


def _rounded(steps: float) -> str:
    """Two significant digits."""
    digits = max(0, int(math.log10(max(steps, 1.0))) - 1)
    return f"{round(steps, -digits):,.0f}"


def _with_encoder(settings: PretrainSettings, shape: tuple[int, int, int]) -> PretrainSettings:
    width, depth, heads = shape
    return settings.changed({"encoder": {"size": "custom", "width": width, "depth": depth, "heads": heads}})


def _fitting(
    settings: PretrainSettings,
    listed: Catalogue,
    world: World,
    source: continued.StartingModel | None,
    fixed_batch: bool,
) -> tuple[PretrainSetup, float] | None:
    """Return the set-up with as many accumulation steps as its memory needs, and the seconds of a step; None: one clip
    at a time does not fit."""
    setup = prepare(settings, listed, world, source)
    batch, accumulate = setup.settings.batch_size, setup.settings.accumulate
    costs, there = small_costs(setup, world, batch // accumulate)[0], machine(world.device)

    def fits(micro: int) -> bool:
        memory = extrapolate(costs, micro).memory_gb
        return all(memory[name] < MEMORY_SHARE * size for name, size in there.items())

    parts = accumulate
    if not fits(batch // parts):
        possible = [n for n in range(accumulate, batch + 1) if batch % n == 0 and fits(batch // n)]
        if not possible or fixed_batch:
            return None
        parts = possible[0]
        setup = prepare(settings.changed({"batch_size": batch, "accumulate": parts}), listed, world, source)
    return setup, extrapolate(costs, batch // parts).seconds * parts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Log nothing: the run that follows logs all of it."""
    logger = logging.getLogger("asit")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
