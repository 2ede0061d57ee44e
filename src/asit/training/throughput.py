"""Clips per second of a run."""

from __future__ import annotations

import time


class Clock:
    """Measures clips per second and the share of time spent waiting for data, since the last reading and in all.

    The clock is monotonic, so that setting the system's time changes nothing.

    Args:
        batch: clips of a step.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.waited = 0.0
        self.began = self.last_read = time.perf_counter()
        self.steps = self.all_steps = 0
        self.pauses = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> None:
        self.steps += 1
        self.all_steps += 1

    def paused(self, seconds: float) -> None:
        """Leave out time spent on checkpoints, figures and probes."""
        self.last_read += seconds
        self.pauses += seconds

    def rate(self) -> float:
        """Return clips per second over all steps."""
        return self.all_steps * self.batch / max(1e-9, self.seconds - self.pauses)

    def read(self) -> tuple[float, float]:
        """Return clips per second and the share of waiting since the last call."""
        elapsed = max(1e-9, time.perf_counter() - self.last_read)
        out = self.steps * self.batch / elapsed, min(1.0, self.waited / elapsed)
        self.last_read, self.steps, self.waited = time.perf_counter(), 0, 0.0
        return out
