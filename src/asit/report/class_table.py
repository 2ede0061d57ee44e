"""Results by class: a table with bars, and a picture of what is taken for what.

Letters in shapes: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.report.score_records import plain, shown

PICTURE = 60
"""Classes up to which the confusion matrix is drawn; beyond, and below too, its largest entries are listed."""
PAIRS = 25
"""Most confused pairs that are listed."""
_LEADS = ("AP", "recall", "accuracy")


def class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a class, the worst first; a click on a title sorts by it.

    Args:
        rows: "class", "clips", and metrics or texts, as in a result record's per_class.
    """
    if not rows:
        return '<p class="missing">No results by class were recorded.</p>'
    names = list(dict.fromkeys(name for row in rows for name in row))
    measured = [n for n in names if n not in ("class", "clips") and any(_is_number(row.get(n)) for row in rows)]
    lead = next((name for name in _LEADS if name in measured), measured[0] if measured else "clips")
    others = [n for n in names if n not in ("class", "clips", lead)]
    columns = ["class", lead, *(["clips"] if lead != "clips" else []), *others]

    def worth(row: Mapping[str, Any]) -> tuple[bool, float, str]:
        value = row.get(lead)
        return not _is_number(value), float(value) if _is_number(value) else 0.0, str(row.get("class"))  # type: ignore[arg-type]

    head = "".join(
        f'<th scope="col"{" aria-sort=ascending" if c == lead else ""}><button>{escape(plain(c))}</button></th>'
        for c in columns
    )
    body = "".join(
        "<tr>" + "".join(_cell(column, row.get(column), column == lead) for column in columns) + "</tr>"
        for row in sorted(rows, key=worth)
    )
    tall = " tall" if len(rows) > 14 else ""
    return (
        f'<div class="scroll{tall}"><table class="sort"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _cell(name: str, value: Any, bar: bool) -> str:
    if not _is_number(value):
        text = "" if value is None or isinstance(value, float) else str(value)
        return f'<td data-v="{escape(text)}">{escape(text) if text else "<small>none</small>"}</td>'
    if name == "clips":
        return f'<td data-v="{value}">{value:,}</td>'
    drawn = f'<i style="width:{100 * min(1.0, max(0.0, value)):.1f}%"></i>' if bar else ""
    style = ' class="bar"' if bar else ""
    return f'<td{style} data-v="{value:.6g}">{escape(shown(name, float(value)))}{drawn}</td>'


def confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> str:
    """What is taken for what: a picture where it can be read, and the most confused pairs.

    Args:
        matrix: (C, C) counts; a row for each true class, a column for each answer.
        classes: (C,) names.
    """
    picture = _heat_map(matrix, classes) if len(classes) <= PICTURE else ""
    about = (
        "<p>A row for each true class, a column for each answer. Blue: right; orange: wrong; the deeper, the larger "
        "the share of the row.</p>"
        if picture
        else f"<p>{len(classes):,} classes are too many for a picture; these are the most confused pairs.</p>"
    )
    return about + picture + _pairs(matrix, classes)


def _pairs(matrix: NDArray[np.int64], classes: Sequence[str]) -> str:
    """The largest entries off the diagonal."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    flat = wrong.ravel()
    most = min(PAIRS, int(np.count_nonzero(flat)))
    if not most:
        return "<p>No clip was given a wrong class.</p>"
    largest = np.argpartition(-flat, most - 1)[:most]
    largest = largest[np.lexsort((largest, -flat[largest]))]
    totals = matrix.sum(1)
    lines = []
    for place in largest:
        truth, answer = divmod(int(place), len(classes))
        count, whole = int(flat[place]), int(totals[truth])
        lines.append(
            f"<tr><td>{escape(classes[truth])}</td><td>{escape(classes[answer])}</td>"
            f'<td data-v="{count}">{count:,} of {whole:,}</td>'
            f'<td class="bar" data-v="{count / whole:.6g}">{count / whole:.1%}'
            f'<i style="width:{100 * count / whole:.1f}%;background:var(--c1)"></i></td></tr>'
        )
    head = "".join(
        f'<th scope="col"{" aria-sort=descending" if c == "clips" else ""}><button>{c}</button></th>'
        for c in ("true class", "taken for", "clips", "share of the true class")
    )
    count = int(np.count_nonzero(flat))
    title = f"The {most} most confused of {count:,} pairs" if count > most else f"All {count:,} confused pairs"
    return (
        f'<h3>{title}</h3><div class="scroll{" tall" if most > 14 else ""}"><table class="sort"><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _heat_map(matrix: NDArray[np.int64], classes: Sequence[str]) -> str:
    """An SVG whose entries say themselves in full when pointed at; wider than a phone it scrolls."""
    count = len(classes)
    side = 46 if count <= 8 else 34 if count <= 20 else 22 if count <= 35 else 17
    size = min(13.0, side * 0.66)
    names = [name if len(name) <= 18 else name[:17] + "…" for name in classes]
    margin = round(max(map(len, names)) * size * 0.56) + 12
    top = round(margin * 0.78) + 10
    width, height = margin + side * count + round(margin * 0.62), top + side * count + 4
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    parts = []
    for i, name in enumerate(names):
        y = top + side * i + side / 2
        x = margin + side * i + side / 2
        parts.append(
            f'<text x="{margin - 6}" y="{y + size * 0.35:.1f}" text-anchor="end">{escape(name)}</text>'
            f'<text transform="translate({x + size * 0.3:.1f} {top - 6}) rotate(-50)">{escape(name)}</text>'
        )
    for i, j in np.argwhere(matrix > 0):
        share, number = float(shares[i, j]), int(matrix[i, j])
        colour, depth = ("--c0", 0.12 + 0.88 * share) if i == j else ("--c1", 0.2 + 0.8 * share**0.5)
        said = f"{classes[i]}, taken for {classes[j]}: {number:,} of {int(matrix[i].sum()):,} ({share:.1%})"
        x, y = margin + side * int(j), top + side * int(i)
        parts.append(
            f'<rect x="{x}" y="{y}" width="{side - 1}" height="{side - 1}" rx="2" fill="var({colour})" '
            f'fill-opacity="{depth:.2f}"><title>{escape(said)}</title></rect>'
        )
        if number < (100 if side < 30 else 10_000):
            font = min(size, 1.5 * side / max(2, len(str(number)) + 0.6))
            parts.append(
                f'<text class="{"on" if depth > 0.6 else "in"}" x="{x + side / 2 - 0.5:.1f}" '
                f'y="{y + side / 2 + font * 0.34:.1f}" text-anchor="middle" font-size="{font:.1f}" '
                f'pointer-events="none">{number}</text>'
            )
    frame = (
        f'<rect x="{margin - 0.5}" y="{top - 0.5}" width="{side * count}" height="{side * count}" fill="none" '
        'stroke="var(--line)"/>'
    )
    right = int(np.trace(matrix))
    label = f"Confusion matrix of {count} classes: {right:,} of {int(matrix.sum()):,} clips on the diagonal."
    return (
        f'<div class="heat" tabindex="0"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-size="{size:.1f}" role="img" aria-label="{escape(label)}">{frame}{"".join(parts)}</svg></div>'
    )
