"""Result records: the metrics of scored clips, worst mistakes and the hash of their list, as JSON, npz and text.

docs/evaluate.md lists the entries of a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, list_hash
from asit.evaluate import metrics
from asit.evaluate.bootstrap import DRAWS
from asit.io import atomic
from asit.training import run_dir

MISTAKES = 50
"""Maximum number of mistakes in a record."""


@dataclass(frozen=True)
class ClipScores:
    """Scores of the clips that could be read.

    Attributes:
        rows: (N,) clips of the catalogue.
        scores: (N, C) float32.
        failures: reasons why other clips could not be read.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    failures: list[str]


class RecordHeader(NamedTuple):
    """What a record is of: corpus, split or fold, weights or probe, and training step (None for probes)."""

    task: str
    split: str
    weights: str
    step: int | None


def result_record(
    scored: ClipScores,
    labels: Labels,
    catalogue: Catalogue,
    header: RecordHeader,
    *,
    seed: int = 0,
    groups: npt.NDArray[np.int64] | None = None,
) -> dict[str, Any]:
    """Make a result record.

    Args:
        scored: the scores.
        labels: of all clips of the catalogue; a soft label counts from 0.5.
        catalogue: of the clips.
        header: what was scored.
        seed: of the bootstrap.
        groups: of all clips, see `group_codes`; None: the bootstrap draws single clips.
    """
    record = {
        "task": header.task,
        "kind": "multi" if labels.multi else "single",
        "split": header.split,
        "weights": header.weights,
        "step": header.step,
        "list": list_hash(catalogue.ids(scored.rows)),
        "unreadable": len(scored.failures),
        **label_metrics(scored, labels, groups=resampling_units(groups, scored.rows), seed=seed),
    }
    if not labels.multi:
        record["mistakes"] = _mistakes(scored, labels, catalogue)
    return record


def label_metrics(
    scored: ClipScores, labels: Labels, *, groups: npt.NDArray[Any] | None = None, seed: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """Compute `multi_label` or `single_label` of `asit.evaluate.metrics`; `groups` are those of the scored clips."""
    part = labels.take(scored.rows)
    if labels.multi:
        targets = part.matrix(np.arange(len(part))) >= 0.5
        return metrics.multi_label(scored.scores, targets, labels.names, seed=seed, draws=draws, groups=groups)
    return metrics.single_label(scored.scores, part.single, labels.names, seed=seed, draws=draws, groups=groups)


def group_codes(catalogue: Catalogue) -> npt.NDArray[np.int64] | None:
    """Number each clip's group, (N,); a clip without one is a group of its own. None: the catalogue has no groups."""
    column = catalogue.column("group")
    if column is None:
        return None
    codes = column.codes.astype(np.int64)
    return np.where(codes < 0, len(column.words) + np.arange(len(codes)), codes)


def resampling_units(groups: npt.NDArray[np.int64] | None, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """Return the groups of the clips at `rows`; None, so that the bootstrap draws clips, where all are of one group."""
    if groups is None or len(np.unique(groups[rows])) < 2:
        return None
    return groups[rows]


def _mistakes(scored: ClipScores, labels: Labels, catalogue: Catalogue) -> list[dict[str, Any]]:
    truth, predicted = labels.take(scored.rows).single, scored.scores.argmax(1)
    score = scored.scores.max(1)
    wrong = np.flatnonzero(predicted != truth)
    worst = wrong[np.argsort(-score[wrong], kind="stable")[:MISTAKES]]
    clips = ((i, catalogue[int(scored.rows[i])]) for i in worst.tolist())
    return [
        {
            "path": clip.path,
            "start": clip.start,
            "seconds": clip.seconds,
            "truth": labels.names[truth[i]],
            "predicted": labels.names[predicted[i]],
            "score": float(score[i]),
        }
        for i, clip in clips
    ]


def save_scores(out: Path, name: str, scored: ClipScores, labels: Labels, catalogue: Catalogue) -> None:
    """Write OUT/scores/NAME.npz: ids, paths, scores, and the targets in CSR form."""
    part = labels.take(scored.rows)
    path = out / run_dir.SCORES / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.write_file(path) as draft, draft.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.array(list(catalogue.ids(scored.rows)), dtype=str),
            root=np.array(catalogue.root),
            scores=scored.scores,
            classes=np.array(labels.names, dtype=str),
            indptr=part.indptr,
            indices=part.indices,
            weights=part.weights,
        )


def summary_line(record: dict[str, Any], *, first_metric: bool = False) -> str:
    """Describe a record in one line: metrics with their 95 % intervals, clips, and the hash of their list.

    Args:
        record: of `result_record`.
        first_metric: only the first metric, by which runs are compared.
    """
    shown = []
    for name, metric in list(record["metrics"].items())[: 1 if first_metric else None]:
        value = "-" if metric["value"] is None else f"{metric['value']:.4f}{bracketed(metric.get('interval'))}"
        shown.append(f"{name} {value}")
    left = f", {record['unreadable']} unreadable" if record.get("unreadable") else ""
    return (
        f"{record['split']}, {record['weights']} weights: {', '.join(shown)}; {record['clips']} clips{left}, "
        f"list {record['list']}"
    )


def bracketed(interval: Sequence[float] | None, digits: int = 4) -> str:
    """Format an interval as " (LOW-HIGH)"; "" for None."""
    return f" ({interval[0]:.{digits}f}-{interval[1]:.{digits}f})" if interval else ""


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns, one line per row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
