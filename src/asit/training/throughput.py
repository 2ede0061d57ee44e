"""Clips per second of a run, and its line of training metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from asit.runtime import World
from asit.training.metrics_log import Records


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


def log_step(
    step: int,
    steps_per_epoch: int,
    parts: Mapping[str, Tensor],
    rates: Mapping[str, float],
    clock: Clock,
    end: int,
    records: Records,
    world: World,
) -> None:
    """Write a step to metrics.jsonl and show progress, with the means over all processes.

    Args:
        step: steps done.
        steps_per_epoch: for the fraction of the epoch.
        parts: () tensors, the loss among them; reading them waits for the device.
        rates: learning rate and others of the step.
        clock: of this process.
        end: step at which this call of the run ends.
        records: of this process.
        world: the processes.
    """
    stacked = torch.stack([value.reshape(()) for value in parts.values()])
    world.sum_(stacked)
    values = dict(zip(parts, (stacked / world.size).tolist(), strict=True))
    clips, wait = clock.read()
    loss = values.pop("loss")
    speed = {"clips_per_second": clips, "data_wait": wait, "seconds": clock.seconds}
    records.write("train", step, {"epoch": step / steps_per_epoch, "loss": loss, "parts": values, **rates, **speed})
    main = "  ".join(f"{name} {values[name]:.3f}" for name in ("global", "local", "reconstruction") if name in values)
    left = (end - step) * clock.batch / clips if clips > 0 else math.inf
    records.progress(step, f"loss {loss:.3f}", left, f"{clips:.1f} clips/s  waits for data {wait:.0%}  {main}")
