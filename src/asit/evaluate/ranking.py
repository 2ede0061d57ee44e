"""Ranking metrics of each class: average precision (AP, whose mean is mAP), area under the ROC curve (AUC) and d'.

Letters: N clips, C classes, K bootstrap draws, P positives of a class.
Definitions are scikit-learn's (`average_precision_score`, `roc_auc_score`), computed for all classes of AudioSet in
under a second. A class without positives has an average precision of NaN, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from torch.nn.functional import embedding_bag

from asit.errors import AsitError
from asit.evaluate.bootstrap import Units

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
CLASS_BLOCK = 64
"""Classes transposed at a time; a copy of the whole table would double the memory."""
WEIGHT_BLOCK = 2**22
"""Bootstrap weights held at a time, clips x draws: 16 MB fit in a processor's cache."""


def d_prime(auc: float) -> float:
    """Compute d', the distance of two unit normal score distributions with this AUC: sqrt(2) x probit(AUC).

    AudioSet's d' is that of the mean AUC over classes, not the mean of the classes' d' (AST, src/traintest.py).
    An AUC of 1 gives inf, 0 gives -inf, NaN gives NaN.
    """
    return math.sqrt(2.0) * float(ndtri(auc))


def ranking(table: NDArray[Any], pointer: Indices, rows: Indices) -> tuple[Floats, Floats]:
    """Compute the average precision and the area under the ROC curve of each class.

    The average precision is the sum over thresholds of (recall gained) x (precision there); clips of equal score share
    one threshold. Over the positives p of a class this is the mean of (positives scored at least as high as p) / (clips
    scored at least as high as p). The AUC is how often a positive beats a negative, ties counting half.

    Args:
        table: (N, C) scores of `score_table`; only their order within a class counts.
        pointer, rows: the `positives`.

    Returns:
        (C,) float64 each; NaN for a class without positives, the AUC also for one without negatives.
    """
    N, C = table.shape
    ap, auc = np.full(C, np.nan), np.full(C, np.nan)
    for c, column in _columns(table, pointer):
        found = np.sort(column[rows[pointer[c] : pointer[c + 1]]])
        P = len(found)
        every = np.sort(column)
        under, upto = np.searchsorted(every, found, "left"), np.searchsorted(every, found, "right")
        found_under, found_upto = np.searchsorted(found, found, "left"), np.searchsorted(found, found, "right")
        ap[c] = np.mean((P - found_under) / (N - under))
        if P < N:
            beaten = ((under - found_under) + (upto - found_upto)) / 2  # negatives below, and half of the ties
            auc[c] = beaten.sum() / (P * (N - P))
    return ap, auc


def ranking_draws(
    table: NDArray[Any], pointer: Indices, rows: Indices, units: Units, draws: int, seed: int
) -> tuple[Floats, Floats]:
    """Compute mean average precision and mean AUC in each bootstrap draw, (K,) each.

    A clip drawn w times counts as w clips of equal score. Each class is sorted once per block of draws; between the
    scores of two positives only sums of weights matter, which `embedding_bag` computes for all draws of the block. A
    class without positives in a draw is left out of that draw's mean.
    """
    N, C = table.shape
    block = min(max(WEIGHT_BLOCK // N, 16), 256)
    means: list[NDArray[np.float32]] = []
    source = units.draws(draws, seed)
    for start in range(0, draws, block):
        width = min(block, draws - start)
        weights = torch.from_numpy(np.stack([next(source) for _ in range(width)], 1).astype(np.float32))  # (N, width)
        values = np.full((2, C, width), np.nan, np.float32)
        for c, column in _columns(table, pointer):
            values[:, c] = _weighted(column, rows[pointer[c] : pointer[c + 1]], weights).numpy()
        known = ~np.isnan(values)
        with np.errstate(invalid="ignore"):  # a draw without positives of any class: NaN
            means.append(np.where(known, values, 0).sum(1) / known.sum(1))
    ap, auc = np.concatenate(means, 1).astype(np.float64) if means else np.empty((2, 0))
    return ap, auc


def _weighted(column: NDArray[Any], mine: Indices, weights: torch.Tensor) -> torch.Tensor:
    """Compute average precision and AUC (2, K) of scores (N,) with positives (P,), for draws of the clips (N, K)."""
    order = np.argsort(column)
    ordered = column[order]
    thresholds, which = np.unique(column[mine], return_inverse=True)
    # The sorted clips form runs: below the first threshold, at it, between it and the second, at the second, ...
    ends = np.stack([np.searchsorted(ordered, thresholds, side) for side in ("left", "right")], 1).reshape(-1)
    runs = _run_sums(weights, order, np.concatenate([[0], ends]))
    by_threshold = np.argsort(which, kind="stable")
    at = _run_sums(weights, mine[by_threshold], np.searchsorted(which[by_threshold], np.arange(len(thresholds))))
    total = weights.sum(0)
    reached = runs[:-1].cumsum(0)
    under, upto = reached[0::2], reached[1::2]  # (thresholds, K): weight of the clips below, and at or below
    under_mine = at.cumsum(0) - at
    P = at.sum(0)
    ap = (at * (P - under_mine) / (total - under).clamp_min(1)).sum(0) / P  # where none is left, `at` is 0 too
    others_under, others_at = under - under_mine, upto - under - at
    auc = (at * (others_under + others_at / 2)).sum(0) / (P * (total - P))
    return torch.stack([ap, auc])


def _run_sums(weights: torch.Tensor, order: Indices, starts: Indices) -> torch.Tensor:
    """Sum weights (N, K) over runs of `order`, each from its start to the next one's: (runs, K)."""
    return embedding_bag(torch.from_numpy(order), weights, torch.from_numpy(starts), mode="sum")


def _columns(table: NDArray[Any], pointer: Indices) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (class, its contiguous scores (N,)) for every class with positives."""
    for start in range(0, table.shape[1], CLASS_BLOCK):
        wanted = start + np.flatnonzero(np.diff(pointer[start : start + CLASS_BLOCK + 1]))
        block = np.ascontiguousarray(table[:, wanted].T)
        yield from zip(wanted.tolist(), block, strict=True)


def score_table(scores: ArrayLike) -> NDArray[Any]:
    """Check scores and return them as an (N, C) table of float32 or float64.

    Raises:
        AsitError: another shape, no clip or no class, or NaN.
    """
    table = np.asarray(scores)
    if table.ndim != 2 or not table.size:
        raise AsitError(f"scores of shape {table.shape}", "(clips, classes), at least one of each", "check the split")
    if table.dtype != np.float32:
        table = table.astype(np.float64)
    bad = np.flatnonzero(np.isnan(table).any(1))
    if len(bad):
        raise AsitError(
            f"{len(bad)} of {len(table)} clips have NaN scores, the first is clip {bad[0]}",
            "a number for each clip and class",
            "look at that clip and at the weights; a diverged run gives NaN for every clip",
        )
    return table


def positives(targets: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Return the positives of each class: (C + 1,) pointers into (positives,) ascending clip indices."""
    column, rows = np.nonzero(targets.T)
    return np.searchsorted(column, np.arange(targets.shape[1] + 1)), rows
