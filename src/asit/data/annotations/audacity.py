"""Audacity label tracks: start, end and text of each label in a line, separated by tabs.

Source: Audacity manual, "Importing and Exporting Labels". A line that begins with a backslash holds the frequencies of
the label before it. Further cells, such as the confidence that BirdNET-Analyzer writes, are not used.
"""

from __future__ import annotations

from pathlib import Path

from asit.data.annotations.box import Box, check_order, lines_of, seconds
from asit.data.catalogue.tables import bad_line


def read_label_track(path: Path) -> list[Box]:
    """Read the labels of an exported label track; none for an empty file.

    Raises:
        CatalogueError: names file, line and field.
    """
    boxes = []
    for number, line in enumerate(lines_of(path), 1):
        cells = line.split("\t")
        if not line.strip() or cells[0] == "\\":
            continue
        if len(cells) < 2:
            raise bad_line(path, number, f"'{line[:40]}'", "start, end and label of an Audacity label, between tabs")
        start, end = (seconds(path, number, name, cell) for name, cell in zip(("start", "end"), cells, strict=False))
        check_order(path, number, start, end)
        boxes.append(Box(start, end, (cells[2].strip() if len(cells) > 2 else "") or None))
    return boxes


def is_label_track(first: str) -> bool:
    """Whether a text file whose first line this is may be a label track: it begins with two numbers."""
    try:
        return len([float(cell) for cell in first.split("\t")[:2]]) == 2
    except ValueError:
        return False
