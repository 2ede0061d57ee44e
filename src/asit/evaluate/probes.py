"""Probes of frozen features: ridge regression, its penalty chosen by cross-validation or on a validation split; k-NN.

Letters: N training clips, n scored clips, D feature width, C classes.
Means, scales, principal components and the penalty come from the training split, or the penalty from a validation
split; nothing of the scored clips enters a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from asit.evaluate.ranking import positives, ranking

Floats = NDArray[np.float32]
Criterion = Literal["accuracy", "mAP"]
"""What the penalty is chosen by: accuracy for one label per clip, mAP for several."""

PENALTIES: NDArray[np.float64] = np.logspace(0, 6, 13)
"""Penalties tried, half a decade apart; features are standardised, so their squares sum to the number of clips."""
FEW_CLIPS_PENALTY = 10.0
"""Penalty where no clip can be held out: the best of five at 1, 5 and 13 clips of each of 40 Arabic words."""
FOLDS = 5
WIDEST = 1024
"""Features wider than this are reduced to as many principal components: the cost is cubic in the width."""
_Sums = Sequence[NDArray[np.float64]]
"""Sums over clips that a fit needs: their number, x, y, x'x and x'y; those of folds are added and subtracted."""
KNN_TEMPERATURE = 0.07
"""A neighbour's weight is exp(cosine / 0.07), as in the k-NN evaluation of InstDisc (arXiv 1805.01978) and DINO."""
NEIGHBOURS = 20
"""Neighbours, as in DINO's evaluation (arXiv 2104.14294)."""
_COSINES = 2**24  # cosines, or targets of neighbours, held at a time: 64 MB
_ROWS = 16384  # clips converted at a time
_PCA_CLIPS = 50_000  # training clips that principal components are computed on


@dataclass(frozen=True)
class ProbeScores:
    """Scores that a probe gives.

    Attributes:
        scores: (n, C) float32; higher is likelier.
        regularisation: the ridge penalty, or the epochs of a trained probe; None where nothing is chosen.
        chosen_by: how it was chosen, in words.
    """

    scores: Floats
    regularisation: float | None
    chosen_by: str


def ridge_scores(
    train_x: Floats,
    targets: Floats,
    x: Floats,
    *,
    criterion: Criterion,
    seed: int,
    groups: NDArray[np.int64] | None = None,
    validation: tuple[Floats, Floats] | None = None,
) -> ProbeScores:
    """Fit ridge regression on standardised features, one target 2 t - 1 per class, and score other clips.

    On frozen features of this size it does as well as logistic regression and has a closed form: one
    eigendecomposition per fold serves all penalties and classes. Of equally good penalties the strongest is taken.
    Where no clip can be held out (one clip per class, no validation split) the penalty is `FEW_CLIPS_PENALTY`.

    Args:
        train_x: (N, D) finite features.
        targets: (N, C) label weights in [0, 1]; one-hot for the criterion "accuracy".
        x: (n, D) features to score.
        criterion: what the penalty is chosen by; mAP is over the classes with positives.
        seed: of the folds and the principal components.
        groups: (N,) two or more groups, such as speakers, each kept within one fold.
        validation: features and targets to choose the penalty on, instead of cross-validation.
    """
    rng = np.random.default_rng(seed)
    wide = train_x.shape[1] > WIDEST
    if wide:
        reduce = _reduction(train_x, WIDEST, seed)
        train_x, x = reduce(train_x), reduce(x)
        if validation is not None:
            validation = (reduce(validation[0]), validation[1])
    # Principal components keep their variances: scaled to one, the weakest would count as much as the strongest.
    scale = not wide
    if validation is not None:
        penalty = _best_penalty([_RidgeFit(_sums(train_x, targets), scale)], [validation], criterion)
        chosen_by = f"{criterion} on the validation split"
    elif (fold_of := draw_folds(targets, criterion, groups, rng)) is None:
        penalty, chosen_by = FEW_CLIPS_PENALTY, "fixed: no clip can be held out"
    else:
        parts = [np.flatnonzero(fold_of == fold) for fold in range(int(fold_of.max()) + 1)]
        sums = [_sums(train_x[part], targets[part]) for part in parts]
        total = [sum(of_folds) for of_folds in zip(*sums, strict=True)]
        fits = (_RidgeFit([a - b for a, b in zip(total, held_out, strict=True)], scale) for held_out in sums)
        penalty = _best_penalty(fits, ((train_x[part], targets[part]) for part in parts), criterion)
        unit = "groups" if groups is not None else "clips"
        chosen_by = f"{criterion} over {len(parts)} folds of the training {unit}"
    fit = _RidgeFit(_sums(train_x, targets), scale)
    return ProbeScores(fit.predict(fit.rotate(x), penalty), penalty, chosen_by)


