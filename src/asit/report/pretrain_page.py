"""The page of a pretraining run: losses, probe, reconstructions, gauges of collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from asit.config import PretrainSettings
from asit.report.charts import Chart, number
from asit.report.html import Section, table
from asit.report.reconstructions import reconstructions
from asit.report.run_reader import Run
from asit.report.sections import data, duration, environment, events, settings

_LOSSES = {
    "global": ("Global loss", "class token, cross-entropy with the teacher on the other view"),
    "local": ("Local loss", "patch tokens, cross-entropy with the teacher on the same view"),
    "reconstruction": ("Reconstruction loss", "mean absolute error where the mask is, in normalised log-mel"),
}
_SCHEDULES = {
    "lr": ("Learning rate", "warm-up, then the schedule"),
    "weight_decay": ("Weight decay", "cosine; none on biases and norms"),
    "teacher_momentum": ("Teacher momentum", "of the moving average that is the teacher"),
    "teacher_temperature": ("Teacher temperature", "lower is sharper"),
}
_GAUGES = {
    "teacher_entropy_class": (
        "Teacher entropy, class",
        "dashed: the largest there is, no preference at all; 0: one prototype",
    ),
    "teacher_entropy_patch": (
        "Teacher entropy, patches",
        "dashed: the largest there is, no preference at all; 0: one prototype",
    ),
    "centre_norm_class": ("Centre norm, class", "without bound: one prototype wins everywhere"),
    "centre_norm_patch": ("Centre norm, patches", "without bound: one prototype wins everywhere"),
    "feature_spread": ("Feature spread", "towards 0: all clips look alike to the encoder"),
    "mask_share": ("Masked share", "of the student's input"),
    "gradient_norm": ("Gradient norm", "before clipping"),
}
_SPEED = {
    "clips_per_second": ("Throughput", "clips a second"),
    "data_wait": ("Waiting for data", "share of time without a batch to train on"),
}


def sections(run: Run, preset: Mapping[str, Any] | None) -> list[Section]:
    """The page's parts, in order; `preset` as for `asit.report.report`."""
    return [
        ("Losses", _losses(run)),
        ("Probe", _probe(run)),
        ("Reconstructions", reconstructions(run)),
        ("Collapse gauges", _grid(run, _GAUGES, "parts")),
        ("Schedules", _grid(run, _SCHEDULES)),
        ("Speed", _grid(run, _SPEED)),
        ("Data", data(run)),
        ("Settings", settings(run, PretrainSettings, preset)),
        ("Environment", environment(run)),
        ("Events and log", events(run)),
    ]


def facts(run: Run) -> dict[str, str]:
    """What is told at the top, in short."""
    last = run.train[-1] if run.train else {}
    told: dict[str, str] = {}
    if last:
        told["step"] = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
        told["epoch"] = f"{last.get('epoch', 0):.4g} of {run.config.get('epochs', '?')}"
        told["loss"] = number(float(last.get("loss", math.nan)))
        told["time"] = duration(float(last.get("seconds", 0)))
        told["speed"] = f"{number(float(last.get('clips_per_second', math.nan)))} clips/s"
    if run.probes:
        told["probe accuracy"] = f"{run.probes[-1]['accuracy']:.1%}"
    if clips := run.catalogue.get("clips"):
        told["clips"] = f"{clips:,}"
    encoder, views = run.config.get("encoder", {}), run.config.get("views", {})
    if encoder:
        told["encoder"] = str(encoder.get("size"))
    if isinstance(views.get("seconds"), int | float):
        told["view"] = f"{views['seconds']:g} s"
    told["model"] = "written" if run.model else "not written yet"
    return told


def _losses(run: Run) -> str:
    if not run.train:
        return '<p class="missing">No training step has been recorded yet.</p>'
    weights = run.config.get("losses", {})
    entries = {}
    for name, (title, note) in _LOSSES.items():
        weight = weights.get(f"{name}_weight")
        entries[name] = (title, f"{note}; weight {weight:g}" if isinstance(weight, int | float) else note)
    known = {*_LOSSES, *_GAUGES}
    others = {n: (n.replace("_", " "), "") for n in run.train[-1].get("parts", {}) if n not in known}
    total = _chart(run, "Total loss", "the weighted sum of the parts", [line.get("loss") for line in run.train])
    return (
        f'<div class="charts">{total}{_cells(run, entries, "parts")}{_cells(run, others, "parts")}</div>'
        "<p><small>Where a curve is thinned it shows means, and a band from the least to the largest value. "
        "Vertical dotted lines: resumes.</small></p>"
    )


def _grid(run: Run, entries: Mapping[str, tuple[str, str]], inside: str = "") -> str:
    cells = _cells(run, entries, inside)
    return f'<div class="charts">{cells}</div>' if cells else '<p class="missing">Not recorded.</p>'


def _cells(run: Run, entries: Mapping[str, tuple[str, str]], inside: str = "") -> str:
    charts = []
    for name, (title, note) in entries.items():
        values = [(line.get(inside) or {} if inside else line).get(name) for line in run.train]
        charts.append(_chart(run, title, note, values, _limit(run, name), percent=name in ("mask_share", "data_wait")))
    return "".join(charts)


def _chart(
    run: Run,
    title: str,
    note: str,
    values: Sequence[float | None],
    limit: tuple[float, str] | None = None,
    percent: bool = False,
) -> str:
    points = [(float(line["step"]), float(v)) for line, v in zip(run.train, values, strict=True) if v is not None]
    series = {title: ([s for s, _ in points], [v for _, v in points])}
    marks = [float(step) for step in run.resumes]
    return Chart(title, note, series, limit, percent, marks).html()


def _limit(run: Run, name: str) -> tuple[float, str] | None:
    """The largest entropy a distribution over K prototypes can have: log K."""
    heads = run.config.get("heads", {})
    which = "class" if name == "teacher_entropy_class" or heads.get("share_prototypes") else "patch"
    count = heads.get(f"{which}_prototypes")
    if not name.startswith("teacher_entropy") or not isinstance(count, int):
        return None
    return math.log(count), f"log {count:,} = {math.log(count):.2f}"


def _probe(run: Run) -> str:
    if not run.probes:
        table_path = run.config.get("probe", {}).get("table")
        text = "No probe has been run yet." if table_path else "No probe was asked for (<code>probe.table</code>)."
        return f'<p class="missing">{text}</p>'
    names = list(dict.fromkeys(n for line in run.probes for n in line.get("features", {})))
    series = {
        name: (
            [float(line["step"]) for line in run.probes if name in line.get("features", {})],
            [float(line["features"][name]) for line in run.probes if name in line.get("features", {})],
        )
        for name in names
    } or {"accuracy": ([float(p["step"]) for p in run.probes], [float(p["accuracy"]) for p in run.probes])}
    clips = run.probes[-1].get("clips")
    note = "frozen features, by kind; " + (f"{clips:,} test clips" if isinstance(clips, int) else "test clips")
    rows = [
        (f"{line['step']:,}", f"{line['accuracy']:.1%}", *(_share(line.get("features", {}).get(n)) for n in names))
        for line in run.probes
    ]
    details = f"<details><summary>All probes</summary>{table(['step', 'accuracy', *names], rows)}</details>"
    return f'<div class="charts">{Chart("Probe accuracy", note, series, percent=True).html()}</div>{details}'


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
