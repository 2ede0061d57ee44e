"""The page of encoders that `asit evaluate` compared."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from asit.errors import ConfigError
from asit.io import parsing
from asit.report import charts, ranking_table
from asit.report.findings import RunFinding
from asit.report.templates import Section, page, part
from asit.training import run_dir

_REMEDY = "score the models again with asit evaluate"


def read(folder: Path) -> dict[str, Any] | None:
    """Return results.json of a folder that `asit evaluate --out` wrote; None for another folder.

    Raises:
        ConfigError: results.json cannot be parsed.
    """
    path = folder / run_dir.RESULTS
    if not path.is_file() or (folder / "config.yaml").exists():
        return None
    held = parsing.json_object(path, ConfigError, "the file as asit evaluate wrote it", _REMEDY)
    return held if "encoders" in held else None


def html(held: Mapping[str, Any], folder: Path) -> str:
    """Return the page: a table for each score, the picture, and the encoders with their sources."""
    scored = [one for one in held["encoders"] if not one["failed"]]
    failed = [one for one in held["encoders"] if one["failed"]]
    first = held["scores"][0]
    verdict = f"{len(scored)} of {len(held['encoders'])} encoders are scored."
    palette = ranking_table.Palette(charts.INK, charts.GRID, list(charts.SERIES))
    values = [f"{row['encoder']}: {row['value']:.3f}" for row in held["scores"] if row["value"] is not None]
    drawing = charts.inline(ranking_table.picture(held, palette), ["Score against clips/s.", ", ".join(values)])
    sections = [Section("Score against speed", part("chart", "", "up and to the right is better", "", drawing, []))]
    for name, rows in ranking_table.scores(held).items():
        head, *lines = ranking_table.cells(held, rows)
        sections.append(Section(name, part("table", head, lines, "scores")))
    sections[-1] = sections[-1]._replace(
        body=sections[-1].body + Markup().join(part("text", note) for note in ranking_table.notes(held))
    )
    head = ["encoder", "model", "sample rate"]
    lines = [[one["encoder"], one["model"] or "a baseline", f"{one['rate']} Hz"] for one in scored]
    lines += [[one["encoder"], one["model"], f"not scored: {one['failed']}"] for one in failed]
    sections.append(Section("Encoders", part("table", head, lines, "")))
    facts = {"data": held["data"], "task": held["task"] or "not named", "test clips": f"{first['clips']:,}"}
    facts |= {"encoders": len(held["encoders"]), "classes": len(held["classes"]), "metric": held["metric"]}
    models = {one["encoder"]: one["model"] for one in scored}
    best = next((models[row["encoder"]] for row in held["scores"] if models[row["encoder"]]), None)
    tune = f"asit finetune --model {shlex.quote(str(best))} --data {shlex.quote(held['data'])} --out FT"
    return page(
        title=f"asit: {folder.resolve().name}",
        state="finished",
        verdict=verdict,
        findings=[_finding(name, rows) for name, rows in ranking_table.scores(held).items()],
        commands=[(tune, "train a classifier from the best")],
        facts=facts,
        sections=sections,
        damaged=0,
    )


def _finding(score: str, rows: Sequence[Mapping[str, Any]]) -> RunFinding:
    """Return which encoder is best by a score, and which ones the interval of the difference does not exclude."""
    best, *others = rows
    close = [
        row["encoder"]
        for row in others
        if row["difference_interval"] is None or row["difference_interval"][0] <= 0 <= row["difference_interval"][1]
    ]
    certainty = (
        f"these clips do not tell it apart from {', '.join(close)}"
        if close
        else "the intervals of all differences exclude 0"
    )
    return RunFinding(not close, f"{score[0].upper()}{score[1:]}: {best['encoder']} is best; {certainty}.")
