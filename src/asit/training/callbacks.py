"""Calls into one's own code while a run trains (docs/research.md), and the guard of trackers, which stop no run."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Callback:
    """Base class of callbacks: override what is needed. All are called in the main process alone.

    An error that a callback raises ends the run.
    """

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Called before the first step with the run's folder, its resolved settings and the steps done so far."""

    def on_step(self, step: int) -> None:
        """Called after each step with the steps done; on a GPU this waits for the step."""

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Called with each line of metrics.jsonl that has numbers: "train", "probe", "validation" or "test"."""

    def on_checkpoint(self, step: int, model: Path) -> None:
        """Called when a checkpoint is on the disk, with the model's folder; in a thread that writes checkpoints."""

    def on_end(self, finished: bool) -> None:
        """Called when the run ends, also by an error; `finished`: all steps of the schedule are done."""


class Guarded(Callback):
    """A tracker in a thread of its own: the run never waits for it while it trains, and never ends by its error.

    Args:
        name: for messages.
        make: makes the tracker, in the thread.
        wait: seconds to wait for it when the run ends.
        waiting: calls that may wait for it; with more it is given up.
    """

    def __init__(self, name: str, make: Callable[[], Callback], *, wait: float = 60.0, waiting: int = 10_000) -> None:
        self.name, self.wait = name, wait
        self._calls: queue.Queue[Callable[[Callback], None] | None] = queue.Queue(waiting)
        self._failed = False
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Hand the call to the thread, as do the others."""
        self._put(lambda tracker: tracker.on_start(folder, settings, step))

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """See `Callback.on_metrics`."""
        self._put(lambda tracker: tracker.on_metrics(kind, step, values))

    def on_end(self, finished: bool) -> None:
        """End the tracker, and wait for what it still has to send."""
        self._put(lambda tracker: tracker.on_end(finished))
        self._put(None)
        self._thread.join(self.wait)
        if self._thread.is_alive():
            self._fail(f"did not end within {self.wait:g} s")

    def _put(self, call: Callable[[Callback], None] | None) -> None:
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"did not answer for {self._calls.maxsize} calls")

    def _fail(self, text: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning(f"tracker {self.name} {text}; the run goes on without it, and metrics.jsonl has every number")

    def _work(self, make: Callable[[], Callback]) -> None:
        try:
            tracker = make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except (Exception, SystemExit) as error:  # SystemExit: some packages leave by it where nobody is logged in
            lines = str(error).strip().splitlines() or [""]
            self._fail(f"failed: {type(error).__name__}: {lines[0]}")


def wants_steps(callback: Callback) -> bool:
    """Return whether a callback is to be called after each step."""
    return type(callback).on_step is not Callback.on_step


@contextlib.contextmanager
def started(
    callbacks: Sequence[Callback], folder: Path, settings: Mapping[str, Any], step: int
) -> Iterator[Callable[[bool], None]]:
    """Start callbacks, and end them when the block ends; it is given a function to say whether the run is finished."""
    finished: list[bool] = []

    def end(callback: Callback) -> None:
        callback.on_end(any(finished))

    with contextlib.ExitStack() as stack:
        for callback in callbacks:
            callback.on_start(folder, settings, step)
            stack.callback(end, callback)
        yield finished.append
