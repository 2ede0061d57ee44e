"""Show results by class: a table, what is confused with what, and how far scores can be trusted.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from asit.report.charts import chart
from asit.report.score_records import Scores, plain, shown
from asit.report.templates import part

PICTURE = 60
"""Most classes for which the confusion matrix is drawn; its largest entries are always listed."""
PAIRS = 25
"""Most confused pairs that are listed."""
BINS = 10
"""Bins of equal width from 0 to 1 for calibration; the calibration error depends on their number."""


class Cell(NamedTuple):
    """A cell of a table that can be sorted; a share is drawn as a bar."""

    text: str
    key: str | float = ""
    share: float | None = None


def class_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return a table with a row for each class, the worst first, that a click on a column's title sorts.

    Args:
        rows: "class", "clips", and metrics or texts, as in a result record's per_class.
    """
    if not rows:
        return part("missing", "No results by class were recorded.")
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("class", "clips")))
    measured = [name for name in names if any(_is_number(row.get(name)) for row in rows)]
    lead = next((name for name in ("AP", "recall", "accuracy") if name in measured), [*measured, "clips"][0])
    columns = list(dict.fromkeys(["class", lead, "clips", *names]))

    def rank(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        value: Any = row.get(lead)
        known = _is_number(value)
        return not known, float(value) if known else 0.0, str(row.get("class"))

    cells = [[_cell(c, row.get(c), bar=c == lead) for c in columns] for row in sorted(rows, key=rank)]
    return part("sort_table", [plain(c) for c in columns], cells, plain(lead), "ascending")


def probe_table_html(
    results: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    headline: str | None = None,
) -> str:
    """Return the HTML of a table of accuracies with a bar in each cell, to pass to `report` as a section.

    Args:
        results: row (a model, a kind of features) -> column (a probe, a pooling) -> accuracy, 0 to 1. A row may lack
            a column. Names are escaped; the best of each column is bold.
        intervals: row -> column -> (low, high), such as 95 % intervals.
        headline: a column. Its accuracies, or the best of a row that lacks it, are drawn first, one bar for each row,
            and the table is folded.
    """
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    if not columns:
        return str(part("missing", "No probe results."))
    best = {c: max(row[c] for row in results.values() if c in row) for c in columns}

    def cell(row: str, column: str) -> Cell:
        if (value := results[row].get(column)) is None:
            return Cell("not measured")
        span = (intervals or {}).get(row, {}).get(column)
        interval = f"{span[0]:.1%} to {span[1]:.1%}" if span else ""
        return Cell(part("value", f"{value:.1%}", interval, bold=value == best[column]), f"{value:.6g}", value)

    rows = [[Cell(row, row), *(cell(row, column) for column in columns)] for row in results]
    table = part("sort_table", ["features", *columns], rows, "", "")
    if headline is None:
        return str(table)
    bars = []
    for name, held in results.items():
        column = headline if headline in held else max(held, key=lambda c: held[c], default="")
        if column:
            low, high = (intervals or {}).get(name, {}).get(column, (held[column], held[column]))
            bars.append((name, column if column != headline else "", f"{held[column]:.1%}", held[column], low, high))
    return str(part("bars", headline, bars) + part("details", "All features", table))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(name: str, value: Any, bar: bool) -> Cell:
    if not _is_number(value):
        text = "" if value is None or isinstance(value, float) else str(value)
        return Cell(text, text)
    if name == "clips":
        return Cell(f"{value:,}", value)
    return Cell(shown(name, float(value)), f"{value:.6g}", min(1.0, max(0.0, value)) if bar else None)


def confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """Return a picture of the confusion matrix, unless there are too many classes, and the most confused pairs.

    Args:
        matrix: (C, C) counts; a row for each true class, a column for each answer.
        classes: (C,) names.
    """
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    flat = wrong.ravel()
    count = int(np.count_nonzero(flat))
    most = min(PAIRS, count)
    largest = np.argpartition(-flat, most - 1)[:most] if most else np.zeros(0, np.int64)
    totals, rows = matrix.sum(1), []
    for index in largest[np.lexsort((largest, -flat[largest]))]:
        truth, answer = divmod(int(index), len(classes))
        clips, total = int(flat[index]), int(totals[truth])
        share = clips / total
        names = [Cell(classes[i], classes[i]) for i in (truth, answer)]
        rows.append([*names, Cell(f"{clips:,} of {total:,}", clips), Cell(f"{share:.1%}", f"{share:.6g}", share)])
    head = ["true class", "taken for", "clips", "share of the true class"]
    table = part("sort_table", head, rows, "clips", "descending", wrong=True)
    picture = _heat_map(matrix, classes) if len(classes) <= PICTURE else ""
    return part("confusion", picture, len(classes), most, count, table)


def _heat_map(matrix: NDArray[np.int64], classes: Sequence[str]) -> Markup:
    """An SVG in which each entry has a tooltip; where it is wider than the screen it scrolls."""
    count, totals = len(classes), matrix.sum(1)
    side = 46 if count <= 8 else 34 if count <= 20 else 22 if count <= 35 else 17
    font = min(13.0, side * 0.66)
    names = [name if len(name) <= 18 else name[:17] + "…" for name in classes]
    left = round(max(map(len, names)) * font * 0.56) + 12
    entries = [(int(i), int(j), int(matrix[i, j]), int(totals[i])) for i, j in np.argwhere(matrix > 0)]
    right, total = int(np.trace(matrix)), int(matrix.sum())
    label = f"Confusion matrix of {count} classes: {right:,} of {total:,} clips on the diagonal."
    return part("heat_map", side, font, left, label, names, classes, entries)


def calibration(scores: NDArray[Any], right: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Return mean score and share of right answers in each bin that is not empty, and the expected calibration error.

    The error is the mean over clips of their bin's |share right - mean score| (Guo et al. 2017, arXiv 1706.04599).

    Args:
        scores: (n,) in [0, 1].
        right: (n,) whether the scored answer is right.
    """
    index = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(index, minlength=BINS)
    filled = count > 0
    mean = np.bincount(index, scores, minlength=BINS)[filled] / count[filled]
    share = np.bincount(index, right, minlength=BINS)[filled] / count[filled]
    return mean, share, float((np.abs(share - mean) * count[filled]).sum() / max(1, len(scores)))


def confidence(held: Scores, single: bool) -> Markup:
    """Return charts of calibration and of the scores of right and wrong answers.

    Args:
        held: scores of all clips.
        single: one label a clip: its highest score is the confidence; else every pair of clip and class counts.
    """
    if not len(held.ids) or not (held.exclusive if single else held.probable):
        return part("missing", "The scores kept are no probabilities, so their calibration is not drawn.")
    if single:
        scores = held.scores.max(1).astype(np.float64)
        right = held.scores.argmax(1) == held.truth
        names = ("right answers", "wrong answers")
    else:
        scores, right = held.scores.ravel().astype(np.float64), held.positives.ravel()
        names = ("class is there", "class is not there")
    mean, share, error = calibration(scores, right)
    edges = np.linspace(0, 1, 2 * BINS + 1)
    middles = list(50 * (edges[:-1] + edges[1:]))
    shares = {
        name: (middles, list(np.histogram(scores[chosen], edges)[0] / int(chosen.sum())))
        for name, chosen in zip(names, (right, ~right), strict=True)
        if chosen.any()
    }
    note = f"answers with a score of 80 % should be right 8 times in 10; calibration error {error:.1%} ({BINS} bins)"
    lines = {"share right": (list(100 * mean), list(share)), "ideal": ([0.0, 100.0], [0.0, 1.0])}
    charts = (("Calibration", note, lines), ("Scores", "share of each kind by score, in bins of 5 %", shares))
    return part("charts", [chart(*each, percent=True, axis="score, %", lasts=False) for each in charts])
