"""Write CSV (RFC 4180) such that any name is read back as it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from asit.io import atomic

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # OWASP, "CSV Injection"


def write_csv(target: Path, rows: Iterable[Iterable[object]], *, spreadsheet: bool = False) -> None:
    """Write a table atomically, in UTF-8; see `csv_line`."""
    with atomic.write_file(target) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        file.writelines(csv_line(row, spreadsheet=spreadsheet) + "\r\n" for row in rows)


def csv_line(cells: Iterable[object], *, spreadsheet: bool = False) -> str:
    """Return one line of CSV, without its end.

    Numbers are written bare, None as nothing. A text is quoted where it holds a comma, a quote, a line break of any
    kind or another control character, or where white space at its ends would be lost.

    Args:
        cells: texts, numbers and None.
        spreadsheet: write "'" before a text that a spreadsheet program would run as a formula: one that begins with
            =, +, -, @, a tab or a carriage return. Such names then differ from those of the files.
    """
    return ",".join(_cell(cell, spreadsheet) for cell in cells)


def _cell(cell: object, spreadsheet: bool) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        return str(cell)
    if spreadsheet and cell.startswith(_FORMULA):
        cell = "'" + cell
    if cell != cell.strip() or "," in cell or '"' in cell or not cell.isprintable():
        return '"' + cell.replace('"', '""') + '"'
    return cell
