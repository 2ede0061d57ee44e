"""The score of a model with a head on any catalogue: as at the end of the run that trained it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import make_splits, may_share_groups
from asit.data.loading.windows import Windows
from asit.evaluate import scoring
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier
from asit.progress import counter
from asit.runtime import Precision, World
from asit.training.resources import loader_workers

BLOCK = 64
"""Windows scored together, as in `score_batch` of fine-tuning."""


def score_model(
    model: AudioModel,
    catalogue: Catalogue,
    *,
    splits: Sequence[str],
    world: World,
    precision: Precision,
    fold: str | None = None,
    overlap: float = 0.0,
    bad_files: float = 0.1,
    missing: Literal["error", "skip"] = "error",
    shared_groups: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One result record for each split; every process of the world calls this, the main one gets the records.

    Args:
        model: with a head, on the world's device; the catalogue's labels must be among its classes.
        catalogue: the clips; without splits, all are scored.
        splits: names of splits.
        world: the processes that share the clips; the scores are those of one.
        precision: arithmetic of the network.
        fold: score this fold instead.
        overlap: of the windows over which a long clip is scored, as a share.
        bad_files: share of unreadable clips above which this fails.
        missing: whether clips without a label are an error or left out.
        shared_groups: draw single clips for the intervals, not whole groups.
        seed: of the bootstrap.

    Raises:
        CatalogueError: no such split or fold, labels that the model does not know, too many unreadable clips.
        ConfigError: the model has no head.
    """
    assert model.head is not None, "the caller asks only where there is a head"
    kind: Literal["single", "multi"] = "multi" if model.multi else "single"
    labels = read_labels(catalogue, kind, model.classes, missing=missing)
    network = Classifier(model.encoder, model.head)
    workers = loader_workers("auto", world)
    step = model.training.get("step")
    groups = None if may_share_groups(catalogue, shared_groups) else scoring.group_codes(catalogue)
    records = []
    for name, rows in _sides(catalogue, splits, fold).items():
        rows = rows[labels.known[rows]]
        windows = Windows(catalogue, rows, model.front_end.settings, model.frames, overlap, BLOCK)
        scorer = scoring.Scorer(
            windows, model.multi, world, precision, workers=workers, keep=False, bad_files=bad_files
        )
        show = counter(f"scoring {name}", "clips")
        scored = scorer(network, len(labels.names), show)
        if not world.main:
            continue
        records.append(
            scoring.record(
                scored,
                labels,
                catalogue,
                task=str(catalogue.header.get("task") or ""),
                split=name,
                weights="model",
                step=step if isinstance(step, int) else None,
                seed=seed,
                groups=scoring.units(groups, scored.rows),
            )
        )
    return records


def _sides(catalogue: Catalogue, splits: Sequence[str], fold: str | None) -> dict[str, npt.NDArray[np.int64]]:
    if fold is not None:
        return {f"fold {fold}": make_splits(catalogue, fold=fold).test}
    if catalogue.column("split") is None:
        return {"all": np.arange(len(catalogue))}
    return {name: make_splits(catalogue, train=(name,), validation=(), test=()).train for name in splits}
