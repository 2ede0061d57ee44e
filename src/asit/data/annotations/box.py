"""A part of a recording that somebody annotated, and the check of its times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from asit.data.catalogue.tables import bad_line, open_table
from asit.errors import CatalogueError


@dataclass(frozen=True, slots=True)
class Box:
    """One annotation.

    Attributes:
        start, end: s, in the recording; equal for a point.
        label: as in the file; None: it has no text.
        recording: path or name of the recording, as the file says it; None: the file names none.
    """

    start: float
    end: float
    label: str | None = None
    recording: str | None = None


def seconds(path: Path, line: int, field: str, text: str) -> float:
    """Parse a time, s.

    Raises:
        CatalogueError: names file, line and field.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise bad_line(path, line, f"{field} is '{text[:40]}'", "seconds, 0 or above, with a decimal point")
    return value


def check_order(path: Path, line: int, start: float, end: float) -> None:
    """Raise a CatalogueError for an end before the start."""
    if end < start:
        raise bad_line(path, line, f"from {start:g} s to {end:g} s", "an end that is not before the start")


def lines_of(path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8 or UTF-16; raises CatalogueError."""
    with open_table(path) as file:
        text = file.read()
    if "\0" in text:
        found = f"{path} holds zero bytes: UTF-16 without a byte order mark, or no text"
        raise CatalogueError(found, "UTF-8, or UTF-16 with a byte order mark", "save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
