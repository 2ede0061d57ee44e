"""The verb finetune."""

from __future__ import annotations

import shlex

from asit.config import FinetuneSettings
from asit.terminal.options import (
    RunOptions,
    dry_run_lines,
    is_main_process,
    parse_run,
    resume_line,
    resume_of,
    signal_status,
)


class FinetuneOptions(FinetuneSettings, RunOptions):
    """Every setting of the run, and how to run it."""


def finetune(prog: str, summary: str, given: list[str]) -> int:
    settings, options = parse_run(FinetuneSettings, FinetuneOptions, prog, summary, given)
    resume = resume_of(options)
    if options.dry_run:
        print("\n".join(dry_run_lines(settings)))
        return 0
    from asit.evaluate.result_records import summary_line
    from asit.finetune import cross_validation
    from asit.finetune.finetune_run import FinetuneResult

    result = cross_validation.run(settings, resume=resume, overwrite=options.overwrite)
    if not is_main_process():
        return signal_status(result.stopped_by)
    if not result.finished:
        print(resume_line(FinetuneSettings.VERB, result.out))
        return signal_status(result.stopped_by)
    if isinstance(result, FinetuneResult):
        for record in result.results:
            print(summary_line(record, first_metric=True))
        print(f"model:  {result.model}")
    else:
        for name, held in result.summary.items():
            print(f"{name}: mean {held['mean']:.4f}, std {held['std']:.4f} over {len(held['values'])} folds")
        for fold, classes in result.unseen.items():
            print(f"fold {fold} has no training clips of {', '.join(classes)}: scored without clips of these")
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    return 0
