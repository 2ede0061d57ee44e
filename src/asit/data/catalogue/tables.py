"""Tables of clips: CSV, TSV or JSONL with a path and, optionally, labels, a split, a fold, a group, a part's times."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH122, PTH208

from __future__ import annotations

import codecs
import csv
import difflib
import functools
import io
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from asit.data.catalogue.columns import WORDS, identifier, normal
from asit.errors import CatalogueError
from asit.io import local_files, parsing

SUFFIXES = frozenset({".csv", ".tsv", ".jsonl"})
"""What a table's name ends in."""

_COLUMNS = {
    "path": ("file", "filename", "file_name", "filepath", "file_path"),
    "label": ("labels", "class", "category"),
    "split": (),
    "fold": (),
    "group": ("speaker",),
    "start": ("start_seconds",),
    "end": ("end_seconds",),
}
_NAMES = {name: column for column, others in _COLUMNS.items() for name in (column, *others)}
_KNOWN = ", ".join(name + (f" (or {', '.join(others)})" if others else "") for name, others in _COLUMNS.items())
_SEPARATORS = ",;\t|"
_ENCODINGS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

_normal = functools.lru_cache(1 << 16, typed=True)(normal)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One line of a table; its texts are as :func:`asit.data.catalogue.columns.identifier` makes them.

    Attributes:
        path: absolute, normalised, spelt as on the disk; a relative one in the table counts from the table's folder.
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
    filename, file_name, filepath, file_path), label (or labels, class, category), split, fold, group (or speaker),
    start and end (or start_seconds and end_seconds), of which the path must be there. Others are skipped, which is
    logged, unless the name of one is a slip of the pen away from one that the table lacks. Cells are parted by commas,
    semicolons, tabs or bars, whichever names the columns, or as a first line such as "sep=;" says. In a JSONL the label
    may also be a list of names, or an object that gives each name its weight. The text is UTF-8, or UTF-16 with its
    mark. Files are looked for only where their name may be spelt otherwise on the disk (see
    `asit.io.local_files.locate`).

    Raises:
        CatalogueError: no such table, a missing or misspelt column, a damaged line (with its number), times that
            are none, a clip that stands on two lines, or no rows.
    """
    return list(iterate_table(path))


def iterate_table(path: str | os.PathLike[str]) -> Iterator[TableRow]:
    """As :func:`read_table`, one row at a time."""
    table = Path(local_files.locate(os.fspath(path)))
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
        with _opened(table) as lines:
            for number, row in _objects(table, lines) if suffix == ".jsonl" else _columns(table, lines, suffix):
                found = _row(table, folder, number, row)
                clip = hash((found.path, found.start or 0.0, found.end))
                if clip in seen:
                    part = "" if found.start is None and found.end is None else f" from {found.start or 0:g} s"
                    raise CatalogueError(
                        f"{table}, line {number}: {row['path']}{part} stands in the table twice",
                        "one line a file, or a part of a file",
                        "remove one line; several labels of one clip go in one cell, parted by ';'",
                    )
                seen.add(clip)
                yield found
    except FileNotFoundError:
        raise CatalogueError(
            f"there is no table {table}", "a CSV, TSV or JSONL file", "check the path" + near(table)
        ) from None
    except UnicodeDecodeError as error:
        raise CatalogueError(
            f"{table} is not {error.encoding.upper()} text: {error.reason} 0x{error.object[error.start]:02x}",
            "UTF-8, or UTF-16 with its mark",
            "save the table as UTF-8 (in Excel: CSV UTF-8; of Latin-1: iconv -f latin1 -t utf-8)",
        ) from None
    except (OSError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CatalogueError(f"{table} cannot be read: {why}", "a readable table", "check the file") from None
    if not seen:
        raise CatalogueError(f"{table} has no rows", "at least one line with a file's path", "check the table")


def _opened(table: Path) -> TextIO:
    file = local_files.open_file(table)
    encoding = _ENCODINGS.get(file.peek(2)[:2], "utf-8-sig") if isinstance(file, io.BufferedReader) else "utf-8-sig"
    return io.TextIOWrapper(file, encoding, newline="")


def _row(table: Path, folder: str, number: int, row: dict[str, Any]) -> TableRow:
    name = str(row.get("path") or "").strip()
    if not name or "\0" in name:
        raise CatalogueError(f"{table}, line {number}: no path", "each line names a file", "mend or remove this line")
    try:
        name.isascii() or name.encode("utf-8", "surrogateescape")
        words = {column: _normal(column, row.get(column)) for column in WORDS}
    except ValueError as error:
        raise CatalogueError(f"{table}, line {number}: {error}", "text or a number", "mend this line") from None
    start, end = (_time(table, number, key, row.get(key)) for key in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise CatalogueError(
            f"{table}, line {number}: from {start or 0:g} s to {end:g} s",
            "an end after the start",
            "mend or remove this line",
        )
    return TableRow(os.path.normpath(local_files.locate(name, folder)), **words, start=start, end=end)


def _time(table: Path, number: int, name: str, value: Any) -> float | None:
    text = identifier(value) if isinstance(value, str | int | float | None) else "?"
    if text is None and not isinstance(value, str):
        return None
    if text is None and not value.strip():
        return None
    try:
        seconds = float(text or "nan")
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise CatalogueError(
            f"{table}, line {number}: {name} is '{value}'",
            "a number of seconds, 0 or above, with a decimal point",
            "mend this line",
        )
    return seconds


def _columns(table: Path, lines: TextIO, suffix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    first, skipped, given = lines.readline(), 0, None
    while first and (not first.strip() or (given := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first) or given)):
        first, skipped = lines.readline(), skipped + 1
        if given and first.strip():
            break
    if "\0" in first:
        raise CatalogueError(
            f"{table} holds zero bytes: it is UTF-16 without its mark, or no text", "UTF-8", "save the table as UTF-8"
        )
    separator = given[1] if given else _separator(first, "\t" if suffix == ".tsv" else ",")
    reader = csv.reader(_chained(first, lines), delimiter=separator, skipinitialspace=separator != "\t", strict=True)
    header = next(reader, None)
    if not header:
        return
    names = _known(table, header)
    for cells in reader:
        if not any(map(str.strip, cells)):
            continue
        if len(cells) > len(names) and not any(map(str.strip, cells[len(names) :])):
            cells = cells[: len(names)]  # commas at the end of a line
        if len(cells) != len(names):
            raise CatalogueError(
                f"{table}, line {reader.line_num + skipped}: {len(cells)} cells under {len(names)} columns",
                f"one cell for each of {', '.join(header)}",
                "mend this line; a cell that holds the separator or a line break needs quotes",
            )
        yield reader.line_num + skipped, {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _chained(first: str, lines: TextIO) -> Iterator[str]:
    yield first
    yield from lines


def _separator(line: str, usual: str) -> str:
    """What parts the names in a header's line: the usual sign, unless another one yields the path's column."""
    for sign in dict.fromkeys(usual + _SEPARATORS):
        names = [name.strip().strip('"').strip().lower() for name in line.split(sign)]
        if any(_NAMES.get(name) == "path" for name in names):
            return sign
    return usual


def _objects(table: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    known: dict[tuple[str, ...], list[str | None]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pairs = parsing.from_json(line, surrogates=True, pairs=unique_keys)
        except parsing.Malformed as error:
            raise CatalogueError(
                f"{table}, line {number} is no row: {error}", "one JSON object a line", "mend this line"
            ) from None
        if not isinstance(pairs, dict):
            raise CatalogueError(
                f"{table}, line {number}: {line.strip()[:40]}", 'an object such as {"path": "a.wav"}', "mend this line"
            )
        keys = tuple(pairs)
        if keys not in known:
            earlier = {key for one in known for key in one}
            known[keys] = _known(table, keys, quiet=earlier)
        row: dict[str, Any] = {name: value for name, value in zip(known[keys], pairs.values(), strict=True) if name}
        try:
            row |= {"label": label_text(row.get("label"))}
        except ValueError as error:
            raise CatalogueError(f"{table}, line {number}: {error.args[0]}", *error.args[1:]) from None
        for name, value in row.items():
            if isinstance(value, list | dict) or (name == "path" and isinstance(value, bool)):
                found = f"{table}, line {number}: {name} is {json.dumps(value)[:60]}"
                raise CatalogueError(found, "text or a number", "mend this line")
        yield number, row


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses one that has a key twice, of which a parser would silently keep the last.

    Raises:
        Malformed: it has.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise parsing.Malformed(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


def label_text(value: Any) -> Any:
    """A label as JSON gives it, as the text of a cell: a name, a list of names, or names with their weights.

    Raises:
        ValueError: with what was found, what was expected, and what to do.
    """
    if not isinstance(value, list | dict):
        return value
    found = f"label is {json.dumps(value)[:60]}"
    try:
        names = [name for label in value if (name := identifier(label)) is not None]
    except ValueError:
        raise ValueError(found, "names", "mend this line") from None
    if any(";" in label for label in names):
        raise ValueError(found, "names without ';', which parts labels", "give these names another sign")
    if isinstance(value, list):
        return ";".join(names)
    weights = list(value.values())
    if len(names) != len(weights) or not all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1 for weight in weights
    ):
        raise ValueError(found, "a weight from 0 to 1 for each name", "mend this line")
    return ";".join(f"{label}:{float(weight)!r}" for label, weight in zip(names, weights, strict=True))


def _known(table: Path, header: Sequence[str], quiet: Iterable[str] = ()) -> list[str | None]:
    """The header's names in our words; None for columns of the table's own, which are logged unless in `quiet`."""
    found = [" ".join(name.split()).lower() for name in header]
    ours = [_NAMES.get(name) for name in found]
    expected = f"path and, where wanted, others of: {_KNOWN}"
    for name in _COLUMNS:
        same = [header[i] for i, our in enumerate(ours) if our == name]
        if len(same) > 1:
            raise CatalogueError(
                f"{table}: {' and '.join(same)} are both the {name}", "one of them", "remove the other"
            )
    slips = {
        name: close
        for name, our in zip(found, ours, strict=True)
        if our is None and (close := next((known for known in _NAMES if _slip(name, known)), None))
        if _NAMES[close] not in ours
    }
    if slips:
        names = ", ".join(f"'{name}' (did you mean '{close}'?)" for name, close in slips.items())
        raise CatalogueError(
            f"{table}: unknown columns {names}", expected, "rename these columns, or take them out of the table"
        )
    if "path" not in ours:
        if any(os.path.splitext(name)[1] for name in found):
            raise CatalogueError(
                f"{table}: the first line is '{', '.join(header)}'", f"the columns' names: {expected}", "add that line"
            )
        raise CatalogueError(f"{table}: columns {', '.join(header)}, none with the path", expected, "add that column")
    own = [f"'{name}'" for name, our in zip(header, ours, strict=True) if our is None and name not in quiet]
    if own:
        _log_own(str(table), ", ".join(own))
    return ours


@functools.cache
def _log_own(table: str, columns: str) -> None:
    # Once, however often a process reads the table.
    log.warning("%s: columns that are not used: %s", table, columns)


def _slip(name: str, known: str) -> bool:
    """Whether a name is one letter away from a known one: one more, one less, another, or two exchanged."""
    if len(name) == len(known):
        at = [i for i, (one, other) in enumerate(zip(name, known, strict=True)) if one != other]
        exchanged = len(at) == 2 and at[1] == at[0] + 1 and name[at[0]] == known[at[1]] and name[at[1]] == known[at[0]]
        return exchanged or (len(at) == 1 and len(known) > 3)
    longer, shorter = sorted((name, known), key=len, reverse=True)
    return len(longer) == len(shorter) + 1 and any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))


def near(path: Path) -> str:
    """A hint at the entry of the same folder that is spelt nearly the same."""
    try:
        found = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
    except OSError:
        return ""
    return f"; did you mean {path.parent / found[0]}?" if found else ""
