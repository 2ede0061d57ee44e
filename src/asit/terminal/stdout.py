"""Standard output, made ready for what is written to it: names of files and labels may hold any character."""

from __future__ import annotations

import io
import sys


def for_data() -> None:
    """JSON and CSV are UTF-8 whatever the locale says; what is no text in a file's name is escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def for_people() -> None:
    """Characters that the terminal's encoding lacks are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
