"""The records that a run writes as it goes: metrics.jsonl and log.txt; callbacks get its numbers."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from asit import logs
from asit.io import atomic, parsing
from asit.progress import Progress, duration
from asit.training.callbacks import Callback

log = logging.getLogger(__name__)


class Records:
    """The records of one run, written by the main process alone.

    Args:
        folder: the run's folder; None: nothing is written (the other processes).
        total: steps of the complete schedule.
        start: step that the run resumes from; later lines of an earlier try are removed.
        callbacks: get the numbers of each line.
        log: of `asit.logs.run_log`, which log.txt begins with; None: one is made.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        start: int,
        *,
        callbacks: Sequence[Callback] = (),
        log: MemoryHandler | None = None,
    ) -> None:
        self.folder, self.total = folder, total
        self._metrics: TextIO | None = None
        self._callbacks = callbacks
        self._progress = Progress()
        self._open = contextlib.ExitStack()
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            # Without lines of later steps, and lines that a crash of the machine left damaged.
            kept = [line for line, record in lines(path) if record["step"] <= start]
            with atomic.write_file(path) as draft:
                draft.write_bytes(b"".join(line + b"\n" for line in kept))
        self._metrics = self._open.enter_context(path.open("a", encoding="utf-8"))
        if log is None:
            log = self._open.enter_context(logs.run_log())
        file = (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace")
        self._open.enter_context(file)
        log.setTarget(logs.LineHandler(file, logging.DEBUG, dated=True))
        self._open.callback(log.setTarget, None)
        log.flush()

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.folder is not None:
            self._progress.end()
        # A full disk, which takes no more lines either, must not hide the error that the run ends by.
        with contextlib.suppress(*([OSError] if error is not None else [])):
            self._open.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl, and give its numbers to the callbacks."""
        if self._metrics is None:
            return
        record = {"kind": kind, "step": step, **values}
        self._metrics.write(json.dumps(record, allow_nan=True) + "\n")
        self._metrics.flush()
        if kind != "event" and self._callbacks:
            numbers = dict(_numbers(values))
            for callback in self._callbacks:
                callback.on_metrics(kind, step, numbers)

    def event(self, step: int, text: str) -> None:
        """Log a line that is also kept with the metrics."""
        self.write("event", step, {"text": text})
        log.info(text)

    def progress(self, step: int, text: str, seconds_left: float, details: str = "") -> None:
        """Show how far the run is, with `details` last, where a narrow terminal cuts them; see `asit.progress`."""
        if self.folder is not None and self._progress.due():
            line = f"step {step}/{self.total}  {text}  {duration(seconds_left)} left  {details}"
            self._progress.show(line.rstrip())


def lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of metrics.jsonl that are records, each with its record."""
    for line in path.read_bytes().split(b"\n"):
        try:
            record = parsing.from_json(line)
        except parsing.Malformed:
            continue
        if isinstance(record, dict) and isinstance(record.get("kind"), str) and type(record.get("step")) is int:
            yield line, record


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            out += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out.append((prefix + name, float(value)))
    return out