def knn_scores(train_x: Floats, targets: Floats, x: Floats, *, k: int = NEIGHBOURS) -> ProbeScores:
    """Score clips by the targets of their k nearest training clips, each weighted exp(cosine / 0.07).

    Features are standardised on the training split first: an offset common to all clips (a log-mel's mean level)
    would otherwise make every cosine nearly 1.

    Args:
        train_x, targets, x: as in `ridge_scores`.
        k: neighbours; at most the number of training clips.
    """
    mean, deviation = moments(train_x)
    train = _unit((train_x - mean) / deviation)
    k = min(k, len(train))
    scores = np.empty((len(x), targets.shape[1]), np.float32)
    rows = max(1, _COSINES // max(len(train), k * targets.shape[1]))
    for first in range(0, len(x), rows):
        cosines = _unit((x[first : first + rows] - mean) / deviation) @ train.T
        nearest = np.argpartition(cosines, -k, axis=1)[:, -k:]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / KNN_TEMPERATURE).astype(np.float64)
        weights /= weights.sum(1, keepdims=True)
        scores[first : first + rows] = np.einsum("rk,rkc->rc", weights, targets[nearest])
    return ProbeScores(scores, None, f"{k} neighbours, nothing chosen")


def stratified_folds(classes: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Assign each clip to a fold so that every fold has its share of each class: (N,) from class indices (N,).

    The folds are those of scikit-learn's `StratifiedKFold(folds, shuffle=True, random_state=seed)`.
    """
    _, first, code = np.unique(classes, return_index=True, return_inverse=True)
    code = np.argsort(np.argsort(first))[code]  # classes in the order of their first clips
    ordered = np.sort(code)
    counts = np.array([np.bincount(ordered[fold::folds], minlength=len(first)) for fold in range(folds)])
    rng = np.random.RandomState(seed)  # scikit-learn's generator
    out = np.empty(len(code), np.int64)
    for c in range(len(first)):
        out[code == c] = rng.permutation(np.repeat(np.arange(folds), counts[:, c]))
    return out


def principal_components(x: Floats, count: int, seed: int) -> tuple[Floats, Floats]:
    """Compute the mean (D,) and the first `count` principal components (count, D) of features (N, D).

    Up to signs and rounding they are those of scikit-learn's `PCA(count, svd_solver="randomized", random_state=seed)`.
    N. Halko, P. Martinsson and J. Tropp, Finding structure with randomness (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    mean = x.mean(0)
    a = x - mean
    transposed = len(x) < x.shape[1]
    if transposed:
        a = a.T
    rng = np.random.RandomState(seed)  # scikit-learn's generator
    q = rng.normal(size=(a.shape[1], count + 10)).astype(np.float32)
    for _ in range(7 if count < 0.1 * min(a.shape) else 4):
        q = linalg.lu(a @ q, permute_l=True, check_finite=False)[0]
        q = linalg.lu(a.T @ q, permute_l=True, check_finite=False)[0]
    q = linalg.qr(a @ q, mode="economic", check_finite=False)[0]
    left, _, right = linalg.svd(q.T @ a, full_matrices=False)
    return mean, ((q @ left).T if transposed else right)[:count]


def moments(x: Floats) -> tuple[Floats, Floats]:
    """Compute the mean and standard deviation of each feature, (D,) float32 each; 1 where a feature is constant."""
    mean = x.mean(0, dtype=np.float64)
    variance = sum((np.square(part - mean).sum(0) for part in _blocks(x)), np.zeros(x.shape[1])) / len(x)
    constant = variance <= 1e-12 * np.maximum(mean**2, 1e-30)
    return mean.astype(np.float32), np.where(constant, 1.0, np.sqrt(variance)).astype(np.float32)


def _sums(x: Floats, targets: Floats) -> _Sums:
    D, C = x.shape[1], targets.shape[1]
    out = np.array(float(len(x))), np.zeros(D), np.zeros(C), np.zeros((D, D)), np.zeros((D, C))
    for rows, wanted in zip(_blocks(x), _blocks(targets), strict=True):
        rows, wanted = rows.astype(np.float64), 2.0 * wanted - 1.0
        for total, part in zip(out[1:], (rows.sum(0), wanted.sum(0), rows.T @ rows, rows.T @ wanted), strict=True):
            total += part
    return out


class _RidgeFit:
    """Ridge regression for every penalty a: W(a) = V (L + a)^-1 V' X'Y with X'X = V L V', X standardised."""

    def __init__(self, sums: _Sums, scale: bool) -> None:
        n, x, y, xx, xy = sums
        self.mean, self.offset = x / n, y / n
        covariance = xx - n * np.outer(self.mean, self.mean)
        variance = covariance.diagonal() / n
        # A constant feature has a variance of rounding errors; dividing by it would make them count.
        constant = variance <= 1e-12 * np.maximum(self.mean**2, 1e-30)
        self.scale = np.where(constant, 1.0, np.sqrt(np.maximum(variance, 0))) if scale else np.ones(len(variance))
        covariance /= np.outer(self.scale, self.scale)
        covariance[constant], covariance[:, constant] = 0, 0
        eigenvalues, self.vectors = np.linalg.eigh(covariance)
        self.eigenvalues = np.maximum(eigenvalues, 0.0)  # rounding can make a zero eigenvalue negative
        correlation = (xy - n * np.outer(self.mean, self.offset)) / self.scale[:, None]
        correlation[constant] = 0
        self.projected = self.vectors.T @ correlation

    def rotate(self, x: Floats) -> Floats:
        """Project standardised features on the eigenvectors, once for all penalties."""
        parts = [(((part - self.mean) / self.scale) @ self.vectors).astype(np.float32) for part in _blocks(x)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.eigenvalues)), np.float32)

    def predict(self, rotated: Floats, penalty: float) -> Floats:
        weights = (self.projected / (self.eigenvalues + penalty)[:, None]).astype(np.float32)
        return rotated @ weights + self.offset.astype(np.float32)


