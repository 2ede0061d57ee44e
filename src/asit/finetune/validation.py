"""Validation during fine-tuning: the best epoch is chosen by the validation split, and its weights are kept."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from asit.errors import CheckpointError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.evaluate.result_records import label_metrics
from asit.finetune.finetune_setup import FinetuneSetup
from asit.training import loop, run_dir
from asit.training.metrics_log import Records, lines
from asit.training.run_claim import together

log = logging.getLogger(__name__)


class Validation:
    """Scores the validation split each `validation.every` epochs and at the end, and keeps the best weights.

    Attributes:
        scorer: of the validation split; None where no epoch is chosen.
        found: whether model-best holds weights.
    """

    def __init__(self, setup: FinetuneSetup) -> None:
        self.setup, self.out, self.world = setup, setup.out, setup.world
        self.every = setup.settings.validation.every * setup.plan.steps_per_epoch
        self.scorer: ClassifierScorer | None = None
        if self.every and len(setup.splits.validation):
            self.scorer = setup.scorer(setup.splits.validation)
        self._best: float | None = None

    @property
    def found(self) -> bool:
        return self._best is not None

    def hooks(self, records: Records, resumed_at: int | None) -> Sequence[tuple[int, loop.Hook]]:
        """Return the loop's hook, with a validation that an interruption prevented made up for.

        Args:
            records: of the run.
            resumed_at: step that the run is resumed from; None: it starts.

        Raises:
            CheckpointError: an epoch was chosen, and its weights are missing.
        """
        if self.scorer is None:
            return ()
        validate = functools.partial(self._validate, records, self.scorer)
        if resumed_at is not None:
            known = self.world.gather(together(self.world, lambda: self._known(resumed_at), self.world.main))[0]
            for _, value in known:
                self._better(value)
            if resumed_at not in dict(known):
                validate(resumed_at)
        return [(self.every, validate)]

    def _validate(self, records: Records, scorer: ClassifierScorer, step: int) -> None:
        # The loop also calls at its end, which may come early (stop_after).
        if not step or not (step % self.every == 0 or step == self.setup.plan.total):
            return
        setup, metric = self.setup, self.setup.settings.validation.metric
        scored = scorer(setup.task.scored(), len(setup.labels.names))
        found = label_metrics(scored, setup.labels, draws=0)
        values = {name: held["value"] for name, held in found["metrics"].items()}
        better = self._better(values[metric])
        if better:
            # Saved before the record: a run that dies between the two scores this step again.
            model = setup.model(step, chosen_by=metric, validation=values[metric])
            together(self.world, lambda: model.save(self.out / run_dir.BEST, overwrite=True), self.world.main)
        records.write("validation", step, {"metrics": values, "clips": found["clips"], "best": better})
        log.info(f"step {step}: validation {metric} {values[metric]:.4f}{' (best)' * better}")

    def _better(self, value: float | None) -> bool:
        if value is None or (self._best is not None and value <= self._best):
            return False
        self._best = value
        return True

    def _known(self, until: int) -> list[tuple[int, float | None]]:
        """Return (step, value) of the recorded validations up to a step."""
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
