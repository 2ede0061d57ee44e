"""Show encoders that `asit evaluate` compared: Markdown, CSV, and a picture of score against speed.

The functions take the content of results.json, as `asit.evaluate.encoder_ranking.rank_encoders` makes it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from asit.evaluate.bootstrap import Value
from asit.evaluate.feature_readers import LOG_MEL_STATISTICS, UNTRAINED
from asit.io import atomic
from asit.io.csv_lines import csv_line
from asit.report.comparison_table import interval_text
from asit.training import run_dir

TABLE, PICTURE = "table", "figure.png"
"""Name of the table's files without .csv and .md, and name of the picture."""
_CSV = (
    *("probe", "features", "labels", "encoder", "model", "metric", "value", "low", "high", "against", "difference"),
    *("difference_low", "difference_high", "clips_per_second", "parameters", "width", "rate", "seeds", "folds"),
    *("clips", "note"),
)
_MARKERS = "osD^vP"
_ACROSS = 3  # panels


class Palette(NamedTuple):
    """Colours of a picture: text, grid lines, and encoders by turns."""

    ink: str = "#222222"
    grid: str = "#dddddd"
    series: Sequence[str] = ("#1f6fb5", "#d9622b", "#2f9463", "#8a54b0", "#b3892a", "#6b7280")


def write(held: Mapping[str, Any], out: Path) -> None:
    """Write results.json, table.csv, table.md and figure.png into a folder, which is created where it is missing."""
    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / f"{TABLE}.csv", "".join(csv_line(line) + "\n" for line in (_CSV, *_csv_rows(held))))
    atomic.write_text(out / f"{TABLE}.md", markdown(held))
    with atomic.write_file(out / PICTURE) as draft:
        drawn = picture(held)
        FigureCanvasAgg(drawn)
        drawn.savefig(draft, format="png", dpi=130)
    atomic.write_json(out / run_dir.RESULTS, held)


def may_write(out: Path) -> bool:
    """Return whether a path is new, an empty folder, or a folder that `write` wrote."""
    return not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / f"{TABLE}.csv").is_file()))


