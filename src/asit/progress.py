"""Progress with the time left: redrawn on the console's terminal, else a log line every 30 s."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from asit import logs

log = logging.getLogger(__name__)

Counter = Callable[[int, int, int], None]
"""Takes what is done, what there is to do, and how much of the former failed."""


class Progress:
    """When and where to show how far some work is; see the module."""

    def __init__(self) -> None:
        self._last = -math.inf

    def due(self) -> bool:
        """Whether a new text would be shown."""
        drawn = logs.terminal() is not None
        if not drawn and not log.isEnabledFor(logging.INFO):
            return False
        return time.monotonic() - self._last >= (0.2 if drawn else 30.0)

    def show(self, text: str, *, last: bool = False) -> None:
        """Show a text now; `last`: the terminal keeps it."""
        self._last = time.monotonic()
        if (console := logs.terminal()) is not None:
            console.draw(text, last=last)
        else:
            log.info("%s", text)

    def end(self) -> None:
        """Keep the last text on the terminal."""
        if (console := logs.terminal()) is not None:
            console.end()


def counter(what: str, unit: str = "files", scale: float = 1.0) -> Callable[..., None]:
    """Return a function that shows counts, rate and time left when called with (done, total), or as a `Counter`.

    A total of None is unknown. What is done at a first call within a second is not in the rate: an earlier call of the
    program has done it.

    Args:
        what: is done.
        unit: of what is counted, after division by `scale`.
        scale: such as 1e6 for bytes in MB.
    """
    progress, began, first, shown = Progress(), time.monotonic(), -1, -1

    def show(done: int, total: int | None, failed: int | None = None) -> None:
        nonlocal first, shown
        last = total is not None and done >= total
        if first < 0:
            first = 0 if last or time.monotonic() - began > 1.0 else done
        if not (last and shown != done) and not (done and progress.due()):
            return
        shown, seconds = done, time.monotonic() - began
        rate = (done - first) / max(1e-9, seconds)
        counts = f"{done / scale:,.0f}" + (f"/{total / scale:,.0f}" if total else "") + f" {unit}" * (scale != 1)
        bad = "" if failed is None else f"  {failed} bad"
        left = (
            f"in {duration(seconds)}" if last else f"{duration((total - done) / rate)} left" if total and rate else ""
        )
        speed = f"{rate / scale:,.{0 if rate / scale >= 10 else 1}f} {unit}/s  " if rate / scale >= 0.05 else ""
        progress.show(f"{what}: {counts}{bad}  {speed}{left}".rstrip(), last=last)

    return show


def duration(seconds: float) -> str:
    """Return seconds in readable units: 45 s, 12 min, 3 h 05 min, 4 days 3 h."""
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
    return f"{hours // 24:,} days {hours % 24} h"
