"""How fast a run goes, and the line that tells of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from asit.runtime import World
from asit.training.metrics_log import Records


class Clock:
    """Clips a second and the share of time spent waiting for data, since the last reading and over all.

    By the clock that only goes forward: a clock of the day that is set anew changes time stamps alone.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.waited = 0.0
        self.began = self.mark = time.perf_counter()
        self.steps = self.all_steps = 0
        self.pauses = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> None:
        self.steps += 1
        self.all_steps += 1

    def paused(self, seconds: float) -> None:
        """Time spent on checkpoints, figures and probes, which is not the steps'."""
        self.mark += seconds
        self.pauses += seconds

    def rate(self) -> float:
        return self.all_steps * self.batch / max(1e-9, self.seconds - self.pauses)

    def read(self) -> tuple[float, float]:
        elapsed = max(1e-9, time.perf_counter() - self.mark)
        out = self.steps * self.batch / elapsed, min(1.0, self.waited / elapsed)
        self.mark, self.steps, self.waited = time.perf_counter(), 0, 0.0
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
    """Write the line of a step to the records: means over the processes, in one exchange.

    Args:
        step: steps done.
        parts: () tensors, the loss among them; reading them waits for the device.
        rates: what the step followed.
        end: the step that this call goes to.
    """
    stacked = torch.stack([value.reshape(()) for value in parts.values()])
    world.sum_(stacked)
    values = dict(zip(parts, (stacked / world.size).tolist(), strict=True))
    clips, wait = clock.read()
    loss = values.pop("loss")
    records.write(
        "train",
        step,
        {
            "epoch": step / steps_per_epoch,
            "loss": loss,
            "parts": values,
            **rates,
            "clips_per_second": clips,
            "data_wait": wait,
            "seconds": clock.seconds,
        },
    )
    main = "  ".join(f"{name} {values[name]:.3f}" for name in ("global", "local", "reconstruction") if name in values)
    left = (end - step) * clock.batch / clips if clips > 0 else math.inf
    records.progress(step, f"loss {loss:.3f}  {main}  {clips:.1f} clips/s  waits for data {wait:.0%}", left)
