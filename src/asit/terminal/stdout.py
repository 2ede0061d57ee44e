"""Encoding of standard output, since names of files and labels may hold any character."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from typing import Any, Literal


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
