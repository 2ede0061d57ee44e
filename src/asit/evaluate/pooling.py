"""Frozen features and what can be read off them: a linear probe and a nearest-neighbour probe.

Letters: N clips, R rows of a batch, S samples, T frames, F mel bins, P patches, D width, C classes.
The encoder is never trained here: features are computed once, then small closed-form readers are fitted on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from asit.errors import AsitError
from asit.evaluate.linear_knn import NEIGHBOURS, RIDGE_GRID, WIDEST, knn_probe_scores, one_hot, ridge_probe

__all__ = [
    "RIDGE_GRID",
    "Pooling",
    "ProbeResult",
    "features",
    "knn_probe",
    "linear_probe",
    "log_mel_statistics",
    "pool",
]

Floats = NDArray[np.float32]
Pooling = Literal["class", "mean", "class+mean", "time-mean", "mel-mean", "mean+std"]
Extract = Callable[[Tensor], Mapping[str, Tensor]]

DRAWS = 2000
"""Bootstrap draws for an interval."""


class LogMel(Protocol):
    """What the plain baseline needs of `asit.audio.fbank.FrontEnd`."""

    def fbank(self, wave: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reads on the test side.

    Attributes:
        accuracy: share of test clips named rightly.
        interval: its 95 % bootstrap interval over test clips, or over whole test groups where they are given.
        clips: test clips.
        regularisation: the ridge penalty chosen on the training side; for k-NN, None.
        per_class: class -> share of its test clips named rightly (classes without test clips are left out).
    """

    accuracy: float
    interval: tuple[float, float]
    clips: int
    regularisation: float | None
    per_class: dict[str, float]


def pool(cls: Tensor, patches: Tensor, grid: tuple[int, int], kind: Pooling) -> Tensor:
    """One vector a clip out of an encoder's tokens.

    Args:
        cls: class tokens (R, D).
        patches: patch tokens (R, P, D), time-major: all mel patches of the first time column, then the next.
        grid: (time, mel) patches; P is their product.
        kind: what to keep:
            "class": the class token, (R, D);
            "mean": the mean over all patches, (R, D);
            "class+mean": both side by side, (R, 2 D);
            "time-mean": the mean over time for each mel patch, lowest band first, (R, mel * D);
            "mel-mean": the mean over mel for each time patch, earliest first, (R, time * D);
            "mean+std": mean and (population) standard deviation over all patches, (R, 2 D).

    Raises:
        AsitError: an unknown kind, or a grid that does not hold P patches.
    """
    time, mel = grid
    if patches.ndim != 3 or time * mel != patches.shape[1]:
        raise AsitError(
            f"patch tokens of shape {tuple(patches.shape)} with a grid of {time} x {mel}",
            f"(rows, {time * mel}, width)",
            "pass the grid that the encoder returned with these tokens",
        )
    if kind == "class":
        return cls
    if kind == "mean":
        return patches.mean(1)
    if kind == "class+mean":
        return torch.cat([cls, patches.mean(1)], 1)
    if kind == "time-mean":
        return patches.reshape(-1, time, mel, patches.shape[2]).mean(1).flatten(1)
    if kind == "mel-mean":
        return patches.reshape(-1, time, mel, patches.shape[2]).mean(2).flatten(1)
    if kind == "mean+std":
        return torch.cat([patches.mean(1), patches.std(1, correction=0)], 1)
    raise AsitError(
        f"pooling {kind!r}",
        "class, mean, class+mean, time-mean, mel-mean or mean+std",
        "choose one of these",
    )


