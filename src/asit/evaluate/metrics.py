"""Metrics of classifiers with intervals: accuracy, balanced accuracy, macro F1 and top-5; mAP, mean AUC and d'.

Letters: N clips, C classes.
Definitions are scikit-learn's (`balanced_accuracy_score`, `f1_score`; see also `asit.evaluate.ranking`). Every
dictionary returned here can be written as JSON, with None for an undefined value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError
from asit.evaluate.bootstrap import DRAWS, Units, interval
from asit.evaluate.ranking import Floats, Targets, d_prime, positives, ranking, ranking_draws, score_table

SingleMetric: TypeAlias = Literal["accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy"]
Metric: TypeAlias = Literal["accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "mAP", "mAUC"]
Indices: TypeAlias = NDArray[np.int64]

SINGLE: tuple[SingleMetric, ...] = ("accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy")
TOP_5_ABOVE = 10
"""Top-5 accuracy is given for more classes than this."""
LARGEST_CONFUSION = 200
"""Confusion matrices are given for at most this many classes."""


def multi_label(
    scores: ArrayLike,
    targets: Targets,
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
        scores, targets: as in `average_precision`.
        classes: C names.
        seed, draws: of the bootstrap; 0 draws give no intervals.
        groups: (N,) group of each clip, such as its video or speaker: whole groups are drawn.

    Returns:
        {"clips", "metrics": {"mAP", "mAUC", "d_prime": {"value", "interval"}}, "per_class": [{"class", "clips" (its
        positives), "AP", "AUC"}], "skipped_classes": names without positives, "bootstrap"}.

    Raises:
        AsitError: as in `average_precision`; no class with positives; groups of another length.
    """
    table = score_table(scores)
    _names(classes, table.shape[1])
    pointer, rows = positives(targets, *table.shape)
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
    targets: ArrayLike,
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
        targets: (N,) class indices.
        classes: C names.
        seed, draws, groups: as in `multi_label`.

    Returns:
        {"clips", "metrics": {"accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy" where C > 10: {"value",
        "interval"}}, "per_class": [{"class", "clips", "recall", "precision", "F1", "confused_with", "confused_clips"}],
        "confusion": rows truth, columns prediction, where C <= 200; "skipped_classes": names without clips,
        "bootstrap"}.

    Raises:
        AsitError: NaN scores, targets outside 0 to C - 1, shapes that disagree.
    """
    table = score_table(scores)
    C = table.shape[1]
    _names(classes, C)
    truth = _truth(targets, table)
    named = [name for name in SINGLE if name != "top5_accuracy" or C > TOP_5_ABOVE]
    predicted, inside = _predicted(table, truth)
    units = Units.of(len(table), groups)
    values = _single_values(truth, predicted, inside, C)
    drawn = [_single_values(truth, predicted, inside, C, times) for times in units.draws(draws, seed)]
    metrics = {
        name: {"value": values[name], "interval": interval([draw[name] for draw in drawn], units=units.count)}
        for name in named
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
    if not len(found) or not np.isfinite(found).all():
        raise AsitError(
            f"scores of folds: {list(values)}",
            "one number for each fold",
            "look at the run of the fold without a score",
        )
    summary = {
        "mean": float(found.mean()),
        "std": float(found.std(ddof=1)) if len(found) > 1 else None,
        "values": found.tolist(),
    }
    if clips is not None:
        if len(clips) != len(found):
            raise AsitError(f"{len(clips)} counts of clips for {len(found)} folds", "one per fold", "pass one per fold")
        summary["pooled"] = float(np.average(found, weights=clips))
    return summary


def paired_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    targets: Targets,
    metric: Metric,
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
        targets: (N,) class indices; for mAP and mAUC also `Targets`.
        metric: "accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "mAP" or "mAUC".
        seed, draws, groups: as in `multi_label`.

    Returns:
        {"metric", "a", "b", "difference" (a - b), "interval", "clips", "bootstrap"}.

    Raises:
        AsitError: an unknown metric, tables of different shapes, and as in `single_label` and `multi_label`.
    """
    a, b = score_table(scores_a), score_table(scores_b)
    if a.shape != b.shape:
        raise AsitError(
            f"scores of shape {a.shape} and {b.shape}", "the same clips and classes", "compare runs on the same list"
        )
    units = Units.of(len(a), groups)
    values, drawn = [], []
    if metric in ("mAP", "mAUC"):
        which = ("mAP", "mAUC").index(metric)
        single = not isinstance(targets, tuple) and np.ndim(targets) == 1
        several = (np.arange(len(a) + 1), _truth(cast(ArrayLike, targets), a)) if single else targets
        for table in (a, b):
            parts = (table, *positives(several, *table.shape))
            values.append(_mean(ranking(*parts)[which]))
            drawn.append(ranking_draws(*parts, units, draws, seed)[which])
    elif metric in SINGLE:
        truth = _truth(cast(ArrayLike, targets), a)
        for table in (a, b):
            named = (truth, *_predicted(table, truth), table.shape[1])
            values.append(_single_values(*named)[metric])
            drawn.append(np.array([_single_values(*named, times)[metric] for times in units.draws(draws, seed)]))
    else:
        raise AsitError(f"metric {metric!r}", ", ".join((*SINGLE, "mAP", "mAUC")), "choose one of these")
    centre = values[0] - values[1]
    return {
        "metric": metric,
        "a": _number(values[0]),
        "b": _number(values[1]),
        "difference": _number(centre),
        "interval": interval(drawn[0] - drawn[1], units=units.count, centre=centre, bounds=(-1.0, 1.0)),
        "clips": len(a),
        "bootstrap": units.describe(draws, seed),
    }


def _truth(targets: ArrayLike, table: NDArray[Any]) -> Indices:
    """Check targets and return them as (N,) int64 class indices."""
    truth = np.asarray(targets)
    N, C = table.shape
    if truth.shape != (N,) or truth.dtype.kind not in "iu":
        raise AsitError(
            f"targets of shape {truth.shape} and type {truth.dtype} for {N} clips",
            f"({N},) integer class indices",
            "pass one class index per clip; multi_label scores several labels per clip",
        )
    outside = np.flatnonzero((truth < 0) | (truth >= C))
    if len(outside):
        first = outside[0]
        raise AsitError(
            f"targets of {len(outside)} of {N} clips are no class, the first is {truth[first]} of clip {first}",
            f"0 to {C - 1}, for {C} columns of scores",
            "score with the classes that the model was trained on",
        )
    return truth.astype(np.int64)


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
) -> dict[SingleMetric, float]:
    """Compute the metrics of `SINGLE`, with weights `times` (N,) of the clips."""
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
    for pair, count in zip(
        pairs.tolist(), counts.tolist(), strict=True
    ):  # ascending, so that of equal counts the lowest index stays
        true, other = divmod(pair, C)
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


def _names(classes: Sequence[str], columns: int) -> None:
    if len(classes) != columns:
        raise AsitError(
            f"{len(classes)} class names for {columns} columns of scores",
            "one name for each column",
            "pass the classes that the model was trained on, in its order",
        )


def _mean(values: Floats) -> float:
    """Compute the mean over the classes where the value is defined; NaN where it is for none."""
    found = values[~np.isnan(values)]
    return float(found.mean()) if len(found) else float("nan")


def _number(value: float) -> float | None:
    """Turn NaN and infinities, which JSON lacks, into None."""
    return float(value) if np.isfinite(value) else None
