"""The verb pretrain."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from asit.config import PretrainSettings
from asit.terminal.run_options import RunOptions, is_main_process, parse_run, resume_line, resume_of, signal_status

if TYPE_CHECKING:
    from asit.tools.dry_run import DryRun


class PretrainOptions(PretrainSettings, RunOptions):
    """Every setting of the run, and how to run it."""

    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


def pretrain(prog: str, summary: str, given: list[str]) -> int:
    settings, options = parse_run(PretrainSettings, PretrainOptions, prog, summary, given)
    resume = resume_of(options)
    if options.dry_run:
        from asit.tools.dry_run import dry_run

        _print_dry_run(dry_run(settings))
        return 0
    from asit.pretrain import pretrain_run

    result = pretrain_run.pretrain(settings, resume=resume, overwrite=options.overwrite)
    if not is_main_process():
        return signal_status(result.stopped_by)
    print(f"{result.step} of {result.total} steps, {result.clips_per_second:.1f} clips/s; run folder: {result.out}")
    if not result.finished:
        print(resume_line(PretrainSettings.VERB, result.out))
        if result.stopped_by:
            return signal_status(result.stopped_by)
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    print(f'python: import asit; model = asit.load("{result.model}"); model.embed("clip.wav").clip')
    return 0


def _print_dry_run(found: DryRun) -> None:
    from asit.progress import duration

    print(found.settings)
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
