"""Ranking metrics and their bootstrap draws against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from asit.evaluate.bootstrap import Units, interval
from asit.evaluate.ranking import d_prime, positives, ranking_draws, score_table

from .conftest import average_precision, roc_auc, several  # type: ignore[import-not-found]


@pytest.mark.parametrize("ties", [True, False])
def test_average_precision_and_auc_are_scikit_learns(ties: bool) -> None:
    scores, targets = several(400, 70, ties=ties)  # more classes than a block of columns
    ap, auc = average_precision(scores, targets), roc_auc(scores, targets)
    assert np.isnan(ap[-1])
    assert np.isnan(auc[[-1, -2]]).all()
    for c in range(69):
        assert ap[c] == pytest.approx(average_precision_score(targets[:, c], scores[:, c]), abs=1e-12)
    for c in range(68):
        assert auc[c] == pytest.approx(roc_auc_score(targets[:, c], scores[:, c]), abs=1e-12)
    assert ap[-2] == 1.0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_column_is_scikit_learns(data: st.DataObject) -> None:
    values = data.draw(st.lists(st.sampled_from([-1e30, -2.0, -0.0, 0.0, 1e-30, 0.5, 0.5 + 1e-9, 3.0]), min_size=2))
    labels = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    scores, targets = np.array(values)[:, None], np.array(labels)[:, None]
    ap, auc = average_precision(scores, targets)[0], roc_auc(scores, targets)[0]
    if not any(labels):
        assert math.isnan(ap)
        assert math.isnan(auc)
        return
    assert ap == pytest.approx(average_precision_score(labels, values), abs=1e-12)
    if all(labels):
        assert math.isnan(auc)
    else:
        assert auc == pytest.approx(roc_auc_score(labels, values), abs=1e-12)


def test_average_precision_and_auc_by_hand() -> None:
    targets = np.array([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.5, 0.1], [0.8, 0.5, 0.1], [0.7, 0.5, 0.1], [0.1, 0.5, 0.1]])
    # Class 0: precision 1 at the first positive, 2/3 at the second. Class 2 is constant: one threshold, 1 of 4.
    np.testing.assert_allclose(average_precision(scores, targets), [(1 + 2 / 3) / 2, np.nan, 0.25], rtol=1e-15)
    np.testing.assert_allclose(roc_auc(scores, targets), [3 / 4, np.nan, 0.5], rtol=1e-15)


def test_d_prime() -> None:
    for auc in (0.5, 0.6, 0.975, 1e-4):
        assert d_prime(auc) == pytest.approx(math.sqrt(2) * norm.ppf(auc), abs=1e-12)
    assert (d_prime(1.0), d_prime(0.0)) == (math.inf, -math.inf)
    assert math.isnan(d_prime(math.nan))


@pytest.mark.parametrize("groups", [False, True])
def test_a_draw_is_the_metric_of_the_clips_drawn(groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted sums against scikit-learn on the drawn clips themselves, each repeated as often as it was drawn."""
    monkeypatch.setattr("asit.evaluate.ranking.WEIGHT_BLOCK", 80 * 17)  # 17 draws a block: a last one that is not full
    scores, targets = several(80, 8)
    units = Units.of(80, np.arange(80) // 4 if groups else None)
    ap, auc = ranking_draws(score_table(scores), *positives(targets), units, 40, 3)
    assert ap.shape == auc.shape == (40,)
    for draw, times in enumerate(units.draws(40, 3)):
        assert not groups or (times.reshape(-1, 4) == times[::4, None]).all()
        rows = np.repeat(np.arange(80), times)
        some = [c for c in range(8) if targets[rows, c].any()]
        both = [c for c in some if not targets[rows, c].all()]
        expected = np.mean([average_precision_score(targets[rows, c], scores[rows, c]) for c in some])
        assert ap[draw] == pytest.approx(expected, abs=1e-6)
        expected = np.mean([roc_auc_score(targets[rows, c], scores[rows, c]) for c in both])
        assert auc[draw] == pytest.approx(expected, abs=1e-6)


def test_draws_lie_above_average_precision_and_are_centred() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((1000, 100)) < 0.02
    scores = rng.normal(size=targets.shape) + targets
    value = float(np.nanmean(average_precision(scores, targets)))
    drawn, _ = ranking_draws(score_table(scores), *positives(targets), Units.of(1000), 100, 0)
    plain = interval(drawn, units=1000)
    centred = interval(drawn, units=1000, centre=value)
    assert plain is not None
    assert centred is not None
    assert plain[0] > value  # why it is centred
    assert centred[0] < value < centred[1]
    assert centred[1] - centred[0] == pytest.approx(plain[1] - plain[0])
