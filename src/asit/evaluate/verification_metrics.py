"""Equal error rate (EER) and minimum detection cost (minDCF) of speaker verification, with bootstrap intervals.

A trial is a pair of clips with a score; a threshold t accepts it if score >= t. Misses are same-speaker trials that are
not accepted, false alarms different-speaker trials that are. n is the number of trials.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError
from asit.evaluate.bootstrap import DRAWS, Units, interval

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


class Roc(NamedTuple):
    """An ROC curve: thresholds (falling, inf first), false alarm rates (0 to 1) and miss rates (1 to 0)."""

    thresholds: Floats
    false_alarms: Floats
    misses: Floats


def roc(ordered: Floats, same: NDArray[np.bool_], times: NDArray[np.int64] | None = None) -> Roc:
    """Compute the ROC curve of `sorted_trials`, one point for each distinct score, with weights `times` (n,)."""
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # equal scores are accepted together
    weight = np.ones(len(ordered)) if times is None else times.astype(np.float64)
    accepted = np.cumsum(weight * same)
    alarms = np.cumsum(weight * ~same)
    return Roc(
        np.concatenate([[np.inf], ordered[last]]),
        np.concatenate([[0.0], alarms[last] / alarms[-1]]),
        1.0 - np.concatenate([[0.0], accepted[last] / accepted[-1]]),
    )


def eer(curve: Roc) -> tuple[float, float]:
    """Compute the equal error rate and its threshold.

    The points of the ROC are joined by straight lines; at the EER false alarm rate and miss rate are equal. (The convex
    hull, as in BOSARIS, can be lower.) The threshold is interpolated on the same line; on the line from (0, 1) it is
    the highest score.
    """
    thresholds, alarms, misses = curve
    gap = misses - alarms  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    value = alarms[before] + share * (alarms[after] - alarms[before])
    if before == 0:
        return float(value), float(thresholds[after])
    return float(value), float(thresholds[before] + share * (thresholds[after] - thresholds[before]))


def min_dcf(curve: Roc, p_target: float = 0.01) -> tuple[float, float]:
    """Compute the normalised minimum detection cost and its threshold (inf where accepting nothing is cheapest).

    A threshold costs p_target * miss rate + (1 - p_target) * false alarm rate. The minimum is divided by the cost of
    the better constant decision, min(p_target, 1 - p_target), so it is at most 1. NIST 2016 Speaker Recognition
    Evaluation Plan, section 3, with costs of 1.
    """
    cost = p_target * curve.misses + (1 - p_target) * curve.false_alarms
    best = int(np.argmin(cost))
    return float(cost[best] / min(p_target, 1 - p_target)), float(curve.thresholds[best])


def verification_metrics(
    scores: ArrayLike,
    same: NDArray[np.bool_],
    *,
    speakers: tuple[ArrayLike, ArrayLike] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Compute EER and minDCF (prior 0.01, costs 1) with 95 % bootstrap intervals, as entries of a result record.

    Trials that share a speaker are not independent, so whole speakers are drawn: with speaker s drawn m_s times, a
    same-speaker trial has weight m_s, one of speakers s and t has weight m_s * m_t. Draws without trials of both kinds
    are left out. Intervals are centred on the value, since the minimum cost over thresholds is lower in draws.

    Args:
        scores: (n,) finite, higher for the same speaker.
        same: (n,).
        speakers: (n,) speaker of each trial's first clip, and of its second. Without them single trials are drawn,
            which makes the interval too narrow.
        seed, draws: of the bootstrap; 0 draws give no intervals.

    Returns:
        {"trials", "same_trials", "metrics": {"EER", "minDCF": {"value", "interval", "threshold"}}, "bootstrap"}, as for
        JSON: a threshold that is not finite is None.

    Raises:
        AsitError: trials of one kind only; speakers that disagree with `same`.
    """
    ordered, kind, order = sorted_trials(scores, same)
    curve = roc(ordered, kind)
    found = {"EER": eer(curve), "minDCF": min_dcf(curve)}
    drawn: dict[str, list[float]] = {name: [] for name in found}
    if speakers is None:
        units = Units.of(len(ordered))
        weights: Iterable[NDArray[np.int64]] = (times[order] for times in units.draws(draws, seed))
    else:
        count, a, b = _speakers(speakers, same)
        a, b = a[order], b[order]
        units = Units.of(count)
        weights = (np.where(kind, times[a], times[a] * times[b]) for times in units.draws(draws, seed))
    for times in weights:
        targets = times[kind].sum()
        if targets and targets < times.sum():
            curve = roc(ordered, kind, times)
            drawn["EER"].append(eer(curve)[0])
            drawn["minDCF"].append(min_dcf(curve)[0])
    metrics = {
        name: {
            "value": value,
            "interval": interval(drawn[name], units=units.count, centre=value),
            "threshold": threshold if np.isfinite(threshold) else None,
        }
        for name, (value, threshold) in found.items()
    }
    described = units.describe(draws, seed) | {"unit": "trial" if speakers is None else "speaker"}
    return {"trials": len(ordered), "same_trials": int(kind.sum()), "metrics": metrics, "bootstrap": described}


def _speakers(speakers: tuple[ArrayLike, ArrayLike], same: NDArray[np.bool_]) -> tuple[int, Indices, Indices]:
    """Return the number of speakers, and the index of each trial's first and second speaker."""
    names, code = np.unique(np.concatenate([np.asarray(of).astype(str) for of in speakers]), return_inverse=True)
    a, b = np.split(code.astype(np.int64), 2)
    wrong = np.flatnonzero((a == b) != same)
    if len(wrong):
        at = wrong[0]
        raise AsitError(
            f"{len(wrong)} of {len(same)} trials disagree with their speakers, the first is trial {at}: "
            f"{names[a[at]]} and {names[b[at]]}, marked {'same' if same[at] else 'different'}",
            "same where both clips have one speaker, different otherwise",
            "check the list of trials against the speakers",
        )
    return len(names), a, b


def sorted_trials(scores: ArrayLike, same: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_], Indices]:
    """Return scores (n,) from high to low, `same` in that order, and the order; refuse trials of one kind."""
    values = np.asarray(scores, np.float64)
    if same.all() or not same.any():
        raise AsitError(
            f"{int(same.sum())} same-speaker and {int((~same).sum())} different-speaker trials",
            "at least one of each",
            "add trials of the other kind",
        )
    order = np.argsort(-values, kind="stable")
    return values[order], same[order], order
