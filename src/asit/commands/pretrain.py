"""The verb pretrain."""

from __future__ import annotations

import shlex

from asit.config import PretrainSettings
from asit.terminal.options import (
    RunOptions,
    dry_run_lines,
    is_main_process,
    parse_run,
    resume_line,
    resume_of,
    signal_status,
)


class PretrainOptions(PretrainSettings, RunOptions):
    """Every setting of the run, and how to run it."""


def pretrain(prog: str, summary: str, given: list[str]) -> int:
    settings, options = parse_run(PretrainSettings, PretrainOptions, prog, summary, given)
    resume = resume_of(options)
    if options.dry_run:
        print("\n".join(dry_run_lines(settings)))
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
