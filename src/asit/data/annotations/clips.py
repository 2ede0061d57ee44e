"""Tables and annotations to clips: each annotated part, or windows of one length with the labels of the parts."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from asit.audio import files
from asit.config import TableSettings
from asit.data.annotations import annotation_files
from asit.data.catalogue import frames, table_columns
from asit.data.catalogue.catalogue import relative
from asit.data.catalogue.labels import BACKGROUND
from asit.data.catalogue.tables import TableRow, iterate_table
from asit.errors import AudioError, CatalogueError, ConfigError

_ROUNDING = 1e-9  # s

log = logging.getLogger(__name__)


def rows_of(source: str | os.PathLike[str], settings: TableSettings | None = None) -> Iterable[TableRow]:
    """Return the clips of a table, an annotation file, or a folder of annotation files.

    Args:
        source: the file or folder.
        settings: names of columns, and windows; None: the defaults.

    Raises:
        CatalogueError: what `iterate_table` and `read_annotations` raise; a point without a window.
        ConfigError: settings that do not go together.
    """
    settings = settings or TableSettings()
    if not settings.window and (settings.hop or settings.background):
        which = "hop" if settings.hop else "background"
        raise ConfigError(f"{which} without window", "the length of the windows", "set window, such as --window 3")
    if not os.path.isdir(source) and annotation_files.kind_of(source) is None:
        if not settings.window:
            return iterate_table(source, settings.columns)
        rows = list(iterate_table(source, settings.columns, repeated=True))
        return windows(rows, settings, root=frames.root_of(source, [row.path for row in rows]))
    given = table_columns.chosen(settings.columns)
    if others := set(given) - {"label"}:
        expected = "label alone: the column of a Raven table, or the tier of a TextGrid"
        raise ConfigError(f"columns names {', '.join(sorted(others))} for annotations", expected, "remove the others")
    rows, recordings = annotation_files.read_annotations(source, given.get("label", ""))
    root = os.path.abspath(source if os.path.isdir(source) else os.path.dirname(source))
    if settings.window:
        return windows(rows, settings, recordings, root=root)
    if not rows:
        raise CatalogueError(f"{source} annotates nothing", "at least one part", "check the annotation files")
    return _merged(rows, root)


def _merged(rows: Iterable[TableRow], root: str) -> Iterator[TableRow]:
    """Yield each part once, with the labels of all rows about it; recordings are groups."""
    found: dict[tuple[str, float | None, float | None], dict[str, None]] = {}
    for row in rows:
        if row.start == row.end:
            problem = f"{row.path} has the label '{row.label}' at the point {row.start:g} s"
            raise CatalogueError(problem, "parts with a length", "cut windows around it, such as --window 3")
        found.setdefault((row.path, row.start, row.end), {}).update(dict.fromkeys(_names(row)))
    for (path, start, end), labels in found.items():
        yield TableRow(path, label=";".join(labels) or None, group=relative(path, root), start=start, end=end)


def windows(
    rows: Iterable[TableRow], settings: TableSettings, recordings: Iterable[str] = (), *, root: str = ""
) -> Iterator[TableRow]:
    """Cut recordings into windows, and label each.

    Window k is from k * hop to k * hop + window. It has the labels of each part that it overlaps by `box_share` of the
    shorter of the two, and of each point in it. Of the others, windows that no part touches are labelled background on
    request, where they end within the recording; the rest is left out. So are windows of parts without a label. The
    windows of a recording are of one group, unless the rows have groups.

    Args:
        rows: labelled parts; one without an end lasts to the end of the recording, and one without both is all of it.
        settings: window, hop, box_share and background.
        recordings: that may have no parts.
        root: folder that the names of the groups are relative to.
    """
    by_path: dict[str, list[TableRow]] = {path: [] for path in recordings}
    for row in rows:
        by_path.setdefault(row.path, []).append(row)
    counts = [0, 0, 0]
    for path, parts in by_path.items():
        base = parts[0] if parts else TableRow(path)
        base = replace(base, group=base.group or relative(path, root))
        yield from _of_recording(parts, settings, base, counts)
    log.info(
        "%d windows of %g s with labels, %d of background, %d left out because parts touch them too little",
        *(counts[0], settings.window, counts[1], counts[2]),
    )


def _of_recording(
    parts: list[TableRow], settings: TableSettings, base: TableRow, counts: list[int]
) -> Iterator[TableRow]:
    length, hop = settings.window, settings.hop or settings.window
    total = None
    if settings.background or any(part.end is None for part in parts):
        try:
            total = files.probe(base.path).seconds
        except (AudioError, OSError):  # the scan reports it
            yield replace(base, start=None, end=None)
            return
    labels: dict[int, dict[str, None]] = {}
    touched: set[int] = set()
    for part in parts:
        start = part.start or 0.0
        end = part.end if part.end is not None else total if total is not None else start
        for k in range(max(0, math.floor((start - length) / hop)), math.ceil((end + _ROUNDING) / hop) + 1):
            overlap = min(end, k * hop + length) - max(start, k * hop)
            if start == end and overlap == 0 and start < k * hop + length:
                touched.add(k)
                labels.setdefault(k, {}).update(dict.fromkeys(_names(part)))
            elif overlap > _ROUNDING:
                touched.add(k)
                if overlap >= settings.box_share * min(end - start, length) - _ROUNDING:
                    labels.setdefault(k, {}).update(dict.fromkeys(_names(part)))
    labelled = {k for k, names in labels.items() if names}
    free: set[int] = set()
    if settings.background and total is not None:
        free = set(range(math.floor((total - length) / hop + _ROUNDING) + 1)) - touched
    counts[0], counts[1] = counts[0] + len(labelled), counts[1] + len(free)
    counts[2] += len(touched - labelled)
    for k in sorted(labelled | free):
        label = ";".join(labels[k]) if k in labelled else BACKGROUND
        start = round(k * hop, 6)
        yield replace(base, label=label, group=base.group, start=start, end=round(start + length, 6))


def _names(row: TableRow) -> list[str]:
    return row.label.split(";") if row.label else []
