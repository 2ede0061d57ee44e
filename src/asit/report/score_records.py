"""Read the scores that fine-tuning and evaluation write: result records, and the scores of each clip.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.errors import AsitError
from asit.evaluate.bootstrap import Value
from asit.io import parsing
from asit.report.run_reader import Line, RunFolder

HEADLINES = ("accuracy", "mAP", "EER")
"""Metrics that sum up a record: the first of these that it has."""
SHARES = frozenset(
    {
        *("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "mAP", "mAUC", "EER"),
        *("AP", "AUC", "recall", "precision", "F1"),
    }
)
"""Metrics from 0 to 1 that pages show in per cent."""


@dataclass(frozen=True)
class ResultRecord:
    """The scores of some weights on one split of a run.

    Attributes:
        content: the record as it is in results.json.
        folder: of the run; None for a file of records.
        split, weights: names; the weights are last, best or a probe.
        clips: clips scored.
        list: hash of the list of clips.
        unit: what the bootstrap draws: clip or group.
        multi: whether a clip may have several labels.
    """

    content: Line
    folder: Path | None
    split: str
    weights: str
    clips: int
    list: str
    unit: str
    multi: bool

    @classmethod
    def of(cls, content: Line, folder: Path | None = None) -> ResultRecord:
        """Return the record with the content of an entry of results.json."""
        return cls(
            content=content,
            folder=folder,
            **{name: str(content.get(name, "")) for name in ("split", "weights", "list")},
            clips=int(content.get("clips", 0)),
            unit=str((content.get("bootstrap") or {}).get("unit", "clip")),
            multi=content.get("kind") == "multi",
        )

    @property
    def headline(self) -> str:
        """The metric that sums up the record: mAP for several labels, else the first of HEADLINES."""
        names = list(self.content["metrics"])
        preferred = ("mAP", *HEADLINES) if self.multi else HEADLINES
        return next((name for name in preferred if name in names), names[0] if names else "")

    @property
    def scores(self) -> Path | None:
        """Path of the scores of each clip."""
        return self.folder / "scores" / f"{self.split}-{self.weights}.npz" if self.folder else None

    def metric(self, name: str) -> Value:
        """Return a metric with its interval; NaN where the record lacks it."""
        entry = self.content["metrics"].get(name)
        if isinstance(entry, Mapping):
            low, high = entry.get("interval") or (None, None)
            return Value(*(math.nan if v is None else float(v) for v in (entry.get("value"), low, high)))
        return Value(math.nan if entry is None else float(entry))

    def like(self, other: ResultRecord) -> bool:
        """Return whether two records are of the same split and weights."""
        return (self.split, self.weights) == (other.split, other.weights)


@dataclass(frozen=True)
class Scores:
    """The scores of each clip, and its labels.

    Attributes:
        ids: (N,) the clips' ids in the catalogue.
        scores: (N, C) float32, usually probabilities.
        indptr, indices, weights: the labels of clip i are indices[indptr[i]:indptr[i + 1]], with weights in [0, 1].
    """

    ids: NDArray[np.str_]
    scores: NDArray[np.float32]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def positives(self) -> NDArray[np.bool_]:
        """(N, C): which labels a clip has; soft ones from a weight of one half on."""
        dense = np.zeros(self.scores.shape, dtype=bool)
        rows = np.repeat(np.arange(len(self.ids)), np.diff(self.indptr))
        kept = self.weights >= 0.5
        dense[rows[kept], self.indices[kept]] = True
        return dense

    @property
    def truth(self) -> NDArray[np.int64]:
        """(N,) the label of each clip with the largest weight; -1 where it has none."""
        order = np.lexsort((self.indices, -self.weights, np.repeat(np.arange(len(self.ids)), np.diff(self.indptr))))
        out = np.full(len(self.ids), -1, np.int64)
        has = np.diff(self.indptr) > 0
        out[has] = self.indices[order[self.indptr[:-1][has]]]
        return out

    @property
    def probable(self) -> bool:
        """Whether all scores are in [0, 1]."""
        return bool(self.scores.size) and bool(((self.scores >= 0) & (self.scores <= 1)).all())

    @property
    def exclusive(self) -> bool:
        """Whether the scores of each clip are probabilities that add up to 1."""
        return self.probable and bool(np.allclose(self.scores.sum(1, dtype=np.float64), 1, atol=1e-2))

    @classmethod
    def read(cls, path: Path | None) -> Scores:
        """Read a run's scores/SPLIT-WEIGHTS.npz.

        Raises:
            AsitError: the file is missing or damaged, or its arrays do not fit together.
        """
        expected, remedy = "the scores of each clip, as the run wrote them", "score the model again"
        if path is None or not path.is_file():
            raise AsitError(f"{path} is not there", expected, remedy)
        types = {"ids": np.str_, "scores": np.float32, "indptr": np.int64, "indices": np.int64, "weights": np.float32}
        try:
            held = parsing.npz(path, tuple(types))
            made = cls(**{name: held[name].astype(kind, copy=False) for name, kind in types.items()})
        except (ValueError, TypeError) as error:
            raise AsitError(f"{path} cannot be read: {error}", expected, remedy) from error
        if not made._consistent():
            found = f"{path} does not hold together: {made.ids.size} clips, scores of shape {made.scores.shape}"
            raise AsitError(found, "one row of scores and one list of labels for each clip", remedy)
        return made

    @classmethod
    def joined(cls, paths: Sequence[Path]) -> Scores:
        """Read the scores of all folds as one.

        Raises:
            AsitError: as `read`, or the folds differ in their number of classes.
        """
        held = [cls.read(path) for path in paths]
        if len({one.scores.shape[1] for one in held}) > 1:
            raise AsitError("the folds have different numbers of classes")
        names = ("ids", "scores", "indices", "weights")
        counts = np.concatenate([np.diff(one.indptr) for one in held])
        return cls(
            **{name: np.concatenate([getattr(one, name) for one in held]) for name in names},
            indptr=np.concatenate([[0], np.cumsum(counts)]),
        )

    def _consistent(self) -> bool:
        if self.scores.ndim != 2 or any(one.ndim != 1 for one in (self.ids, self.indptr, self.indices, self.weights)):
            return False
        count, classes = self.scores.shape
        return (
            len(self.ids) == count
            and len(self.indptr) == count + 1
            and len(self.indices) == len(self.weights) == int(self.indptr[-1])
            and (not len(self.indices) or (int(self.indices.min()) >= 0 and int(self.indices.max()) < classes))
        )


@dataclass(frozen=True)
class ScoredFold:
    """A fold of a cross-validation: name, run folder, and records, which are empty until the fold is finished."""

    name: str
    folder: Path
    records: Sequence[ResultRecord]

    def like(self, record: ResultRecord) -> list[ResultRecord]:
        """Return this fold's records with the split and weights of `record`."""
        return [own for own in self.records if own.like(record)]


