"""How long scoring takes: mAP and mean AUC over AudioSet's evaluation set, with and without intervals.

    python bench/metrics.py [--toy] [--clips 20371] [--classes 527] [--draws 1000] [--rounds 5] [--threads 1]

Scores are drawn, and so are labels: about 2.7 a clip, from 20 to 6,000 clips a class, as uneven as AudioSet's.
scikit-learn's functions are called on the same arrays, class by class, in the same rounds. Intervals are timed once.
By the clock, and by CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn import __version__ as sklearn_version
from sklearn.metrics import average_precision_score, roc_auc_score

from asit.evaluate.metrics import multi_label, paired_difference, single_label
from asit.evaluate.ranking import positives, ranking, score_table
from asit.evaluate.verification import cosine_scores, trials_from_labels
from asit.evaluate.verification_metrics import verification_metrics


def labelled(clips: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, C) float32 and targets (N, C) bool; every class has a positive."""
    rng = np.random.default_rng(0)
    share = np.clip(70 * np.exp(rng.normal(0, 0.6, classes)), 20, 1000)
    share[:2] = 6000, 4500  # music and speech
    targets = rng.random((clips, classes)) < share / 20371
    targets[rng.integers(0, clips, classes), np.arange(classes)] = True
    return (rng.normal(size=targets.shape) + 2.5 * targets).astype(np.float32), targets


def by_class(function: Callable[..., float], scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """scikit-learn's function for each class."""
    return np.array([function(targets[:, c], scores[:, c]) for c in range(scores.shape[1])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="few clips and classes, one round")
    parser.add_argument("--clips", type=int, default=20371)
    parser.add_argument("--classes", type=int, default=527)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    clips, classes, draws, rounds = options.clips, options.classes, options.draws, options.rounds
    if options.toy:
        clips, classes, draws, rounds = 300, 12, 20, 1
    torch.set_num_threads(options.threads)
    scores, targets = labelled(clips, classes)
    names = [f"class {c}" for c in range(classes)]
    other = scores + np.random.default_rng(1).normal(size=scores.shape).astype(np.float32)
    truth = np.random.default_rng(2).integers(0, classes, clips)
    drawn = trials_from_labels(truth, 0, most=10 * clips)
    embeddings = np.random.default_rng(3).normal(size=(clips, 32)) + np.eye(classes, 32)[truth]
    trial_scores = cosine_scores(embeddings, drawn.first, drawn.second)
    speakers = truth[drawn.first], truth[drawn.second]

    often: dict[str, Callable[[], Any]] = {
        "average precision": lambda: ranking(score_table(scores), *positives(targets))[0],
        "average precision, scikit-learn": lambda: by_class(average_precision_score, scores, targets),
        "AUC": lambda: ranking(score_table(scores), *positives(targets))[1],
        "AUC, scikit-learn": lambda: by_class(roc_auc_score, scores, targets),
        "mAP, mAUC, d' and rows, no intervals": lambda: multi_label(scores, targets, names, draws=0),
    }
    once: dict[str, Callable[[], Any]] = {
        "the same with intervals": lambda: multi_label(scores, targets, names, draws=draws),
        "mAP of two models, paired": lambda: paired_difference(scores, other, targets, "mAP", draws=draws),
        "accuracies and macro F1, with intervals": lambda: single_label(scores, truth, names, draws=draws),
        f"EER and minDCF of {len(trial_scores):,} trials, with intervals": lambda: verification_metrics(
            trial_scores, drawn.same, speakers=speakers, draws=draws
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    results = {}
    for turn in range(rounds):
        for name, call in (often | once if turn == 0 else often).items():
            start = time.perf_counter(), time.process_time()
            results[name] = call()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))

    print(
        f"torch {torch.__version__}, numpy {np.__version__}, scikit-learn {sklearn_version}; {os.cpu_count()} cores, "
    )
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{clips:,} clips, {classes} classes, {int(targets.sum()):,} labels, {draws:,} bootstrap draws\n")
    print("| | seconds | of CPU time | rounds |\n|---|---|---|---|")
    for name, taken in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        print(f"| {name} | {wall:.3f} | {cpu:.3f} | {len(taken)} |")
    for ours in ("average precision", "AUC"):
        apart = np.abs(results[ours] - results[f"{ours}, scikit-learn"]).max()
        print(f"\nGreatest difference to scikit-learn in {ours}: {apart:.1e}")


if __name__ == "__main__":
    main()
