"""Tables of clips: CSV, TSV, JSONL or Parquet with a path and optional label, split, fold, group, start and end."""

from __future__ import annotations

import codecs
import csv
import difflib
import functools
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from asit.data.catalogue import table_columns
from asit.data.catalogue.columns import WORDS, identifier, normal
from asit.errors import CatalogueError, missing_extra
from asit.io import local_files, parsing

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".parquet"})
"""Suffixes of tables."""

_SEPARATORS = ",;\t|"

_normal = functools.lru_cache(1 << 16, typed=True)(normal)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table; texts are normalised by :func:`asit.data.catalogue.columns.identifier`.

    Attributes:
        path: absolute, normalised, spelt as on the disk; relative paths in the table start at the table's folder.
        label: several labels are separated by ";", and a soft one has its weight after a colon: "dog:0.7".
        split: such as "train" or "test".
        fold: the clip's fold in a cross-validation.
        group: what must not be in two splits, such as a speaker or a recording.
        start, end: s; the part of the file, None: from its beginning, to its end.
    """

    path: str
    label: str | None = None
    split: str | None = None
    fold: str | None = None
    group: str | None = None
    start: float | None = None
    end: float | None = None


def read_table(path: str | os.PathLike[str], columns: str = "") -> list[TableRow]:
    """Read all rows of a table, in order.

    The first line of a CSV or TSV names the columns, each line of a JSONL is an object. The columns are path, label,
    split, fold, group, start and end, or other names of these (`table_columns`); path is required. Other columns are
    skipped, which is logged; a name one letter away from a missing column is an error. The separator is a comma,
    semicolon, tab or bar, or as a first line "sep=;" says. In a JSONL the label may be a list of names, or an object
    with the weight of each name. The text is UTF-8, or UTF-16 with a byte order mark. Parquet needs its extra.

    Args:
        path: the table.
        columns: names of its columns, such as "label=species,path=file_name".

    Raises:
        CatalogueError: no such table, a missing or misspelt column, a damaged line (with its number), invalid times, a
            clip on two lines, or no rows.
    """
    return list(iterate_table(path, columns))


def iterate_table(path: str | os.PathLike[str], columns: str = "", *, repeated: bool = False) -> Iterator[TableRow]:
    """Yield the rows of :func:`read_table` one at a time; `repeated`: a clip may be on several lines."""
    table = Path(local_files.locate(os.fspath(path)))
    suffix = table.suffix.lower()
    if suffix not in SUFFIXES:
        what = "is a folder" if table.is_dir() else "is not a table by its name"
        problem = f"{table} {what}" if table.exists() else f"there is no {table}"
        fix = "rename the table" if table.is_file() else "check the path" + near(table)
        raise CatalogueError(problem, f"a table, whose name ends in {', '.join(sorted(SUFFIXES))}", fix)
    folder = os.path.abspath(table.parent)
    seen: set[int] = set()  # hashes take an eighth of the memory of the paths
    with open_table(table) as lines:
        for number, row in _cells(table, lines, suffix, columns):
            found = _row(table, folder, number, row)
            clip = hash((found.path, found.start or 0.0, found.end))
            if clip in seen and not repeated:
                part = "" if found.start is None and found.end is None else f" from {found.start or 0:g} s"
                raise bad_line(
                    *(table, number, f"{row['path']}{part} is in the table twice"),
                    "each file, or part of a file, once",
                    "remove one line; several labels of one clip go in one cell, separated by ';'",
                )
            seen.add(clip)
            yield found
    if not seen:
        raise CatalogueError(f"{table} has no rows", "at least one line with a file's path", "check the table")


@contextmanager
def open_table(table: Path) -> Iterator[TextIO]:
    """Open a table as text, UTF-8 or UTF-16; line ends are kept.

    Raises:
        CatalogueError: it cannot be read, or in the block a damaged encoding or CSV.
    """
    try:
        with local_files.open_file(table) as file, io.TextIOWrapper(file, _encoding(file), newline="") as lines:
            yield lines
    except UnicodeDecodeError as error:
        problem = f"{table} is not {error.encoding.upper()} text: {error.reason} 0x{error.object[error.start]:02x}"
        fix = "save the table as UTF-8 (in Excel: CSV UTF-8; of Latin-1: iconv -f latin1 -t utf-8)"
        raise CatalogueError(problem, "UTF-8, or UTF-16 with a byte order mark", fix) from None
    except (OSError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        fix = "check the file" if table.exists() else "check the path" + near(table)
        raise CatalogueError(f"{table} cannot be read: {why}", "a readable table", fix) from None


def _cells(table: Path, lines: TextIO, suffix: str, columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row's number, of a text its line, and its cells under our names."""
    if suffix == ".parquet":
        return _objects(table, _parquet(table), columns)
    return (
        _objects(table, _json(table, lines), columns) if suffix == ".jsonl" else _columns(table, lines, suffix, columns)
    )


def bad_line(table: Path, number: int, found: str, expected: str, fix: str = "correct this line") -> CatalogueError:
    """Make the error about a line of a table."""
    return CatalogueError(f"{table}, line {number}: {found}", expected, fix)


