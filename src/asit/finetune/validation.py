"""The best epoch by validation: scored as a run goes, its weights kept; the test side is never looked at here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from asit.errors import CheckpointError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.evaluate.result_records import label_metrics
from asit.finetune.finetune_setup import Setup
from asit.runtime import World
from asit.training import loop, run_dir
from asit.training.metrics_log import Records, lines
from asit.training.run import together

log = logging.getLogger(__name__)


class Chooser:
    """Scores the validation side each `validation.every` epochs and at the end, and keeps the weights that do best.

    Attributes:
        scorer: of the validation side; None where no epoch is chosen.
        found: whether model-best holds weights.
    """

    def __init__(self, setup: Setup, out: Path, world: World) -> None:
        self.setup, self.out, self.world = setup, out, world
        self.every = setup.settings.validation.every * setup.plan.steps_per_epoch
        self.scorer: ClassifierScorer | None = None
        if self.every and len(setup.sides.validation):
            self.scorer = setup.scorer(setup.sides.validation, world)
        self._best: float | None = None

    @property
    def found(self) -> bool:
        return self._best is not None

    def hooks(self, records: Records, start: int | None) -> Sequence[tuple[int, loop.Hook]]:
        """What the loop calls. Going on from step `start`, first what a stop may have come before is made up for.

        Raises:
            CheckpointError: an epoch was chosen, and its weights have gone.
        """
        if self.scorer is None:
            return ()
        if start is not None:
            known = self.world.gather(together(self.world, lambda: self._known(start), self.world.main))[0]
            for _, value in known:
                self._better(value)
            if start not in dict(known):
                self._validate(records, start)
        return [(self.every, functools.partial(self._validate, records))]

    def _validate(self, records: Records, step: int) -> None:
        # The loop calls at the end of every call of it, which may be an early one (stop_after).
        if not step or not (step % self.every == 0 or step == self.setup.plan.total):
            return
        setup, metric = self.setup, self.setup.settings.validation.metric
        assert self.scorer is not None
        scored = self.scorer(setup.task.scored(), len(setup.labels.names))
        found = label_metrics(scored, setup.labels, draws=0)
        values = {name: held["value"] for name, held in found["metrics"].items()}
        better = self._better(values[metric])
        if better:
            # Before the line that tells of it: a run that dies between the two scores this step again.
            told = {"chosen_by": metric, "validation": values[metric]}
            save = functools.partial(setup.model(step, **told).save, self.out / run_dir.BEST, overwrite=True)
            together(self.world, save, self.world.main)
        records.write("validation", step, {"metrics": values, "clips": found["clips"], "best": better})
        log.info(f"step {step}: validation {metric} {values[metric]:.4f}{' (best)' * better}")

    def _better(self, value: float | None) -> bool:
        if value is None or (self._best is not None and value <= self._best):
            return False
        self._best = value
        return True

    def _known(self, until: int) -> list[tuple[int, float | None]]:
        """(step, value) of the validations that the run has had, up to a step."""
        known = []
        for _, entry in lines(self.out / "metrics.jsonl"):
            if entry["kind"] == "validation" and entry["step"] <= until and isinstance(entry.get("metrics"), dict):
                value = entry["metrics"].get(self.setup.settings.validation.metric)
                known.append((entry["step"], value if isinstance(value, float | int) else None))
        if known and not (self.out / run_dir.BEST).is_dir():
            raise CheckpointError(
                f"{self.out / run_dir.BEST} is not there, and {len(known)} validations were recorded",
                "the weights that did best so far",
                "put the folder back, or start again with --overwrite",
            )
        return known
