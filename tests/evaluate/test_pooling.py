"""Frozen features and the probes on them, against brute force and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from asit.errors import AsitError
from asit.evaluate.pooling import RIDGE_GRID, features, knn_probe, linear_probe, log_mel_statistics, pool


def _classes(n: int, classes: int = 5, width: int = 24, seed: int = 0, apart: float = 0.8) -> tuple[np.ndarray, ...]:
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    scale = np.logspace(-1, 2, width)  # unequal scales: without standardising the small ones would be lost
    return ((centres[y] + rng.normal(size=(n, width))) * scale + 50).astype(np.float32), y


# --- pooling ---------------------------------------------------------------------------------------------------------


def test_pool_against_loops() -> None:
    time, mel, width = 3, 2, 4
    generator = torch.Generator().manual_seed(0)
    cls, patches = torch.randn(5, width, generator=generator), torch.randn(5, time * mel, width, generator=generator)
    got = {kind: pool(cls, patches, (time, mel), kind).numpy() for kind in
           ("class", "mean", "class+mean", "time-mean", "mel-mean", "mean+std")}  # fmt: skip
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
        }
        for kind, vector in expected.items():
            np.testing.assert_allclose(got[kind][r], vector, atol=1e-6, err_msg=kind)


def test_pool_refuses_a_wrong_grid_and_an_unknown_kind() -> None:
    cls, patches = torch.zeros(2, 4), torch.zeros(2, 6, 4)
    with pytest.raises(AsitError, match=r"\(2, 6, 4\) with a grid of 2 x 2"):
        pool(cls, patches, (2, 2), "mean")
    with pytest.raises(AsitError, match="pooling 'maximum'"):
        pool(cls, patches, (3, 2), "maximum")  # type: ignore[arg-type]


# --- features --------------------------------------------------------------------------------------------------------


def test_features_keep_the_order_over_batches_and_read_lazily() -> None:
    waves = np.arange(7 * 3, dtype=np.float64).reshape(7, 3)
    sizes: list[int] = []
    taken: list[int] = []

    def source() -> object:
        for index, wave in enumerate(waves):
            taken.append(index)
            yield wave

    def extract(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        assert batch.dtype == torch.float32
        assert len(taken) <= len(batch) + sum(sizes)
        sizes.append(len(batch))
        return {"sum": batch.sum(1, keepdim=True), "twice": (2 * batch).bfloat16()}

    got = features(source(), extract, batch_size=3)  # type: ignore[arg-type]
    assert sizes == [3, 3, 1]
    np.testing.assert_array_equal(got["sum"][:, 0], waves.sum(1))
    assert got["twice"].shape == (7, 3)
    assert got["twice"].dtype == np.float32


def test_features_refuse_what_cannot_be_used() -> None:
    def extract(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": batch.log()}

    ones = [np.ones(4)] * 5
    with pytest.raises(AsitError, match="'x': 1 clips with NaN or infinite values, the first is clip 3"):
        features([*ones[:3], -np.ones(4), *ones], extract, batch_size=2)
    with pytest.raises(AsitError, match=r"clip 5 has shape \(3,\)"):
        features([*ones, np.ones(3)], extract, batch_size=4)
    with pytest.raises(AsitError, match="no clip"):
        features([], extract)
    with pytest.raises(AsitError, match=r"\(4, 2, 2\) for 4 clips"):
        features(ones, lambda batch: {"x": batch.reshape(-1, 2, 2)}, batch_size=4)


def test_log_mel_statistics_are_mean_and_deviation_over_time() -> None:
    class Bank:
        def fbank(self, wave: torch.Tensor) -> torch.Tensor:
            return wave.unflatten(1, (4, 3))

    waves = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    got = log_mel_statistics(Bank(), waves).numpy()
    spectrogram = waves.numpy().reshape(2, 4, 3)
    np.testing.assert_allclose(got, np.concatenate([spectrogram.mean(1), spectrogram.std(1)], 1), atol=1e-6)


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_linear_probe_agrees_with_scikit_learns_grid_search() -> None:
    x, y = _classes(150)
    test, truth = _classes(400, seed=1)
    result = linear_probe(x, y, test, truth, seed=3)
    state = int(np.random.default_rng(3).integers(2**31))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RidgeClassifier()),
        {"ridgeclassifier__alpha": RIDGE_GRID},
        cv=StratifiedKFold(5, shuffle=True, random_state=state),
    ).fit(x.astype(np.float64), y)
    scores = search.cv_results_["mean_test_score"]
    chosen = scores[np.flatnonzero(result.regularisation == RIDGE_GRID)[0]]
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


def test_interval_by_groups_is_wider_where_groups_stand_or_fall_together() -> None:
    """Two of ten speakers are wholly wrong: 2,000 clips tell no more than ten."""
    x, y = _classes(200, apart=8)
    test, truth = _classes(2000, seed=1, apart=8)
    speaker = np.repeat(np.arange(10), 200)
    wrong = np.where(speaker < 2, (truth + 1) % 5, truth)
    alone = linear_probe(x, y, test, wrong, seed=0)
    grouped = linear_probe(x, y, test, wrong, seed=0, test_groups=speaker)
    assert alone.accuracy == grouped.accuracy == pytest.approx(0.8, abs=0.01)
    assert alone.interval[1] - alone.interval[0] < 0.05
    assert 0.3 < grouped.interval[1] - grouped.interval[0] < 0.7


def test_penalty_for_new_groups_is_stronger_where_features_tell_the_group() -> None:
    """Each speaker says few words and has a voice of its own: folds that split a speaker reward learning the voice."""
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


@pytest.mark.parametrize("probe", [lambda *sides: linear_probe(*sides, seed=0), knn_probe])
def test_bad_sides_are_refused(probe: object) -> None:
    x, y = _classes(60)
    test, truth = _classes(20, seed=1)
    broken = x.copy()
    broken[17, 3] = np.nan
    for arguments, message in (
        ((broken, y, test, truth), "train features: 1 clips with NaN or infinite values, the first is clip 17"),
        ((x, y, np.full_like(test, np.inf), truth), "test features: 20 clips"),
        ((x, y, test[:, :4], truth), "24 features a clip on the train side and 4"),
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
    monkeypatch.setattr("asit.evaluate.pooling.WIDEST", 100)
    reduced = linear_probe(x[:160], labels[:160], x[160:], labels[160:], seed=0)
    assert reduced == linear_probe(x[:160], labels[:160], x[160:], labels[160:], seed=0)
    assert whole.accuracy > 0.9
    assert abs(whole.accuracy - reduced.accuracy) < 0.05
