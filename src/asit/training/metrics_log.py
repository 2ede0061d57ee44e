"""What a run writes while it goes: metrics.jsonl, log.txt, TensorBoard events, and the progress line."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from asit.errors import ConfigError
from asit.io import atomic, parsing


class Records:
    """The records of one run, written by the main process alone.

    Args:
        folder: the run's folder; None: nothing is written (the other processes).
        total: steps of the whole schedule.
        start: step that the run goes on from; later lines of an earlier try are taken out.
        tensorboard: whether to write event files.
        stream: where progress goes; None: nowhere.
    """

    def __init__(
        self, folder: Path | None, total: int, start: int, *, tensorboard: bool, stream: TextIO | None = sys.stderr
    ) -> None:
        self.folder, self.total = folder, total
        self._metrics: TextIO | None = None
        self._log: TextIO | None = None
        self._board: Any = None
        self._bar: Any = None
        self._stream = stream if folder is not None else None
        self._last_line = -math.inf
        if folder is None:
            return
        _cut(folder / "metrics.jsonl", start)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        if tensorboard:
            self._board = _summary_writer(folder / "tensorboard", start)
        if self._stream is not None and self._stream.isatty():
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar:12}| {n}/{total} [{elapsed}<{remaining}] {postfix}"
            self._bar = tqdm(
                total=total, initial=start, file=self._stream, bar_format=layout, dynamic_ncols=True, mininterval=0.5
            )

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for handle in (self._bar, self._metrics, self._log, self._board):
            if handle is not None:
                # What the run ends by is told, not that a full disk takes no more lines either.
                with contextlib.suppress(*([OSError] if error is not None else [])):
                    handle.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard."""
        if self._metrics is None:
            return
        record = {"kind": kind, "step": step, **values}
        self._metrics.write(json.dumps(record, allow_nan=True) + "\n")
        self._metrics.flush()
        if self._board is not None and kind != "event":
            for name, value in _numbers(values):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line for the user and the log."""
        self.keep(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            self._stream.write(text + "\n")
            self._stream.flush()

    def keep(self, text: str) -> None:
        """A line for the log alone."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def event(self, step: int, text: str) -> None:
        """A line for the user and the log that is also kept with the metrics."""
        self.write("event", step, {"text": text})
        self.say(text)

    def progress(self, step: int, text: str, seconds_left: float) -> None:
        """Move the progress line; without a terminal, a plain line at most every 30 s."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(0)
            self._bar.refresh()
        elif self._log is not None and time.monotonic() - self._last_line >= 30:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self.total}  {text}  {duration(seconds_left)} left")


def counter(stream: TextIO | None, what: str, unit: str = "files") -> Callable[[int, int, int], None] | None:
    """A progress line for work over files: called with (done, total, bad); without a terminal, a line each 30 s."""
    if stream is None:
        return None
    out, terminal, began = stream, stream.isatty(), time.monotonic()
    last_time, last_done = 0.0, -1

    def show(done: int, total: int, bad: int) -> None:
        nonlocal last_time, last_done
        now = time.monotonic()
        finished = done >= total
        if now - last_time < (0.2 if terminal else 30.0) and not (finished and last_done != done):
            return
        last_time, last_done = now, done
        rate = done / max(1e-9, now - began)
        time_left = (total - done) / rate if done else math.inf
        left = f"in {duration(now - began)}" if finished else f"{duration(time_left)} left"
        out.write(("\r\x1b[K" if terminal else "") + f"{what}: {done}/{total}  {bad} bad  {rate:.0f} {unit}/s  {left}")
        out.write("" if terminal and not finished else "\n")
        out.flush()

    return show


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3 h 05 min, 4 days 3 h."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


def _cut(path: Path, step: int) -> None:
    """Take out the lines after `step`, and those that are no records, of a run that is resumed from there.

    The checkpoint says where the run is: a line that a crash of the machine tore costs that line alone.
    """
    if not path.exists():
        return
    kept = [line for line, record in lines(path) if record["step"] <= step]
    with atomic.write_file(path) as draft:
        draft.write_bytes(b"".join(line + b"\n" for line in kept))


def lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl that are records, each with its record; others are left out."""
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


def _summary_writer(folder: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "records.tensorboard is on and the package tensorboard is not installed",
            "tensorboard",
            "pip install tensorboard, or pass --no-records.tensorboard",
        ) from error
    return SummaryWriter(str(folder), purge_step=start + 1)  # type: ignore[no-untyped-call]