@torch.inference_mode()
def features(waves: Iterable[ArrayLike], extract: Extract, *, batch_size: int = 32) -> dict[str, Floats]:
    """Features of many clips in one pass, several kinds at once.

    Args:
        waves: float waveforms (S,), all of one length; an iterator is read batch by batch, so files may be read as it
            goes (`(front_end.pad(read(p, rate=16000), samples) for p in paths)`).
        extract: (R, S) float32 tensor on the CPU -> name -> (R, D) tensor. It moves the batch to its device, and puts
            the model in evaluation mode.
        batch_size: rows a call.

    Returns:
        name -> (N, D) float32, rows in the order of the clips.

    Raises:
        AsitError: no clip, clips of different lengths, or features that are not finite.
    """
    collected: dict[str, list[Floats]] = {}
    source = iter(waves)
    done, samples = 0, 0
    while batch := [np.asarray(wave, np.float32) for wave in islice(source, batch_size)]:
        samples = samples or batch[0].size
        for offset, wave in enumerate(batch):
            if wave.shape != (samples,):
                raise AsitError(
                    f"clip {done + offset} has shape {wave.shape}",
                    f"({samples},), as the first clip",
                    "cut and pad all clips to one length, for instance with FrontEnd.pad",
                )
        for name, rows in extract(torch.from_numpy(np.stack(batch))).items():
            array = rows.detach().float().cpu().numpy()
            if array.ndim != 2 or len(array) != len(batch):
                raise AsitError(
                    f"feature {name!r} of shape {array.shape} for {len(batch)} clips",
                    f"({len(batch)}, width)",
                    "pool the tokens to one vector a clip",
                )
            _finite(array, f"feature {name!r}", first=done)
            collected.setdefault(name, []).append(array)
        done += len(batch)
    if not done:
        raise AsitError("no clip to take features of", "at least one", "check the table or the split that was chosen")
    return {name: np.concatenate(parts) for name, parts in collected.items()}


@torch.inference_mode()
def log_mel_statistics(front_end: LogMel, waves: Tensor) -> Tensor:
    """The plain baseline: (R, S) waveforms -> (R, 2 F), mean and standard deviation over time of each log-mel bin."""
    spectrogram = front_end.fbank(waves)
    return torch.cat([spectrogram.mean(1), spectrogram.std(1, correction=0)], 1)


def linear_probe(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    *,
    seed: int,
    folds: int = 5,
    groups: ArrayLike | None = None,
    test_groups: ArrayLike | None = None,
) -> ProbeResult:
    """Accuracy of a ridge classifier on standardised features, its penalty chosen on the training side.

    See `asit.evaluate.linear_knn.ridge_probe`, which gives scores, and takes several labels a clip. Its cost: 7,200 x
    768 features with 40 classes take a few seconds on one core.

    Args:
        train_x, test_x: (N, D) features.
        train_y, test_y: (N,) labels, integers or strings.
        seed: of the folds and of the bootstrap.
        folds: folds of the cross-validation (fewer where a class, or the groups, has fewer members; at least 2).
        groups: (N,) groups, such as speakers, of the training clips: a group never lies in two folds, so the penalty
            is chosen for new groups, as a test side of new speakers asks for.
        test_groups: (N,) groups of the test clips: the bootstrap then draws whole groups, since clips of one speaker
            are not independent.

    Raises:
        AsitError: features that are not finite, shapes that disagree, one class only, or a test label that the
            training side does not have.
    """
    x, y, test, truth, classes = _sides(train_x, train_y, test_x, test_y)
    if groups is None and np.bincount(y).min() < 2:
        raise AsitError(
            "a class with a single training clip",
            "at least two, to choose the regularisation by cross-validation",
            "add clips, or leave that class out",
        )
    rng = np.random.default_rng(seed)
    scored = ridge_probe(
        x,
        one_hot(y, len(classes)),
        test,
        aim="accuracy",
        seed=seed,
        folds=folds,
        groups=groups,
        widest=WIDEST,
        rng=rng,
    )
    return _score(scored.scores.argmax(1), truth, classes, scored.regularisation, rng, test_groups)


