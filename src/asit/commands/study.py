"""The verb study."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from asit.config import PretrainSettings
from asit.errors import AsitError, ConfigError
from asit.terminal.options import parse_run

if TYPE_CHECKING:
    from asit.study.study_plan import Request


class StudyOptions(PretrainSettings):
    """The study, and every setting of pretraining, for all its arms."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """losses, masked-share, length, corruption, alignment, views, strategies, or a YAML file with arms of your own."""
    table: tuple[str, ...] = ()
    """Labelled tables (CSV, TSV, JSONL) or catalogues with splits or folds; each is scored on by itself."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1)
    """Each arm is pretrained and scored with each of these."""
    arms: tuple[str, ...] = ()
    """Arms to run; by default all of the study."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Length of a run in minutes of CPU time (of the clock on a GPU), in place of --epochs: steps are measured."""
    finetune: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    """Also fine-tune with these shares of the labels, such as 0.1 1; by default the encoder stays frozen."""
    finetune_epochs: Annotated[int, Field(ge=1)] = 30
    """Of fine-tuning with all labels; with fewer labels there are more, up to ten times as many."""
    scratch_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """With --finetune: train the same classifier from fresh weights at these learning rates; the best one is shown."""
    task: str = "1/1"
    """I/N: do the I-th of N shares of the runs, for jobs of a Slurm array. Without it processes share as they come."""
    report: bool = False
    """Only write the table and the figure of what is finished in --out."""
    config: str | None = None
    """YAML file of settings of pretraining, for all arms; flags override it."""
    dry_run: bool = False
    """List the arms with their settings and the time to expect; write nothing."""


def study(prog: str, summary: str, given: list[str]) -> int:
    settings, options = parse_run(PretrainSettings, StudyOptions, prog, summary, given)
    out = Path(settings.out)
    if options.report:
        return _report(out)
    from asit.study import grids, study_plan, study_run

    if options.minutes is not None and any(word.partition("=")[0] == "--epochs" for word in given):
        raise ConfigError("--epochs and --minutes were both given", "one of the two", "choose one")
    if len(set(options.seeds)) != len(options.seeds) or not options.seeds:
        found = "--seeds " + " ".join(map(str, options.seeds))
        raise ConfigError(found, "one or more, each once", "give them as in --seeds 0 1")
    task = _task(options.task)
    request = study_plan.Request(
        grid=grids.read(options.name, options.arms),
        base=settings,
        tables=options.table,
        minutes=options.minutes,
        scoring=study_plan.Scoring(
            shares=options.finetune, epochs=options.finetune_epochs, scratch_rates=options.scratch_rates
        ),
    )
    if options.dry_run:
        print("\n".join(_dry_run_lines(request, len(options.seeds))))
        return 0
    prepared = study_plan.prepare(request)
    end = study_run.run(prepared, options.seeds, list(request.grid.arms), task)
    if end.stopped_by:
        print(f"stopped: {end.done} of {end.total} runs are finished and scored; the same command resumes the study")
        return 128 + signal.Signals[end.stopped_by]
    if end.others:
        print(f"{len(end.others)} runs are in the hands of other processes: the table lacks them for now")
    status = _report(out) if end.done or not end.failed else 0
    if end.failed:
        raise AsitError(
            f"{len(end.failed)} of {end.total} runs failed:\n    "
            + "\n    ".join(f"{name}: {why}" for name, why in end.failed.items()),
            "runs that train to their end",
            "the same command tries them again; another rate, or --arms without them, may be needed",
        )
    return status


def _report(out: Path) -> int:
    from asit.study import study_report
    from asit.study.study_plan import Study

    print(study_report.write(Study.read(out)), end="")
    print(f"\ntable:  {out / 'table.csv'}, {out / 'table.md'}\nfigure: {out / 'figure.png'}")
    return 0


def _task(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(f"--task {text}", "I/N with I from 1 to N", "write it as in --task 1/4")


def _dry_run_lines(request: Request, seeds: int) -> Iterator[str]:
    """List the arms, and measure what their runs take where no minutes are given."""
    from asit.config import yaml
    from asit.progress import duration
    from asit.study.grids import arm_settings, typical_seconds
    from asit.tools import run_estimate
    from asit.training import open_data

    base, grid = request.base, request.grid

    def typical() -> float:
        return typical_seconds(base, open_data.of_run(base, None))

    arms, total = arm_settings(grid, base, typical), 0.0
    yield f"study {grid.name}: {len(arms)} arms, {seeds} seeds; source: {grid.source or 'not named'}"
    for arm, settings in arms.items():
        changed = {name: now for name, (_, now) in yaml.differences(base, settings).items() if name != "epochs"}
        own = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
        if request.minutes is None:
            seconds = run_estimate.dry_run(settings).total_seconds
            took = f"{settings.epochs} epochs, {duration(seconds)} at the rate measured"
        else:
            seconds = 60 * request.minutes * grid.length(arm)
            took = duration(seconds)
        total += seeds * seconds
        yield f"{arm}{' (the reference)' * (arm == grid.reference)}: {took}; {own or 'the settings given'}"
    yield f"all runs one after the other: {duration(total)}, without scoring; nothing was written"
