"""Draw charts as inline SVG in the page's colours, so that one page serves light and dark screens."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from asit.report.score_records import number
from asit.report.templates import part

Floats = NDArray[np.float64]

INK, GRID, _BAND = "#010101", "#020202", "#040404"
SERIES = {f"#030{i + 1}ff": f"var(--c{i})" for i in range(6)}
"""matplotlib cannot draw with CSS variables: it gets these colours, and `inline` replaces them."""
BINS = 240
"""Most points of a curve: the mean of each bin of steps, and a band from its smallest to its largest value."""


class Guide(NamedTuple):
    """What a curve is read by.

    Attributes:
        level: value of a dashed line, such as the largest possible entropy; NaN: none.
        label: of that line.
        band: least and largest value of a sound run, drawn as a shaded area.
    """

    level: float = math.nan
    label: str = ""
    band: tuple[float, float] | None = None


def chart(
    title: str,
    note: str,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    guide: Guide | None = None,
    percent: bool = False,
    resumes: Sequence[float] = (),
    axis: str = "step",
    lasts: bool = True,
) -> Markup:
    """Return a <figure> with title, last value, SVG with its text alternative, and legend; empty without points.

    Args:
        title: printed above the chart.
        note: what to look for; printed below the title.
        series: name -> (steps, values); with two or more there is a legend.
        guide: a dashed line and a shaded area to read the curve by.
        percent: show values, which are shares, in per cent.
        resumes: steps at which a dotted vertical line is drawn.
        axis: name of the horizontal axis.
        lasts: show the last value of each series in the legend.
    """
    if not any(len(x) for x, _ in series.values()):
        return Markup()
    figure = Figure(figsize=(3.4, 2.0))
    plot = figure.add_axes((0.165, 0.2, 0.8, 0.76))  # an automatic layout doubles the time
    texts, legend = [f"{title}."], []
    for (colour, variable), (name, (x, y)) in zip(itertools.cycle(SERIES.items()), series.items(), strict=False):
        steps, middle, low, high = thin(x, y)
        dots = "o" if len(steps) < 30 else None
        plot.plot(steps, middle, color=colour, linewidth=1.6, marker=dots, markersize=2.5)
        if len(x) > BINS:
            plot.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
        first, last = (f"{value:.1%}" if percent else number(float(value)) for value in (y[0], y[-1]))
        texts.append(f"{name}: from {first} at {axis} {x[0]:,.0f} to {last} at {axis} {x[-1]:,.0f}.")
        legend.append((variable, name, last if lasts else ""))
    for step in resumes:
        plot.axvline(step, color=INK, linewidth=0.6, linestyle=":")
    if guide:
        _guide(plot, guide)
    _style(plot, percent)
    plot.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    plot.set_xlabel(axis, fontsize=8, color=INK)
    _make_room(plot)
    single = len(legend) == 1
    return part(
        "chart",
        title,
        note,
        last if single else "",
        inline(figure, texts),
        [] if single else legend,
    )


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[Floats, Floats, Floats, Floats]:
    """Return (steps, mean, minimum, maximum) of at most BINS bins of equal counts; non-finite values are dropped."""
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


def _guide(axis: Any, guide: Guide) -> None:
    if math.isfinite(guide.level):
        axis.axhline(guide.level, color=INK, linewidth=0.8, linestyle="--")
        at = ("axes fraction", "data")
        axis.annotate(guide.label, (0.01, guide.level), xycoords=at, color=INK, fontsize=8, va="bottom")
        axis.margins(y=0.14)
    if guide.band:
        low, high = axis.get_ylim()
        least, largest = guide.band
        low, high = min(low, largest), max(high, least)  # a curve outside the band shows which side it is on
        axis.axhspan(max(low, least), min(high, largest), color=_BAND, alpha=0.1, linewidth=0)
        axis.set_ylim(low, high)


def _make_room(axis: Any) -> None:
    """Set the left margin by the longest tick label; a single step needs whole numbers around it."""
    left, right = axis.get_xlim()
    if right - left < 2:
        axis.set_xlim((left + right) / 2 - 1, (left + right) / 2 + 1)
    write = axis.yaxis.get_major_formatter()
    longest = max((len(write(value)) for value in axis.get_yticks()), default=1)
    margin = max(0.1, 0.035 + 0.028 * longest)
    axis.set_position((margin, 0.2, 0.965 - margin, 0.76))


def _style(axis: Any, percent: bool) -> None:
    axis.tick_params(labelsize=9.5, colors=INK, labelcolor=INK, length=0)
    axis.spines[:].set_visible(False)
    axis.grid(color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:g}k" if abs(v) >= 10_000 else f"{v:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _=0: f"{100 * v:.4g} %" if percent else _tick(v)))


def _tick(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-") if 0 < abs(value) < 0.001 else f"{value:.5g}"


def inline(figure: Figure, texts: Sequence[str]) -> Markup:
    """Return a figure as an <svg> element with text as text, colours as variables, and no ids or namespaces."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "asit", "font.family": "sans-serif"}):
        figure.patch.set_visible(False)
        for axis in figure.axes:
            axis.patch.set_visible(False)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    for colour, variable in {INK: "var(--ink2)", GRID: "var(--line)", _BAND: "var(--good)", **SERIES}.items():
        body = body.replace(colour, variable)
    head = Markup('<svg {} role="img" aria-label="{}">').format(Markup(view[0]), " ".join(texts))
    return head + Markup(re.sub(r"\n\s*", " ", body))
