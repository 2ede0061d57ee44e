"""Encoding of standard output, since names may hold any character; labels as a table, JSON lines or CSV."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asit.io.csv_lines import csv_line
from asit.logs import fit, printable, width


def for_data() -> None:
    """Set UTF-8 for JSON and CSV, whatever the locale; bytes of a file name that are no text are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def for_people() -> None:
    """Escape characters that the terminal's encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def choose(form: Literal["auto", "table", "json", "csv"]) -> Literal["table", "json", "csv"]:
    """Return the format of standard output, by default a table on a terminal and else JSON, and set its encoding."""
    chosen = form if form != "auto" else "table" if sys.stdout.isatty() else "json"
    for_people() if chosen == "table" else for_data()
    return chosen


def rendered(as_json: bool, value: Any, text: Callable[[int], str]) -> str:
    """Return a value as JSON, or its text for a width in columns, and set the encoding for it."""
    if as_json:
        for_data()
        return json.dumps(value, indent=1, ensure_ascii=False)
    for_people()
    return text(min(100, shutil.get_terminal_size().columns))


Format = Literal["table", "json", "csv"]

_PARTS = " ▏▎▍▌▋▊▉█"
_BAR = 24  # cells of the longest bar
_CSV = ("path", "start", "end", "label", "score")


@dataclass(frozen=True)
class Row:
    """Labels of one interval of a recording.

    Attributes:
        start, end: seconds from the recording's start.
        labels: names with scores, the highest first.
    """

    start: float
    end: float
    labels: Sequence[tuple[str, float]]


def json_lines(path: str, rows: Sequence[Row], flat: bool) -> Iterator[str]:
    """Yield a JSON object for each row; `flat`: each row has one label (segments), which is not in a list."""
    for row in rows:
        known: dict[str, Any] = {"path": path, "start": round(row.start, 4), "end": round(row.end, 4)}
        labels = [{"label": label, "score": round(score, 6)} for label, score in row.labels]
        yield json.dumps({**known, **labels[0]} if flat else {**known, "labels": labels}, ensure_ascii=False)


def csv_header() -> str:
    """Return the first line of the CSV."""
    return ",".join(_CSV)


def csv_lines(path: str, rows: Sequence[Row], spreadsheet: bool = False) -> Iterator[str]:
    """Yield a line for each label of each row; see `asit.io.csv_lines.csv_line`."""
    for row in rows:
        for label, score in row.labels:
            cells = [path, f"{row.start:.4f}", f"{row.end:.4f}", label, f"{score:.6f}"]
            yield csv_line(cells, spreadsheet=spreadsheet)


def table_lines(
    path: str, seconds: float, rows: Sequence[Row], columns: int, timed: bool, blocks: bool = True
) -> Iterator[str]:
    """Yield a heading with the recording's name and length, then its rows.

    Args:
        path: name of the recording.
        seconds: its length.
        rows: each row's labels are on one line if `timed`; otherwise the one row has a line for each label.
        columns: cells that a line may have.
        timed: whether start and end are shown.
        blocks: whether the output can show block characters; otherwise bars are made of #.
    """
    length = f"{seconds:.2f} s" if seconds < 60 else clock(seconds)
    yield f"{fit(path, columns - len(length) - 2, middle=True)}  {length}"
    if not any(row.labels for row in rows):
        yield "  no label above the threshold"
        return
    last = clock(max(row.end for row in rows)) if timed else ""
    if all(len(row.labels) <= 1 for row in rows) or not timed:
        room = max(8, columns - (2 * len(last) + 5 if timed else 0) - _BAR - 12)
        widest = min(max(width(printable(label)) for row in rows for label, _ in row.labels), room)
        for row in rows:
            when = f"  {clock(row.start):>{len(last)}} - {clock(row.end):>{len(last)}}" if timed else ""
            for label, score in row.labels:
                padded = fit(label, widest)
                padded += " " * (widest - width(padded))
                yield f"{when}  {padded}  {score:.3f}  {bar(score, blocks)}".rstrip()
        return
    for row in rows:
        yield _line(row, last, columns)


def clock(seconds: float) -> str:
    """Return a time as h:mm:ss.ss, or m:ss.ss below an hour."""
    hundredths = round(seconds * 100)
    minutes, rest = divmod(hundredths, 6000)
    text = f"{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"
    return f"{minutes // 60}:{text}" if minutes >= 60 else text.removeprefix("0")


def bar(score: float, blocks: bool = True) -> str:
    """Return a bar whose length shows a score from 0 to 1."""
    eighths = round(min(max(score, 0.0), 1.0) * _BAR * 8)
    if not blocks:
        return "#" * round(eighths / 8)
    return ("█" * (eighths // 8) + _PARTS[eighths % 8]).rstrip()


def _line(row: Row, last: str, columns: int) -> str:
    """Return a window and as many of its labels as fit, at least one."""
    line = f"  {clock(row.start):>{len(last)}} - {clock(row.end):>{len(last)}}"
    for i, (label, score) in enumerate(row.labels):
        room = columns - width(line) - 8
        if i and width(printable(label)) > room:
            break
        line += f"  {fit(label, max(8, room))} {score:.3f}"
    return line
