"""Ridge and nearest-neighbour scores for several labels a clip, few clips, and validation sides."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from asit.evaluate.linear_knn import (
    FEW,
    RIDGE_GRID,
    knn_probe_scores,
    one_hot,
    principal_components,
    ridge_probe,
    stratified_folds,
)


def several(n: int, seed: int, classes: int = 4, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Features to which each of the clip's labels adds its own direction."""
    own = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, classes)) < 0.3).astype(np.float32)
    return (targets @ own + rng.normal(size=(n, width)) + 5).astype(np.float32), targets


def test_ridge_scores_are_scikit_learns_for_the_penalty_chosen() -> None:
    x, targets = several(300, 0)
    test, truth = several(200, 1)
    scored = ridge_probe(x, targets, test, aim="mAP", seed=0)
    scaler = StandardScaler().fit(x.astype(np.float64))
    oracle = Ridge(alpha=scored.regularisation).fit(scaler.transform(x), 2 * targets - 1)
    np.testing.assert_allclose(scored.scores, oracle.predict(scaler.transform(test)), atol=1e-4)
    assert np.mean([average_precision_score(truth[:, c], scored.scores[:, c]) for c in range(4)]) > 0.8
    assert scored.chosen_by == "mAP over 5 folds of the training clips"


@pytest.mark.parametrize("aim", ["mAP", "accuracy"])
def test_a_validation_side_chooses_the_penalty(aim: str) -> None:
    rng = np.random.default_rng(0)
    if aim == "mAP":
        (x, targets), held = several(60, 2), several(150, 3)
    else:
        y, other = rng.integers(0, 4, 60), rng.integers(0, 4, 150)
        x = (np.eye(4, 30)[y] + rng.normal(size=(60, 30))).astype(np.float32)
        targets = one_hot(y, 4)
        held = ((np.eye(4, 30)[other] + rng.normal(size=(150, 30))).astype(np.float32), one_hot(other, 4))
    scored = ridge_probe(x, targets, held[0], aim=aim, seed=0, validation=held)  # type: ignore[arg-type]
    scaler = StandardScaler().fit(x.astype(np.float64))
    values = []
    for penalty in RIDGE_GRID:
        found = Ridge(alpha=penalty).fit(scaler.transform(x), 2 * targets - 1).predict(scaler.transform(held[0]))
        if aim == "mAP":
            values.append(np.mean([average_precision_score(held[1][:, c], found[:, c]) for c in range(4)]))
        else:
            values.append((found.argmax(1) == held[1].argmax(1)).mean())
    chosen = values[int(np.flatnonzero(scored.regularisation == RIDGE_GRID)[0])]
    assert chosen == pytest.approx(max(values), abs=1e-3)
    assert scored.chosen_by == f"{aim} on the validation side"


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_stratified_folds_are_scikit_learns(folds: int, seed: int) -> None:
    for classes, clips in ((2, 30), (7, 100), (40, 999)):
        truth = np.random.default_rng([seed, folds]).integers(0, classes, clips)
        truth = np.concatenate([truth, np.repeat(np.arange(classes) * 2, folds)])  # some classes are missing
        expected = np.empty(len(truth), np.int64)
        for fold, (_, held) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(truth, truth)):
            expected[held] = fold
        np.testing.assert_array_equal(stratified_folds(truth, folds, seed), expected)


@pytest.mark.parametrize(("clips", "width", "count"), [(300, 120, 40), (90, 200, 90), (400, 300, 20), (64, 64, 10)])
def test_principal_components_are_scikit_learns_up_to_sign(clips: int, width: int, count: int) -> None:
    rng = np.random.default_rng(clips)
    x = (rng.normal(size=(clips, width)) * np.geomspace(1, 0.05, width) + rng.normal(size=width)).astype(np.float32)
    mean, components = principal_components(x, count, 7)
    oracle = PCA(count, svd_solver="randomized", random_state=7).fit(x)
    np.testing.assert_array_equal(mean, oracle.mean_)
    assert components.dtype == oracle.components_.dtype == np.float32
    both = components @ oracle.components_.T
    kept = count - (count == clips)  # centring leaves one direction without variance
    np.testing.assert_allclose(np.abs(both[:kept, :kept]), np.eye(kept), atol=2e-3)


def test_few_clips() -> None:
    y = np.arange(5)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    alone = ridge_probe(x, one_hot(y, 5), x, aim="accuracy", seed=0)
    assert (alone.regularisation, alone.chosen_by) == (FEW, "fixed: no clip can be held out")
    assert alone.scores.argmax(1).tolist() == y.tolist()
    # One class has a single clip and the others several: folds are made all the same.
    y = np.array([0] * 20 + [1] * 20 + [2])
    x = (np.eye(3, 8)[y] * 4 + np.random.default_rng(1).normal(size=(41, 8))).astype(np.float32)
    mixed = ridge_probe(x, one_hot(y, 3), x, aim="accuracy", seed=0)
    assert mixed.chosen_by == "accuracy over 5 folds of the training clips"
    assert (mixed.scores.argmax(1) == y).mean() > 0.9


def test_a_feature_that_never_changes_says_nothing() -> None:
    x, targets = several(80, 0)
    still = np.concatenate([x, np.full((80, 1), 1e4, np.float32)], 1)
    moved = np.concatenate([x, np.full((80, 1), 2e4, np.float32)], 1)
    for probe in (lambda *a: ridge_probe(*a, aim="mAP", seed=0), knn_probe_scores):
        np.testing.assert_allclose(probe(still, targets, still).scores, probe(x, targets, x).scores, atol=1e-4)
    assert np.isfinite(ridge_probe(still, targets, moved, aim="mAP", seed=0).scores).all()


def test_neighbours_vote_for_all_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = several(90, 4)
    test, _ = several(25, 5)
    scored = knn_probe_scores(x, targets, test, k=7)
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    for row, found in zip((test - mean) / std, scored.scores, strict=True):
        cosines = np.array([row @ o / np.linalg.norm(row) / np.linalg.norm(o) for o in (x - mean) / std])
        near = np.argsort(-cosines)[:7]
        votes = np.exp(cosines[near] / 0.07)
        np.testing.assert_allclose(found, votes @ targets[near] / votes.sum(), atol=1e-4)
    monkeypatch.setattr("asit.evaluate.linear_knn._COSINES", 200)  # a few rows at a time
    np.testing.assert_allclose(knn_probe_scores(x, targets, test, k=7).scores, scored.scores, atol=1e-6)
