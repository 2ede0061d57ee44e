"""Linear and k-NN probes against scikit-learn and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asit.errors import AsitError
from asit.evaluate.probes import knn_probe, knn_scores, linear_probe
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


def test_linear_probe_takes_names_and_reports_each_class() -> None:
    x, y = _classes(200)
    test, truth = _classes(300, seed=1)
    names = np.array(["ant", "bee", "cat", "dog", "eel"])
    numbered, named = linear_probe(x, y, test, truth, seed=0), linear_probe(x, names[y], test, names[truth], seed=0)
    assert named.accuracy == numbered.accuracy
    assert list(named.per_class) == names.tolist()
    share = np.bincount(truth, minlength=5) / len(truth)
    assert np.dot(list(named.per_class.values()), share) == pytest.approx(named.accuracy)


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


def test_interval_by_groups_is_wider_where_clips_of_a_group_agree() -> None:
    """All clips of two of ten speakers are wrong: 2,000 clips then carry no more information than ten."""
    x, y = _classes(200, apart=8)
    test, truth = _classes(2000, seed=1, apart=8)
    speaker = np.repeat(np.arange(10), 200)
    wrong = np.where(speaker < 2, (truth + 1) % 5, truth)
    alone = linear_probe(x, y, test, wrong, seed=0)
    grouped = linear_probe(x, y, test, wrong, seed=0, test_groups=speaker)
    assert alone.accuracy == grouped.accuracy == pytest.approx(0.8, abs=0.01)
    assert alone.interval[1] - alone.interval[0] < 0.05
    assert 0.3 < grouped.interval[1] - grouped.interval[0] < 0.7


def test_penalty_for_new_groups_is_stronger_where_features_identify_the_group() -> None:
    """Each speaker says one word and has its own voice: folds that split a speaker reward learning the voice."""
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(30), 20)
    y = rng.integers(0, 2, 30)[speaker]
    word = (2 * y[:, None] - 1) * 0.3 + rng.normal(size=(600, 5))
    voice = rng.normal(size=(30, 60))[speaker] + 0.05 * rng.normal(size=(600, 60))
    x = np.concatenate([word, voice], 1)
    mixed = linear_probe(x, y, x, y, seed=0).regularisation
    apart = linear_probe(x, y, x, y, seed=0, groups=speaker).regularisation
    assert mixed is not None
    assert apart is not None
    assert apart > 10 * mixed


def test_more_features_than_clips_and_constant_features() -> None:
    x, y = _classes(40, width=300, apart=0.5)
    x[:, 7] = 3.0
    test, truth = _classes(200, width=300, seed=1, apart=0.5)
    test[:, 7] = 3.0
    assert linear_probe(x, y, test, truth, seed=0).accuracy > 0.6


@pytest.mark.parametrize("probe", [lambda *splits: linear_probe(*splits, seed=0), knn_probe])
def test_bad_splits_are_refused(probe: object) -> None:
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
            probe(*arguments)  # type: ignore[operator]


def test_a_class_with_one_clip_is_refused() -> None:
    x, y = _classes(60)
    with pytest.raises(AsitError, match="a class with a single training clip"):
        linear_probe(x, np.where(np.arange(60) == 5, 9, y), x, y, seed=0)
    with pytest.raises(AsitError, match="a single group"):
        linear_probe(x, y, x, y, seed=0, groups=np.zeros(60))


# --- nearest neighbours ----------------------------------------------------------------------------------------------


def test_knn_against_brute_force() -> None:
    x, y = _classes(120, apart=0.5)
    test, truth = _classes(150, seed=1, apart=0.5)
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    right = 0
    for row, label in zip((test - mean) / std, truth, strict=True):
        cosines = [float(row @ other / np.linalg.norm(row) / np.linalg.norm(other)) for other in (x - mean) / std]
        votes = dict.fromkeys(range(5), 0.0)
        for index in sorted(range(120), key=lambda i: -cosines[i])[:20]:
            votes[int(y[index])] += float(np.exp(cosines[index] / 0.07))
        right += max(votes, key=lambda c: votes[c]) == label
    result = knn_probe(x, y, test, truth)
    assert result.accuracy == pytest.approx(right / 150, abs=1e-9)
    assert result.regularisation is None


def test_knn_with_fewer_clips_than_neighbours() -> None:
    x, y = _classes(12, classes=2, apart=8)
    test, truth = _classes(30, classes=2, seed=1, apart=8)
    assert knn_probe(x, y, test, truth, k=50).accuracy > 0.9


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
