"""Intervals over clips and seeds of the mean over folds, and of paired differences, from bootstrap draws.

Letters: N clips, C classes, S seeds, K bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asit.evaluate.bootstrap import DRAWS, UNKNOWN, Units, Value, interval
from asit.evaluate.metrics import score_draws

Floats = NDArray[np.float64]


class Draws(NamedTuple):
    """Scores of one system with one seed: the mean over folds, its draws (K,), and the ids of the clips."""

    value: float
    drawn: Floats
    ids: tuple[str, ...]
    folds: int

    @classmethod
    def over_folds(cls, folds: Sequence[Draws]) -> Draws:
        """Return the mean over folds of one seed, draw by draw."""
        ids = tuple(name for fold in folds for name in fold.ids)
        drawn: Floats = np.mean([fold.drawn for fold in folds], 0)
        return cls(float(np.mean([fold.value for fold in folds])), drawn, ids, len(folds))


def fold_draws(
    scores: NDArray[Any],
    targets: NDArray[Any],
    metric: Literal["accuracy", "mAP"],
    ids: Sequence[str],
    *,
    groups: NDArray[Any] | Sequence[str] | None,
    seed: int,
) -> Draws:
    """Compute the draws of one test split or fold; systems scored on the same clips have the same draws.

    Args:
        scores: (N, C).
        targets, metric: as in `asit.evaluate.metrics.score_draws`.
        ids: N of them.
        groups: (N,) which are drawn whole; None: clips are drawn.
        seed: of the bootstrap.
    """
    value, drawn = score_draws(scores, targets, metric, Units.of(len(ids), groups), seed=seed)
    if metric == "mAP":
        drawn = drawn + (value - float(np.nanmean(drawn)))  # see `asit.evaluate.bootstrap.interval`
    return Draws(value, drawn, tuple(ids), 1)


def over_seeds(own: Mapping[int, Draws], *, difference: bool = False) -> Value:
    """Return the mean over seeds with the interval of draws of clips and of seeds.

    That of a difference is centred on it, as in `asit.evaluate.metrics.paired_difference`.
    """
    first, *_ = own.values()
    value = float(np.mean([one.value for one in own.values()]))
    table = np.stack([own[seed].drawn for seed in sorted(own)])
    picks = np.random.default_rng([0, len(own)]).integers(0, len(own), (len(own), DRAWS))
    drawn = np.take_along_axis(table, picks, 0).mean(0)
    bounds = (-1.0 if difference else 0.0, 1.0)
    low_high = interval(drawn, units=len(first.ids), centre=value if difference else None, bounds=bounds)
    return Value(value) if low_high is None else Value(value, *low_high)


def paired(own: Mapping[int, Draws], base: Mapping[int, Draws]) -> tuple[Value, str]:
    """Return the difference to a reference over the seeds that both have, and a note where it is partial or missing."""
    both = sorted(set(own) & set(base))
    if not both:
        return UNKNOWN, "no seed in common with the reference"
    if any(own[seed].ids != base[seed].ids for seed in both):
        return UNKNOWN, "scored on other clips than the reference"
    pairs = {
        seed: Draws(a.value - b.value, a.drawn - b.drawn, a.ids, a.folds)
        for seed, a, b in ((seed, own[seed], base[seed]) for seed in both)
    }
    note = "" if len(both) == len(own) == len(base) else f"difference over {len(both)} seeds"
    return over_seeds(pairs, difference=True), note
