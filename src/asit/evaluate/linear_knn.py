"""Readers fitted on frozen features: ridge regression and nearest neighbours, for one label a clip or several.

Letters: N training clips, n scored clips, D width of features, C classes.
Both give scores (n, C) rather than names, so that every metric can be had from them. Nothing of the scored side goes
into a fit: means, scales and the regularisation come from the training side, or from a validation side where there is
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from asit.errors import AsitError
from asit.evaluate.metrics import average_precision

Floats = NDArray[np.float32]
Aim = Literal["accuracy", "mAP"]
"""What the regularisation is chosen by: one label a clip, or several."""

RIDGE_GRID: NDArray[np.float64] = np.logspace(0, 6, 13)
"""Ridge penalties tried, for standardised features (whose squares sum to the number of clips): half a decade apart."""
FEW = 10.0
"""The ridge penalty where nothing can choose one: the best of five at 1, 5 and 13 clips of each of 40 Arabic words."""
WIDEST = 1024
"""Widest features that are probed as they are."""
KNN_TEMPERATURE = 0.07
"""A neighbour's vote is exp(cosine / 0.07), as in the k-NN evaluation of InstDisc (arXiv 1805.01978) and DINO."""
NEIGHBOURS = 20
"""Neighbours asked, as in DINO's evaluation (arXiv 2104.14294)."""
_ROWS = 16384  # clips that are copied at a time
_COSINES = 2**24  # cosines, or neighbours' targets, held at a time: 64 MB
_DIRECTIONS_FROM = 50_000  # training clips that main directions are found on


@dataclass(frozen=True)
class Scored:
    """What a probe says of the scored clips.

    Attributes:
        scores: (n, C) float32; higher is likelier.
        regularisation: what was chosen on the training side: the ridge penalty, or the epochs of a trained probe; None
            where nothing is chosen.
        chosen_by: how, in words.
    """

    scores: Floats
    regularisation: float | None
    chosen_by: str


def ridge_probe(
    train_x: Floats,
    targets: Floats,
    x: Floats,
    *,
    aim: Aim,
    seed: int,
    folds: int = 5,
    groups: ArrayLike | None = None,
    validation: tuple[Floats, Floats] | None = None,
    widest: int = WIDEST,
    rng: np.random.Generator | None = None,
) -> Scored:
    """Ridge regression on standardised features, one target a class, its penalty chosen on the training side.

    Targets go in as 2 t - 1, so +-1 for hard labels. On frozen features of this size ridge regression reads as well as
    logistic regression and has a closed form: a fold's sums of products serve every penalty through one
    eigendecomposition, and AudioSet's 527 classes cost hardly more than one. For several labels the same scores are
    ranked within each class, which is all that mAP looks at. Features wider than `widest` are first reduced to that
    many main directions of the training side, since the cost is cubic in the width. A tie between penalties goes to
    the stronger one.

    Args:
        train_x: (N, D) finite features.
        targets: (N, C) weights of the labels in [0, 1]; for the aim "accuracy" one-hot.
        x: (n, D) features to score.
        aim: what the penalty is chosen by: accuracy, or the mean average precision of classes that have positives.
        seed: of the folds, and of the main directions.
        folds: folds of the cross-validation; fewer where a class, or the groups, has fewer members.
        groups: (N,) groups, such as speakers: a group never lies in two folds.
        validation: features and targets to choose the penalty on instead.
        rng: what the folds are drawn from; None: a generator of the seed.

    Where no clip can be held out (one clip a class, no validation side) the penalty is `FEW`.
    """
    rng = np.random.default_rng(seed) if rng is None else rng
    wide = train_x.shape[1] > widest
    if wide:
        reduce = _Directions(train_x, widest, seed)
        train_x, x = reduce(train_x), reduce(x)
        if validation is not None:
            validation = (reduce(validation[0]), validation[1])
    # Main directions keep their lengths: scaled each to one, the weakest would be as loud as the strongest.
    scale = not wide
    if validation is not None:
        penalty = _best([_Fit(_sums(train_x, targets), scale)], [validation], aim)
        chosen_by = f"{aim} on the validation side"
    else:
        fold_of = _folds(targets, aim, folds, groups, rng)
        if fold_of is None:
            penalty, chosen_by = FEW, "fixed: no clip can be held out"
        else:
            parts = [np.flatnonzero(fold_of == fold) for fold in range(int(fold_of.max()) + 1)]
            sums = [_sums(train_x[part], targets[part]) for part in parts]
            whole = _Sums.total(sums)
            fits = (_Fit(whole - one, scale) for one in sums)
            penalty = _best(fits, ((train_x[part], targets[part]) for part in parts), aim)
            unit = "groups" if groups is not None else "clips"
            chosen_by = f"{aim} over {len(parts)} folds of the training {unit}"
    fit = _Fit(_sums(train_x, targets), scale)
    return Scored(fit.scores(x, penalty), penalty, chosen_by)


