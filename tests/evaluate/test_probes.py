"""Linear and k-NN probes against scikit-learn and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asit.errors import AsitError
from asit.evaluate.probes import knn_scores, linear_probe, one_hot
from asit.evaluate.ridge import PENALTIES


def _classes(n: int, classes: int = 5, width: int = 24, seed: int = 0, apart: float = 0.8) -> tuple[np.ndarray, ...]:
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    scale = np.logspace(-1, 2, width)  # unequal scales: without standardising the small ones would be lost
    return ((centres[y] + rng.normal(size=(n, width))) * scale + 50).astype(np.float32), y


def _several(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, 4)) < 0.3).astype(np.float32)
    directions = np.random.default_rng(99).normal(size=(4, 30))
    return (targets @ directions + rng.normal(size=(n, 30)) + 5).astype(np.float32), targets


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_linear_probe_agrees_with_scikit_learns_grid_search() -> None:
    x, y = _classes(150)
    test, truth = _classes(400, seed=1)
    result = linear_probe(x, y, test, truth, seed=3)
    state = int(np.random.default_rng(3).integers(2**31))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RidgeClassifier()),
        {"ridgeclassifier__alpha": PENALTIES},
        cv=StratifiedKFold(5, shuffle=True, random_state=state),
    ).fit(x.astype(np.float64), y)
    scores = search.cv_results_["mean_test_score"]
    chosen = scores[np.flatnonzero(result.regularisation == PENALTIES)[0]]
    assert chosen == pytest.approx(scores.max(), abs=1e-9)
    oracle = make_pipeline(StandardScaler(), RidgeClassifier(alpha=result.regularisation)).fit(x, y).predict(test)
    assert result.accuracy == pytest.approx((oracle == truth).mean(), abs=0.003)  # float32 may turn a near tie
    assert 0.5 < result.accuracy < 1
    assert result.clips == 400


def test_linear_probe_takes_names() -> None:
    x, y = _classes(200)
    test, truth = _classes(300, seed=1)
    names = np.array(["ant", "bee", "cat", "dog", "eel"])
    assert linear_probe(x, names[y], test, names[truth], seed=0) == linear_probe(x, y, test, truth, seed=0)


def test_interval_covers_as_often_as_it_says_and_is_seeded() -> None:
    x, y = _classes(200)
    test, truth = _classes(20000, seed=1)
    whole = linear_probe(x, y, test, truth, seed=0)
    inside = 0
    for part in range(100):
        rows = slice(part * 200, part * 200 + 200)
        low, high = linear_probe(x, y, test[rows], truth[rows], seed=0).interval
        inside += low <= whole.accuracy <= high
    assert 87 <= inside <= 100
    assert whole.interval == linear_probe(x, y, test, truth, seed=0).interval
    assert whole.interval[1] - whole.interval[0] < 0.02


def test_more_features_than_clips_and_constant_features() -> None:
    x, y = _classes(40, width=300, apart=0.5)
    x[:, 7] = 3.0
    test, truth = _classes(200, width=300, seed=1, apart=0.5)
    test[:, 7] = 3.0
    assert linear_probe(x, y, test, truth, seed=0).accuracy > 0.6


def test_bad_splits_are_refused() -> None:
    x, y = _classes(60)
    test, truth = _classes(20, seed=1)
    broken = x.copy()
    broken[17, 3] = np.nan
    for arguments, message in (
        ((broken, y, test, truth), "train features: 1 clips with NaN or infinite values, the first is clip 17"),
        ((x, y, np.full_like(test, np.inf), truth), "test features: 20 clips"),
        ((x, y, test[:, :4], truth), "24 features per clip in the train split and 4"),
        ((x, y[:-1], test, truth), r"\(60, 24\) with labels of shape \(59,\)"),
        ((x, np.zeros(60), test, np.zeros(20)), "one class only"),
        ((x, y, test, truth + 3), "test labels that no training clip has: 5, 6, 7"),
    ):
        with pytest.raises(AsitError, match=message):
            linear_probe(*arguments, seed=0)


def test_a_class_with_one_clip_is_refused() -> None:
    x, y = _classes(60)
    with pytest.raises(AsitError, match="a class with a single training clip"):
        linear_probe(x, np.where(np.arange(60) == 5, 9, y), x, y, seed=0)


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def test_knn_with_fewer_clips_than_neighbours() -> None:
    x, y = _classes(12, classes=2, apart=8)
    test, truth = _classes(30, classes=2, seed=1, apart=8)
    found = knn_scores(x, one_hot(y, 2), test, k=50)
    assert (found.scores.argmax(1) == truth).mean() > 0.9
    assert (found.regularisation, found.chosen_by) == (None, "12 neighbours, nothing chosen")


def test_features_wider_than_the_limit_are_reduced_and_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(240) % 4
    centres = rng.standard_normal((4, 300))
    x = (centres[labels] + 2.0 * rng.standard_normal((240, 300))).astype(np.float32)
    whole = linear_probe(x[:160], labels[:160], x[160:], labels[160:], seed=0)
    monkeypatch.setattr("asit.evaluate.ridge.WIDEST", 100)
    reduced = linear_probe(x[:160], labels[:160], x[160:], labels[160:], seed=0)
    assert reduced == linear_probe(x[:160], labels[:160], x[160:], labels[160:], seed=0)
    assert whole.accuracy > 0.9
    assert abs(whole.accuracy - reduced.accuracy) < 0.05


def test_knn_scores_of_several_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = _several(90, 4)
    test, _ = _several(25, 5)
    scored = knn_scores(x, targets, test, k=7)
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    for row, found in zip((test - mean) / std, scored.scores, strict=True):
        cosines = np.array([row @ o / np.linalg.norm(row) / np.linalg.norm(o) for o in (x - mean) / std])
        near = np.argsort(-cosines)[:7]
        votes = np.exp(cosines[near] / 0.07)
        np.testing.assert_allclose(found, votes @ targets[near] / votes.sum(), atol=1e-4)
    monkeypatch.setattr("asit.evaluate.probes._COSINES", 200)  # a few rows at a time
    np.testing.assert_allclose(knn_scores(x, targets, test, k=7).scores, scored.scores, atol=1e-6)
