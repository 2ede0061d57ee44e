"""Bootstrap intervals: the clips of a test side, or whole groups of them, drawn anew.

Letters: N clips, U units (clips or groups), K draws.
A draw is a vector of how often each clip was taken; a metric that takes such weights needs no copy of the scores, and
two models that get the same draws are compared in pairs. B. Efron and R. Tibshirani, An Introduction to the Bootstrap
(1993), chapters 13 (percentile interval) and 10 (bias).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError

DRAWS = 1000
"""Bootstrap draws for a 95 % interval."""


@dataclass(frozen=True)
class Units:
    """What is drawn: each clip for itself, or groups of clips that are not independent (speakers, recordings).

    Attributes:
        count: U.
        member: (N,) the unit of each clip; None where every clip is its own.
    """

    count: int
    member: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, clips: int, groups: ArrayLike | None = None) -> Units:
        """Units of `clips` clips; `groups` (N,) names the group of each.

        Raises:
            AsitError: no clip, groups of another length, or clips without a group (None).
        """
        if clips < 1:
            raise AsitError("no clip to score", "at least one", "check the split that was chosen")
        if groups is None:
            return cls(clips)
        names = np.asarray(groups)
        if names.shape != (clips,):
            raise AsitError(f"groups of shape {names.shape}", f"({clips},), one a clip", "pass one group a clip")
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
        """`count` vectors (N,): how often each clip is drawn. The same seed gives the same draws."""
        rng = np.random.default_rng([seed, self.count])
        for _ in range(count):
            times = np.bincount(rng.integers(0, self.count, self.count), minlength=self.count)
            yield times if self.member is None else times[self.member]

    def describe(self, draws: int, seed: int) -> dict[str, Any]:
        """What a result says of its intervals: {"unit", "units", "draws", "seed"}."""
        return {"unit": "clip" if self.member is None else "group", "units": self.count, "draws": draws, "seed": seed}


def interval(
    draws: ArrayLike, *, units: int, centre: float | None = None, bounds: tuple[float, float] = (0.0, 1.0)
) -> list[float] | None:
    """The 95 % percentile interval of a metric's draws: [low, high].

    Args:
        draws: (K,) the metric in each draw; NaN where a draw has none.
        units: number of units drawn from; a single one gives no interval.
        centre: the metric itself. The draws are then moved so that their mean lies on it. A metric that counts ties
            (average precision) is higher when positives appear twice, so its draws sit above it, often by more than
            their spread, while the spread is right: in a simulation (30 classes, 2,000 clips) centred intervals held
            the expected mAP 94 times in 100, uncentred ones 81 times.
        bounds: what the metric cannot leave.

    Returns:
        None where there is nothing to draw from: one unit, or no draw that is a number.
    """
    values = np.asarray(draws, np.float64)
    values = values[~np.isnan(values)]
    if units < 2 or not len(values):
        return None
    if centre is not None:
        values = values + (centre - values.mean())
    low, high = np.clip(np.quantile(values, [0.025, 0.975]), *bounds)
    return [float(low), float(high)]
