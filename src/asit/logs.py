"""Logging: one handler class for the console and for a run's log.txt.

Modules log with `logging.getLogger(__name__)`. Nothing is shown until `console` is entered, as the command line does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from asit.errors import ConfigError

if TYPE_CHECKING:
    from logging.handlers import MemoryHandler

_ROOT = logging.getLogger("asit")
_CLEAR = "\r\x1b[K"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes each record as one line; on a terminal a progress line may be drawn below.

    Errors of the stream are raised where the record is logged: a run whose log.txt meets a full disk ends.

    Args:
        stream: file or console.
        level: least level that is written.
        dated: begin each line with its time, as in log.txt.
        prefix: what each line begins with, after the time.
    """

    def __init__(self, stream: TextIO, level: int, *, dated: bool = False, prefix: str = "") -> None:
        super().__init__(stream)
        self.setLevel(level)
        self.dated, self.prefix = dated, prefix
        self.terminal = not dated and stream.isatty()
        self._drawn = ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"warning: {text}"
        date = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(record.created)) if self.dated else ""
        return date + self.prefix + "\n".join(map(printable, text.split("\n")))

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"{_CLEAR if self._drawn else ''}{self.format(record)}\n{self._drawn}")

    def draw(self, text: str, *, last: bool = False) -> None:
        """Draw or redraw the progress line, cut to the terminal's width; `last`: leave it and begin a new line."""
        with contextlib.suppress(OSError):  # as wide as it is; a stream that is no file is cut to 80 columns
            columns = 80
            columns = os.get_terminal_size(self.stream.fileno()).columns or columns
        text = fit(text, columns - 1)
        with self.lock or contextlib.nullcontext():
            self._drawn = "" if last else text
            self._write(_CLEAR + text + "\n" * last)

    def end(self) -> None:
        """Leave the progress line as it is and begin a new line."""
        if self._drawn:
            self._drawn = ""
            self._write("\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.flush()


class _Forward(logging.Handler):
    """Passes on to the root logger what it would have received anyway."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:  # without any, logging would print warnings by itself
            logging.getLogger().handle(record)


_console: LineHandler | None = None


def terminal() -> LineHandler | None:
    """The console's handler where progress lines can be drawn: it is on, a terminal, and the main process's."""
    return _console if _console is not None and _console.terminal and _console.level <= logging.INFO else None


@contextlib.contextmanager
def console(level: str | None = None) -> Iterator[None]:
    """Show log and progress on standard error, from a level on: debug, info or warning.

    By default it is what the environment's variable ASIT_LOG names, or else info.

    Processes that torchrun starts beside the main one show warnings alone, with their rank. Within another such context
    this does nothing.

    Raises:
        ConfigError: ASIT_LOG names no level.
    """
    global _console
    if _console is not None:
        yield
        return
    named = level or os.environ.get("ASIT_LOG", "info").lower()
    if named not in _LEVELS:
        raise ConfigError(f"ASIT_LOG is {named}", f"one of {', '.join(_LEVELS)}", "change or unset it")
    rank = os.environ.get("RANK", "0")
    least = _LEVELS[named] if rank == "0" else logging.WARNING
    handler = LineHandler(sys.stderr, least, prefix="" if rank == "0" else f"[rank {rank}] ")
    _console = handler
    try:
        with attached(handler):
            yield
    finally:
        _console = None
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            handler.end()


@contextlib.contextmanager
def run_log() -> Iterator[MemoryHandler]:
    """Collect everything that is logged for a run's log.txt; `MemoryHandler.setTarget` names the file's handler."""
    from logging.handlers import MemoryHandler  # imports sockets, which `asit --help` does not need

    kept = MemoryHandler(1, flushOnClose=False)  # without a target it keeps all records
    kept.setLevel(logging.DEBUG)
    with attached(kept):
        yield kept


@contextlib.contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """Give a handler all records of asit from its level on; handlers of the root logger see no more than before."""
    level, propagate, forward = _ROOT.level, _ROOT.propagate, _Forward(_ROOT.getEffectiveLevel())
    _ROOT.setLevel(min(handler.level, _ROOT.getEffectiveLevel()))
    _ROOT.addHandler(handler)
    if propagate:
        _ROOT.propagate = False
        _ROOT.addHandler(forward)
    try:
        yield
    finally:
        _ROOT.removeHandler(forward)
        _ROOT.removeHandler(handler)
        _ROOT.propagate = propagate
        _ROOT.setLevel(level)


def printable(text: str) -> str:
    """Escape what would move a terminal's cursor or change its colours: names of files may hold it."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def width(text: str) -> int:
    """Return the terminal cells of a text: two for wide characters, none for combining marks."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, cells: int, middle: bool = False) -> str:
    """Return the plain text in at most so many cells, cut at its end or in its middle."""
    text = printable(text)
    if width(text) <= cells:
        return text
    tail = ""
    if middle:
        while width(tail) < (cells - 1) // 2:
            tail = text[len(text) - len(tail) - 1 :]
    head = ""
    for c in text:
        if width(head + c) > cells - 1 - width(tail):
            break
        head += c
    return head + "…" + tail
