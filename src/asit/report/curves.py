"""Learning curves of a fine-tuning run: losses, validation, schedule, speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asit.report.charts import Chart
from asit.report.run_reader import Line, Run
from asit.report.score_records import SHARES, plain

_NOTES = {
    "lr": "of the head; blocks below have less where layers decay",
    "gradient_norm": "before clipping",
    "clips_per_second": "clips a second in training",
    "data_wait": "share of time without a batch to train on",
}
_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "clips_per_second": "Throughput",
    "data_wait": "Waiting for data",
    "mAP": "mAP",
    "mAUC": "mAUC",
}
_PLACES = frozenset({"kind", "step", "epoch", "seconds", "clips", "weights"})
"""Entries of a line that say where it stands, and are no curve."""
_LAST = ("gradient_norm", "clips_per_second", "data_wait")


def curves(run: Run) -> str:
    """One chart for each quantity, with training and validation as its series."""
    if not run.train:
        return '<p class="missing">No training step has been recorded yet.</p>'
    sides = {"training": run.train, "validation": run.validation}
    series: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for side, lines in sides.items():
        for line in lines:
            for told, value in _values(line).items():
                name = told.removeprefix("train_")  # beside what validation calls so
                steps, values = series.setdefault(name, {}).setdefault(side, ([], []))
                steps.append(float(line["step"]))
                values.append(value)
    first = ["loss", *(name for name in series if "validation" in series[name]), "lr"]
    order = [name for name in dict.fromkeys(first) if name in series and name not in _LAST]
    order += [name for name in series if name not in order and name not in _LAST]
    marks = [float(step) for step in run.resumes]
    charts = "".join(
        Chart(_title(name), _note(name, series[name]), series[name], None, _in_percent(name), marks).html()
        for name in [*order, *(name for name in _LAST if name in series)]
    )
    return (
        f'<div class="charts">{charts}</div>'
        "<p><small>Where a curve is thinned it shows means, and a band from the least to the largest value. "
        "Vertical dotted lines: resumes.</small></p>"
    )


def _values(line: Line) -> dict[str, float]:
    """The numbers of a line by their own names; metrics may stand in a group and carry an interval."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if name in _PLACES:
            continue
        if isinstance(value, Mapping):
            inner: Any = value.get("value") if "value" in value else None
            found |= {name: float(inner)} if isinstance(inner, int | float) else _values(dict(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _title(name: str) -> str:
    text = plain(name)
    return _TITLES.get(name, text[:1].upper() + text[1:])


def _note(name: str, sides: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    if len(sides) > 1:
        return "training: with mixup, smoothing and masks where they are on, so it may be the worse of the two"
    return _NOTES.get(name, f"on the {next(iter(sides))} side")


def _in_percent(name: str) -> bool:
    return name in SHARES or name == "data_wait"
