"""Tables of clips: CSV, TSV or JSONL with a path and, optionally, a label and a split."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH118, PTH122, PTH123, PTH208

from __future__ import annotations

import csv
import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.errors import CatalogueError

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
"""What a table's name ends in."""

_NAMES = {
    "path": "path",
    "file": "path",
    "filename": "path",
    "label": "label",
    "labels": "label",
    "class": "label",
    "category": "label",
    "split": "split",
}


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of a table.

    Attributes:
        path: absolute, normalised; a relative one in the table counts from the table's folder.
        label: the cell's text; several labels of one clip are parted by ";".
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

    The first line of a CSV or TSV names the columns; each line of a JSONL is an object. The path's column is
    called path, file or filename, the label's label, labels, class or category (in a JSONL it may be a list), the
    split's split. Files are not looked at.

    Raises:
        CatalogueError: no such table, an unknown or missing column, a damaged line (with its number), a file that
            stands on two lines, or no rows.
    """
    return list(iterate_table(path))


def iterate_table(path: str | os.PathLike[str]) -> Iterator[TableRow]:
    """As :func:`read_table`, one row at a time."""
    table = Path(path)
    suffix = table.suffix.lower()
    if suffix not in SUFFIXES:
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
                if hash(full) in seen:
                    raise CatalogueError(
                        f"{table}, line {number}: {name} stands in the table twice",
                        "one line a file",
                        "remove one line; several labels of one file go in one cell, parted by ';'",
                    )
                seen.add(hash(full))
                yield TableRow(full, row.get("label") or None, row.get("split") or None)
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
        yield number, dict(zip(_known(table, list(row)), map(_text, row.values()), strict=True))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ";".join(map(str, value)) if isinstance(value, list) else str(value)


def _known(table: Path, header: list[str]) -> list[str]:
    """The header's names in our words: path, label, split."""
    found = [name.strip().lower() for name in header]
    expected = "path (or file, filename) and, if wanted, label (or labels, class, category) and split"
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
        parted = any(sign in name for name in unknown for sign in ";\t|")
        remedy = "part the columns by commas" if parted else "rename these columns or remove them"
        raise CatalogueError(f"{table}: unknown columns {', '.join(told)}", expected, remedy)
    ours = [_NAMES[name] for name in found]
    for name in ("path", "label", "split"):
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
