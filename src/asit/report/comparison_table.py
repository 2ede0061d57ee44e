"""A comparison as Markdown, CSV or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from asit.errors import ConfigError
from asit.io import atomic
from asit.io.csv_lines import csv_line
from asit.report.compare import Comparison, Row
from asit.report.score_records import Value, plain

SUFFIXES = (".md", ".csv", ".json")
"""What a comparison can be written as."""
_HEAD = ("run", "started from", "task", "split", "weights", "labels", "epochs")
_COLUMNS = (
    *("kind", "run", "started_from", "task", "split", "weights", "labels", "epochs", "seed", "metric", "value", "low"),
    *("high", "deviation", "folds", "seeds", "clips", "list", "against", "difference", "difference_low"),
    *("difference_high", "state"),
)


def write(found: Comparison, path: Path, *, spreadsheet: bool = False) -> None:
    """Write a comparison in the form that the file's name asks for, whole or not at all.

    Args:
        found: the comparison.
        path: the file.
        spreadsheet: of CSV, see `asit.io.csv_lines.csv_line`.

    Raises:
        ConfigError: a name that ends otherwise than in .md, .csv or .json.
    """
    check_name(path)
    suffix = path.suffix.lower()
    text = as_csv(found, spreadsheet=spreadsheet) if suffix == ".csv" else _FORMS[suffix](found)
    atomic.write_text(path, text)


def check_name(path: Path) -> None:
    """Refuse a name that says no known form, before the work begins."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out {path}", f"a name that ends in {', '.join(SUFFIXES)}", "choose one of these forms")


def markdown(found: Comparison) -> str:
    """The scores, the seeds together, the paired differences, and the warnings."""
    scored = [row for row in found.rows if not row.state]
    parts = []
    if scored:
        parts.append(
            _table(
                (*_HEAD, "score (95 % interval)", "clips", "list"),
                ((*_names(row), _score(row), *_clips(row)) for row in scored),
            )
        )
    if found.seeds:
        parts.append(
            "Runs that differ by their seed alone (mean ± standard deviation over seeds):\n\n"
            + _table(
                (*_HEAD[1:], "score over seeds", "seeds", "of each"),
                (
                    (
                        *_names(group.row)[1:],
                        f"{plain(group.row.metric)} {_spread(group.mean, group.deviation)}",
                        str(len(group.values)),
                        ", ".join(f"{value:.3f}" for value in group.values),
                    )
                    for group in found.seeds
                ),
            )
        )
    if found.differences:
        lines = (
            (d.run, d.weights, plain(d.metric), _interval(d.value, "+"), f"{d.clips:,}") for d in found.differences
        )
        parts.append(
            f"Difference to {found.differences[0].against} on the same clips (paired bootstrap, 95 % interval):\n\n"
            + _table(("run", "weights", "metric", "difference", "clips"), lines)
        )
    parts += [f"No score: {row.run} is {row.state}" for row in found.rows if row.state]
    parts += [f"Warning: {warning}" for warning in found.warnings]
    return "\n\n".join(parts) + "\n"


def as_csv(found: Comparison, *, spreadsheet: bool = False) -> str:
    """A line for each score and one for each group of seeds, all digits."""
    differences = {(d.run, d.weights, d.metric): d for d in found.differences}
    out: list[dict[str, Any]] = []
    for row in found.rows:
        line = _plain(row) | {"kind": "score"}
        if against := differences.get((row.run, row.weights, row.metric)):
            line |= {"against": against.against, "difference": _finite(against.value.value)}
            line |= {"difference_low": _finite(against.value.low), "difference_high": _finite(against.value.high)}
        out.append(line)
    for group in found.seeds:
        line = _plain(group.row) | {"kind": "seeds", "run": "", "seed": None, "low": None, "high": None}
        line |= {"value": _finite(group.mean), "deviation": _finite(group.deviation), "seeds": len(group.values)}
        out.append(line)
    lines = ([line.get(name) for name in _COLUMNS] for line in out)
    return "".join(csv_line(cells, spreadsheet=spreadsheet) + "\n" for cells in (_COLUMNS, *lines))


def as_json(found: Comparison) -> str:
    """{"rows", "seeds", "differences", "warnings"}; null for what has no value."""
    held = {
        "rows": [_plain(row) for row in found.rows],
        "seeds": [
            _plain(group.row)
            | {"run": None, "seed": None, "low": None, "high": None, "value": _finite(group.mean)}
            | {"deviation": _finite(group.deviation), "values": [_finite(value) for value in group.values]}
            for group in found.seeds
        ],
        "differences": [
            {"run": d.run, "weights": d.weights, "against": d.against, "metric": d.metric, "clips": d.clips}
            | {"difference": _finite(d.value.value), "interval": _ends(d.value)}
            for d in found.differences
        ],
        "warnings": found.warnings,
    }
    return json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


_FORMS = {".md": markdown, ".json": as_json}


def _plain(row: Row) -> dict[str, Any]:
    return {
        "run": row.run,
        "started_from": row.start,
        "task": row.task,
        "split": row.split,
        "weights": row.weights,
        "labels": row.labels,
        "epochs": row.epochs,
        "seed": row.seed,
        "metric": row.metric,
        "value": _finite(row.value.value),
        "low": _finite(row.value.low),
        "high": _finite(row.value.high),
        "deviation": _finite(row.deviation),
        "folds": row.folds or None,
        "clips": row.clips,
        "list": row.list,
        "state": row.state,
    }


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    drawn = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn)


def _names(row: Row) -> tuple[str, ...]:
    epochs = "" if row.epochs is None else str(row.epochs)
    return row.run, row.start, row.task, row.split, row.weights, row.labels, epochs


def _score(row: Row) -> str:
    if row.folds:
        return f"{plain(row.metric)} {_spread(row.value.value, row.deviation)} over {row.folds} folds"
    return f"{plain(row.metric)} {_interval(row.value)}"


def _clips(row: Row) -> tuple[str, str]:
    return f"{row.clips:,}", row.list


def _interval(value: Value, sign: str = "") -> str:
    if math.isnan(value.value):
        return "not to be had"
    ends = f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})" if value.known else ""
    return f"{value.value:{sign}.3f}{ends}"


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" + (f" ± {deviation:.3f}" if math.isfinite(deviation) else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _ends(value: Value) -> list[float] | None:
    return [value.low, value.high] if value.known else None