def records(held: Mapping[str, Any], path: Path, folder: Path | None = None) -> list[ResultRecord]:
    """Return the result records in the content of a results.json.

    Raises:
        AsitError: entries of `held` are no records; the message names `path`.
    """
    found = held.get("results", [])
    good = isinstance(found, list) and all(isinstance(r, dict) and isinstance(r.get("metrics"), dict) for r in found)
    if not good:
        raise AsitError(
            f"{path} holds results that are not records",
            "a list of records with task, split, weights and metrics",
            "score the model again, or take the file that asit wrote",
        )
    return [ResultRecord.of(content, folder) for content in found]


def run_records(run: RunFolder) -> list[ResultRecord]:
    """Return the result records of a single run."""
    return records(run.results, run.folder / "results.json", run.folder)


def folds(run: RunFolder) -> list[ScoredFold]:
    """Return the folds of a cross-validation, from its fold folders and its results.json."""
    written = {str(fold["fold"]): fold for fold in run.results.get("folds", [])}
    folders = {path.name.removeprefix("fold-"): path for path in run.folds}
    made = []
    for name in [*folders, *(name for name in written if name not in folders)]:
        folder = folders.get(name, run.folder / f"fold-{name}")
        held = written[name] if name in written else RunFolder.read(folder).results
        made.append(ScoredFold(name, folder, records(held, folder / "results.json", folder)))
    return made


def chief(found: Iterable[ResultRecord]) -> ResultRecord | None:
    """Return the record that a page describes: test before validation, last weights before chosen ones."""
    order = {"test": 0, "validation": 1}
    return min(found, key=lambda r: (order.get(r.split, 2), r.weights != "last"), default=None)


def start(run: RunFolder) -> str:
    """Return the model that a run started from, as given."""
    return str(run.results.get("model", run.config.get("model")) or "not recorded")


def label_share(config: Mapping[str, Any]) -> str:
    """Return how many of the training labels were used."""
    sampling = config.get("sampling") or {}
    if sampling.get("per_class"):
        return f"{sampling['per_class']} per class"
    share = sampling.get("share", 1.0)
    return "all" if share == 1 else f"{100 * share:.4g} %"


def plain(name: str) -> str:
    """Return the name of a metric or split as it is read."""
    return name.replace("_", " ")


def shown(name: str, value: float) -> str:
    """Return the value of a metric as text: shares in per cent."""
    if math.isnan(value):
        return "not available"
    return f"{value:.1%}" if name in SHARES and math.isfinite(value) else number(value)


def number(value: float) -> str:
    """Return a number with three or four digits, and a power of ten where it is very small or very large."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1; NaN for a single value) of the finite values of folds or seeds."""
    finite = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if not len(finite):
        return math.nan, math.nan
    return float(finite.mean()), float(finite.std(ddof=1)) if len(finite) > 1 else math.nan
