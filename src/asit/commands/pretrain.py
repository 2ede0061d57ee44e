"""The verbs pretrain and finetune."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Literal

from asit import api
from asit.config import FinetuneSettings, PretrainSettings
from asit.errors import ConfigError
from asit.terminal.options import early, parse, settings_of

if TYPE_CHECKING:
    from asit.tools.dry_run import DryRun


class PretrainOptions(PretrainSettings):
    """Every setting of the run, and how to run it."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags go over it."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    auto_resume: bool = False
    """Begin where --out holds no run, and go on where it holds one: for jobs that a scheduler may start again."""
    overwrite: bool = False
    """Delete the run in --out and start again."""
    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


def pretrain(prog: str, summary: str, given: list[str]) -> int:
    chosen_early = early(given, ("--preset", "--config", "--out"))
    chosen = (chosen_early.get("--out", ""), chosen_early.get("--preset"), chosen_early.get("--config"))
    base = api.settings_for(*chosen, {}, resume=_goes_on(given))
    options = parse(PretrainOptions, prog, summary, given, default=PretrainOptions(**base.model_dump()))
    settings = settings_of(PretrainSettings, base, options, given)
    resume, overwrite = _resume(options), options.overwrite
    if options.dry_run:
        from asit.tools.dry_run import dry_run

        _tell(dry_run(settings, stream=sys.stderr))
        return 0
    from asit.pretrain import pretrain_run as runs

    result = runs.pretrain(settings, resume=resume, overwrite=overwrite, stream=sys.stderr)
    if int(os.environ.get("RANK", "0")) != 0:
        return signal_status(result.stopped_by)
    print(f"{result.step} of {result.total} steps, {result.clips_per_second:.1f} clips/s; the run is in {result.out}")
    if not result.finished:
        print(f"go on:  asit pretrain --out {shlex.quote(str(result.out))} --resume")
        if result.stopped_by:
            return signal_status(result.stopped_by)
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    print(f'python: import asit; model = asit.load("{result.model}"); model.embed("clip.wav").clip')
    return 0


def _goes_on(given: list[str]) -> bool:
    """Whether settings that are not given may come from the run itself; read before the options are parsed."""
    return "--resume" in given or "--auto-resume" in given


def _resume(options: PretrainOptions | FinetuneOptions) -> bool | Literal["auto"]:
    if options.auto_resume and (options.resume or options.overwrite):
        other = "--resume" if options.resume else "--overwrite"
        raise ConfigError(f"--auto-resume and {other} were both given", "one of the two", "choose one")
    return "auto" if options.auto_resume else options.resume


def signal_status(name: str | None) -> int:
    """The exit status that shells give to who is ended by this signal; 0 for none."""
    return 0 if name is None else 128 + signal.Signals[name]


def _tell(found: DryRun) -> None:
    from asit.training.metrics_log import duration

    print(found.settings)
    for note in found.notes:
        print(note)
    for name, shape in found.shapes.items():
        print(f"{name}: {shape}")
    how = "from two smaller sizes measured" if found.extrapolated else "measured"
    for name, size in found.memory_gb.items():
        print(f"peak memory of a process, {name}: {size:.1f} GB ({how})")
        if size > found.machine_gb.get(name, size):
            there = found.machine_gb[name]
            print(f"warning: that is more than the {there:.1f} GB there are; raise accumulate, or lower batch_size")
    print(f"a step: {found.seconds_per_step:.2f} s, {found.clips_per_second:.1f} clips/s ({how})")
    print(f"loading: {1 / found.seconds_per_clip:.0f} clips/s in one process, the first time (measured)")
    print(f"the whole run: {duration(found.total_seconds)} at that rate; nothing was written")


class FinetuneOptions(FinetuneSettings):
    """Every setting of the run, and how to run it."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags go over it."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    auto_resume: bool = False
    """Begin where --out holds no run, and go on where it holds one: for jobs that a scheduler may start again."""
    overwrite: bool = False
    """Delete the run in --out and start again."""


def finetune(prog: str, summary: str, given: list[str]) -> int:
    chosen_early = early(given, ("--task", "--config", "--out"))
    chosen = (chosen_early.get("--out", ""), chosen_early.get("--task"), chosen_early.get("--config"))
    base = api.finetune_settings_for(*chosen, {}, resume=_goes_on(given))
    options = parse(FinetuneOptions, prog, summary, given, default=FinetuneOptions(**base.model_dump()))
    settings = settings_of(FinetuneSettings, base, options, given)
    from asit.evaluate import scoring
    from asit.finetune import cross_validation
    from asit.finetune.finetune_run import FinetuneResult

    result = cross_validation.run(settings, resume=_resume(options), overwrite=options.overwrite, stream=sys.stderr)
    if int(os.environ.get("RANK", "0")) != 0:
        return signal_status(result.stopped_by)
    out = shlex.quote(str(result.out))
    if not result.finished:
        print(f"go on:  asit finetune --out {out} --resume")
        return signal_status(result.stopped_by)
    if isinstance(result, FinetuneResult):
        for record in result.results:
            print(scoring.sentence(record, every=False))
        print(f"model:  {result.model}")
    else:
        for name, held in result.summary.items():
            print(f"{name}: mean {held['mean']:.4f}, std {held['std']:.4f} over {len(held['values'])} folds")
        for fold, classes in result.unseen.items():
            print(f"fold {fold} has no training clips of {', '.join(classes)}: it is scored without clips of these")
    print(f"page:   asit report {out}")
    return 0
