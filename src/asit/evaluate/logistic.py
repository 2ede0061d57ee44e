"""Logistic regression with an L2 penalty on weighted rows, by L-BFGS.

It minimises sum_i s_i loss_i + penalty / 2 |W|^2 over W and b: the objective of scikit-learn's `LogisticRegression`
with C = 1 / penalty and sample weights s. The loss is the cross-entropy of a softmax, or, where rows may have several
labels, the sum of the binary cross-entropies of the classes.

Letters: n rows, D features, r coordinates, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import linalg, optimize, special

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Solution:
    """A minimum: weights (D, C) and bias (C,) of standardised features, and the largest entry of the gradient there."""

    weights: Array
    bias: Array
    gradient: float


class LogisticProblem:
    """The same rows fitted with several penalties; each fit starts where the last one ended.

    Args:
        x: (n, D), standardised; products are in its precision.
        targets: (n, C), in [0, 1]; of a softmax each row sums to 1.
        weights: (n,) s, positive.
        multi: whether rows may have several labels.
    """

    def __init__(self, x: npt.NDArray[Any], targets: Array, weights: Array, multi: bool) -> None:
        self.targets, self.s, self.multi = targets, weights[:, None], multi
        # W is a combination of rows, so their principal axes describe it; scaled by the curvature along each, they take
        # L-BFGS a tenth of the steps.
        scaled = x * np.sqrt(self.s).astype(x.dtype)
        few = len(x) < x.shape[1]
        values, axes = linalg.eigh(scaled @ scaled.T if few else scaled.T @ scaled, check_finite=False)
        some = values > 1e-6 * values[-1] * (1e-6 if x.dtype == np.float64 else 1)
        self.values, axes = values[some].astype(np.float64), axes[:, some]
        self.basis = (scaled.T @ axes) / np.sqrt(values[some]) if few else axes
        self.x = x @ self.basis
        self.curvature = 0.25 if multi else 1 / targets.shape[1]
        self.last = np.zeros((len(self.values) + 1, targets.shape[1]))
        """Weights (r, C) on the axes, and bias, of the last fit."""

    def solve(self, penalty: float, precision: float = 1e-4, steps: int = 2000) -> Solution:
        """Minimise until no entry of the gradient exceeds `precision`, or for so many steps.

        The gradient is that along the scaled axes; its unit is the root of the sum of weights."""
        total = self.curvature * float(self.s.sum())
        scale = 1 / np.sqrt(np.append(self.curvature * self.values + penalty, total))[:, None]

        def value(flat: Array) -> tuple[float, Array]:
            loss, gradient = self._value(flat.reshape(scale.shape[0], -1) * scale, penalty)
            return loss, (gradient * scale).ravel()

        limit = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 0.0}
        limit["gtol"] = precision * float(np.sqrt(self.s.sum()))
        found = optimize.minimize(value, (self.last / scale).ravel(), jac=True, method="L-BFGS-B", options=limit)
        self.last = found.x.reshape(self.last.shape) * scale
        gradient = found.jac.reshape(scale.shape[0], -1) / scale
        return Solution(self.basis @ self.last[:-1], self.last[-1], float(np.abs(gradient).max()))

    def _value(self, table: Array, penalty: float) -> tuple[float, Array]:
        """Return the objective and its gradient (r + 1, C)."""
        kind, weights = self.x.dtype, table[:-1]
        logits = (self.x @ weights.astype(kind)).astype(np.float64) + table[-1]
        if self.multi:
            loss = np.logaddexp(0, logits) - self.targets * logits
            error = special.expit(logits) - self.targets
        else:
            log_scores = special.log_softmax(logits, axis=1)
            loss, error = -self.targets * log_scores, np.exp(log_scores) - self.targets
        error *= self.s
        gradient = np.vstack([self.x.T @ error.astype(kind) + penalty * weights, error.sum(0)])
        value = float((self.s * loss).sum()) + penalty / 2 * float(np.square(weights).sum())
        return value, gradient
