"""Tables of clips: CSV, TSV or JSONL with a path and, optionally, labels, a split, a fold, a group, a part's times."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH118, PTH122, PTH123, PTH208

from __future__ import annotations

import csv
import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.errors import CatalogueError

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
"""What a table's name ends in."""

_COLUMNS = {
    "path": ("file", "filename"),
    "label": ("labels", "class", "category"),
    "split": (),
    "fold": (),
    "group": ("speaker",),
    "start": ("start_seconds",),
    "end": ("end_seconds",),
}
_NAMES = {name: column for column, others in _COLUMNS.items() for name in (column, *others)}
_KNOWN = ", ".join(name + (f" (or {', '.join(others)})" if others else "") for name, others in _COLUMNS.items())


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of a table.

    Attributes:
        path: absolute, normalised; a relative one in the table counts from the table's folder.
        label: the cell's text; several labels of one clip are parted by ";", and a soft one carries its weight, from 0
            to 1, after a colon: "dog:0.7".
        split: the cell's text, such as "train" or "test".
        fold: the cell's text: which fold of a cross-validation the clip lies in.
        group: the cell's text: what must not lie on two sides of a split, such as a speaker or a recording.
        start: s; the clip is the file from here, None: from its beginning.
        end: s; the clip is the file up to here, None: to its end.
    """

    path: str
    label: str | None = None
    split: str | None = None
    fold: str | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None


def read_table(path: str | os.PathLike[str]) -> list[TableRow]:
    """All rows of a table, in its order.

    The first line of a CSV or TSV names the columns, each line of a JSONL is an object. The columns are path (or file,
    filename), label (or labels, class, category), split, fold, group (or speaker), start and end (or start_seconds and
    end_seconds), of which the path must be there. In a JSONL the label may also be a list of names, or an object that
    gives each name its weight. Files are not looked at.

    Raises:
        CatalogueError: no such table, an unknown or missing column, a damaged line (with its number), times that
            are none, a clip that stands on two lines, or no rows.
    """
    return list(iterate_table(path))


def iterate_table(path: str | os.PathLike[str]) -> Iterator[TableRow]:
    """As :func:`read_table`, one row at a time."""
    table = Path(path)
    suffix = table.suffix.lower()
    if suffix not in SUFFIXES:
        if not table.is_file():
            raise CatalogueError(
                f"{table} is a folder" if table.is_dir() else f"there is no {table}",
                f"a table, whose name ends in {', '.join(sorted(SUFFIXES))}",
                "check the path" + ("" if table.is_dir() else near(table)),
            )
        raise CatalogueError(
            f"{table} is not a table by its name", f"a name ending in {', '.join(sorted(SUFFIXES))}", "rename the table"
        )
    folder = os.path.abspath(table.parent)
    # A set of hashes instead of paths: an eighth of the memory for two million rows.
    seen: set[int] = set()
    try:
        with open(table, encoding="utf-8-sig", newline="") as lines:
            cells = _objects(table, lines) if suffix == ".jsonl" else _columns(table, lines, suffix)
            for number, row in cells:
                name = (row.get("path") or "").strip()
                if not name:
                    raise CatalogueError(
                        f"{table}, line {number}: no path", "each line names a file", "mend or remove this line"
                    )
                full = os.path.normpath(os.path.join(folder, name))
                start, end = (_time(table, number, key, row.get(key)) for key in ("start", "end"))
                if end is not None and end <= (start or 0.0):
                    raise CatalogueError(
                        f"{table}, line {number}: from {start or 0:g} s to {end:g} s",
                        "an end after the start",
                        "mend or remove this line",
                    )
                clip = hash((full, start or 0.0, end))
                if clip in seen:
                    part = "" if start is None and end is None else f" from {start or 0:g} s"
                    raise CatalogueError(
                        f"{table}, line {number}: {name}{part} stands in the table twice",
                        "one line a file, or a part of a file",
                        "remove one line; several labels of one clip go in one cell, parted by ';'",
                    )
                seen.add(clip)
                label, split, fold, group = (row.get(key) or None for key in ("label", "split", "fold", "group"))
                yield TableRow(full, label, split, fold, group, start, end)
    except FileNotFoundError:
        raise CatalogueError(
            f"there is no table {table}", "a CSV, TSV or JSONL file", "check the path" + near(table)
        ) from None
    except UnicodeDecodeError as error:
        raise CatalogueError(
            f"{table} is not UTF-8 text ({error.reason} at byte {error.start})", "UTF-8", "save the table as UTF-8"
        ) from None
    except (OSError, csv.Error) as error:
        raise CatalogueError(f"{table} cannot be read: {error}", "a readable table", "check the file") from None
    if not seen:
        raise CatalogueError(f"{table} has no rows", "at least one line with a file's path", "check the table")


def _time(table: Path, number: int, name: str, text: str | None) -> float | None:
    if not text or not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise CatalogueError(
            f"{table}, line {number}: {name} is '{text}'", "a number of seconds, 0 or above", "mend this line"
        )
    return seconds


def _columns(table: Path, lines: Iterable[str], suffix: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    header = next(reader, None)
    if header is None:
        return
    names = _known(table, header)
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(names):
            raise CatalogueError(
                f"{table}, line {reader.line_num}: {len(cells)} cells under {len(names)} columns",
                f"one cell for each of {', '.join(header)}",
                "mend this line; a cell that holds the separator needs quotes",
            )
        yield reader.line_num, dict(zip(names, cells, strict=True))


def _objects(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise CatalogueError(
                f"{table}, line {number}: not JSON ({error.msg})", "one JSON object a line", "mend this line"
            ) from None
        if not isinstance(row, dict):
            raise CatalogueError(
                f"{table}, line {number}: {line.strip()[:40]}", 'an object such as {"path": "a.wav"}', "mend this line"
            )
        names = _known(table, list(row))
        yield number, {name: _text(table, number, name, value) for name, value in zip(names, row.values(), strict=True)}


def _text(table: Path, number: int, name: str, value: Any) -> str:
    """What a JSONL's value would be in a CSV's cell."""
    if value is None:
        return ""
    if not isinstance(value, list | dict):
        return str(value)
    found = f"{table}, line {number}: {name} is {json.dumps(value)[:60]}"
    if name != "label":
        raise CatalogueError(found, "text or a number", "mend this line")
    names = [str(label) for label in value]
    if any(";" in label for label in names):
        raise CatalogueError(found, "names without ';', which parts labels", "give these names another sign")
    if isinstance(value, list):
        return ";".join(names)
    weights = list(value.values())
    if not all(isinstance(weight, int | float) and 0 <= weight <= 1 for weight in weights):
        raise CatalogueError(found, "a weight from 0 to 1 for each name", "mend this line")
    return ";".join(f"{label}:{float(weight)!r}" for label, weight in zip(names, weights, strict=True))


def _known(table: Path, header: list[str]) -> list[str]:
    """The header's names in our words."""
    found = [name.strip().lower() for name in header]
    expected = f"path and, where wanted, others of: {_KNOWN}"
    unknown = [name for name in found if name not in _NAMES]
    if unknown:
        if not any(_NAMES.get(name) == "path" for name in found) and any(
            os.path.splitext(name)[1] and not difflib.get_close_matches(name, _NAMES, 1) for name in found
        ):
            raise CatalogueError(
                f"{table}: the first line is '{', '.join(header)}'", f"the columns' names: {expected}", "add that line"
            )
        told = []
        for name in unknown:
            near = difflib.get_close_matches(name, _NAMES, 1)
            told.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        remedy = "rename these columns, or save the table without them"
        if any(sign in name for name in unknown for sign in ";\t|"):
            remedy = "part the columns by commas"
        raise CatalogueError(f"{table}: unknown columns {', '.join(told)}", expected, remedy)
    ours = [_NAMES[name] for name in found]
    for name in _COLUMNS:
        same = [header[i] for i, our in enumerate(ours) if our == name]
        if len(same) > 1:
            raise CatalogueError(
                f"{table}: {' and '.join(same)} are both the {name}", "one of them", "remove the other"
            )
    if "path" not in ours:
        raise CatalogueError(f"{table}: columns {', '.join(header)}, none with the path", expected, "add that column")
    return ours


def near(path: Path) -> str:
    """A hint at the entry of the same folder that is spelt nearly the same."""
    try:
        found = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        return ""
    return f"; did you mean {path.parent / found[0]}?" if found else ""
