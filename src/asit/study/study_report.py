"""Write a study's scores: OUT/table.csv, OUT/table.md and OUT/figure.png."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from asit.errors import AsitError
from asit.io import atomic
from asit.io.csv_lines import csv_line
from asit.report.comparison_table import interval_text
from asit.report.ranking_table import error_bar
from asit.study.grids import COST
from asit.study.study_plan import Study
from asit.study.study_table import StudyRow, rows

_CSV = (
    *("table", "score", "system", "metric", "value", "low", "high", "reference", "difference", "difference_low"),
    *("difference_high", "seeds", "folds", "clips", "minutes", "note"),
)


def write(study: Study) -> str:
    """Write the table, as CSV and as Markdown, and the figure; return the Markdown.

    Raises:
        AsitError: nothing is scored yet, or results are damaged.
    """
    found = rows(study)
    if not found:
        raise AsitError(f"{study.out} has no scores yet", "a finished run", "run `asit study` without --report first")
    lines = [csv_line(_CSV), *(csv_line(_fields(row, study)) for row in found)]
    atomic.write_text(study.out / "table.csv", "\n".join(lines) + "\n")
    text = "\n".join(_markdown(study, found)) + "\n"
    atomic.write_text(study.out / "table.md", text)
    with atomic.write_file(study.out / "figure.png") as draft:
        _figure(study, found).savefig(draft, format="png", dpi=110)
    return text


def _fields(row: StudyRow, study: Study) -> list[Any]:
    numbers = [*row.value, study.grid.reference, *row.difference]
    held = [row.table, row.score, row.system, row.metric, *numbers, row.seeds, row.folds, row.clips, row.minutes]
    return [None if isinstance(v, float) and math.isnan(v) else v for v in held] + [row.note]


def _markdown(study: Study, found: Sequence[StudyRow]) -> Iterator[str]:
    grid = study.grid
    yield f"# Study {grid.name}"
    yield ""
    yield f"Source: {grid.source or 'not named'}."
    for table, score in dict.fromkeys((row.table, row.score) for row in found):
        held = [row for row in found if (row.table, row.score) == (table, score)]
        first = held[0]
        over = f", mean over {first.folds} folds" if first.folds > 1 else ""
        yield from ("", f"## {table}: {score}", "", f"{first.metric} on {first.clips:,} clips{over}.", "")
        yield f"| arm | {first.metric} (95 % interval) | difference to {grid.reference} | seeds | CPU minutes |"
        yield "|---|---|---|---|---|"
        for row in held:
            minutes = "" if math.isnan(row.minutes) else f"{row.minutes:.1f}"
            difference = row.note if math.isnan(row.difference.value) else interval_text(row.difference, "+")
            yield f"| {row.system} | {interval_text(row.value)} | {difference} | {row.seeds} | {minutes} |"
    yield ""
    yield (
        "Intervals are those of a bootstrap that draws clips (groups, such as speakers, where the table has them) and "
        "seeds; of differences it is paired. With one seed they do not hold what another seed would change. "
        "CPU minutes are minutes of the clock on a GPU."
    )
    if any(row.system.startswith("scratch") for row in found):
        yield ""
        yield "From scratch the best of the rates by its test score is shown, which favours it."
    yield from (line for note in study.notes for line in ("", f"Note: {note}."))


def _figure(study: Study, found: Sequence[StudyRow]) -> Figure:
    """Draw a panel for each table and score: points by arm, a curve where arms lie on an axis, lines of baselines."""
    tables, scores = (list(dict.fromkeys(names)) for names in zip(*((r.table, r.score) for r in found), strict=True))
    high = 3.2 if study.grid.axis else 1.2 + 0.28 * len({row.system for row in found})
    figure = Figure(figsize=(0.8 + 3.4 * len(scores), 0.3 + high * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tables), len(scores), squeeze=False)
    for y, table in enumerate(tables):
        for x, score in enumerate(scores):
            held = [row for row in found if (row.table, row.score) == (table, score)]
            panel = panels[y, x]
            panel.set_title(f"{table}: {score}", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
            if study.grid.axis:
                _curve(panel, study, held)
            else:
                _points(panel, held)
    return figure


def _points(panel: Any, held: Sequence[StudyRow]) -> None:
    for place, row in enumerate(held):
        panel.errorbar(row.value.value, place, xerr=error_bar(row.value), fmt="o", markersize=4, color="C0", capsize=2)
    panel.set_yticks(range(len(held)), [row.system for row in held])
    panel.invert_yaxis()
    panel.set_xlabel("score", fontsize=8)


def _curve(panel: Any, study: Study, held: Sequence[StudyRow]) -> None:
    cost = study.grid.axis == COST
    arms = [row for row in held if row.system in study.arms]
    placed = [(row.minutes if cost else study.grid.place(row.system), row) for row in arms]
    placed.sort(key=lambda one: one[0])
    for place, row in placed:
        panel.errorbar(place, row.value.value, yerr=error_bar(row.value), fmt="o", markersize=4, color="C0", capsize=2)
        if cost:
            panel.annotate(row.system, (place, row.value.value), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if not cost:
        panel.plot([place for place, _ in placed], [row.value.value for _, row in placed], color="C0", linewidth=1)
    for number, row in enumerate(row for row in held if row.system not in study.arms):
        panel.axhline(row.value.value, color=f"C{number + 1}", linewidth=1, linestyle="--", label=row.system)
    if len(arms) < len(held):
        panel.legend(fontsize=6)
    panel.set_xlabel(study.grid.axis, fontsize=8)
    panel.set_ylabel("score", fontsize=8)
