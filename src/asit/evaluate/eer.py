"""Verification of speakers (or of any label): are two clips of the same one? Equal error rate and detection cost.

Letters: N clips, D width, n trials, K bootstrap draws.
A trial is a pair of clips with a score; at a threshold t it is accepted where score >= t. Misses are same-speaker
trials that are not accepted, false alarms different-speaker trials that are.
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

TRIAL_BLOCK = 2**16
"""Trials scored at a time: two gathered blocks of embeddings fit in memory."""


class Trials(NamedTuple):
    """Pairs of clips: indices `first` and `second` (n,), and `same` (n,), whether the speaker is the same."""

    first: Indices
    second: Indices
    same: NDArray[np.bool_]


def trials_from_labels(labels: ArrayLike, seed: int, most: int = 100_000) -> Trials:
    """Trials over clips with these labels: every pair where there are at most `most`, else a seeded balanced draw.

    Of a draw, half are same-speaker pairs and half different-speaker pairs, each half uniform over its pairs and
    without repetition; where one side has too few pairs, all of them are taken and the other side fills up. Pairs are
    ordered by first clip, then second; first < second.

    Args:
        labels: (N,) speaker of each clip.
        seed: of the draw.
        most: trials at most.

    Raises:
        AsitError: one speaker only, no speaker with two clips, or `most` under 2.
    """
    names = np.asarray(labels)
    speakers, code = np.unique(names.astype(str) if names.dtype == object else names, return_inverse=True)
    sizes = np.bincount(code, minlength=len(speakers))
    if names.ndim != 1 or len(speakers) < 2 or sizes.max() < 2 or most < 2:
        raise AsitError(
            f"{names.size} clips of {len(speakers)} speakers, {int((sizes > 1).sum())} of them with two clips or more; "
            f"{most} trials at most",
            "two speakers, one of them with two clips, and room for a pair of the same and one of different speakers",
            "check the column that names the speaker",
        )
    # Clips in speaker order: position q has, before it, `start` clips of other speakers and q - start of its own.
    order = np.argsort(code, kind="stable")
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    own, others = np.arange(len(order)) - start, start
    all_same, all_different = int(own.sum()), int(others.sum())
    same_wanted, different_wanted = all_same, all_different
    if all_same + all_different > most:
        same_wanted = min(all_same, max(most // 2, most - all_different))
        different_wanted = min(all_different, most - same_wanted)
    rng = np.random.default_rng([seed, len(order)])
    same_q, same_rest = _pairs(own, same_wanted, rng)
    different_q, different_rest = _pairs(others, different_wanted, rng)
    left = np.concatenate([order[start[same_q] + same_rest], order[different_rest]])
    right = np.concatenate([order[same_q], order[different_q]])
    first, second = np.minimum(left, right), np.maximum(left, right)
    same = np.arange(len(first)) < same_wanted
    sequence = np.lexsort((second, first))
    return Trials(first[sequence].astype(np.int64), second[sequence].astype(np.int64), same[sequence])


def _pairs(partners: NDArray[Any], wanted: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """`wanted` of all pairs (position, one of its partners[position]), uniformly without repetition."""
    ends = np.cumsum(partners)
    total = int(ends[-1])
    picked = np.arange(total) if wanted == total else rng.choice(total, wanted, replace=False, shuffle=False)
    position = np.searchsorted(ends, picked, side="right")
    return position, picked - (ends[position] - partners[position])


def cosine_scores(embeddings: ArrayLike, first: ArrayLike, second: ArrayLike) -> NDArray[np.float32]:
    """Cosine of the embeddings (N, D) of each trial's two clips: (n,) float32.

    Raises:
        AsitError: embeddings that are not finite or have no length, or trials of clips that are not there.
    """
    table = np.asarray(embeddings, np.float32)
    a, b = np.asarray(first, np.int64), np.asarray(second, np.int64)
    if table.ndim != 2 or a.shape != b.shape or a.ndim != 1:
        raise AsitError(
            f"embeddings of shape {table.shape}, trials of shape {a.shape} and {b.shape}",
            "(clips, width), and two equally long lists of clip indices",
            "pass one pooled vector a clip",
        )
    if len(a) and (min(a.min(), b.min()) < 0 or max(a.max(), b.max()) >= len(table)):
        raise AsitError(
            f"trials of clips {min(a.min(), b.min())} to {max(a.max(), b.max())}",
            f"0 to {len(table) - 1}, the clips with embeddings",
            "draw the trials from the clips that were embedded",
        )
    length = np.sqrt(np.einsum("nd,nd->n", table, table, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        raise AsitError(
            f"{len(bad)} of {len(table)} embeddings are zero or not finite, the first is that of clip {bad[0]}",
            "finite embeddings of some length",
            "look at that clip and at the weights",
        )
    unit = (table / length[:, None]).astype(np.float32)
    scores = np.empty(len(a), np.float32)
    for start in range(0, len(a), TRIAL_BLOCK):
        block = slice(start, start + TRIAL_BLOCK)
        scores[block] = np.einsum("nd,nd->n", unit[a[block]], unit[b[block]])
    return scores


def eer(scores: ArrayLike, same: ArrayLike) -> tuple[float, float]:
    """Equal error rate and its threshold.

    The ROC has one point for each distinct score, (false alarms, misses) as rates, and the point (0, 1) that accepts
    nothing; it is joined by straight lines, and the EER is where it meets false alarms = misses. (The convex hull, as
    in BOSARIS, can be lower.) The threshold is interpolated on the same line; on the line from (0, 1) it is the
    highest score.

    Args:
        scores: (n,), higher for the same speaker.
        same: (n,) bool.

    Raises:
        AsitError: scores that are not finite, or trials of one kind only.
    """
    ordered, kind, _ = _falling(scores, same)
    return _eer(*_curve(ordered, kind))


def min_dcf(
    scores: ArrayLike, same: ArrayLike, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> tuple[float, float]:
    """Minimum detection cost, normalised, and its threshold (inf where accepting nothing is cheapest).

    Cost of a threshold: c_miss * p_target * misses + c_fa * (1 - p_target) * false alarms, as rates; the least over all
    thresholds is divided by that of the better blind answer, min(c_miss * p_target, c_fa * (1 - p_target)), so it is
    never above 1. NIST Speaker Recognition Evaluation plans (2016: section 3).

    Raises:
        AsitError: as `eer`; a prior out of (0, 1) or a cost that is not positive.
    """
    if not 0 < p_target < 1 or not min(c_miss, c_fa) > 0:
        raise AsitError(
            f"p_target {p_target:g}, c_miss {c_miss:g}, c_fa {c_fa:g}",
            "a prior between 0 and 1 and positive costs",
            "NIST's usual setting is 0.01, 1, 1",
        )
    ordered, kind, _ = _falling(scores, same)
    return _min_dcf(*_curve(ordered, kind), p_target, c_miss, c_fa)


def verification(
    scores: ArrayLike,
    same: ArrayLike,
    *,
    speakers: tuple[ArrayLike, ArrayLike] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """EER and minDCF (prior 0.01, costs 1) with 95 % bootstrap intervals, as parts of a result record.

    Trials that share a speaker are not independent, so whole speakers are drawn: with speaker s drawn m_s times, a
    same-speaker trial counts m_s times, one of speakers s and t counts m_s * m_t times. Draws without trials of both
    kinds are left out. Intervals are centred on the value: the least cost over thresholds is lower in draws.

    Args:
        scores, same: as `eer`.
        speakers: (n,) speaker of each trial's first clip, and of its second; without them, trials are drawn one by one,
            which makes the interval too narrow.
        seed, draws: of the bootstrap; 0 draws give no intervals.

    Returns:
        {"trials", "same_trials", "metrics": {"EER", "minDCF": {"value", "interval", "threshold"}}, "bootstrap"};
        JSON-able, a threshold that is not finite is null.

    Raises:
        AsitError: as `eer`; speakers that disagree with `same`.
    """
    ordered, kind, order = _falling(scores, same)
    found = {"EER": _eer(*_curve(ordered, kind)), "minDCF": _min_dcf(*_curve(ordered, kind))}
    drawn: dict[str, list[float]] = {name: [] for name in found}
    if speakers is None:
        units = Units.of(len(ordered))
        weights: Iterable[NDArray[np.int64]] = (times[order] for times in units.draws(draws, seed))
    else:
        count, a, b = _speakers(speakers, np.asarray(same))
        a, b = a[order], b[order]
        units = Units.of(count)
        weights = (np.where(kind, times[a], times[a] * times[b]) for times in units.draws(draws, seed))
    for times in weights:
        targets = times[kind].sum()
        if targets and targets < times.sum():
            curve = _curve(ordered, kind, times)
            drawn["EER"].append(_eer(*curve)[0])
            drawn["minDCF"].append(_min_dcf(*curve)[0])
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
    """Number of speakers, and the speaker's index on both sides of each trial."""
    sides = [np.asarray(side) for side in speakers]
    if any(side.shape != same.shape for side in sides):
        raise AsitError(
            f"speakers of shape {sides[0].shape} and {sides[1].shape} for {len(same)} trials",
            f"({len(same)},) twice",
            "pass the speaker of the first and of the second clip of each trial",
        )
    names, code = np.unique(np.concatenate([side.astype(str) for side in sides]), return_inverse=True)
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


