"""Charts as inline SVG that take the page's colours, so that one page serves light and dark screens."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

# Marker colours for matplotlib to draw with; `_inline` turns each into a CSS variable of the page.
_INK, _GRID = "#010101", "#020202"
_SERIES = ["#0301ff", "#0302ff", "#0303ff", "#0304ff", "#0305ff", "#0306ff"]
_VARIABLES = {_INK: "var(--ink2)", _GRID: "var(--line)"} | {c: f"var(--c{i})" for i, c in enumerate(_SERIES)}
BINS = 240
"""Points a curve is drawn with: the mean of each bin over steps, and a band from its least to its largest value."""


@dataclass(frozen=True)
class Chart:
    """One chart: values over steps.

    Attributes:
        title: said above the chart.
        note: what to look for, in a sentence; said below the title.
        series: name -> (steps, values); a single one needs no legend.
        limit: a dashed line with its label, such as the largest possible entropy.
        percent: values are shares.
        marks: steps at which a vertical line is drawn (resumes).
        axis: what the values are drawn over, where it is not steps.
        lasts: whether the legend says each series' last value.
    """

    title: str
    note: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    limit: tuple[float, str] | None = None
    percent: bool = False
    marks: Sequence[float] = ()
    axis: str = "step"
    lasts: bool = True

    def html(self) -> str:
        """A <figure> with the title, the last value, the SVG with its text alternative, and a legend."""
        if not any(len(x) for x, _ in self.series.values()):
            return ""
        figure = Figure(figsize=(3.4, 2.0))
        axis = figure.add_axes((0.165, 0.2, 0.8, 0.76))  # an automatic layout doubles the time
        summaries = []
        for colour, (name, (x, y)) in zip(_cycle(len(self.series)), self.series.items(), strict=True):
            steps, middle, low, high = thin(x, y)
            dots = "o" if len(steps) < 30 else None
            axis.plot(steps, middle, color=colour, linewidth=1.6, marker=dots, markersize=2.5)
            if len(x) > BINS:
                axis.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
            summaries.append((name, float(x[0]), float(y[0]), float(x[-1]), float(y[-1])))
        for mark in self.marks:
            axis.axvline(mark, color=_INK, linewidth=0.6, linestyle=":")
        if self.limit and math.isfinite(self.limit[0]):
            axis.axhline(self.limit[0], color=_INK, linewidth=0.8, linestyle="--")
            axis.annotate(
                self.limit[1],
                (0.01, self.limit[0]),
                xycoords=("axes fraction", "data"),
                color=_INK,
                fontsize=8,
                va="bottom",
            )
            axis.margins(y=0.14)
        _plain(axis, self.percent)
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_xlabel(self.axis, fontsize=8, color=_INK)
        alternative = f"{self.title}. " + " ".join(
            f"{name}: from {self._number(v0)} at {self.axis} {s0:,.0f} to {self._number(v1)} at {self.axis} {s1:,.0f}."
            for name, s0, v0, s1, v1 in summaries
        )
        last = self._number(summaries[-1][4]) if len(summaries) == 1 else ""
        return (
            f'<figure class="chart"><figcaption><b>{escape(self.title)}</b><span class="last">{escape(last)}</span>'
            f"<small>{escape(self.note)}</small></figcaption>{_inline(figure, alternative)}"
            f"{self._legend(summaries) if len(summaries) > 1 else ''}</figure>"
        )

    def _legend(self, summaries: Sequence[tuple[str, float, float, float, float]]) -> str:
        return _legend([(name, self._number(last) if self.lasts else "") for name, *_, last in summaries])

    def _number(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else number(value)


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """At most BINS points of a curve: (steps, mean, least, largest) of bins of equal counts; not-finite values go."""
    steps, values = np.asarray(x, float), np.asarray(y, float)
    keep = np.isfinite(values)
    steps, values = steps[keep], values[keep]
    if len(steps) <= BINS:
        return steps, values, values, values
    starts = np.linspace(0, len(steps), BINS, endpoint=False).astype(int)
    counts = np.diff(np.append(starts, len(steps)))
    return (
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def probe_table_html(
    results: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
    """A table and a bar figure that compare accuracies, for the page of a report.

    Args:
        results: row (a model, a kind of features) -> column (a probe, a pooling) -> accuracy, 0 to 1. A row may lack
            a column: its cell says so.
        intervals: row -> column -> (low, high), such as the 95 % intervals of `ProbeResult`; drawn and written out
            where given.

    Returns:
        HTML to hand to `report` as a section; names are escaped. The best of each column is bold.
    """
    rows = list(results)
    columns = list(dict.fromkeys(column for row in results.values() for column in row))
    if not columns:
        return '<p class="missing">No probe results.</p>'
    spans = intervals or {}
    best = {c: max(results[r][c] for r in rows if c in results[r]) for c in columns}

    def cell(row: str, column: str) -> str:
        value = results[row].get(column)
        if value is None:
            return "<td>not measured</td>"
        text = f"{value:.1%}"
        text = f"<b>{text}</b>" if value == best[column] else text
        span = spans.get(row, {}).get(column)
        return f"<td>{text}{f' <small>{span[0]:.1%} to {span[1]:.1%}</small>' if span else ''}</td>"

    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(f'<tr><th scope="row">{escape(r)}</th>{"".join(cell(r, c) for c in columns)}</tr>' for r in rows)
    figure = Figure(figsize=(5.4, 0.5 + 0.22 * len(rows) * len(columns) + 0.18 * len(rows)), layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(columns)
    for index, (colour, column) in enumerate(zip(_cycle(len(columns)), columns, strict=True)):
        for place, row in enumerate(rows):
            value = results[row].get(column)
            if value is None:
                continue
            y = place - 0.4 + height * (index + 0.5)
            axis.barh(y, value, height * 0.86, color=colour)
            low, high = spans.get(row, {}).get(column, (value, value))
            if high > low:
                axis.plot([low, high], [y, y], color=_INK, linewidth=1.2)
            axis.annotate(f"{value:.1%}", (max(value, high) + 0.01, y), va="center", fontsize=8, color=_INK)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, min(1.12, max(best.values()) * 1.2 + 0.05))
    _plain(axis, percent=False)
    axis.set_yticks(range(len(rows)), [_clip(r) for r in rows], parse_math=False)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0%}"))
    axis.grid(axis="y", visible=False)
    said = " ".join(f"{r}: " + ", ".join(f"{c} {v:.1%}" for c, v in results[r].items()) + "." for r in rows)
    legend = _legend([(c, "") for c in columns]) if len(columns) > 1 else ""
    return (
        f'<div class="scroll"><table class="probe"><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><figure class="chart wide">'
        f"{_inline(figure, 'Accuracy by features. ' + said)}{legend}</figure>"
    )


def number(value: float) -> str:
    """A number as one reads it: three or four figures, thousands set off, powers of ten only where they help."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cycle(count: int) -> list[str]:
    return [_SERIES[i % len(_SERIES)] for i in range(count)]


def _clip(name: str, most: int = 44) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _plain(axis: Any, percent: bool) -> None:
    axis.tick_params(labelsize=9.5, colors=_INK, labelcolor=_INK, length=0)
    axis.spines[:].set_visible(False)
    axis.grid(color=_GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %" if percent else f"{v:.5g}"))


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><i style="background:var(--c{i % len(_SERIES)})"></i>{escape(name)} <b>{escape(value)}</b></li>'
        for i, (name, value) in enumerate(entries)
    )
    return f'<ul class="legend">{items}</ul>'


def _inline(figure: Figure, alternative: str) -> str:
    """A figure as an <svg> element: text stays text, colours become variables, no ids to clash, no outside names."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "asit", "font.family": "sans-serif"}):
        figure.patch.set_visible(False)
        for axis in figure.axes:
            axis.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{escape(alternative)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for marker, variable in _VARIABLES.items():
        svg = svg.replace(marker, variable)
    return re.sub(r"\n\s*", " ", svg)
