"""Verify speakers with frozen embeddings: EER and minDCF of the cosine between the embeddings of two clips.

Letters: N clips, n trials, D width.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import list_hash
from asit.data.catalogue.splits import TRAIN, make_splits
from asit.errors import CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL, LOG_MEL_STATISTICS, MODEL, POOLINGS, pooled
from asit.evaluate.frozen import collect_features
from asit.evaluate.frozen_settings import VerificationSettings, choose
from asit.evaluate.result_records import bracketed, text_table
from asit.evaluate.trials import Trials, cosine_scores, read_trials, trials_from_labels
from asit.evaluate.verification_metrics import verification_metrics
from asit.model.audio_model import AudioModel
from asit.runtime import World

log = logging.getLogger(__name__)

CENTRING_CLIPS = 2000
"""Maximum number of training clips whose mean is subtracted, drawn with the seed; more would not change it."""


@dataclass(frozen=True)
class VerificationScores:
    """Scores of verification: a record for each encoder and pooling (docs/evaluate.md)."""

    records: list[dict[str, Any]]

    def text(self) -> str:
        """Make a table with a row for each record."""
        lines = [["encoder", "embedding", *self.records[0]["metrics"]]]
        for record in self.records:
            cells = [f"{m['value']:.4f}{bracketed(m['interval'])}" for m in record["metrics"].values()]
            lines.append([record["encoder"], record["features"], *cells])
        first = self.records[0]
        legend = (
            f"{first['trials']} trials, {first['same_trials']} of them of one {first['by']}, over {first['clips']} "
            f"clips (list {first['list']}); in brackets the 95 % interval over {first['bootstrap']['unit']}s"
        )
        return "\n".join([*text_table(lines), legend])


def verify(
    model: AudioModel, catalogue: Catalogue, settings: VerificationSettings, *, world: World, store: Store | None = None
) -> VerificationScores | None:
    """Compute EER and minDCF of the cosine between embeddings centred on the mean of the training split.

    Embeddings of one encoder share a large common part, which the mean of clips that are not scored removes; without
    a training split they are compared as they are. Every process of the world calls this; the main one gets the scores,
    the others None.

    Raises:
        ConfigError: an unknown pooling.
        CatalogueError: no speakers, no test split, or a list of trials that cannot be read or names unknown clips.
        AsitError: trials of one kind only.
    """
    choose("pooling", settings.pooling, POOLINGS)
    train, test = _splits(catalogue, settings)
    speakers, by = _speakers(catalogue, settings)
    known = np.array([name is not None for name in speakers], bool)
    listed = None if settings.trials is None else read_trials(Path(settings.trials), catalogue, settings.root)
    scored = test[known[test]] if listed is None else np.unique(np.concatenate([listed.first, listed.second]))
    train = np.setdiff1d(train, scored)
    if len(train) > CENTRING_CLIPS:
        train = np.sort(np.random.default_rng([settings.seed, 4]).permutation(train)[:CENTRING_CLIPS])
    used = np.union1d(train, scored)
    found = collect_features(model, catalogue, used, settings, pooling=settings.pooling, world=world, store=store)
    if found is None:
        return None
    index = np.full(len(catalogue), -1, np.int64)  # of each clip in the features; -1: unreadable
    index[used[found.kept]] = np.arange(len(found.kept))
    unreadable = int((index[scored] < 0).sum())
    scored, train = scored[index[scored] >= 0], train[index[train] >= 0]
    if listed is not None:
        both = (index[listed.first] >= 0) & (index[listed.second] >= 0)
        if not both.all():
            log.warning("%d of %d trials have a clip that cannot be read and are left out", (~both).sum(), len(both))
        trials = Trials(listed.first[both], listed.second[both], listed.same[both])
    else:
        drawn = trials_from_labels(speakers[scored].astype(str), settings.seed, settings.most)
        trials = Trials(scored[drawn.first], scored[drawn.second], drawn.same)
    pairs = None
    if known[trials.first].all() and known[trials.second].all():
        pairs = speakers[trials.first].astype(str), speakers[trials.second].astype(str)
    if not len(train):
        log.info("no training split: embeddings are compared without centring")
    records = []
    for encoder in found.vectors:
        for kind in (LOG_MEL,) if encoder == LOG_MEL_STATISTICS else settings.pooling:
            table = pooled(found.vectors[encoder], kind)
            if len(train):
                table = table - table[index[train]].mean(0, dtype=np.float64).astype(np.float32)
            cosines = cosine_scores(table, index[trials.first], index[trials.second])
            records.append(
                {
                    "task": str(catalogue.header.get("task") or ""),
                    "kind": "verification",
                    "split": "test" if settings.trials is None else Path(settings.trials).name,
                    "weights": f"cosine, {kind}" + ("" if encoder == MODEL else f", {encoder}"),
                    "step": None,
                    "clips": len(scored),
                    "list": list_hash(catalogue.ids(scored)),
                    "unreadable": unreadable,
                    "encoder": encoder,
                    "features": kind,
                    "by": by,
                    "centred": bool(len(train)),
                    **verification_metrics(cosines, trials.same, speakers=pairs, seed=settings.seed),
                }
            )
    return VerificationScores(records)


def _splits(
    catalogue: Catalogue, settings: VerificationSettings
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows of the training split, which may be empty, and of the test split: without splits, all."""
    empty = np.empty(0, np.int64)
    if catalogue.column("split") is None:
        return empty, np.arange(len(catalogue))
    test = empty
    if settings.trials is None:
        test = make_splits(catalogue, train=settings.test, validation=(), test=()).train
    try:
        train = make_splits(catalogue, train=settings.train, validation=settings.validation, test=settings.test).train
    except CatalogueError:
        if settings.train != TRAIN:  # named by the user
            raise
        train = empty
    return train, test


def _speakers(catalogue: Catalogue, settings: VerificationSettings) -> tuple[npt.NDArray[np.object_], str]:
    """Return each clip's speaker or None (N,), and the column used."""
    column: str = settings.by
    if column == "auto":
        column = "label" if catalogue.column("group") is None else "group"
    if catalogue.column(column) is None:
        if settings.trials is not None and settings.by == "auto":
            column = "speaker"  # a list of trials needs no column
        else:
            raise CatalogueError(
                f"the catalogue has no {column}s to verify by",
                "a column group (or speaker), or label",
                "add it, or give a list of trials with --trials",
            )
    return catalogue.texts(column), column
