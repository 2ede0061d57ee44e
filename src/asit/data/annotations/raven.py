"""Raven selection tables: columns separated by tabs, with "Begin Time (s)" and "End Time (s)".

Source: Raven Pro user's manual. Where several recordings were open as one sequence, begin and end count from the start
of the first; "File Offset (s)" is then the begin within its own recording. BirdNET-Analyzer writes such tables too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from asit.data.annotations.box import Box, check_order, lines_of, seconds
from asit.data.catalogue.tables import bad_line
from asit.errors import CatalogueError, suggestion

BEGIN, END, OFFSET = "Begin Time (s)", "End Time (s)", "File Offset (s)"
RECORDING = ("Begin Path", "Begin File")
LABELS = (
    *("label", "labels", "annotation", "annotations", "species", "common name", "scientific name", "species code"),
    *("class", "category", "sound type", "call type", "type", "tags", "name"),
)
"""Columns for labels, which each user of Raven names; the first that a table has is read."""

log = logging.getLogger(__name__)


def is_selection_table(first: str) -> bool:
    """Whether the first line of a file is that of a selection table."""
    return BEGIN.lower() in _names(first)


def read_selection_table(path: Path, label: str = "") -> list[Box]:
    """Read the selections of a table.

    The rows that Raven writes for the waveform and for the spectrogram of one selection have the same times.

    Args:
        path: the table.
        label: column with the labels, in upper or lower case; "": the first of `LABELS`, or none.

    Raises:
        CatalogueError: a missing column, or a damaged line; names file, line and field.
    """
    first, *rows = lines_of(path)
    names = _names(first)
    for name in (BEGIN, END):
        if names.count(name.lower()) != 1:
            found = f"{path}, line 1: {names.count(name.lower())} columns '{name}' among '{first[:200]}'"
            raise CatalogueError(found, "one, as Raven writes it", "save the selection table with this column")
    labels = _label_column(path, names, label)
    boxes = []
    for number, line in enumerate(rows, 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(names):
            raise bad_line(path, number, f"{len(cells)} cells under {len(names)} columns", "one for each, between tabs")
        row = dict(zip(names, map(str.strip, cells), strict=True))
        start, end = (seconds(path, number, name, row[name.lower()]) for name in (BEGIN, END))
        check_order(path, number, start, end)
        if offset := row.get(OFFSET.lower()):
            length, start = end - start, seconds(path, number, OFFSET, offset)
            end = start + length
        recording = next((row[name.lower()] for name in RECORDING if row.get(name.lower())), None)
        boxes.append(Box(start, end, row.get(labels) or None, recording))
    return boxes


def _names(line: str) -> list[str]:
    return [" ".join(name.split()).lower() for name in line.rstrip("\r\n").split("\t")]


def _label_column(path: Path, names: Sequence[str], label: str) -> str:
    if label and label.lower() not in names:
        found = f"{path} has no column '{label}'" + suggestion(label.lower(), names)
        raise CatalogueError(found, f"one of {', '.join(names)}", "give its name as --columns label=NAME")
    chosen = label.lower() or next((name for name in LABELS if name in names), "")
    if not chosen:
        log.warning("%s: no labels, as no column is one of %s; --columns label=NAME names it", path, ", ".join(LABELS))
    return chosen
