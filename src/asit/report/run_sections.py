"""Make the sections that the pages of all runs share: data, settings, environment, events; and training curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel

from asit.config.yaml import flat
from asit.progress import duration
from asit.report.run_reader import Line, RunFolder
from asit.report.score_records import number
from asit.report.templates import Section, part

_OWN = {"data", "out", "preset", "task", "model"}
"""Settings that differ from run to run anyway, so they are never marked."""
_POSITION = frozenset({"kind", "step", "epoch", "seconds", "clips", "weights"})
"""Entries of a metrics line that are no curve."""

Series = tuple[list[float], list[float]]


def progress(run: RunFolder) -> dict[str, str]:
    """Return how far training is, for the top of the page; empty before the first recorded step."""
    if not run.train:
        return {}
    last = run.train[-1]
    return {
        "step": f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
        "epoch": f"{last.get('epoch', 0):.4g} of {run.config.get('epochs', '?')}",
        "time": duration(float(last.get("seconds", 0))),
        "speed": f"{number(float(last.get('clips_per_second', 'nan')))} clips/s",
    }


def curves(lines: Iterable[Line]) -> dict[str, Series]:
    """Return (steps, values) of each quantity in lines of metrics.jsonl."""
    found: dict[str, Series] = {}
    for line in lines:
        for name, value in _values(line).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(float(line["step"]))
            values.append(value)
    return found


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name; those in groups too, and of a metric with an interval its value."""
    found: dict[str, float] = {}
    for name, value in line.items():
        inner = value.get("value", value) if isinstance(value, Mapping) else value
        if name in _POSITION:
            continue
        if isinstance(inner, Mapping):
            found |= _values(inner)
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            found[name] = float(inner)
    return found


def data(run: RunFolder) -> Section:
    """Return where the recordings came from, how many there are, and which were left out."""
    header = run.catalogue
    rows: list[tuple[str, object]] = [("source", run.config.get("data", "not recorded"))]
    if not header:
        missing = part("missing", "The run's folder holds no catalogue.")
        return Section("Data", part("table", (), rows, "pairs") + missing, folded=True)
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
    return Section("Data", part("table", (), rows, "pairs"), folded=True)


def settings(run: RunFolder, model: type[BaseModel], basis: Mapping[str, Any] | None, key: str) -> Section:
    """Return the settings that differ from a basis, then all of them with their meaning.

    Args:
        run: whose settings.
        model: the class that describes them.
        basis: values to mark differences from, nested as in config.yaml; None: the class's own defaults.
        key: the setting that names the basis: preset or task.
    """
    if not run.config:
        return Section("Settings", part("missing", "config.yaml is not there."), folded=True)
    kind = "recipe" if key == "task" else "preset"
    name = "the built-in defaults" if basis is None else f"the {kind} {run.config.get(key, '')}"
    now, meanings = dict(flat(run.config)), _descriptions(model)
    before = dict(flat(basis if basis is not None else model().model_dump(mode="json")))
    changed = {n for n, v in now.items() if n not in _OWN and n in before and _lists(before[n]) != _lists(v)}
    head = ["setting", "value", "default" if basis is None else kind, "meaning"]
    rows = {n: (n, _text(v), _text(before[n]) if n in changed else "", meanings.get(n, "")) for n, v in now.items()}
    different = [row for n, row in rows.items() if n in changed]
    everything = part("table", head, rows.values(), "settings", [i for i, n in enumerate(rows) if n in changed])
    return Section(
        "Settings",
        part("differing", len(different), name, part("table", head, different, "settings"))
        + part("details", f"All {len(rows)} settings", everything),
        folded=True,
    )


def environment(run: RunFolder) -> Section:
    """Return versions, device, precision and its reason, and the checkpoints that are kept."""
    if not run.environment:
        return Section("Environment", part("missing", "environment.json is not there."), folded=True)
    rows = [(name, _text(value)) for name, value in flat(run.environment)]
    rows.append(("checkpoints kept", ", ".join(run.checkpoints) or "none"))
    return Section("Environment", part("table", (), rows, "pairs"), folded=True)


def events(run: RunFolder) -> Section:
    """Return starts, stops and resumes, and the end of the log."""
    rows = [(f"{event['step']:,}", event.get("text", "")) for event in run.events]
    listed = part("table", ["step", "event"], rows, "") if rows else Markup()
    return Section("Events and log", listed + (part("log", run.log) if run.log else ""), folded=True)


def _descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    notes: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            notes |= _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            notes[f"{prefix}{name}"] = " ".join((info.description or "").split())
    return notes


def _lists(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else "no" if value is False else str(value)