def _falling(scores: ArrayLike, same: ArrayLike) -> tuple[Floats, NDArray[np.bool_], Indices]:
    """Checked scores (n,) from high to low, `same` in that order, and the order."""
    values, truth = np.asarray(scores, np.float64), np.asarray(same)
    if values.ndim != 1 or truth.shape != values.shape or truth.dtype != bool:
        raise AsitError(
            f"scores of shape {values.shape}, same of shape {truth.shape} and type {truth.dtype}",
            "(trials,) numbers and (trials,) true or false",
            "pass one score and one truth for each trial",
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise AsitError(
            f"{len(bad)} of {len(values)} trials have NaN or infinite scores, the first is trial {bad[0]}",
            "a number for each trial",
            "look at its two clips and at the weights",
        )
    if truth.all() or not truth.any():
        raise AsitError(
            f"{int(truth.sum())} same-speaker and {int((~truth).sum())} different-speaker trials",
            "at least one of each",
            "add trials of the other kind",
        )
    order = np.argsort(-values, kind="stable")
    return values[order], truth[order], order


def _curve(
    ordered: Floats, same: NDArray[np.bool_], times: NDArray[np.int64] | None = None
) -> tuple[Floats, Floats, Floats]:
    """Thresholds (falling, inf first), false alarms (rising from 0 to 1) and misses (falling from 1 to 0), as rates.

    Args:
        ordered: (n,) scores, falling.
        same: (n,) in that order.
        times: (n,) how often each trial counts.
    """
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # equal scores are accepted together
    weight = np.ones(len(ordered)) if times is None else times.astype(np.float64)
    accepted = np.cumsum(weight * same)
    alarms = np.cumsum(weight * ~same)
    return (
        np.concatenate([[np.inf], ordered[last]]),
        np.concatenate([[0.0], alarms[last] / alarms[-1]]),
        1.0 - np.concatenate([[0.0], accepted[last] / accepted[-1]]),
    )


def _eer(thresholds: Floats, alarms: Floats, misses: Floats) -> tuple[float, float]:
    gap = misses - alarms  # falls from 1 to -1
    after = int(np.argmax(gap <= 0))
    before = after - 1
    share = gap[before] / (gap[before] - gap[after])
    value = alarms[before] + share * (alarms[after] - alarms[before])
    if before == 0:
        return float(value), float(thresholds[after])
    return float(value), float(thresholds[before] + share * (thresholds[after] - thresholds[before]))


def _min_dcf(
    thresholds: Floats,
    alarms: Floats,
    misses: Floats,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
) -> tuple[float, float]:
    cost = c_miss * p_target * misses + c_fa * (1 - p_target) * alarms
    best = int(np.argmin(cost))
    return float(cost[best] / min(c_miss * p_target, c_fa * (1 - p_target))), float(thresholds[best])