def knn_probe_scores(train_x: Floats, targets: Floats, x: Floats, *, k: int = NEIGHBOURS) -> Scored:
    """The k nearest training clips by cosine, each with weight exp(cosine / 0.07): nothing is fitted.

    A class' score is the weighted mean of the neighbours' targets for it. Features are standardised on the training
    side first: an offset common to all clips (a log-mel's mean level) would otherwise make every cosine nearly 1.

    Args:
        train_x, targets, x: as `ridge_probe`.
        k: neighbours; at most the number of training clips.
    """
    mean, deviation = _moments(train_x)
    near = _unit((train_x - mean) / deviation)
    k = min(k, len(near))
    scores = np.empty((len(x), targets.shape[1]), np.float32)
    rows = max(1, _COSINES // max(len(near), k * targets.shape[1]))
    for first in range(0, len(x), rows):
        cosines = _unit((x[first : first + rows] - mean) / deviation) @ near.T
        nearest = np.argpartition(cosines, -k, axis=1)[:, -k:]
        votes = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / KNN_TEMPERATURE).astype(np.float64)
        votes /= votes.sum(1, keepdims=True)
        scores[first : first + rows] = np.einsum("rk,rkc->rc", votes, targets[nearest])
    return Scored(scores, None, f"{k} neighbours, nothing chosen")


def one_hot(indices: NDArray[np.int64], classes: int) -> Floats:
    """(N,) class indices to (N, C) targets."""
    out = np.zeros((len(indices), classes), np.float32)
    out[np.arange(len(indices)), indices] = 1
    return out


# --- ridge regression from sums -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Sums over clips that a ridge regression needs; those of folds add up and can be taken out again."""

    count: int
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    xx: NDArray[np.float64]
    xy: NDArray[np.float64]

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count - other.count, self.x - other.x, self.y - other.y, self.xx - other.xx, self.xy - other.xy
        )

    @staticmethod
    def total(parts: list[_Sums]) -> _Sums:
        return _Sums(
            sum(part.count for part in parts),
            np.sum([part.x for part in parts], 0),
            np.sum([part.y for part in parts], 0),
            np.sum([part.xx for part in parts], 0),
            np.sum([part.xy for part in parts], 0),
        )


def _sums(x: Floats, targets: Floats) -> _Sums:
    D, C = x.shape[1], targets.shape[1]
    out = _Sums(len(x), np.zeros(D), np.zeros(C), np.zeros((D, D)), np.zeros((D, C)))
    for first in range(0, len(x), _ROWS):
        rows, aims = x[first : first + _ROWS].astype(np.float64), 2.0 * targets[first : first + _ROWS] - 1.0
        out.x[:] += rows.sum(0)
        out.y[:] += aims.sum(0)
        out.xx[:] += rows.T @ rows
        out.xy[:] += rows.T @ aims
    return out


class _Fit:
    """Ridge regression for every penalty: W(a) = V (L + a)^-1 V' X'Y with X'X = V L V', X standardised."""

    def __init__(self, sums: _Sums, scale: bool) -> None:
        n = sums.count
        self.mean, self.offset = sums.x / n, sums.y / n
        products = sums.xx - n * np.outer(self.mean, self.mean)
        variance = products.diagonal() / n
        # A feature that never changes has a variance of rounding; dividing by it would blow it up.
        still = variance <= 1e-12 * np.maximum(self.mean**2, 1e-30)
        self.scale = np.where(still, 1.0, np.sqrt(np.maximum(variance, 0))) if scale else np.ones(len(variance))
        products /= np.outer(self.scale, self.scale)
        products[still], products[:, still] = 0, 0
        values, self.vectors = np.linalg.eigh(products)
        self.values = np.maximum(values, 0.0)  # rounding can make a zero eigenvalue negative
        correlation = (sums.xy - n * np.outer(self.mean, self.offset)) / self.scale[:, None]
        correlation[still] = 0
        self.projected = self.vectors.T @ correlation

    def rotated(self, x: Floats) -> Floats:
        """Features along the eigenvectors."""
        out = np.empty((len(x), len(self.values)), np.float32)
        for first in range(0, len(x), _ROWS):
            out[first : first + _ROWS] = ((x[first : first + _ROWS] - self.mean) / self.scale) @ self.vectors
        return out

    def of_rotated(self, rotated: Floats, penalty: float) -> Floats:
        weights = (self.projected / (self.values + penalty)[:, None]).astype(np.float32)
        return rotated @ weights + self.offset.astype(np.float32)

    def scores(self, x: Floats, penalty: float) -> Floats:
        return self.of_rotated(self.rotated(x), penalty)


