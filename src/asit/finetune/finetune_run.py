"""A fine-tuning run: from a pretrained encoder and labelled clips to a scored classifier and its run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from asit.config import FinetuneSettings, finetune_settings
from asit.config.presets import Resume
from asit.evaluate.result_records import summary_line
from asit.finetune import final_scores, init_model
from asit.finetune.finetune_setup import FinetuneSetup, prepare
from asit.finetune.validation import Validation
from asit.runtime import World
from asit.training import loop, run
from asit.training.metrics_log import Records


@dataclass(frozen=True, kw_only=True)
class FinetuneResult(run.RunResult):
    """How a call of fine-tuning ended.

    Attributes:
        results: result records, of the last weights and of those that validation chose; empty where the run is not
            finished, and in all processes but the first.
    """

    results: list[dict[str, Any]]

    def __repr__(self) -> str:
        scores = "; ".join(summary_line(record, first_metric=True) for record in self.results) or "no scores"
        return f"FinetuneResult({str(self.out)!r}, {self.step} of {self.total} steps; {scores})"


def finetune(settings: FinetuneSettings, *, resume: Resume = False, overwrite: bool = False) -> FinetuneResult:
    """Fine-tune a classifier, score it, and write a run's folder (docs/finetune.md lists its files).

    Args:
        settings: `data`, `model` and `out` are needed. For all folds see `cross_validation.run`.
        resume: resume the run in `out` from its last checkpoint; "auto": where there is one.
        overwrite: delete the run in `out` first.

    Raises:
        AsitError: the settings, the data or the folder do not fit, or training failed.
    """
    results: list[dict[str, Any]] = []
    with run.launch(settings, finetune_settings.check, _set_up, resume=resume, overwrite=overwrite) as launched:
        setup = launched.setup
        validation = Validation(setup)

        def finish(records: Records, outcome: loop.Outcome) -> None:
            if outcome.finished:
                # Scores of a run that was finished before are not computed again.
                had = final_scores.read(setup.out) if launched.step == setup.plan.total else None
                had = setup.world.gather(had)[0]
                results.extend(final_scores.score_all(setup, records, validation, outcome.step) if had is None else had)

        resumed_at = launched.step if launched.resumed else None
        outcome = launched.train(lambda records: validation.hooks(records, resumed_at), finish)
    return FinetuneResult(**launched.result(outcome), results=results)


def _set_up(settings: FinetuneSettings, open_catalogue: run.OpenCatalogue, world: World, _: bool) -> FinetuneSetup:
    model = init_model.pretrained(settings)
    catalogue = open_catalogue(None if model is None else model.front_end.settings)
    return prepare(settings, model, catalogue, world)
