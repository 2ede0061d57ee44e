"""Whether scores can be taken at their word: how often answers of each confidence are right.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.report.charts import Chart
from asit.report.score_records import Scores

BINS = 10
"""Bins of equal width from 0 to 1; the calibration error depends on their number."""


def calibration(scores: NDArray[Any], right: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Mean score and share of right ones in each bin that is not empty, and the expected calibration error.

    The error is the mean over clips of their bin's |share right - mean score| (Guo et al. 2017, arXiv 1706.04599).

    Args:
        scores: (n,) in [0, 1].
        right: (n,) whether what was scored is so.
    """
    place = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    there = count > 0
    mean = np.bincount(place, scores, minlength=BINS)[there] / count[there]
    share = np.bincount(place, right, minlength=BINS)[there] / count[there]
    return mean, share, float((np.abs(share - mean) * count[there]).sum() / max(1, len(scores)))


def confidence(held: Scores, single: bool) -> str:
    """Charts of calibration and of the scores of right and wrong answers; a sentence where scores are no probabilities.

    Args:
        held: scores of all clips.
        single: one label a clip: its highest score is the confidence; otherwise every (clip, class) pair counts.
    """
    if not len(held.ids) or not (held.exclusive if single else held.probable):
        return '<p class="missing">The scores kept are no probabilities, so their calibration is not drawn.</p>'
    if single:
        told = held.scores.max(1).astype(np.float64)
        right = held.scores.argmax(1) == held.truth
        names = ("right answers", "wrong answers")
    else:
        told, right = held.scores.ravel().astype(np.float64), held.positives.ravel()
        names = ("class is there", "class is not there")
    mean, share, error = calibration(told, right)
    line = ([0.0, 100.0], [0.0, 1.0])
    charts = Chart(
        "Calibration",
        f"answers with a score of 80 % should be right 8 times in 10; calibration error {error:.1%} ({BINS} bins)",
        {"share right": (list(100 * mean), list(share)), "ideal": line},
        percent=True,
        axis="score, %",
        lasts=False,
    ).html()
    edges = np.linspace(0, 1, 2 * BINS + 1)
    middles = list(50 * (edges[:-1] + edges[1:]))
    series = {
        name: (middles, list(np.histogram(told[side], edges)[0] / max(1, int(side.sum()))))
        for name, side in zip(names, (right, ~right), strict=True)
        if side.any()
    }
    charts += Chart(
        "Scores", "share of each kind by score, in bins of 5 %", series, percent=True, axis="score, %", lasts=False
    ).html()
    return f'<div class="charts">{charts}</div>'
