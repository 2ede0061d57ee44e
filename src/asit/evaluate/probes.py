"""Nearest-neighbour (k-NN) probe of frozen features.

Letters: N training clips, n scored clips, C classes.
"""

from __future__ import annotations

import numpy as np

from asit.evaluate.ridge import Floats, ProbeScores, moments

KNN_TEMPERATURE = 0.07
"""A neighbour's weight is exp(cosine / 0.07), as in the k-NN evaluation of InstDisc (arXiv 1805.01978) and DINO."""
NEIGHBOURS = 20
"""Neighbours, as in DINO's evaluation (arXiv 2104.14294)."""
_COSINES = 2**24  # cosines, or targets of neighbours, held at a time: 64 MB


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


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
