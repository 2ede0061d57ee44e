"""One self-contained HTML page about a run: curves, reconstructions with sound, settings, environment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from asit.report.charts import Chart, number, probe_table_html
from asit.report.page import Section, flat, page, table, tiles
from asit.report.reconstructions import reconstructions
from asit.report.run import Run
from asit.settings import PretrainSettings

__all__ = ["probe_table_html", "report"]

_LOSSES = {
    "global": ("Global loss", "class token, cross-entropy with the teacher on the other view"),
    "local": ("Local loss", "patch tokens, cross-entropy with the teacher on the same view"),
    "reconstruction": ("Reconstruction loss", "mean absolute error where the mask is, in normalised log-mel"),
}
_SCHEDULES = {
    "lr": ("Learning rate", "warm-up, then cosine"),
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


def report(
    run: Path | str,
    out: Path | str | None = None,
    sections: Sequence[Section] = (),
    *,
    preset: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML page about a run; no other file and no network is needed to read it.

    It may be called while the run goes on, and for a run that lacks parts: the page says what is not there.

    Args:
        run: the folder written by `asit pretrain`.
        out: the page; RUN/report.html if not given. Written whole or not at all.
        sections: (title, html) to put first, such as results measured elsewhere; the html is taken as it is.
        preset: settings of the run's preset, nested as in config.yaml, to mark differences from; the built-in defaults
            if not given.

    Returns:
        The page's path.

    Raises:
        AsitError: `run` is not a run's folder.
        ConfigError: its config.yaml or environment.json cannot be parsed.
    """
    held = Run.read(Path(run))
    state, sentence = held.verdict
    lead = f'<p class="verdict {state}">{escape(sentence)}</p>{tiles(_facts(held))}'
    every: list[Section] = [
        *sections,
        ("Losses", _losses(held)),
        ("Probe", _probe(held)),
        ("Reconstructions", reconstructions(held)),
        ("Collapse gauges", _grid(held, _GAUGES, "parts")),
        ("Schedules", _grid(held, _SCHEDULES)),
        ("Speed", _grid(held, _SPEED)),
        ("Data", _data(held)),
        ("Settings", _settings(held, preset)),
        ("Environment", _environment(held)),
        ("Events and log", _events(held)),
    ]
    damaged = f" {held.damaged} unreadable lines of metrics.jsonl were left out." if held.damaged else ""
    html = page(
        f"asit: {held.folder.resolve().name}",
        lead,
        [section for section in every if section[1]],
        f"Written by <code>asit report</code>; one file, no outside request. Size: @SIZE@ MB.{damaged}",
    )
    html = html.replace("@SIZE@ MB.", f"{len(html.encode()) / 1e6:.1f} MB.")
    path = Path(out) if out is not None else held.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(html, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _facts(run: Run) -> dict[str, str]:
    last = run.train[-1] if run.train else {}
    facts: dict[str, str] = {}
    if last:
        facts["step"] = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
        facts["epoch"] = f"{last.get('epoch', 0):.4g} of {run.config.get('epochs', '?')}"
        facts["loss"] = number(float(last.get("loss", math.nan)))
        facts["time"] = _duration(float(last.get("seconds", 0)))
        facts["speed"] = f"{number(float(last.get('clips_per_second', math.nan)))} clips/s"
    if run.probes:
        facts["probe accuracy"] = f"{run.probes[-1]['accuracy']:.1%}"
    if clips := run.catalogue.get("clips"):
        facts["clips"] = f"{clips:,}"
    encoder, views = run.config.get("encoder", {}), run.config.get("views", {})
    if encoder:
        facts["encoder"] = str(encoder.get("size"))
    if isinstance(views.get("seconds"), int | float):
        facts["view"] = f"{views['seconds']:g} s"
    facts["model"] = "written" if run.model else "not written yet"
    return facts


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


def _data(run: Run) -> str:
    header = run.catalogue
    rows: list[tuple[str, object]] = [("source", run.config.get("data", "not recorded"))]
    if not header:
        return table([], rows, "pairs") + '<p class="missing">The run\'s folder holds no catalogue.</p>'
    if "clips" in header:
        rows.append(("files", f"{header['clips']:,}"))
    if "seconds" in header:
        rows.append(("duration", f"{float(header['seconds']) / 3600:.2f} h"))
    for name in ("mean", "std"):
        if isinstance(header.get(name), int | float):
            rows.append((f"log-mel {name}", number(float(header[name]))))
    skipped = header.get("skipped", "not recorded")
    if isinstance(skipped, Mapping):
        rows += [(f"left out: {reason}", count) for reason, count in skipped.items()] or [("left out", "none")]
    else:
        rows.append(("left out", skipped))
    return table([], rows, "pairs")


def _settings(run: Run, preset: Mapping[str, Any] | None) -> str:
    if not run.config:
        return '<p class="missing">config.yaml is not there.</p>'
    now, notes = flat(run.config), _descriptions(PretrainSettings)
    basis = "the built-in defaults" if preset is None else f"the preset {run.config.get('preset', '')}"
    before = flat(preset if preset is not None else PretrainSettings().model_dump(mode="json"))
    free = {"data", "out", "preset"}
    changed = {n: n not in free and n in before and _plain(before[n]) != _plain(v) for n, v in now.items()}
    head = ["setting", "value", "default" if preset is None else "preset", "meaning"]
    lines = {n: (n, _text(v), _text(before[n]) if changed[n] else "", notes.get(n, "")) for n, v in now.items()}
    different = [lines[n] for n in now if changed[n]]
    top = (
        f"<p>{len(different)} settings differ from {escape(basis)} (what auto became counts too):</p>"
        + table(head, different, "settings")
        if different
        else f"<p>No setting differs from {escape(basis)}.</p>"
    )
    everything = table(head, lines.values(), "settings", marked=list(changed.values()))
    return f"{top}<details><summary>All {len(lines)} settings</summary>{everything}</details>"


def _descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    notes: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            notes |= _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            notes[f"{prefix}{name}"] = " ".join((info.description or "").split())
    return notes


def _environment(run: Run) -> str:
    if not run.environment:
        return '<p class="missing">environment.json is not there.</p>'
    rows = [(name, _text(value)) for name, value in flat(run.environment).items()]
    kept = ", ".join(run.checkpoints) or "none"
    return table([], [*rows, ("checkpoints kept", kept)], "pairs")


def _events(run: Run) -> str:
    rows = [(f"{event['step']:,}", event.get("text", "")) for event in run.events]
    events = table(["step", "event"], rows) if rows else ""
    log = "\n".join(run.log)
    tail = f"<details><summary>Last {len(run.log)} lines of the log</summary><pre>{escape(log)}</pre></details>"
    return events + (tail if run.log else "")


def _plain(value: Any) -> Any:
    """YAML gives lists where the settings have tuples, and 1 for 1.0."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else "no" if value is False else str(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"
