"""Write a comparison of runs as Markdown, CSV or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from asit.errors import ConfigError
from asit.evaluate.bootstrap import Value
from asit.io import atomic
from asit.io.csv_lines import csv_line
from asit.report.compare import PairedDifference, RunComparison, ScoreRow, SeedGroup
from asit.report.score_records import plain

SUFFIXES = (".md", ".csv", ".json")
"""Endings of the files that a comparison can be written to."""
_HEAD = ("run", "started from", "task", "split", "weights", "labels", "epochs")
_CSV = (
    *("kind", "run", "started_from", "task", "split", "weights", "labels", "epochs", "seed", "metric", "value", "low"),
    *("high", "deviation", "folds", "seeds", "clips", "list", "against", "difference", "difference_low"),
    *("difference_high", "state"),
)


def write(found: RunComparison, path: Path, *, spreadsheet: bool = False) -> None:
    """Write a comparison atomically, in the form that the file's ending names.

    Args:
        found: the comparison.
        path: the file.
        spreadsheet: of CSV, see `asit.io.csv_lines.csv_line`.

    Raises:
        ConfigError: the name does not end in .md, .csv or .json.
    """
    check_name(path)
    match path.suffix.lower():
        case ".csv":
            text = _as_csv(found, spreadsheet)
        case ".json":
            text = _as_json(found)
        case _:
            text = markdown(found)
    atomic.write_text(path, text)


def check_name(path: Path) -> None:
    """Raise a ConfigError if the name of a file has none of SUFFIXES."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--out {path}", f"a name that ends in {', '.join(SUFFIXES)}", "choose one of these forms")


def markdown(found: RunComparison, compact: bool = False) -> str:
    """Return tables of the scores, the means over seeds and the paired differences, and the warnings.

    Args:
        found: the comparison.
        compact: name a column that is the same in all rows once above its table, so that tables fit a terminal.
    """
    parts = []
    table = _compact_table if compact else _table
    if scored := [row for row in found.rows if not row.state]:
        rows = ((*_names(row), _score(row), f"{row.clips:,}", row.list) for row in scored)
        parts.append(table((*_HEAD, "score (95 % interval)", "clips", "list"), rows))
    if found.seeds:
        parts.append("Runs that differ by their seed alone (mean ± standard deviation over seeds):")
        rows = (
            (
                *_names(group.row)[1:],
                f"{plain(group.row.metric)} {_spread(group.mean, group.deviation)}",
                str(len(group.values)),
                ", ".join(f"{value:.3f}" for value in group.values),
            )
            for group in found.seeds
        )
        parts.append(table((*_HEAD[1:], "score over seeds", "seeds", "of each"), rows))
    if found.differences:
        first = found.differences[0].against
        parts.append(f"Difference to {first} on the same clips (paired bootstrap, 95 % interval):")
        rows = (
            (d.run, d.weights, plain(d.metric), interval_text(d.value, "+"), f"{d.clips:,}") for d in found.differences
        )
        parts.append(table(("run", "weights", "metric", "difference", "clips"), rows))
    parts += [f"No score: {row.run} is {row.state}" for row in found.rows if row.state]
    parts += [f"Warning: {warning}" for warning in found.warnings]
    return "\n\n".join(parts) + "\n"


def _as_csv(found: RunComparison, spreadsheet: bool) -> str:
    """A line for each score and one for each group of seeds, all digits."""
    differences = {(d.run, d.weights, d.metric): d for d in found.differences}
    out: list[dict[str, Any]] = []
    for row in found.rows:
        line = _fields(row) | {"kind": "score"}
        if against := differences.get((row.run, row.weights, row.metric)):
            value, low, high = map(_finite, against.value)
            line |= {"against": against.against, "difference": value, "difference_low": low, "difference_high": high}
        out.append(line)
    out += [_seed_fields(group, "") | {"kind": "seeds", "seeds": len(group.values)} for group in found.seeds]
    lines = ([line.get(name) for name in _CSV] for line in out)
    return "".join(csv_line(cells, spreadsheet=spreadsheet) + "\n" for cells in (_CSV, *lines))


def _as_json(found: RunComparison) -> str:
    """{"rows", "seeds", "differences", "warnings"}; null for what has no value."""
    held = {
        "rows": [_fields(row) for row in found.rows],
        "seeds": [_seed_fields(group, None) | {"values": list(map(_finite, group.values))} for group in found.seeds],
        "differences": [_difference_fields(difference) for difference in found.differences],
        "warnings": found.warnings,
    }
    return json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _fields(row: ScoreRow) -> dict[str, Any]:
    names = ("task", "split", "weights", "labels", "epochs", "seed", "metric")
    return {
        "run": row.run,
        "started_from": row.start,
        **{name: getattr(row, name) for name in names},
        **dict(zip(("value", "low", "high"), map(_finite, row.value), strict=True)),
        "deviation": _finite(row.deviation),
        "folds": row.folds or None,
        **{name: getattr(row, name) for name in ("clips", "list", "state")},
    }


def _seed_fields(group: SeedGroup, run: str | None) -> dict[str, Any]:
    means = {"value": _finite(group.mean), "deviation": _finite(group.deviation)}
    return _fields(group.row) | {"run": run, "seed": None, "low": None, "high": None} | means


def _difference_fields(found: PairedDifference) -> dict[str, Any]:
    made = {name: getattr(found, name) for name in ("run", "weights", "against", "metric", "clips")}
    interval = [found.value.low, found.value.high] if found.value.known else None
    return made | {"difference": _finite(found.value.value), "interval": interval}


def _compact_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table without the columns that are the same in all of its rows, which are named above it."""
    rows = list(lines)
    same = {i for i in range(1, len(head)) if len(rows) > 1 and len({row[i] for row in rows}) == 1}
    kept = [i for i in range(len(head)) if i not in same]
    made = _table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])
    common = "; ".join(f"{head[i]} {rows[0][i]}" for i in sorted(same) if rows[0][i])
    return f"Of all: {common}\n\n{made}" if common else made


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _names(row: ScoreRow) -> tuple[str, ...]:
    epochs = "" if row.epochs is None else str(row.epochs)
    return row.run, row.start, row.task, row.split, row.weights, row.labels, epochs


def _score(row: ScoreRow) -> str:
    over = (
        f"{_spread(row.value.value, row.deviation)} over {row.folds} folds" if row.folds else interval_text(row.value)
    )
    return f"{plain(row.metric)} {over}"


def interval_text(value: Value, sign: str = "") -> str:
    """Return a value with its interval; `sign` "+" for a difference."""
    if math.isnan(value.value):
        return "not available"
    ends = f" ({value.low:{sign}.3f} to {value.high:{sign}.3f})" if value.known else ""
    return f"{value.value:{sign}.3f}{ends}"


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.3f}" + (f" ± {deviation:.3f}" if math.isfinite(deviation) else "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
