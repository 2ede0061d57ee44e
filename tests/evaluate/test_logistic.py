"""Logistic regression against scikit-learn, within a bound from gradient and curvature."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from sklearn.linear_model import LogisticRegression

from asit.evaluate.logistic import LogisticProblem


def gradient_and_curvature(
    x: np.ndarray, targets: np.ndarray, weights: np.ndarray, at: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """Gradient at (D + 1, C) parameters, and the least curvature there but for a shift of all biases, in float64."""
    one = np.hstack([x, np.ones((len(x), 1))])
    scores = special.softmax(one @ at, axis=1)
    ridge = np.ones_like(at) * penalty
    ridge[-1] = 0
    gradient = one.T @ (weights[:, None] * (scores - targets)) + ridge * at
    classes = targets.shape[1]
    hessian = np.zeros((at.size, at.size))
    for row, score, weight in zip(one, scores, weights, strict=True):
        hessian += weight * np.kron(np.outer(row, row), np.diag(score) - np.outer(score, score))
    hessian += np.diag(ridge.ravel())
    shift = np.zeros(at.size)
    shift[-classes:] = 1
    return gradient, float(np.linalg.eigvalsh(hessian + np.outer(shift, shift))[0])


@pytest.mark.parametrize("penalty", [0.3, 10.0])
@pytest.mark.parametrize(("rows", "width"), [(90, 12), (30, 45)])
def test_softmax_is_scikit_learns(rows: int, width: int, penalty: float) -> None:
    """Near the minimum an error is at most gradient / curvature; the factor 2 is for the curvature's own change."""
    rng = np.random.default_rng([rows, width])
    x, truth, weights = rng.normal(size=(rows, width)), rng.integers(0, 3, rows), rng.uniform(0.2, 1, rows)
    x[:, 0] *= 30  # badly scaled
    targets = np.eye(3)[truth]
    problem = LogisticProblem(x, targets, weights, multi=False)
    for before in (1000.0, penalty):  # the second fit starts where the first ended
        found = problem.solve(before)
    own = np.vstack([found.weights, found.bias])
    gradient, curvature = gradient_and_curvature(x, targets, weights, own, penalty)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-12, max_iter=100_000).fit(x, truth, weights)
    other = np.vstack([theirs.coef_.T, theirs.intercept_ - theirs.intercept_.mean()])
    assert np.linalg.norm(gradient) < 0.05
    rest, _ = gradient_and_curvature(x, targets, weights, other, penalty)
    bound = 2 * (np.linalg.norm(gradient) + np.linalg.norm(rest)) / curvature
    assert np.linalg.norm(own - other) <= bound


def test_sigmoids_are_scikit_learns_class_by_class() -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(80, 6)), rng.uniform(0.2, 1, 80)
    targets = (rng.random((80, 3)) < (0.2, 0.5, 0.7)).astype(float)
    found = LogisticProblem(x, targets, weights, multi=True).solve(2.0, 1e-8)
    for c in range(3):
        theirs = LogisticRegression(C=0.5, tol=1e-12, max_iter=10_000).fit(x, targets[:, c], weights)
        np.testing.assert_allclose(found.weights[:, c], theirs.coef_[0], atol=1e-5)
        np.testing.assert_allclose(found.bias[c], theirs.intercept_[0], atol=1e-5)