def knn_probe(
    train_x: ArrayLike,
    train_y: ArrayLike,
    test_x: ArrayLike,
    test_y: ArrayLike,
    k: int = NEIGHBOURS,
    *,
    seed: int = 0,
    test_groups: ArrayLike | None = None,
) -> ProbeResult:
    """Accuracy of the k nearest training clips by cosine vote; see `asit.evaluate.linear_knn.knn_probe_scores`.

    Args:
        train_x, test_x: (N, D) features.
        train_y, test_y: (N,) labels, integers or strings.
        k: neighbours; at most the number of training clips.
        seed: of the bootstrap.
        test_groups: as in `linear_probe`.

    Raises:
        AsitError: as `linear_probe`.
    """
    x, y, test, truth, classes = _sides(train_x, train_y, test_x, test_y)
    scored = knn_probe_scores(x, one_hot(y, len(classes)), test, k=k)
    return _score(scored.scores.argmax(1), truth, classes, None, np.random.default_rng(seed), test_groups)


def _sides(
    train_x: ArrayLike, train_y: ArrayLike, test_x: ArrayLike, test_y: ArrayLike
) -> tuple[Floats, NDArray[np.int64], Floats, NDArray[np.int64], NDArray[Any]]:
    """Check both sides; labels become indices into the sorted classes of the training side."""
    train, test = np.asarray(train_x, np.float32), np.asarray(test_x, np.float32)
    train_labels, test_labels = np.asarray(train_y), np.asarray(test_y)
    for side, x, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 2 or labels.shape != (len(x),) or not len(x):
            raise AsitError(
                f"{side} features of shape {x.shape} with labels of shape {labels.shape}",
                "(clips, width) and (clips,), at least one clip",
                "pass one label for each row of features",
            )
        _finite(x, f"{side} features")
    if train.shape[1] != test.shape[1]:
        raise AsitError(
            f"{train.shape[1]} features a clip on the train side and {test.shape[1]} on the test side",
            "the same width",
            "take both sides' features from one model with one pooling",
        )
    classes, y = np.unique(train_labels, return_inverse=True)
    if len(classes) < 2:
        raise AsitError(f"one class only, {classes[0]!r}", "two or more classes", "check the label column")
    unknown = sorted(set(test_labels.tolist()) - set(classes.tolist()))
    if unknown:
        raise AsitError(
            f"test labels that no training clip has: {', '.join(map(repr, unknown[:5]))}",
            "test labels among those of the training side",
            "check the split, or leave these clips out",
        )
    return train, y.astype(np.int64), test, np.searchsorted(classes, test_labels).astype(np.int64), classes


def _finite(x: NDArray[Any], name: str, first: int = 0) -> None:
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise AsitError(
            f"{name}: {len(bad)} clips with NaN or infinite values, the first is clip {first + bad[0]}",
            "finite features",
            "look at that clip and at the weights; a diverged checkpoint gives NaN for every clip",
        )


def _score(
    predicted: NDArray[Any],
    truth: NDArray[np.int64],
    classes: NDArray[Any],
    penalty: float | None,
    rng: np.random.Generator,
    groups: ArrayLike | None,
) -> ProbeResult:
    right = predicted == truth
    clips = np.bincount(truth, minlength=len(classes))
    named = np.bincount(truth, weights=right, minlength=len(classes))
    if groups is None:  # resampling clips of a 0/1 score is a binomial draw
        draws = rng.binomial(len(right), right.mean(), DRAWS) / len(right)
    else:
        _, member = np.unique(np.asarray(groups), return_inverse=True)
        if member.shape != truth.shape:
            raise AsitError(f"test groups of shape {member.shape}", f"{truth.shape}", "pass one group a test clip")
        sizes = np.bincount(member)
        times = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), DRAWS)
        draws = (times @ np.bincount(member, weights=right)) / (times @ sizes)
    low, high = np.quantile(draws, [0.025, 0.975])
    return ProbeResult(
        accuracy=float(right.mean()),
        interval=(float(low), float(high)),
        clips=len(right),
        regularisation=penalty,
        per_class={str(classes[c]): float(named[c] / clips[c]) for c in np.flatnonzero(clips)},
    )
