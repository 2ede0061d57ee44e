"""Lines of CSV: the one place where asit writes them, so that any name comes back as it was."""

from __future__ import annotations

from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # OWASP, "CSV Injection"


def csv_line(cells: Iterable[object], *, spreadsheet: bool = False) -> str:
    """One line of CSV as RFC 4180 has it, without its end.

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