def _encoding(file: BinaryIO) -> str:
    start = file.peek(2)[:2] if isinstance(file, io.BufferedReader) else b""
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _row(table: Path, folder: str, number: int, row: dict[str, Any]) -> TableRow:
    name = str(row.get("path") or "").strip()
    if not name or "\0" in name:
        raise bad_line(table, number, "no path", "a file's path in each line")
    try:
        words = {column: _normal(column, row.get(column)) for column in WORDS}
    except ValueError as error:
        raise bad_line(table, number, str(error), "text or a number") from None
    start, end = (_time(table, number, key, row.get(key)) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise bad_line(table, number, f"from {start or 0:g} s to {end:g} s", "an end after the start")
    return TableRow(os.path.normpath(local_files.locate(name, folder)), **words, start=start, end=end)


def _time(table: Path, number: int, name: str, value: Any) -> float | None:
    text = identifier(value)
    if text is None and not (isinstance(value, str) and value.strip()):
        return None
    try:
        seconds = float(text or "nan")
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise bad_line(table, number, f"{name} is '{value}'", "seconds, 0 or above, with a decimal point")
    return seconds


def _columns(table: Path, lines: TextIO, suffix: str, columns: str) -> Iterator[tuple[int, dict[str, Any]]]:
    first, skipped, given = lines.readline(), 0, None
    while first and (not first.strip() or (given := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first) or given)):
        first, skipped = lines.readline(), skipped + 1
        if given and first.strip():
            break
    if "\0" in first:
        found = f"{table} holds zero bytes: UTF-16 without a byte order mark, or no text"
        raise CatalogueError(found, "UTF-8", "save the table as UTF-8")
    separator = usual = given[1] if given else "\t" if suffix == ".tsv" else ","
    for sign in usual if given else dict.fromkeys(usual + _SEPARATORS):  # the first that yields the path column
        if any(table_columns.is_path(name.strip().strip('"'), columns) for name in first.split(sign)):
            separator = sign
            break
    reader = csv.reader(
        itertools.chain([first], lines), delimiter=separator, skipinitialspace=separator != "\t", strict=True
    )
    header = next(reader, None)
    if not header:
        return
    names = table_columns.known(str(table), header, columns)
    for cells in reader:
        if not any(map(str.strip, cells)):
            continue
        if len(cells) > len(names) and not any(map(str.strip, cells[len(names) :])):
            cells = cells[: len(names)]  # commas at the end of a line
        if len(cells) != len(names):
            raise bad_line(
                *(table, reader.line_num + skipped, f"{len(cells)} cells under {len(names)} columns"),
                f"one cell for each of {', '.join(header)}",
                "correct this line; a cell that holds the separator or a line break needs quotes",
            )
        yield reader.line_num + skipped, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _json(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pairs = parsing.from_json(line, surrogates=True, pairs=unique_keys)
        except parsing.Malformed as error:
            raise bad_line(table, number, f"not a row: {error}", "one JSON object a line") from None
        if not isinstance(pairs, dict):
            raise bad_line(table, number, line.strip()[:40], 'an object such as {"path": "a.wav"}')
        yield number, pairs


def _parquet(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_extra(str(table), "pyarrow", "parquet") from None
    number = 0
    try:
        with parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    yield (number := number + 1), row
    except (ArrowException, OSError) as error:
        raise CatalogueError(f"{table} cannot be read: {error}", "a Parquet file", "write it again") from None


def _objects(
    table: Path, rows: Iterable[tuple[int, dict[str, Any]]], columns: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    known: dict[tuple[str, ...], list[str | None]] = {}
    lenient = table.suffix.lower() == ".jsonl"  # whose lines may lack a column
    for number, pairs in rows:
        keys = tuple(pairs)
        if keys not in known:
            earlier = {key for one in known for key in one}
            known[keys] = table_columns.known(str(table), keys, columns, earlier if known or lenient else None)
        row: dict[str, Any] = {name: value for name, value in zip(known[keys], pairs.values(), strict=True) if name}
        try:
            row |= {"label": label_text(row.get("label"))}
        except ValueError as error:
            raise bad_line(table, number, *error.args) from None
        for name, value in row.items():
            if isinstance(value, list | dict) or (name == "path" and isinstance(value, bool)):
                raise bad_line(table, number, f"{name} is {json.dumps(value, default=str)[:60]}", "text or a number")
        yield number, row


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dict.

    Raises:
        Malformed: a repeated key, of which a parser would silently keep the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise parsing.Malformed(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def label_text(value: Any) -> Any:
    """Convert a JSON label (a name, a list of names, or names with weights) to the text of a cell.

    Raises:
        ValueError: with what was found, what was expected, and the fix.
    """
    if not isinstance(value, list | dict):
        return value
    found = f"label is {json.dumps(value)[:60]}"
    try:
        names = [name for label in value if (name := identifier(label)) is not None]
    except ValueError:
        raise ValueError(found, "names", "correct this line") from None
    if any(";" in label for label in names):
        raise ValueError(found, "names without ';', which separates labels", "replace it by another sign")
    if isinstance(value, list):
        return ";".join(names)
    weights = list(value.values())
    if len(names) != len(weights) or not all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1 for weight in weights
    ):
        raise ValueError(found, "a weight from 0 to 1 for each name", "correct this line")
    return ";".join(f"{label}:{float(weight)!r}" for label, weight in zip(names, weights, strict=True))


def near(path: Path) -> str:
    """Return a hint at the entry of the same folder with the most similar name, or ""."""
    try:
        found = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        return ""
    return f"; did you mean {path.parent / found[0]}?" if found else ""
