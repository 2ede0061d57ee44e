"""Metrics of classifiers with intervals: accuracy, balanced accuracy, macro F1 and top-5; mAP, mean AUC and d'.

Letters: N clips, C classes.
Definitions are scikit-learn's (`balanced_accuracy_score`, `f1_score`; see also `asit.evaluate.ranking`). Every
dictionary returned here can be written as JSON, with None for an undefined value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError
from asit.evaluate.bootstrap import DRAWS, Units, interval
from asit.evaluate.ranking import Floats, Indices, d_prime, positives, ranking, ranking_draws, score_table

TOP_5_ABOVE = 10
"""Top-5 accuracy is given for more classes than this."""
LARGEST_CONFUSION = 200
"""Confusion matrices are given for at most this many classes."""


def multi_label(
    scores: ArrayLike,
    targets: NDArray[np.bool_],
    classes: Sequence[str],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Compute mAP, mean AUC and d' with 95 % intervals, and the values of each class, as entries of a result record.

    Means are over the classes where the value is defined. Intervals are centred on the value (see
    `asit.evaluate.bootstrap.interval`); their draws are float32.

    Args:
        scores: (N, C) logits or probabilities.
        targets: (N, C), which clips have which classes.
        classes: C names.
        seed, draws: of the bootstrap; 0 draws give no intervals.
        groups: (N,) group of each clip, such as its video or speaker: whole groups are drawn.

    Returns:
        {"clips", "metrics": {"mAP", "mAUC", "d_prime": {"value", "interval"}}, "per_class": [{"class", "clips" (its
        positives), "AP", "AUC"}], "skipped_classes": names without positives, "bootstrap"}.

    Raises:
        AsitError: no clip, NaN scores, no class with positives, or clips without a group.
    """
    table = score_table(scores)
    pointer, rows = positives(targets)
    ap, auc = ranking(table, pointer, rows)
    if np.isnan(ap).all():
        raise AsitError(
            f"{len(table)} clips without any label among {len(classes)} classes",
            "at least one class with positives",
            "check the label column and the split",
        )
    units = Units.of(len(table), groups)
    low_high = ranking_draws(table, pointer, rows, units, draws, seed)
    values = {"mAP": _mean(ap), "mAUC": _mean(auc)}
    metrics: dict[str, Any] = {
        name: {"value": _number(value), "interval": interval(of, units=units.count, centre=value)}
        for (name, value), of in zip(values.items(), low_high, strict=True)
    }
    ends = metrics["mAUC"]["interval"]
    metrics["d_prime"] = {
        "value": _number(d_prime(values["mAUC"])),
        "interval": [d_prime(end) for end in ends] if ends and ends[0] > 0 and ends[1] < 1 else None,
    }
    counts = np.diff(pointer)
    return {
        "clips": len(table),
        "metrics": metrics,
        "per_class": [
            {"class": str(name), "clips": int(counts[c]), "AP": _number(ap[c]), "AUC": _number(auc[c])}
            for c, name in enumerate(classes)
        ],
        "skipped_classes": [str(classes[c]) for c in np.flatnonzero(counts == 0).tolist()],
        "bootstrap": units.describe(draws, seed),
    }


