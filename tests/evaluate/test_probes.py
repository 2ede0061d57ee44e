"""Ridge regression and k-NN against scikit-learn and brute force: penalties, folds, principal components, few clips."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asit.evaluate.feature_readers import log_mel_statistics, pool
from asit.evaluate.probes import (
    FEW_CLIPS_PENALTY,
    PENALTIES,
    knn_scores,
    principal_components,
    ridge_scores,
    stratified_folds,
)

from .conftest import one_hot  # type: ignore[import-not-found]


def multi_label_clips(n: int, seed: int, classes: int = 4, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Features to which each of the clip's labels adds its own direction."""
    own = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, classes)) < 0.3).astype(np.float32)
    return (targets @ own + rng.normal(size=(n, width)) + 5).astype(np.float32), targets


def test_ridge_scores_are_scikit_learns_for_the_penalty_chosen() -> None:
    x, targets = multi_label_clips(300, 0)
    test, truth = multi_label_clips(200, 1)
    scored = ridge_scores(x, targets, test, criterion="mAP", seed=0)
    scaler = StandardScaler().fit(x.astype(np.float64))
    oracle = Ridge(alpha=scored.regularisation).fit(scaler.transform(x), 2 * targets - 1)
    np.testing.assert_allclose(scored.scores, oracle.predict(scaler.transform(test)), atol=1e-4)
    assert np.mean([average_precision_score(truth[:, c], scored.scores[:, c]) for c in range(4)]) > 0.8
    assert scored.chosen_by == "mAP over 5 folds of the training clips"


@pytest.mark.parametrize("criterion", ["mAP", "accuracy"])
def test_a_validation_split_chooses_the_penalty(criterion: str) -> None:
    rng = np.random.default_rng(0)
    if criterion == "mAP":
        (x, targets), held = multi_label_clips(60, 2), multi_label_clips(150, 3)
    else:
        y, other = rng.integers(0, 4, 60), rng.integers(0, 4, 150)
        x = (np.eye(4, 30)[y] + rng.normal(size=(60, 30))).astype(np.float32)
        targets = one_hot(y, 4)
        held = ((np.eye(4, 30)[other] + rng.normal(size=(150, 30))).astype(np.float32), one_hot(other, 4))
    scored = ridge_scores(x, targets, held[0], criterion=criterion, seed=0, validation=held)  # type: ignore[arg-type]
    scaler = StandardScaler().fit(x.astype(np.float64))
    values = []
    for penalty in PENALTIES:
        found = Ridge(alpha=penalty).fit(scaler.transform(x), 2 * targets - 1).predict(scaler.transform(held[0]))
        if criterion == "mAP":
            values.append(np.mean([average_precision_score(held[1][:, c], found[:, c]) for c in range(4)]))
        else:
            values.append((found.argmax(1) == held[1].argmax(1)).mean())
    chosen = values[int(np.flatnonzero(scored.regularisation == PENALTIES)[0])]
    assert chosen == pytest.approx(max(values), abs=1e-3)
    assert scored.chosen_by == f"{criterion} on the validation split"


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
    alone = ridge_scores(x, one_hot(y, 5), x, criterion="accuracy", seed=0)
    assert (alone.regularisation, alone.chosen_by) == (FEW_CLIPS_PENALTY, "fixed: no clip can be held out")
    assert alone.scores.argmax(1).tolist() == y.tolist()
    # One class has a single clip and the others several: folds are still made.
    y = np.array([0] * 20 + [1] * 20 + [2])
    x = (np.eye(3, 8)[y] * 4 + np.random.default_rng(1).normal(size=(41, 8))).astype(np.float32)
    mixed = ridge_scores(x, one_hot(y, 3), x, criterion="accuracy", seed=0)
    assert mixed.chosen_by == "accuracy over 5 folds of the training clips"
    assert (mixed.scores.argmax(1) == y).mean() > 0.9


def test_a_constant_feature_changes_no_score() -> None:
    x, targets = multi_label_clips(80, 0)
    constant = np.concatenate([x, np.full((80, 1), 1e4, np.float32)], 1)
    moved = np.concatenate([x, np.full((80, 1), 2e4, np.float32)], 1)
    for scores in (lambda *a: ridge_scores(*a, criterion="mAP", seed=0), knn_scores):
        np.testing.assert_allclose(scores(constant, targets, constant).scores, scores(x, targets, x).scores, atol=1e-4)
    assert np.isfinite(ridge_scores(constant, targets, moved, criterion="mAP", seed=0).scores).all()


def test_penalty_for_new_groups_is_stronger_where_features_identify_the_group() -> None:
    """Each speaker says one word and has its own voice: folds that split a speaker reward learning the voice."""
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(30), 20)
    y = rng.integers(0, 2, 30)[speaker]
    word = (2 * y[:, None] - 1) * 0.3 + rng.normal(size=(600, 5))
    voice = rng.normal(size=(30, 60))[speaker] + 0.05 * rng.normal(size=(600, 60))
    x = np.concatenate([word, voice], 1).astype(np.float32)
    targets = one_hot(y, 2)
    mixed, apart = (
        ridge_scores(x, targets, x, criterion="accuracy", seed=0, groups=groups) for groups in (None, speaker)
    )
    assert mixed.regularisation is not None
    assert apart.regularisation is not None
    assert apart.regularisation > 10 * mixed.regularisation
    assert apart.chosen_by == "accuracy over 5 folds of the training groups"


def single_label_clips(n: int, classes: int = 5, width: int = 24, seed: int = 0, apart: float = 0.8) -> tuple:
    """Features around a centre for each class; without standardising the small ones would be lost."""
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    scale = np.logspace(-1, 2, width)
    return ((centres[y] + rng.normal(size=(n, width))) * scale + 50).astype(np.float32), y