def scores(held: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each probe, features and part of the labels, the best encoder first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in held["scores"]:
        labels = "" if row["labels"] == "all" else f", {row['labels']} of the labels"
        labels = labels.replace(" a class of the labels", " labels a class")
        found.setdefault(f"{row['probe']} probe, {row['features']}{labels}", []).append(row)
    return found


def cells(held: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield head and rows of the table of one score; encoders that were not scored come last."""
    yield [
        *("encoder", f"{held['metric']} (95 % interval)", f"difference to {rows[0]['encoder']}"),
        *("clips/s", "parameters", "vector"),
    ]
    encoders = {one["encoder"]: one for one in held["encoders"]}
    for row in rows:
        own = encoders[row["encoder"]]
        difference = row["note"] or ("" if row["against"] is None else interval_text(_value(row, "difference"), "+"))
        parameters = f"{own['parameters'] / 1e6:.1f} M" if own["parameters"] else "none"
        speed = _speed(own["clips_per_second"])
        yield [row["encoder"], interval_text(_value(row)), difference, speed, parameters, str(row["width"] or "")]
    yield from ([one["encoder"], "not scored", "", "", "", ""] for one in held["encoders"] if one["failed"])


def markdown(held: Mapping[str, Any]) -> str:
    """Return a table for each probe, features and part of the labels, with its columns aligned, and notes."""
    parts = []
    for title, rows in scores(held).items():
        table = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in cells(held, rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines = (f"| {' | '.join(map(str.ljust, line, widths))} |" for line in table)
        parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join([*parts, *notes(held)]) + "\n"


def notes(held: Mapping[str, Any]) -> list[str]:
    """Return what has to be known to read the table, and the reasons of encoders that were not scored."""
    first, speed, record = held["scores"][0], held["speed"], held["results"][0]
    over = f" in {first['folds']} folds" if first["folds"] > 1 else f" (list {record['list']})"
    seeds = " and seeds" if first["seeds"] > 1 else ""
    made = [
        f"{held['metric']} on {first['clips']:,} test clips{over}. Intervals: 95 %, bootstrap over "
        f"{record['bootstrap']['unit']}s{seeds}; of differences it is paired.",
        f"clips/s: log-mel and encoder on {speed['device']} (threads: {speed['threads']}, {speed['precision']}), "
        f"median of {speed['rounds']} rounds over {speed['clips']} clips of {speed['seconds'] / speed['clips']:.1f} s.",
    ]
    if any(one["encoder"] == UNTRAINED or one["encoder"] == LOG_MEL_STATISTICS for one in held["encoders"]):
        made[-1] += f" Baselines: architecture and front end of {held['encoders'][0]['encoder']}."
    failed = [one for one in held["encoders"] if one["failed"]]
    return made + [f"{one['encoder']} is not scored: {one['failed']}" for one in failed]


def picture(held: Mapping[str, Any], palette: Palette = Palette()) -> Figure:  # noqa: B008 (immutable)
    """Draw a panel for each score: score with its interval against clips/s on a logarithmic axis."""
    found = scores(held)
    across = min(_ACROSS, len(found))
    down = math.ceil(len(found) / across)
    speeds = {one["encoder"]: one["clips_per_second"] for one in held["encoders"] if one["clips_per_second"]}
    figure = Figure(
        figsize=(1.0 + 4.2 * across, 3.3 * down + 0.25 * math.ceil(len(speeds) / across)), layout="constrained"
    )
    styles = {
        name: {"color": colour, "marker": marker, "markerfacecolor": colour if name not in _BASELINES else "none"}
        for name, colour, marker in zip(
            speeds, itertools.cycle(palette.series), itertools.cycle(_MARKERS * len(palette.series)), strict=False
        )
    }
    panels = figure.subplots(down, across, squeeze=False).ravel()
    drawn: dict[str, Any] = {}
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    for panel, (title, rows) in zip(panels, found.items(), strict=False):
        for row in rows:
            if (name := row["encoder"]) in styles:
                value = _value(row)
                how = {"markersize": 6, "capsize": 2, "linestyle": "none", "linewidth": 1, **styles[name]}
                drawn[name] = panel.errorbar(speeds[name], value.value, yerr=error_bar(value), **how)
        _style(panel, title, held["metric"], palette)
    named = [name for name in speeds if name in drawn]
    legend = figure.legend(
        [drawn[name] for name in named], named, loc="outside lower center", ncols=across, fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(palette.ink)
    return figure


def error_bar(value: Value) -> list[list[float]] | None:
    """Return the lengths of an error bar below and above; the mean of draws may lie outside of their interval."""
    if not value.known:
        return None
    return [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]


_BASELINES = (UNTRAINED, LOG_MEL_STATISTICS)


def _style(panel: Any, title: str, metric: str, palette: Palette) -> None:
    panel.set_title(title, fontsize=9, color=palette.ink)
    panel.set_xscale("log")
    panel.margins(x=0.12)
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("clips/s", fontsize=8, color=palette.ink)
    panel.set_ylabel(metric, fontsize=8, color=palette.ink)
    panel.tick_params(which="both", labelsize=8, colors=palette.ink, length=0)
    panel.grid(color=palette.grid, linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)


def _csv_rows(held: Mapping[str, Any]) -> Iterator[list[Any]]:
    encoders = {one["encoder"]: one for one in held["encoders"]}
    for row in held["scores"]:
        own = encoders[row["encoder"]]
        line = {**own, **row, "metric": held["metric"]}
        line["low"], line["high"] = row["interval"] or (None, None)
        line["difference_low"], line["difference_high"] = row.get("difference_interval") or (None, None)
        yield [line.get(name) for name in _CSV]
    for one in held["encoders"]:
        if one["failed"]:
            yield [{**one, "note": one["failed"]}.get(name) for name in _CSV]


def _value(row: Mapping[str, Any], name: str = "value") -> Value:
    interval = row.get("interval" if name == "value" else f"{name}_interval")
    value = math.nan if row[name] is None else float(row[name])
    return Value(value, *map(float, interval)) if interval else Value(value)


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
