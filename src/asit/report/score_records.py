"""Scores of fine-tuned models as their runs keep them: result records, and the scores of each clip behind them.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.errors import AsitError
from asit.io import parsing
from asit.report.charts import number
from asit.report.run_reader import Line, Run

HEADLINES = ("accuracy", "mAP", "EER")
"""What a record is summed up by: the first of these that it has."""
SHARES = frozenset({"accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "mAP", "mAUC", "EER"}) | frozenset(
    {"AP", "AUC", "recall", "precision", "F1"}
)
"""Values from 0 to 1 that a page shows in per cent."""


@dataclass(frozen=True)
class Value:
    """A metric with its 95 % interval; NaN where it was not to be had.

    Attributes:
        value: the metric.
        low, high: the interval; NaN where there is none.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Scores:
    """What a model said of each clip, and what is true.

    Attributes:
        ids: (N,) names of the clips, as the catalogue has them.
        scores: (N, C) float32, probabilities as a rule.
        indptr, indices, weights: the labels of clip i are indices[indptr[i]:indptr[i + 1]], with weights in [0, 1].
    """

    ids: NDArray[np.str_]
    scores: NDArray[np.float32]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def positives(self) -> NDArray[np.bool_]:
        """(N, C): which labels a clip has, soft ones from one half on."""
        dense = np.zeros(self.scores.shape, dtype=bool)
        rows = np.repeat(np.arange(len(self.ids)), np.diff(self.indptr))
        kept = self.weights >= 0.5
        dense[rows[kept], self.indices[kept]] = True
        return dense

    @property
    def truth(self) -> NDArray[np.int64]:
        """(N,) the heaviest label of each clip; -1 where it has none."""
        order = np.lexsort((self.indices, -self.weights, np.repeat(np.arange(len(self.ids)), np.diff(self.indptr))))
        out = np.full(len(self.ids), -1, np.int64)
        has = np.diff(self.indptr) > 0
        out[has] = self.indices[order[self.indptr[:-1][has]]]
        return out

    @property
    def probable(self) -> bool:
        """Whether all scores lie in [0, 1]."""
        return bool(self.scores.size) and bool(((self.scores >= 0) & (self.scores <= 1)).all())

    @property
    def exclusive(self) -> bool:
        """Whether the scores of each clip are probabilities that add up to one."""
        return self.probable and bool(np.allclose(self.scores.sum(1, dtype=np.float64), 1, atol=1e-2))

    @classmethod
    def read(cls, path: Path) -> Scores:
        """The scores in a run's scores/SPLIT-WEIGHTS.npz.

        Raises:
            AsitError: no such file, or one that is damaged or does not hold together.
        """
        if not path.is_file():
            raise AsitError(f"{path} is not there", "the scores of each clip", "score the model again")
        try:
            held = parsing.npz(path, ("ids", "scores", "indptr", "indices", "weights"))
            made = cls(
                held["ids"].astype(np.str_),
                held["scores"].astype(np.float32, copy=False),
                held["indptr"].astype(np.int64, copy=False),
                held["indices"].astype(np.int64, copy=False),
                held["weights"].astype(np.float32, copy=False),
            )
        except (ValueError, TypeError) as error:
            raise AsitError(
                f"{path} cannot be read: {error}", "the file as the run wrote it", "score the model again"
            ) from error
        count, classes = made.scores.shape if made.scores.ndim == 2 else (-1, -1)
        flat = all(one.ndim == 1 for one in (made.ids, made.indptr, made.indices, made.weights))
        whole = flat and (
            len(made.ids) == count
            and len(made.indptr) == count + 1
            and len(made.indices) == len(made.weights) == int(made.indptr[-1])
            and (not len(made.indices) or (int(made.indices.min()) >= 0 and int(made.indices.max()) < classes))
        )
        if not whole:
            raise AsitError(
                f"{path} does not hold together: {made.ids.size} clips, scores of shape {made.scores.shape}",
                "one row of scores and one list of labels for each clip",
                "score the model again",
            )
        return made


@dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation: its name, its run's folder, its records (none until it is finished)."""

    name: str
    folder: Path
    records: Sequence[Line]


def records(held: Mapping[str, Any], where: Path) -> list[Line]:
    """The result records of a results.json.

    Raises:
        AsitError: entries that are no records; the file is named.
    """
    found = held.get("results", [])
    good = isinstance(found, list) and all(isinstance(r, dict) and isinstance(r.get("metrics"), dict) for r in found)
    if not good:
        raise AsitError(
            f"{where} holds results that are not records",
            "a list of records with task, split, weights and metrics",
            "score the model again, or take the file that asit wrote",
        )
    return list(found)


def folds(run: Run) -> list[Fold]:
    """The folds of a cross-validation, finished or not, by the runs' folders and by its results.json."""
    told = {str(fold["fold"]): fold for fold in run.results.get("folds", [])}
    places = {path.name.removeprefix("fold-"): path for path in run.folds}
    made = []
    for name in [*places, *(name for name in told if name not in places)]:
        folder = places.get(name, run.folder / f"fold-{name}")
        held = told[name] if name in told else Run.read(folder).results
        made.append(Fold(name, folder, records(held, folder / "results.json")))
    return made


def metric(record: Mapping[str, Any], name: str) -> Value:
    """A metric of a record with its interval; NaN where the record lacks it."""
    entry = record["metrics"].get(name)
    if isinstance(entry, Mapping):
        low, high = entry.get("interval") or (None, None)
        return Value(*(math.nan if v is None else float(v) for v in (entry.get("value"), low, high)))
    return Value(math.nan if entry is None else float(entry))


def headline(record: Mapping[str, Any]) -> str:
    """The metric that sums a record up: the field's own for its kind of labels, else the first there is."""
    names = list(record["metrics"])
    preferred = ("mAP", *HEADLINES) if record.get("kind") == "multi" else HEADLINES
    return next((name for name in preferred if name in names), names[0] if names else "")


def chief(found: Sequence[Line]) -> Line | None:
    """The record that a page goes into: test before validation, last weights before those that were chosen."""

    def rank(record: Line) -> tuple[int, int]:
        split, weights = record.get("split"), record.get("weights")
        return (0 if split == "test" else 1 if split == "validation" else 2), (weights != "last")

    return min(found, key=rank, default=None)


def plain(name: str) -> str:
    """A metric's or split's name as one reads it."""
    return name.replace("_", " ")


def shown(name: str, value: float) -> str:
    """A metric's value as a page shows it: shares in per cent."""
    if not math.isfinite(value):
        return "not to be had" if math.isnan(value) else str(value)
    return f"{value:.1%}" if name in SHARES else number(value)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1 in the denominator; NaN for a single value) of folds or seeds."""
    there = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if not len(there):
        return math.nan, math.nan
    return float(there.mean()), float(there.std(ddof=1)) if len(there) > 1 else math.nan


def scores_path(folder: Path, record: Mapping[str, Any]) -> Path:
    """Where a run keeps the scores of each clip behind a record."""
    return folder / "scores" / f"{record.get('split')}-{record.get('weights')}.npz"
