"""Encoding of standard output, since names of files and labels may hold any character."""

from __future__ import annotations

import io
import sys


def for_data() -> None:
    """Set UTF-8 for JSON and CSV, whatever the locale; bytes of a file name that are no text are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def for_people() -> None:
    """Escape characters that the terminal's encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
