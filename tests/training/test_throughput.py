"""How fast a run goes: pauses are not the steps'."""

from __future__ import annotations

import math

import pytest

from asit.training import throughput


def test_the_clock_leaves_out_pauses() -> None:
    clock = throughput.Clock(batch=8)
    clock.began -= 10
    clock.last_read -= 10
    for _ in range(5):
        clock.step()
    clock.waited = 2.5
    clock.paused(5.0)
    rate, waited = clock.read()
    assert rate == pytest.approx(5 * 8 / 5, rel=0.05)
    assert waited == pytest.approx(0.5, rel=0.05)
    assert clock.rate() == pytest.approx(8.0, rel=0.05)
    assert math.isfinite(clock.read()[0])
