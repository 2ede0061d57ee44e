"""How far recordings are from an index of normal ones, and the threshold that the normal ones give.

The distance of a window is 1 - cosine to its nearest window of another recording in the index: nearest neighbours of
frozen embeddings, a usual training-free detector in DCASE's task 2 (such as arXiv 2606.19269). A recording has the
largest distance of its windows, so that a short event counts.

Letters: N rows of the index, W windows, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import Item
from asit.errors import ConfigError
from asit.model.audio_model import AudioModel
from asit.search.embed_windows import embed_sources
from asit.search.index import Index, Neighbour
from asit.search.index_files import Files

MOST = 2000
"""Normal recordings that a threshold is taken from, evenly spaced where the index has more."""
PARTIAL = 0.1
"""Largest rate of false alarms of the partial AUC, as in DCASE's task 2 (arXiv 2406.07250)."""
_COSINES = 2**24  # held at a time: 64 MB

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Anomaly:
    """How unusual a recording is.

    Attributes:
        name: as it was given.
        score: 1 - cosine to the nearest normal window, from 0 to 2; of the window for which it is largest.
        start, end: of this window, s from the beginning of the file.
        nearest: the normal window.
        label: where the input had labels.
        known: whether the index holds the recording, whose own windows were left out.
    """

    name: str
    score: float
    start: float
    end: float
    nearest: Neighbour
    label: str | None
    known: bool


def distances(
    index: Index, vectors: npt.ArrayLike, k: int = 1, without: npt.NDArray[np.int64] | None = None
) -> tuple[Scores, npt.NDArray[np.int64]]:
    """Return the mean distance of vectors (W, D) of length 1 to their k nearest rows, and the nearest row: (W,) each.

    Args:
        index: of normal recordings.
        vectors: of the index's model, pooled as its own.
        k: neighbours; where fewer rows are left, all of them.
        without: rows to leave out.

    Raises:
        ConfigError: no row is left, or k is below 1.
    """
    rows = np.asarray(vectors, np.float32)
    left = len(index) - (0 if without is None else len(np.unique(without)))
    if k < 1 or left < 1:
        raise ConfigError(
            f"{k} neighbours among {left} windows", "at least one of each", "index more than one normal recording"
        )
    found, nearest, step = np.empty(len(rows)), np.empty(len(rows), np.int64), max(1, _COSINES // len(index))
    for first in range(0, len(rows), step):
        cosines = index.cosines(rows[first : first + step])
        if without is not None:
            cosines[:, without] = -np.inf
        best = np.argpartition(cosines, -min(k, left), axis=1)[:, -min(k, left) :]
        values = np.take_along_axis(cosines, best, 1).astype(np.float64)
        found[first : first + step] = 1 - values.mean(1)
        nearest[first : first + step] = np.take_along_axis(best, values.argmax(1)[:, None], 1)[:, 0]
    return found, nearest


def normal_scores(index: Index, k: int = 1) -> Scores:
    """Return the score of each recording of an index, at most `MOST` of them, against all others.

    Raises:
        ConfigError: fewer than two recordings.
    """
    count = len(index.sources)
    if count < 2:
        raise ConfigError(
            f"{index.folder} holds {count} recording", "two normal recordings or more", "add some: asit index ... --add"
        )
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int))
    own = [index.rows_at([i]) for i in chosen.tolist()]
    return np.array([distances(index, index.vectors[rows], k, rows)[0].max() for rows in own if len(rows)])


def score(
    index: Index, model: AudioModel, items: Sequence[Item], k: int = 1, batch: int = 16, threads: int = 1
) -> Generator[Anomaly | tuple[str, str]]:
    """Yield how unusual each recording is, in order, or its name and why it cannot be read.

    Windows are cut and embedded as those of the index. Windows of the same file in the index are left out.

    Args:
        index: of normal recordings.
        model: of the index.
        items: recordings.
        k: neighbours.
        batch: windows in a batch.
        threads: that decode and make log-mels.

    Raises:
        ConfigError: as `distances`.
    """
    files, sources, faults = Files(), [], {}
    for i, item in enumerate(items):
        try:
            if item.fault is not None:
                faults[i] = item.fault
            else:
                sources.append(files.source(item))
        except OSError as error:
            faults[i] = error.strerror or str(error)
    embedded = embed_sources(model, sources, index.card, batch, threads)
    for i, item in enumerate(items):
        result = faults[i] if i in faults else next(embedded)[1]
        if isinstance(result, str):
            yield item.name, result
            continue
        own = index.rows_of(item.path, item.member)
        found, nearest = distances(index, result.vectors, k, own if len(own) else None)
        worst = int(found.argmax())
        start, end = result.times[worst]
        yield Anomaly(
            name=item.name,
            score=float(found[worst]),
            start=start,
            end=end,
            nearest=index.clip(int(nearest[worst])),
            label=item.label,
            known=len(own) > 0,
        )


def partial_auc(scores: npt.ArrayLike, anomalous: npt.ArrayLike, most: float = 1.0) -> float | None:
    """Return the area under the ROC curve up to a rate of false alarms, standardised so that chance is 0.5.

    D. McClish, Analyzing a portion of the ROC curve (1989), as scikit-learn's `roc_auc_score` with `max_fpr`; with
    `most` 1 it is the AUC. None where all recordings are normal, or none is.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(anomalous, bool)
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of equal scores
    hits, alarms = np.cumsum(truth[order])[ends], np.cumsum(~truth[order])[ends]
    x, y = np.append(0, alarms / (~truth).sum()), np.append(0, hits / truth.sum())
    inside = x < most
    x, y = np.append(x[inside], most), np.append(y[inside], np.interp(most, x, y))
    least = most**2 / 2
    area = float(((y[1:] + y[:-1]) * np.diff(x)).sum()) / 2
    return 0.5 * (1 + (area - least) / (most - least))