def _best_penalty(fits: Iterable[_RidgeFit], held_out: Iterable[tuple[Floats, Floats]], criterion: Criterion) -> float:
    """Find the penalty with the highest sum over folds; the strongest of equal ones."""
    totals = np.zeros(len(PENALTIES))
    for fit, (x, targets) in zip(fits, held_out, strict=True):
        rotated = fit.rotate(x)
        totals += [criterion_value(fit.predict(rotated, penalty), targets, criterion) for penalty in PENALTIES]
    return float(PENALTIES[np.flatnonzero(totals == totals.max())[-1]])


def criterion_value(scores: Floats, targets: Floats, criterion: Criterion) -> float:
    """Count correct clips, or compute mAP (0 where no class has a positive)."""
    if criterion == "accuracy":
        return float((scores.argmax(1) == targets.argmax(1)).sum())
    precision, _ = ranking(scores, *positives(targets > 0.5))
    precision = precision[~np.isnan(precision)]
    return float(precision.mean()) if len(precision) else 0.0


def draw_folds(
    targets: Floats, criterion: Criterion, groups: NDArray[np.int64] | None, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """Draw the fold of each training clip, (N,); None where two folds cannot be made. Arguments: see `ridge_scores`."""
    N = len(targets)
    if groups is not None:
        unique, member = np.unique(groups, return_inverse=True)
        return np.asarray((rng.permutation(len(unique)) % min(FOLDS, len(unique)))[member], np.int64)
    fold_of = np.empty(N, np.int64)
    if criterion == "mAP":
        if N < 2:
            return None
        fold_of[rng.permutation(N)] = np.arange(N) % min(FOLDS, N)
        return fold_of
    truth = targets.argmax(1)
    sizes = np.bincount(truth)
    sizes = sizes[sizes > 0]
    if sizes.max() < 2:
        return None
    seed = int(rng.integers(2**31))
    if sizes.min() >= 2:
        return stratified_folds(truth, min(FOLDS, int(sizes.min())), seed)
    # Some classes have a single clip: deal the clips out class by class, each class from where the last one ended.
    mixed = rng.permutation(N)
    fold_of[mixed[np.argsort(truth[mixed], kind="stable")]] = np.arange(N) % min(FOLDS, int(sizes.max()))
    return fold_of


def _reduction(x: Floats, count: int, seed: int) -> Callable[[Floats], Floats]:
    """Return the projection on the principal components of the standardised training features."""
    mean, deviation = moments(x)
    rows = x
    if len(x) > _PCA_CLIPS:
        rows = x[np.sort(np.random.default_rng([seed, 1]).permutation(len(x))[:_PCA_CLIPS])]
    rows = (rows - mean) / deviation
    centre, components = principal_components(rows, min(count, *rows.shape), seed)
    return lambda x: np.concatenate([((part - mean) / deviation - centre) @ components.T for part in _blocks(x)])


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _blocks(x: Floats) -> Iterator[Floats]:
    return (x[first : first + _ROWS] for first in range(0, len(x), _ROWS))
