"""Equal error rate, detection cost and trials against a sweep over all thresholds, and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.optimize import brentq

from asit.errors import AsitError
from asit.evaluate.verification import cosine_scores, trials_from_labels
from asit.evaluate.verification_metrics import Roc, eer, min_dcf, sorted_trials, verification_metrics
from asit.evaluate.verification_metrics import roc as sorted_roc


def roc(scores: ArrayLike, same: np.ndarray) -> Roc:
    return sorted_roc(*sorted_trials(scores, same)[:2])


def _rates(scores: np.ndarray, same: np.ndarray) -> list[tuple[float, float, float]]:
    """(threshold, false alarms, misses) at every threshold that differs, the strictest first: by loops."""
    thresholds = [math.inf, *sorted(set(scores.tolist()), reverse=True)]
    return [
        (
            t,
            sum(s >= t for s, truth in zip(scores, same, strict=True) if not truth) / sum(~same),
            sum(s < t for s, truth in zip(scores, same, strict=True) if truth) / sum(same),
        )
        for t in thresholds
    ]


def _eer_by_sweep(scores: np.ndarray, same: np.ndarray) -> float:
    """Where the polygon through the points, walked by length, has false alarms = misses."""
    points = np.array([rates[1:] for rates in _rates(scores, same)])
    positions = np.arange(len(points))
    gap = lambda x: np.interp(x, positions, points[:, 1] - points[:, 0])  # noqa: E731
    return float(np.interp(brentq(gap, 0, len(points) - 1, xtol=1e-14), positions, points[:, 0]))


trials = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
    lambda pairs: len({same for _, same in pairs}) == 2
)


@settings(max_examples=100, deadline=None)
@given(pairs=trials, prior=st.sampled_from([0.01, 0.5, 0.9]))
def test_against_a_sweep(pairs: list[tuple[int, bool]], prior: float) -> None:
    scores, same = np.array([s for s, _ in pairs], float), np.array([truth for _, truth in pairs])
    assert eer(roc(scores, same))[0] == pytest.approx(_eer_by_sweep(scores, same), abs=1e-9)
    cost = {t: prior * miss + (1 - prior) * alarm for t, alarm, miss in _rates(scores, same)}
    value, threshold = min_dcf(roc(scores, same), prior)
    assert value == pytest.approx(min(cost.values()) / min(prior, 1 - prior), abs=1e-12)
    assert cost[threshold] == pytest.approx(min(cost.values()), abs=1e-12)
    assert value <= 1 + 1e-12


def test_eer_by_hand() -> None:
    # Points (alarms, misses): (0, 1) (0, 2/3) (0, 1/3) (1/3, 1/3): met at the last.
    assert eer(roc([0.9, 0.8, 0.6, 0.4, 0.3, 0.1], np.array([1, 1, 0, 1, 0, 0], bool))) == pytest.approx((1 / 3, 0.6))
    # (0, 1/2) at 3, (1/2, 0) at 2, the score of one of each: halfway between.
    assert eer(roc([3, 2, 2, 1], np.array([1, 1, 0, 0], bool))) == pytest.approx((0.25, 2.5))
    assert eer(roc([3, 2, 1, 0], np.array([1, 1, 0, 0], bool))) == pytest.approx((0.0, 2.0))
    assert eer(roc([0, 1, 2, 3], np.array([1, 1, 0, 0], bool)))[0] == pytest.approx(1.0)
    assert eer(roc([5, 5, 5, 5], np.array([1, 1, 0, 0], bool))) == pytest.approx((0.5, 5.0))  # a constant score


def test_min_dcf_by_hand() -> None:
    same = np.array([1, 1, 0, 1, 0, 0], bool)
    scores = [0.9, 0.8, 0.6, 0.4, 0.3, 0.1]
    # At prior 0.01 a false alarm in three costs 33 times a sure miss: best without any, missing one of three.
    assert min_dcf(roc(scores, same)) == pytest.approx((1 / 3, 0.8))
    assert min_dcf(roc(scores, same), p_target=0.5)[0] == pytest.approx(1 / 3)
    assert min_dcf(roc([1, 2], np.array([True, False]))) == (1.0, math.inf)  # a false alarm first: accept nothing


def test_cosine_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asit.evaluate.verification.TRIAL_BLOCK", 7)
    rng = np.random.default_rng(0)
    x, a, b = rng.normal(size=(9, 5)) * 40, rng.integers(0, 9, 30), rng.integers(0, 9, 30)
    expected = [x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i, j in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosine_scores(x, a, b), expected, atol=1e-6)
    x[[3, 5]] = 0
    with pytest.raises(AsitError, match="2 of 9 embeddings are zero or not finite, the first is that of clip 3"):
        cosine_scores(x, a, b)


def test_all_pairs_where_they_are_few() -> None:
    labels = np.array(["b", "a", "b", "c", "a", "b"])
    found = trials_from_labels(labels, 0, most=1000)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == pairs
    assert found.same.tolist() == [labels[i] == labels[j] for i, j in pairs]
    numbered = trials_from_labels(np.array([1, 0, 1, 2, 0, 1]), 7, most=1000)
    assert all((x == y).all() for x, y in zip(found, numbered, strict=True))


def test_drawn_trials_are_balanced_distinct_and_seeded() -> None:
    labels = np.random.default_rng(0).integers(0, 40, 2000)
    found = trials_from_labels(labels, 3, most=5000)
    assert (len(found.same), found.same.sum()) == (5000, 2500)
    assert (found.first < found.second).all()
    assert len(np.unique(found.first * 2000 + found.second)) == 5000
    assert ((labels[found.first] == labels[found.second]) == found.same).all()
    again, other = trials_from_labels(labels, 3, most=5000), trials_from_labels(labels, 4, most=5000)
    assert (again.first == found.first).all()
    assert (other.first != found.first).any()
    # Uniform over pairs: of 2000 clips each is in 5 trials on average; the trials cover nearly all clips.
    assert len(np.unique(np.concatenate([found.first, found.second]))) > 1950
    # Few same-speaker pairs: all of them, and different ones fill up.
    few = trials_from_labels(np.concatenate([np.arange(300), [0, 1]]), 0, most=1000)
    assert (len(few.same), few.same.sum()) == (1000, 2)
    # Few different-speaker pairs: all of them.
    most_same = trials_from_labels(np.array([0] * 100 + [1]), 0, most=1000)
    assert (len(most_same.same), (~most_same.same).sum()) == (1000, 100)


def test_trials_that_cannot_be_drawn() -> None:
    with pytest.raises(AsitError, match="4 clips of 1 speakers, 1 of them with two clips or more"):
        trials_from_labels(["a"] * 4, 0, most=1000)
    with pytest.raises(AsitError, match="3 clips of 3 speakers, 0 of them"):
        trials_from_labels(["a", "b", "c"], 0, most=1000)


def _speakers(count: int, each: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    return rng.normal(size=(count, 8))[labels] + rng.normal(size=(len(labels), 8)) * 0.8, labels


def test_verification_record() -> None:
    x, labels = _speakers(25, 6)
    found = trials_from_labels(labels, 0, most=2000)
    scores = cosine_scores(x, found.first, found.second)
    speakers = labels[found.first], labels[found.second]
    record = verification_metrics(scores, found.same, speakers=speakers, seed=1, draws=100)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    metrics = record["metrics"]
    for name, metric in (("EER", eer), ("minDCF", min_dcf)):
        assert (metrics[name]["value"], metrics[name]["threshold"]) == metric(roc(scores, found.same))
        low, high = metrics[name]["interval"]
        assert low < metrics[name]["value"] < high
    assert (record["trials"], record["same_trials"]) == (len(scores), found.same.sum())
    assert record["bootstrap"] == {"unit": "speaker", "units": 25, "draws": 100, "seed": 1}
    order = np.random.default_rng(0).permutation(len(scores))
    mixed = verification_metrics(
        scores[order], found.same[order], speakers=tuple(s[order] for s in speakers), seed=1, draws=100
    )
    assert mixed["metrics"] == metrics
    by_trial = verification_metrics(scores, found.same, draws=100)
    assert by_trial["bootstrap"]["unit"] == "trial"
    width = {kind: r["metrics"]["EER"]["interval"] for kind, r in (("speaker", record), ("trial", by_trial))}
    assert width["speaker"][1] - width["speaker"][0] > width["trial"][1] - width["trial"][0]
    none = verification_metrics(scores, found.same, draws=0)
    assert none["metrics"]["EER"]["interval"] is None


def test_a_draw_of_speakers_weighs_their_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw, against the trials written out as often as they count."""
    x, labels = _speakers(6, 4)
    found = trials_from_labels(labels, 0, most=1000)
    scores = cosine_scores(x, found.first, found.second).astype(float)
    speakers = labels[found.first], labels[found.second]
    seen: list[list[float]] = []
    monkeypatch.setattr("asit.evaluate.verification_metrics.interval", lambda draws, **_: seen.append(list(draws)))
    verification_metrics(scores, found.same, speakers=speakers, seed=5, draws=1)
    rng = np.random.default_rng([5, 6])
    times = np.bincount(rng.integers(0, 6, 6), minlength=6)
    counts = [times[a] if a == b else times[a] * times[b] for a, b in zip(*speakers, strict=True)]
    rows = np.repeat(np.arange(len(scores)), counts)
    assert seen[0] == pytest.approx([eer(roc(scores[rows], found.same[rows]))[0]])
    assert seen[1] == pytest.approx([min_dcf(roc(scores[rows], found.same[rows]))[0]])


def test_refusals() -> None:
    with pytest.raises(AsitError, match="3 same-speaker and 0 different-speaker trials"):
        verification_metrics([0.1, 0.2, 0.3], np.ones(3, bool))
    same = np.array([True, False, True])
    with pytest.raises(
        AsitError, match="1 of 3 trials disagree with their speakers, the first is trial 1: a and a, marked"
    ):
        verification_metrics([0.1, 0.2, 0.3], same, speakers=(["a", "a", "b"], ["a", "a", "b"]))
