"""Parts that the pages of all runs share: data, settings, environment, events."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from pydantic import BaseModel

from asit.report.charts import number
from asit.report.html import flat, table
from asit.report.run_reader import Run

_FREE = {"data", "out", "preset", "task", "model"}
"""Settings that every run has its own value of: where a difference says nothing."""


def data(run: Run) -> str:
    """Where the recordings came from, how many there are, and what was left out."""
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


def settings(
    run: Run, model: type[BaseModel], basis: Mapping[str, Any] | None, kind: str = "preset", key: str = "preset"
) -> str:
    """The settings that differ from a basis, then all of them with their meaning.

    Args:
        run: whose settings.
        model: the class that describes them.
        basis: values to mark differences from, nested as in config.yaml; None: the class's own defaults.
        kind: what the basis is: a preset, a recipe.
        key: the setting that names it.
    """
    if not run.config:
        return '<p class="missing">config.yaml is not there.</p>'
    now, notes = flat(run.config), _descriptions(model)
    name = "the built-in defaults" if basis is None else f"the {kind} {run.config.get(key, '')}"
    before = flat(basis if basis is not None else model().model_dump(mode="json"))
    changed = {n: n not in _FREE and n in before and _plain(before[n]) != _plain(v) for n, v in now.items()}
    head = ["setting", "value", "default" if basis is None else kind, "meaning"]
    lines = {n: (n, _text(v), _text(before[n]) if changed[n] else "", notes.get(n, "")) for n, v in now.items()}
    different = [lines[n] for n in now if changed[n]]
    top = (
        f"<p>{len(different)} settings differ from {escape(name)} (what auto became counts too):</p>"
        + table(head, different, "settings")
        if different
        else f"<p>No setting differs from {escape(name)}.</p>"
    )
    everything = table(head, lines.values(), "settings", marked=list(changed.values()))
    return f"{top}<details><summary>All {len(lines)} settings</summary>{everything}</details>"


def environment(run: Run) -> str:
    """Versions, device, precision and its reason; the checkpoints that are kept."""
    if not run.environment:
        return '<p class="missing">environment.json is not there.</p>'
    rows = [(name, _text(value)) for name, value in flat(run.environment).items()]
    kept = ", ".join(run.checkpoints) or "none"
    return table([], [*rows, ("checkpoints kept", kept)], "pairs")


def events(run: Run) -> str:
    """Starts, stops and resumes, and the end of the log; nothing where there is neither."""
    rows = [(f"{event['step']:,}", event.get("text", "")) for event in run.events]
    listed = table(["step", "event"], rows) if rows else ""
    log = "\n".join(run.log)
    tail = f"<details><summary>Last {len(run.log)} lines of the log</summary><pre>{escape(log)}</pre></details>"
    return listed + (tail if run.log else "")


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, the two largest that count."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"


def _descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    notes: dict[str, str] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            notes |= _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            notes[f"{prefix}{name}"] = " ".join((info.description or "").split())
    return notes


def _plain(value: Any) -> Any:
    """YAML gives lists where the settings have tuples, and 1 for 1.0."""
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "yes" if value is True else "no" if value is False else str(value)
