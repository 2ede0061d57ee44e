"""Scores and targets that the tests of metrics share."""

from __future__ import annotations

import numpy as np

from asit.evaluate.ranking import positives, ranking, score_table


def several(clips: int, classes: int, seed: int = 0, *, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and targets with an empty class (the last), a full one and one of a single clip."""
    rng = np.random.default_rng([seed, clips, classes])
    targets = rng.random((clips, classes)) < np.geomspace(0.02, 0.4, classes)
    targets[:, -1], targets[:, -2], targets[:, 0] = False, True, np.arange(clips) == 3
    scores = rng.normal(size=targets.shape) + targets
    return (np.round(scores, 1) if ties else scores).astype(np.float32), targets


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The average precision of each class."""
    return ranking(score_table(scores), *positives(targets))[0]


def roc_auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The area under the ROC curve of each class."""
    return ranking(score_table(scores), *positives(targets))[1]


def one_hot(indices: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[indices]
