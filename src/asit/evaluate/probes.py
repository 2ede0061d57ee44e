"""Linear and nearest-neighbour (k-NN) probes of frozen features.

Letters: N training clips, n scored clips, D feature width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.errors import AsitError
from asit.evaluate.ridge import Floats, ProbeScores, moments, ridge_scores

KNN_TEMPERATURE = 0.07
"""A neighbour's weight is exp(cosine / 0.07), as in the k-NN evaluation of InstDisc (arXiv 1805.01978) and DINO."""
NEIGHBOURS = 20
"""Neighbours, as in DINO's evaluation (arXiv 2104.14294)."""
DRAWS = 2000
"""Bootstrap draws of an accuracy's interval."""
_COSINES = 2**24  # cosines, or targets of neighbours, held at a time: 64 MB


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a probe on a test split.

    Attributes:
        accuracy: share of correct test clips.
        interval: its 95 % bootstrap interval over test clips.
        clips: number of test clips.
        regularisation: the ridge penalty chosen on the training split.
    """

    accuracy: float
    interval: tuple[float, float]
    clips: int
    regularisation: float | None


def linear_probe(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike, *, seed: int
) -> ProbeResult:
    """Compute the test accuracy of ridge regression (`asit.evaluate.ridge`) on frozen features.

    7,200 x 768 features of 40 classes take a few seconds on one core.

    Args:
        train_x, test_x: (N, D) and (n, D) features.
        train_y, test_y: (N,) and (n,) labels, integers or strings.
        seed: of the folds and the bootstrap.

    Raises:
        AsitError: features that are not finite, shapes that disagree, fewer than two classes, a class with one
            training clip, or test labels that are not in the training split.
    """
    x, y, test, truth = _checked(train_x, train_y, test_x, test_y)
    rng = np.random.default_rng(seed)
    scored = ridge_scores(x, one_hot(y, int(y.max()) + 1), test, criterion="accuracy", seed=seed, rng=rng)
    correct = scored.scores.argmax(1) == truth
    # Resampling the clips of a 0/1 score is a binomial draw.
    draws = rng.binomial(len(correct), correct.mean(), DRAWS) / len(correct)
    low, high = np.quantile(draws, [0.025, 0.975])
    return ProbeResult(float(correct.mean()), (float(low), float(high)), len(correct), scored.regularisation)


def knn_scores(train_x: Floats, targets: Floats, x: Floats, *, k: int = NEIGHBOURS) -> ProbeScores:
    """Score clips by the targets of their k nearest training clips, each weighted exp(cosine / 0.07).

    Features are standardised on the training split first: an offset common to all clips (a log-mel's mean level)
    would otherwise make every cosine nearly 1.

    Args:
        train_x, targets, x: as in `asit.evaluate.ridge.ridge_scores`.
        k: neighbours; at most the number of training clips.
    """
    mean, deviation = moments(train_x)
    train = _unit((train_x - mean) / deviation)
    k = min(k, len(train))
    scores = np.empty((len(x), targets.shape[1]), np.float32)
    rows = max(1, _COSINES // max(len(train), k * targets.shape[1]))
    for first in range(0, len(x), rows):
        cosines = _unit((x[first : first + rows] - mean) / deviation) @ train.T
        nearest = np.argpartition(cosines, -k, axis=1)[:, -k:]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / KNN_TEMPERATURE).astype(np.float64)
        weights /= weights.sum(1, keepdims=True)
        scores[first : first + rows] = np.einsum("rk,rkc->rc", weights, targets[nearest])
    return ProbeScores(scores, None, f"{k} neighbours, nothing chosen")


def one_hot(indices: NDArray[np.int64], classes: int) -> Floats:
    """Turn class indices (N,) into targets (N, C)."""
    out = np.zeros((len(indices), classes), np.float32)
    out[np.arange(len(indices)), indices] = 1
    return out


def _checked(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike
) -> tuple[Floats, NDArray[np.int64], Floats, NDArray[np.int64]]:
    """Check both splits and turn labels into indices of the sorted training classes."""
    train, test = np.asarray(train_x, np.float32), np.asarray(test_x, np.float32)
    train_labels, test_labels = np.asarray(train_y), np.asarray(test_y)
    for split, x, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
            raise AsitError(
                f"{split} features of shape {x.shape} with labels of shape {labels.shape}",
                "(clips, width) and (clips,), at least one clip",
                "pass one label for each row of features",
            )
        bad = np.flatnonzero(~np.isfinite(x).all(1))
        if len(bad):
            raise AsitError(
                f"{split} features: {len(bad)} clips with NaN or infinite values, the first is clip {bad[0]}",
                "finite features",
                "look at that clip and at the weights; a diverged checkpoint gives NaN for every clip",
            )
    if train.shape[1] != test.shape[1]:
        raise AsitError(
            f"{train.shape[1]} features per clip in the train split and {test.shape[1]} in the test split",
            "the same width",
            "compute both from one model with one pooling",
        )
    classes, y = np.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise AsitError(f"one class only, {classes[0]!r}", "two or more classes", "check the label column")
    if np.bincount(y).min() < 2:
        raise AsitError(
            "a class with a single training clip",
            "at least two, to choose the regularisation by cross-validation",
            "add clips, or leave that class out",
        )
    unknown = sorted(set(test_labels.tolist()) - set(classes.tolist()))
    if unknown:
        raise AsitError(
            f"test labels that no training clip has: {', '.join(map(repr, unknown[:5]))}",
            "test labels among those of the training split",
            "check the split, or leave these clips out",
        )
    return train, y.astype(np.int64), test, np.searchsorted(classes, test_labels).astype(np.int64)


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
