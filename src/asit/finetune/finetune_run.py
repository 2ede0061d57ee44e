"""Fine-tuning, wired: from a pretrained encoder and labelled clips to a scored classifier and its run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.config import FinetuneSettings
from asit.errors import ConfigError
from asit.finetune import final_scores, init_model, supervised
from asit.finetune.finetune_setup import prepare
from asit.finetune.validation import Chooser
from asit.training import loop, open_data, run_dir
from asit.training import run as lifecycle
from asit.training.metrics_log import Records


@dataclass(frozen=True)
class FinetuneResult:
    """How a call of fine-tuning ended.

    Attributes:
        out: the run's folder.
        model: the classifier's folder, for `asit.load`.
        step: optimiser steps done.
        total: steps of the schedule.
        finished: whether the schedule is at its end.
        stopped_by: the signal that stopped it, or None.
        results: result records, of the last weights and of those that the validation side chose; empty where the run
            is not finished, and in all processes but the first.
    """

    out: Path
    model: Path
    step: int
    total: int
    finished: bool
    stopped_by: str | None
    results: list[dict[str, Any]]


def finetune(
    settings: FinetuneSettings,
    *,
    resume: lifecycle.Resume = False,
    overwrite: bool = False,
) -> FinetuneResult:
    """Fine-tune a classifier, score it, and leave a run's folder behind (docs/finetune.md lists its files).

    Args:
        settings: what to do; `data`, `model` and `out` are needed. For all folds in turn see `runs.folds`.
        resume: go on with the run in `out`, from its last checkpoint; "auto": where there is one.
        overwrite: delete the run in `out` first.

    Raises:
        AsitError: anything that the user can mend.
    """
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    supervised.check(settings)  # before hours may go into looking at the recordings
    out = Path(settings.out)
    with (
        lifecycle.processes(settings) as world,
        lifecycle.opened(settings, out, world, resume=resume, overwrite=overwrite) as opened,
    ):
        model = init_model.pretrained(opened.settings)
        wanted = open_data.Wanted.of(opened.settings, None if model is None else model.front_end.settings)
        catalogue = lifecycle.catalogue(wanted, out, world, going_on=opened.going_on)
        setup = prepare(opened.settings, model, catalogue, world)
        run = lifecycle.Run(
            out,
            setup.settings,
            catalogue,
            setup.frames,
            setup.task,
            setup.precision,
            setup.plan,
            setup.settings.records,
            setup.model,
            opened.log,
        )
        begun = lifecycle.start(run, opened, world)
        found: list[dict[str, Any]] = []
        with lifecycle.free_if_nothing_came(out, world, opened.going_on):
            data = setup.feed(world, begun[0])
            chooser = Chooser(setup, out, world)

            def after(records: Records, outcome: loop.Outcome) -> None:
                if outcome.finished:
                    # A run that was finished already has its scores: asking again changes nothing.
                    had = final_scores.read(out) if begun[0] == setup.plan.total else None
                    had = world.gather(had)[0]
                    step = outcome.step
                    found.extend(
                        final_scores.score_all(setup, out, world, records, chooser, step) if had is None else had
                    )

            outcome = lifecycle.train(
                run,
                data,
                world,
                begun,
                going_on=opened.going_on,
                hooks=lambda records: chooser.hooks(records, begun[0] if opened.going_on else None),
                after=after,
            )
    return FinetuneResult(
        out, out / run_dir.MODEL, outcome.step, setup.plan.total, outcome.finished, outcome.stopped_by, found
    )