def test_the_penalty_is_that_of_scikit_learns_grid_search() -> None:
    x, y = single_label_clips(150)
    test, truth = single_label_clips(400, seed=1)
    scored = ridge_scores(x, one_hot(y, 5), test, criterion="accuracy", seed=3)
    state = int(np.random.default_rng(3).integers(2**31))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RidgeClassifier()),
        {"ridgeclassifier__alpha": PENALTIES},
        cv=StratifiedKFold(5, shuffle=True, random_state=state),
    ).fit(x.astype(np.float64), y)
    found = search.cv_results_["mean_test_score"]
    assert found[np.flatnonzero(scored.regularisation == PENALTIES)[0]] == pytest.approx(found.max(), abs=1e-9)
    oracle = make_pipeline(StandardScaler(), RidgeClassifier(alpha=scored.regularisation)).fit(x, y).predict(test)
    assert (scored.scores.argmax(1) == oracle).mean() > 0.995  # float32 may turn a near tie
    assert 0.5 < (oracle == truth).mean() < 1


def test_more_features_than_clips_and_constant_features() -> None:
    x, y = single_label_clips(40, width=300, apart=0.5)
    test, truth = single_label_clips(200, width=300, seed=1, apart=0.5)
    x[:, 7] = test[:, 7] = 3.0
    scored = ridge_scores(x, one_hot(y, 5), test, criterion="accuracy", seed=0)
    assert (scored.scores.argmax(1) == truth).mean() > 0.6


def test_features_wider_than_the_limit_are_reduced_and_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    labels = np.arange(240) % 4
    x = (rng.standard_normal((4, 300))[labels] + 2.0 * rng.standard_normal((240, 300))).astype(np.float32)

    def fitted() -> np.ndarray:
        return ridge_scores(x[:160], one_hot(labels[:160], 4), x[160:], criterion="accuracy", seed=0).scores

    whole = (fitted().argmax(1) == labels[160:]).mean()
    monkeypatch.setattr("asit.evaluate.probes.WIDEST", 100)
    reduced = fitted()
    np.testing.assert_array_equal(reduced, fitted())
    assert whole > 0.9
    assert abs(whole - (reduced.argmax(1) == labels[160:]).mean()) < 0.05


def test_knn_with_fewer_clips_than_neighbours() -> None:
    x, y = single_label_clips(12, classes=2, apart=8)
    test, truth = single_label_clips(30, classes=2, seed=1, apart=8)
    found = knn_scores(x, one_hot(y, 2), test, k=50)
    assert (found.scores.argmax(1) == truth).mean() > 0.9
    assert (found.regularisation, found.chosen_by) == (None, "12 neighbours, nothing chosen")


def test_knn_scores_of_several_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = multi_label_clips(90, 4)
    test, _ = multi_label_clips(25, 5)
    scored = knn_scores(x, targets, test, k=7)
    mean, std = x.astype(np.float64).mean(0), x.astype(np.float64).std(0)
    for row, found in zip((test - mean) / std, scored.scores, strict=True):
        cosines = np.array([row @ o / np.linalg.norm(row) / np.linalg.norm(o) for o in (x - mean) / std])
        near = np.argsort(-cosines)[:7]
        votes = np.exp(cosines[near] / 0.07)
        np.testing.assert_allclose(found, votes @ targets[near] / votes.sum(), atol=1e-4)
    monkeypatch.setattr("asit.evaluate.probes._COSINES", 200)  # a few rows at a time
    np.testing.assert_allclose(knn_scores(x, targets, test, k=7).scores, scored.scores, atol=1e-6)


# --- pooling ----------------------------------------------------------------------------------------------------------


def test_pool_against_loops() -> None:
    time, mel, width = 3, 2, 4
    generator = torch.Generator().manual_seed(0)
    cls, patches = torch.randn(5, width, generator=generator), torch.randn(5, time * mel, width, generator=generator)
    got = {kind: pool(cls, patches, (time, mel), kind).numpy() for kind in
           ("class", "mean", "class+mean", "class+mean+std", "time-mean", "mel-mean", "mean+std")}  # fmt: skip
    for r in range(5):
        token = {(t, m): patches[r, t * mel + m].numpy() for t in range(time) for m in range(mel)}
        every = np.stack(list(token.values()))
        expected = {
            "class": cls[r].numpy(),
            "mean": every.mean(0),
            "class+mean": np.concatenate([cls[r].numpy(), every.mean(0)]),
            "time-mean": np.concatenate([np.mean([token[t, m] for t in range(time)], 0) for m in range(mel)]),
            "mel-mean": np.concatenate([np.mean([token[t, m] for m in range(mel)], 0) for t in range(time)]),
            "mean+std": np.concatenate([every.mean(0), every.std(0)]),
            "class+mean+std": np.concatenate([cls[r].numpy(), every.mean(0), every.std(0)]),
        }
        for kind, vector in expected.items():
            np.testing.assert_allclose(got[kind][r], vector, atol=1e-6, err_msg=kind)


def test_log_mel_statistics_are_mean_and_deviation_over_time() -> None:
    front_end: Any = SimpleNamespace(fbank=lambda waveforms: waveforms.unflatten(1, (4, 3)))
    waveforms = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    got = log_mel_statistics(front_end, waveforms).numpy()
    logmel = waveforms.numpy().reshape(2, 4, 3)
    np.testing.assert_allclose(got, np.concatenate([logmel.mean(1), logmel.std(1)], 1), atol=1e-6)