def single_label(
    scores: ArrayLike,
    truth: Indices,
    classes: Sequence[str],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Compute accuracies and macro F1 with 95 % intervals, and values of each class, as entries of a result record.

    The prediction is the class with the highest score; of equal scores the lowest index wins, also among the top 5.
    Balanced accuracy is the mean recall, macro F1 the mean F1, over the classes with test clips. An interval of width 0
    means that no draw differed (every clip correct, say), not that the score is certain.

    Args:
        scores: (N, C) logits or probabilities.
        truth: (N,) class indices.
        classes: C names.
        seed, draws, groups: as in `multi_label`.

    Returns:
        {"clips", "metrics": {"accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy" where C > 10: {"value",
        "interval"}}, "per_class": [{"class", "clips", "recall", "precision", "F1", "confused_with", "confused_clips"}],
        "confusion": rows truth, columns prediction, where C <= 200; "skipped_classes": names without clips,
        "bootstrap"}.

    Raises:
        AsitError: no clip, NaN scores, or clips without a group.
    """
    table = score_table(scores)
    C = table.shape[1]
    predicted, inside = _predicted(table, truth)
    units = Units.of(len(table), groups)
    values = _single_values(truth, predicted, inside, C)
    drawn = [_single_values(truth, predicted, inside, C, times) for times in units.draws(draws, seed)]
    metrics = {
        name: {"value": values[name], "interval": interval([draw[name] for draw in drawn], units=units.count)}
        for name in values
        if name != "top5_accuracy" or C > TOP_5_ABOVE
    }
    record: dict[str, Any] = {"clips": len(table), "metrics": metrics, "per_class": _classes(truth, predicted, classes)}
    if C <= LARGEST_CONFUSION:
        record["confusion"] = np.bincount(truth * C + predicted, minlength=C * C).reshape(C, C).tolist()
    absent = np.flatnonzero(np.bincount(truth, minlength=C) == 0).tolist()
    return record | {"skipped_classes": [str(classes[c]) for c in absent], "bootstrap": units.describe(draws, seed)}


def fold_summary(values: Sequence[float], clips: Sequence[int] | None = None) -> dict[str, Any]:
    """Compute mean and standard deviation (n - 1) over folds or seeds: {"mean", "std", "values"}.

    The standard deviation of one value is None. With the test clips of each fold, "pooled" is the accuracy over all
    clips (the mean weighted by clips), meant for accuracies only.
    """
    found = np.asarray(values, np.float64)
    std = float(found.std(ddof=1)) if len(found) > 1 else None
    summary = {"mean": float(found.mean()), "std": std, "values": found.tolist()}
    return summary if clips is None else summary | {"pooled": float(np.average(found, weights=clips))}


def paired_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    targets: NDArray[Any],
    metric: Literal["accuracy", "mAP"],
    *,
    seed: int = 0,
    draws: int = DRAWS,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Compute the difference of model a over model b on the same clips, with the 95 % interval of a paired bootstrap.

    Both are scored on the same draws, so the difficulty of a clip cancels: the interval is narrower than those of the
    two models suggest.

    Args:
        scores_a, scores_b: (N, C), rows in the same order of clips.
        targets: as in `single_label` for the accuracy, as in `multi_label` for the mAP.
        metric: what is compared.
        seed, draws, groups: as in `multi_label`.

    Returns:
        {"difference" (a - b), "interval"}.

    Raises:
        AsitError: as in `single_label` and `multi_label`.
    """
    units = Units.of(len(targets), groups)
    values, drawn = zip(
        *(score_draws(scores, targets, metric, units, seed=seed, draws=draws) for scores in (scores_a, scores_b)),
        strict=True,
    )
    centre = values[0] - values[1]
    low_high = interval(drawn[0] - drawn[1], units=units.count, centre=centre, bounds=(-1.0, 1.0))
    return {"difference": centre, "interval": low_high}


def score_draws(
    scores: ArrayLike,
    targets: NDArray[Any],
    metric: Literal["accuracy", "mAP"],
    units: Units,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, NDArray[np.float64]]:
    """Compute a metric and its bootstrap draws (K,); models scored with equal units and seeds have the same draws.

    Args:
        scores: (N, C).
        targets, metric: as in `paired_difference`.
        units: of N clips.
        seed, draws: of the bootstrap.

    Raises:
        AsitError: no clip, or NaN scores.
    """
    table = score_table(scores)
    if metric == "mAP":
        parts = (table, *positives(targets))
        return _mean(ranking(*parts)[0]), ranking_draws(*parts, units, draws, seed)[0]
    right = table.argmax(1) == targets
    return float(right.mean()), np.array([times[right].sum() / times.sum() for times in units.draws(draws, seed)])


def _predicted(table: NDArray[Any], truth: Indices) -> tuple[Indices, NDArray[np.bool_]]:
    """Return the predicted class (N,), and whether the true one is among the top 5 (N,)."""
    C = table.shape[1]
    own = table[np.arange(len(table)), truth]
    before = np.zeros(len(table), np.int64)  # classes ranked before the true one
    for c in range(C):  # by column, without an (N, C) table of comparisons
        column = table[:, c]
        before += (column > own) | ((column == own) & (c < truth))
    return table.argmax(1), before < 5


def _single_values(
    truth: Indices, predicted: Indices, inside: NDArray[np.bool_], classes: int, times: Indices | None = None
) -> dict[str, float]:
    """Compute all metrics, with weights `times` (N,) of the clips."""
    weights = np.ones(len(truth)) if times is None else times.astype(np.float64)
    right = weights * (truth == predicted)
    clips = np.bincount(truth, weights, classes)
    hits = np.bincount(truth, right, classes)
    named = np.bincount(predicted, weights, classes)
    present = clips > 0
    return {
        "accuracy": float(hits.sum() / clips.sum()),
        "balanced_accuracy": float((hits[present] / clips[present]).mean()),
        "macro_f1": float((2 * hits[present] / (clips + named)[present]).mean()),
        "top5_accuracy": float(weights[inside].sum() / clips.sum()),
    }


def _classes(truth: Indices, predicted: Indices, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Make the entry "per_class" of a single-label record."""
    C = len(classes)
    clips, named = np.bincount(truth, minlength=C), np.bincount(predicted, minlength=C)
    wrong = truth != predicted
    hits = np.bincount(truth[~wrong], minlength=C)
    pairs, counts = np.unique(truth[wrong] * C + predicted[wrong], return_counts=True)
    worst: dict[int, tuple[str, int]] = {}
    # Ascending pairs, so that of equal counts the lowest index is kept.
    for (true, other), count in zip(np.stack(np.divmod(pairs, C), 1).tolist(), counts.tolist(), strict=True):
        if count > worst.get(true, ("", 0))[1]:
            worst[true] = str(classes[other]), count
    rows = []
    for c, name in enumerate(classes):
        other_name, confused = worst.get(c, (None, 0))
        rows.append(
            {
                "class": str(name),
                "clips": int(clips[c]),
                "recall": float(hits[c] / clips[c]) if clips[c] else None,
                "precision": float(hits[c] / named[c]) if named[c] else None,
                "F1": float(2 * hits[c] / (clips[c] + named[c])) if clips[c] else None,
                "confused_with": other_name,
                "confused_clips": confused,
            }
        )
    return rows


def _mean(values: Floats) -> float:
    """Compute the mean over the classes where the value is defined; NaN where it is for none."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")


def _number(value: float) -> float | None:
    """Turn NaN and infinities, which JSON lacks, into None."""
    return float(value) if np.isfinite(value) else None