def _best(fits: Any, held: Any, aim: Aim) -> float:
    """The penalty with the best sum over folds; the strongest of equal ones."""
    good = np.zeros(len(RIDGE_GRID))
    for fit, (x, targets) in zip(fits, held, strict=True):
        rotated = fit.rotated(x)
        for index, penalty in enumerate(RIDGE_GRID):
            good[index] += _value(fit.of_rotated(rotated, penalty), targets, aim)
    return float(RIDGE_GRID[np.flatnonzero(good == good.max())[-1]])


def _value(scores: Floats, targets: Floats, aim: Aim) -> float:
    """Clips named rightly; or mAP, 0 where no class has a positive."""
    if aim == "accuracy":
        return float((scores.argmax(1) == targets.argmax(1)).sum())
    precision = average_precision(scores, targets > 0.5)
    precision = precision[~np.isnan(precision)]
    return float(precision.mean()) if len(precision) else 0.0


def _folds(
    targets: Floats, aim: Aim, folds: int, groups: ArrayLike | None, rng: np.random.Generator
) -> NDArray[np.int64] | None:
    """(N,) the fold of each training clip; None where no two folds can be made."""
    N = len(targets)
    if groups is not None:
        names = np.asarray(groups)
        if names.shape != (N,):
            raise AsitError(f"groups of shape {names.shape}", f"({N},), one a training clip", "pass one group a clip")
        _, member = np.unique(names, return_inverse=True)
        folds = min(folds, int(member.max()) + 1)
        if folds < 2:
            raise AsitError(
                "a single group of training clips",
                "at least two, to choose the regularisation by cross-validation",
                "pass no groups",
            )
        return np.asarray((rng.permutation(int(member.max()) + 1) % folds)[member], np.int64)
    fold_of = np.empty(N, np.int64)
    if aim == "mAP":
        if N < 2:
            return None
        fold_of[rng.permutation(N)] = np.arange(N) % min(folds, N)
        return fold_of
    truth = targets.argmax(1)
    sizes = np.bincount(truth)
    sizes = sizes[sizes > 0]
    if sizes.max() < 2:
        return None
    state = int(rng.integers(2**31))
    if sizes.min() >= 2:
        return stratified_folds(truth, min(folds, int(sizes.min())), state)
    # Some classes have a single clip: each class is dealt out in turn, the next where the last one ended.
    mixed = rng.permutation(N)
    dealt = mixed[np.argsort(truth[mixed], kind="stable")]
    fold_of[dealt] = np.arange(N) % min(folds, int(sizes.max()))
    return fold_of


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
    """Mean (D,) and the first `count` principal components (count, D) of features (N, D), by a randomised SVD.

    Up to signs and rounding those of scikit-learn's `PCA(count, svd_solver="randomized", random_state=seed)`.
    N. Halko, P. Martinsson and J. Tropp, Finding structure with randomness (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    mean = x.mean(0)
    a = x - mean
    turn = len(x) < x.shape[1]
    if turn:
        a = a.T
    rng = np.random.RandomState(seed)  # scikit-learn's generator
    q = rng.normal(size=(a.shape[1], count + 10)).astype(np.float32)
    for _ in range(7 if count < 0.1 * min(a.shape) else 4):
        q = linalg.lu(a @ q, permute_l=True, check_finite=False)[0]
        q = linalg.lu(a.T @ q, permute_l=True, check_finite=False)[0]
    q = linalg.qr(a @ q, mode="economic", check_finite=False)[0]
    left, _, right = linalg.svd(q.T @ a, full_matrices=False)
    return mean, ((q @ left).T if turn else right)[:count]


# --- features -------------------------------------------------------------------------------------------------------


class _Directions:
    """Standardised features to their main directions, both found on the training side."""

    def __init__(self, x: Floats, count: int, seed: int) -> None:
        self.mean, self.deviation = _moments(x)
        rows = x
        if len(x) > _DIRECTIONS_FROM:
            rows = x[np.sort(np.random.default_rng([seed, 1]).permutation(len(x))[:_DIRECTIONS_FROM])]
        rows = (rows - self.mean) / self.deviation
        self.centre, self.components = principal_components(rows, min(count, *rows.shape), seed)

    def __call__(self, x: Floats) -> Floats:
        parts = [((part - self.mean) / self.deviation - self.centre) @ self.components.T for part in _parts(x)]
        return np.concatenate(parts)


def _parts(x: Floats) -> Iterator[Floats]:
    return (x[first : first + _ROWS] for first in range(0, len(x), _ROWS))


def _moments(x: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each feature (1 where it never changes), (D,) float32."""
    mean = x.mean(0, dtype=np.float64)
    variance = sum((np.square(part - mean).sum(0) for part in _parts(x)), np.zeros(x.shape[1])) / len(x)
    still = variance <= 1e-12 * np.maximum(mean**2, 1e-30)
    return mean.astype(np.float32), np.where(still, 1.0, np.sqrt(variance)).astype(np.float32)


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
