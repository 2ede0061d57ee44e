"""Options that `asit pretrain` and `asit finetune` share."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from asit.config import FinetuneSettings, PretrainSettings, RunSettings, Settings, presets
from asit.config.presets import Resume
from asit.errors import ConfigError
from asit.terminal.options import early, parse, settings_of

S = TypeVar("S", bound=RunSettings)


class RunOptions(Settings):
    """How to run, beside the settings of the run."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags override it."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint."""
    auto_resume: bool = False
    """Resume the run in --out, or start one where there is none: for jobs that a scheduler may restart."""
    overwrite: bool = False
    """Delete the run in --out and start from scratch."""
    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


def parse_run(kind: type[S], options_kind: Any, prog: str, summary: str, given: list[str]) -> tuple[S, Any]:
    """Return the settings of a run, and all options of its verb, an `options_kind`."""
    recipe = f"--{kind.RECIPE}"
    chosen = early(given, (recipe, "--config", "--out", "--model"))
    resume = "--resume" in given or "--auto-resume" in given  # read before parsing: the run's settings are defaults
    named = {"model": chosen["--model"]} if "--model" in chosen else {}
    base = presets.build_for(
        kind, chosen.get("--out", ""), chosen.get(recipe), chosen.get("--config"), named, resume=resume
    )
    options = parse(options_kind, prog, summary, given, default=options_kind(**base.model_dump()))
    return settings_of(kind, base, options, given), options


def resume_of(options: RunOptions) -> Resume:
    """Return what the options request: to resume, not to, or "auto"."""
    if options.auto_resume and (options.resume or options.overwrite):
        other = "--resume" if options.resume else "--overwrite"
        raise ConfigError(f"--auto-resume and {other} were both given", "one of the two", "choose one")
    return "auto" if options.auto_resume else options.resume


def dry_run_lines(settings: PretrainSettings | FinetuneSettings) -> Iterator[str]:
    """Resolve and measure a run, and yield the lines that say what was found."""
    from asit.progress import duration
    from asit.tools import dry_run

    found = dry_run.dry_run(settings)
    yield found.settings
    yield from (f"{name}: {shape}" for name, shape in found.shapes.items())
    how = "from two smaller sizes measured" if found.extrapolated else "measured"
    for name, size in found.memory_gb.items():
        yield f"peak memory of a process, {name}: {size:.1f} GB ({how})"
        if size > found.machine_gb.get(name, size):
            there = found.machine_gb[name]
            yield f"warning: that is more than the {there:.1f} GB there are; raise accumulate, or lower batch_size"
    yield f"a step: {found.seconds_per_step:.2f} s, {found.clips_per_second:.1f} clips/s ({how})"
    yield f"loading: {1 / found.seconds_per_clip:.0f} clips/s in one process, the first time (measured)"
    scores = "" if isinstance(settings, PretrainSettings) else ", without scoring"
    yield f"the whole run: {duration(found.total_seconds)} at that rate{scores}; nothing was written"


def is_main_process() -> bool:
    """Return whether this process prints results: rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def resume_line(verb: str, out: Path) -> str:
    """Return the line with the command that resumes a stopped run."""
    return f"resume: {verb} --out {shlex.quote(str(out))} --resume"


def signal_status(name: str | None) -> int:
    """Return the exit status that shells give to a process ended by this signal; 0 for none."""
    return 0 if name is None else 128 + signal.Signals[name]
