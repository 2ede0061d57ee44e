"""The scores at the end of a fine-tuning run: of the last weights, and of those that validation chose."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from asit.errors import CheckpointError, ConfigError
from asit.evaluate.result_records import RecordHeader, result_record, save_scores, summary_line
from asit.finetune.finetune_setup import FinetuneSetup
from asit.finetune.validation import Validation
from asit.io import atomic, parsing
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier
from asit.progress import counter
from asit.training import run_dir
from asit.training.metrics_log import Records

log = logging.getLogger(__name__)

_AGAIN = "remove it and resume the run: its clips are scored again"
NAMED = 20
"""Most unreadable clips of a split that the log names."""


def score_all(setup: FinetuneSetup, records: Records, validation: Validation, step: int) -> list[dict[str, Any]]:
    """Score both splits, write scores/ and results.json, and return the result records (none in other processes).

    Args:
        setup: the run.
        records: of the run.
        validation: what chose the best epoch.
        step: steps done: all of them.

    Raises:
        CatalogueError: too many clips cannot be read.
    """
    settings, splits, world, out = setup.settings, setup.splits, setup.world, setup.out
    networks: list[tuple[str, int, Classifier]] = [("last", step, setup.task.scored())]
    if validation.found:
        best = AudioModel.load(out / run_dir.BEST)
        if best.head is None:
            raise CheckpointError(f"{out / run_dir.BEST} has no head", "the run's own classifier", _AGAIN)
        # The step is the folder's own: a killed run may have come further than the checkpoint it resumed from.
        networks.append(("best", best.training["step"], Classifier(best.encoder, best.head).to(world.device)))
    results: list[dict[str, Any]] = []
    for split, rows in (("validation", splits.validation), ("test", splits.test)):
        if not len(rows):
            continue
        scorer = validation.scorer if split == "validation" and validation.scorer else setup.scorer(rows)
        for weights, at, trained in networks:
            show = counter(f"scoring {split}, {weights} weights", "clips")
            scored = scorer(trained, len(setup.labels.names), show)
            if not world.main:
                continue
            header = RecordHeader(settings.task, split, weights, at)
            found = result_record(
                scored, setup.labels, setup.catalogue, header, seed=settings.seed, groups=setup.groups
            )
            save_scores(out, f"{split}-{weights}", scored, setup.labels, setup.catalogue)
            results.append(found)
            if weights == "last":
                for text in scored.failures[:NAMED]:
                    records.event(step, f"not scored ({split}): {text}")
    if not world.main:
        return results
    for found in results:
        if found["split"] == "test":
            values = {name: held["value"] for name, held in found["metrics"].items()}
            records.write("test", step, {"weights": found["weights"], "metrics": values})
        log.info(summary_line(found))
    atomic.write_json(
        out / run_dir.RESULTS,
        {
            "task": settings.task,
            "kind": settings.labels,
            "classes": list(setup.labels.names),
            "model": setup.origin,
            "train_clips": len(splits.train),
            "unseen_classes": list(splits.unseen),
            "chosen_by": settings.validation.metric if validation.found else None,
            "results": results,
        },
    )
    return results


def read(out: Path) -> list[dict[str, Any]] | None:
    """Return the result records of a finished run; None where it has none yet."""
    path = out / run_dir.RESULTS
    if not path.is_file():
        return None
    found = parsing.json_object(path, ConfigError, "the results of a fine-tuning run", _AGAIN).get("results")
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise ConfigError(f"{path} has no list of results", "the results of a fine-tuning run", _AGAIN)
    return found
