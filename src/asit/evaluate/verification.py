"""Verification with frozen embeddings: are two clips of one speaker? Trials from a list, or drawn from the test side.

Letters: N clips, n trials, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import list_hash
from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION, make_splits
from asit.errors import CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL, LOG_MEL_STATISTICS, MODEL, POOLINGS, encoders, pooled
from asit.evaluate.features import collect
from asit.evaluate.frozen import told
from asit.evaluate.pooling import Pooling
from asit.evaluate.probe_scores import choose
from asit.evaluate.trials import MAX_TRIALS, Trials, cosine_scores, read_trials, trials_from_labels
from asit.evaluate.verification_metrics import verification_metrics
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.runtime import World

CENTRE_CLIPS = 2000
"""Training clips, at most, whose mean is taken off: drawn with the seed; reading more would not move it."""


@dataclass(frozen=True)
class AskVerify:
    """What to verify, and how.

    Attributes:
        pooling: embeddings compared.
        trials: list of trials, a line each: 1 or 0, then two paths; None: drawn from the test side.
        root: folder that the list's paths count from; None: the catalogue's.
        most: trials drawn.
        seed: of the draw, the bootstrap and the untrained weights.
        by: what two clips must share: "group" or "label"; "auto": the group where the catalogue has groups.
        baselines, seconds, precision, bad_files, train, validation, test: as in `asit.evaluate.probe_scores.Ask`.
    """

    pooling: tuple[Pooling, ...] = ("class+mean",)
    trials: str | None = None
    root: str | None = None
    most: int = MAX_TRIALS
    seed: int = 0
    by: Literal["auto", "group", "label"] = "auto"
    baselines: bool = False
    seconds: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    bad_files: float = 0.1
    train: tuple[str, ...] = TRAIN
    validation: tuple[str, ...] = VALIDATION
    test: tuple[str, ...] = TEST


@dataclass(frozen=True)
class Verified:
    """Scores of verification.

    Attributes:
        records: one for each encoder and pooling (docs/evaluate.md).
        notes: what the user should know.
    """

    records: list[dict[str, Any]]
    notes: list[str]

    def text(self) -> str:
        """A table for a terminal."""
        names = list(self.records[0]["metrics"])
        lines = [["encoder", "embedding", *names]]
        for record in self.records:
            cells = []
            for held in record["metrics"].values():
                spread = " ({:.4f}-{:.4f})".format(*held["interval"]) if held["interval"] else ""
                cells.append(f"{held['value']:.4f}{spread}")
            lines.append([record["encoder"], record["features"], *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        first = self.records[0]
        return "\n".join(
            [
                *(line.rstrip() for line in shown),
                f"{first['trials']} trials, {first['same_trials']} of them of one {first['by']}, over {first['clips']} "
                f"clips (list {first['list']}); in brackets the 95 % interval over {first['bootstrap']['unit']}s",
            ]
        )


def verify(
    model: AudioModel,
    catalogue: Catalogue,
    ask: AskVerify,
    *,
    world: World,
    store: Store | None = None,
) -> Verified | None:
    """EER and minDCF of the cosine between embeddings, from which the training side's mean is taken first.

    Embeddings of one encoder share a large common part; its mean over clips that are not scored, where there is a
    training side besides the test side, is no label and no test clip's. Every process of the world calls this; the
    main one gets the scores, the others None.

    Raises:
        ConfigError: an unknown pooling.
        CatalogueError: no speakers, no test side, a list of trials that is damaged or names clips that are not there.
        AsitError: trials of one kind only.
    """
    choose("pooling", ask.pooling, POOLINGS)
    train, test = _sides(catalogue, ask)
    who, by = _speakers(catalogue, ask)
    if ask.trials is not None:
        trials = read_trials(Path(ask.trials), catalogue, ask.root)
        scored = np.unique(np.concatenate([trials.first, trials.second]))
        drawn = False
    else:
        assert who is not None
        scored, drawn = test[_known(who, test)], True
    train = np.setdiff1d(train, scored)
    if len(train) > CENTRE_CLIPS:
        train = np.sort(np.random.default_rng([ask.seed, 4]).permutation(train)[:CENTRE_CLIPS])
    used = np.union1d(train, scored)
    found = collect(
        catalogue.subset(used),
        encoders(
            model,
            pooling=ask.pooling,
            baselines=ask.baselines,
            seed=ask.seed,
            precision=ask.precision,
            seconds=ask.seconds,
        ),
        store=store,
        world=world,
        bad_files=ask.bad_files,
        progress=counter("features", "clips"),
    )
    if found is None:
        return None
    notes = told(found, len(used), store)
    place = np.full(len(catalogue), -1, np.int64)
    place[used[found.kept]] = np.arange(len(found.kept))
    lost = int((place[scored] < 0).sum())
    scored, train = scored[place[scored] >= 0], train[place[train] >= 0]
    if drawn:
        assert who is not None
        within = trials_from_labels(who[scored], ask.seed, ask.most)
        trials = Trials(scored[within.first], scored[within.second], within.same)
    else:
        both = (place[trials.first] >= 0) & (place[trials.second] >= 0)
        if not both.all():
            notes.append(f"{int((~both).sum())} of {len(both)} trials have a clip that cannot be read: left out")
        trials = Trials(trials.first[both], trials.second[both], trials.same[both])
    speakers = None
    if who is not None and _known(who, trials.first).all() and _known(who, trials.second).all():
        speakers = (who[trials.first].astype(str), who[trials.second].astype(str))
    if not len(train):
        notes.append("no training side: embeddings are compared as they are, not centred")
    records = []
    for encoder in found.vectors:
        for kind in (LOG_MEL,) if encoder == LOG_MEL_STATISTICS else ask.pooling:
            table = pooled(found.vectors[encoder], kind)
            if len(train):
                table = table - table[place[train]].mean(0, dtype=np.float64).astype(np.float32)
            cosines = cosine_scores(table, place[trials.first], place[trials.second])
            records.append(
                {
                    "task": str(catalogue.header.get("task") or ""),
                    "kind": "verification",
                    "split": "test" if ask.trials is None else Path(ask.trials).name,
                    "weights": f"cosine, {kind}" + ("" if encoder == MODEL else f", {encoder}"),
                    "step": None,
                    "clips": len(scored),
                    "list": list_hash(catalogue.ids(scored)),
                    "unreadable": lost,
                    "encoder": encoder,
                    "features": kind,
                    "by": by,
                    "centred": bool(len(train)),
                    **verification_metrics(cosines, trials.same, speakers=speakers, seed=ask.seed),
                }
            )
    return Verified(records, notes)


def _sides(catalogue: Catalogue, ask: AskVerify) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that embeddings are centred by, which may be none, and rows that are verified: without splits, all."""
    if catalogue.column("split") is None:
        return np.empty(0, np.int64), np.arange(len(catalogue))
    nothing = np.empty(0, np.int64)
    test = nothing
    if ask.trials is None:
        test = make_splits(catalogue, train=ask.test, validation=(), test=()).train
    try:
        return make_splits(catalogue, train=ask.train, validation=ask.validation, test=ask.test).train, test
    except CatalogueError:
        if ask.train != TRAIN:  # named, and not there
            raise
        return nothing, test


def _speakers(catalogue: Catalogue, ask: AskVerify) -> tuple[npt.NDArray[np.object_] | None, str]:
    """(N,) who each clip is of, and by which column; None where a list of trials needs none."""
    column = "label" if ask.by == "label" or (ask.by == "auto" and catalogue.column("group") is None) else "group"
    if catalogue.column(column) is None:
        if ask.trials is not None and ask.by == "auto":
            return None, "speaker"
        raise CatalogueError(
            f"the catalogue has no {column}s to verify by",
            "a column group (or speaker), or label",
            "add it, or give a list of trials with --trials",
        )
    return (catalogue.groups if column == "group" else catalogue.labels), column


def _known(who: npt.NDArray[np.object_], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.array([name is not None for name in who[rows]], bool)
