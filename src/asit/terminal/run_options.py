"""Options that `asit pretrain` and `asit finetune` share."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Any, TypeVar

from asit.config import RunSettings, Settings, presets
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


def is_main_process() -> bool:
    """Return whether this process prints results: rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def resume_line(verb: str, out: Path) -> str:
    """Return the line with the command that resumes a stopped run."""
    return f"resume: {verb} --out {shlex.quote(str(out))} --resume"


def signal_status(name: str | None) -> int:
    """Return the exit status that shells give to a process ended by this signal; 0 for none."""
    return 0 if name is None else 128 + signal.Signals[name]
