"""Result records, folds and paired differences against scikit-learn and by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    recall_score,
    top_k_accuracy_score,
)

from asit.errors import AsitError
from asit.evaluate.metrics import fold_summary, multi_label, paired_difference, single_label
from asit.evaluate.ranking import d_prime

from .conftest import average_precision, roc_auc, several  # type: ignore[import-not-found]


def _one(clips: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Scores and class indices; the last class has no clip."""
    rng = np.random.default_rng([seed, clips, classes])
    truth = rng.integers(0, classes - 1, clips)
    return rng.normal(size=(clips, classes)) + np.eye(classes)[truth], truth, [f"class {c}" for c in range(classes)]


# --- several labels a clip -------------------------------------------------------------------------------------------


def test_multi_label_record() -> None:
    scores, targets = several(300, 6)
    names = ["one", "two", "three", "four", "full", "none"]
    record = multi_label(scores, targets, names, seed=1, draws=200)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    ap, auc = average_precision(scores, targets), roc_auc(scores, targets)
    metrics = record["metrics"]
    assert metrics["mAP"]["value"] == pytest.approx(np.nanmean(ap))
    assert metrics["mAUC"]["value"] == pytest.approx(np.nanmean(auc))
    assert metrics["d_prime"]["value"] == pytest.approx(math.sqrt(2) * norm.ppf(np.nanmean(auc)))  # not the mean of d'
    for name in ("mAP", "mAUC", "d_prime"):
        low, high = metrics[name]["interval"]
        assert low < metrics[name]["value"] < high
    assert metrics["d_prime"]["interval"] == [d_prime(end) for end in metrics["mAUC"]["interval"]]
    assert record["skipped_classes"] == ["none"]
    assert record["clips"] == 300
    assert record["per_class"][5] == {"class": "none", "clips": 0, "AP": None, "AUC": None}
    assert record["per_class"][4] == {"class": "full", "clips": 300, "AP": 1.0, "AUC": None}
    assert record["per_class"][1]["AP"] == pytest.approx(ap[1])
    assert record["bootstrap"] == {"unit": "clip", "units": 300, "draws": 200, "seed": 1}
    assert multi_label(scores, targets, names, seed=1, draws=200) == record
    assert multi_label(scores, targets, names, seed=2, draws=200)["metrics"] != metrics


def test_a_perfect_ranking_has_no_finite_d_prime() -> None:
    targets = np.arange(20)[:, None] % 2 == np.arange(2)
    metrics = multi_label(targets.astype(float), targets, ["a", "b"], draws=20)["metrics"]
    assert metrics["mAP"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert metrics["d_prime"] == {"value": None, "interval": None}
    without = multi_label(targets.astype(float), targets, ["a", "b"], draws=0)["metrics"]
    assert without["mAP"] == {"value": 1.0, "interval": None}


def test_whole_groups_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    speaker = np.repeat(np.arange(20), 20)
    ease = rng.normal(size=(20, 1))[speaker]  # a speaker is easy or hard as a whole
    targets = rng.random((400, 3)) < 0.3
    scores = rng.normal(size=targets.shape) * 0.3 + targets * ease
    wide, narrow = (
        multi_label(scores, targets, list("abc"), draws=200, groups=groups)["metrics"]["mAP"]["interval"]
        for groups in (speaker, None)
    )
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])

    single = multi_label(scores, targets, list("abc"), draws=20, groups=["s1"] * 400)
    assert (single["metrics"]["mAP"]["interval"], single["bootstrap"]["units"]) == (None, 1)


# --- one label a clip ------------------------------------------------------------------------------------------------


def test_single_label_is_scikit_learns() -> None:
    scores, truth, names = _one(500, 12)
    predicted = scores.argmax(1)
    record = single_label(scores, truth, names, seed=4, draws=200)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    present = np.arange(11)
    expected = {
        "accuracy": (predicted == truth).mean(),
        "balanced_accuracy": recall_score(truth, predicted, labels=present, average="macro"),
        "macro_f1": f1_score(truth, predicted, labels=present, average="macro"),
        "top5_accuracy": top_k_accuracy_score(truth, scores, k=5, labels=np.arange(12)),
    }
    assert set(record["metrics"]) == set(expected)
    for name, value in expected.items():
        assert record["metrics"][name]["value"] == pytest.approx(value, abs=1e-12)
        low, high = record["metrics"][name]["interval"]
        assert low < value < high
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert balanced_accuracy_score(truth, predicted) == pytest.approx(expected["balanced_accuracy"], abs=1e-12)
    matrix = confusion_matrix(truth, predicted, labels=np.arange(12))
    assert record["confusion"] == matrix.tolist()
    assert record["skipped_classes"] == ["class 11"]
    precision, recall, f1, clips = precision_recall_fscore_support(
        truth, predicted, labels=np.arange(12), zero_division=0
    )
    for c, row in enumerate(record["per_class"]):
        assert (row["class"], row["clips"], row["precision"]) == (names[c], clips[c], pytest.approx(precision[c]))
        if c < 11:
            assert (row["recall"], row["F1"]) == (pytest.approx(recall[c]), pytest.approx(f1[c]))
            wrong = matrix[c] * (np.arange(12) != c)
            assert (row["confused_with"], row["confused_clips"]) == (names[wrong.argmax()], wrong.max())
    last = record["per_class"][11]
    assert (last["recall"], last["F1"], last["confused_with"], last["confused_clips"]) == (None, None, None, 0)


def test_single_label_by_hand_with_ties() -> None:
    scores = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [0.5, 0.5, 0.5], [0.0, 0.0, 3.0]])
    record = single_label(scores, np.array([1, 1, 0, 2]), ["a", "b", "c"], draws=0)
    # Predicted 0, 1, 0, 2: of equal scores the lowest index.
    assert record["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    values = {name: metric["value"] for name, metric in record["metrics"].items()}
    assert values == {
        "accuracy": 0.75,
        "balanced_accuracy": pytest.approx((1 + 0.5 + 1) / 3),
        "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 1) / 3),
    }
    assert record["per_class"][1] == {
        "class": "b", "clips": 2, "recall": 0.5, "precision": 1.0, "F1": pytest.approx(2 / 3), "confused_with": "a",
        "confused_clips": 1,
    }  # fmt: skip
    assert record["metrics"]["accuracy"]["interval"] is None  # no draws


def test_top_5_ties_go_to_the_lower_index() -> None:
    scores = np.zeros((11, 11))
    record = single_label(scores, np.arange(11), [str(c) for c in range(11)], draws=0)
    assert record["metrics"]["top5_accuracy"]["value"] == pytest.approx(5 / 11)
    never = record["per_class"][1]
    assert (never["recall"], never["precision"], never["F1"], never["confused_with"]) == (0.0, None, 0.0, "0")
    many = single_label(np.zeros((3, 201), np.float32), np.arange(3), [str(c) for c in range(201)], draws=0)
    assert "confusion" not in many


def test_accuracy_interval_is_nearly_the_binomial_one() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)
    right = rng.random(400) < 0.8
    scores = np.eye(2)[np.where(right, truth, 1 - truth)]
    metric = single_label(scores, truth, ["a", "b"], draws=2000)["metrics"]["accuracy"]
    half = 1.96 * math.sqrt(metric["value"] * (1 - metric["value"]) / 400)
    assert metric["interval"] == pytest.approx([metric["value"] - half, metric["value"] + half], abs=0.006)


# --- folds and pairs -------------------------------------------------------------------------------------------------


def test_fold_summary() -> None:
    summary = fold_summary([0.5, 0.7, 0.9], clips=[10, 10, 20])
    assert summary == {
        "mean": pytest.approx(0.7), "std": pytest.approx(0.2), "values": [0.5, 0.7, 0.9], "pooled": pytest.approx(0.75)
    }  # fmt: skip
    assert fold_summary([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}


def test_paired_difference_of_single_labels() -> None:
    a, truth, names = _one(300, 12)
    b = a + np.random.default_rng(5).normal(size=a.shape) * 0.3 - 0.3 * np.eye(12)[truth]
    found = paired_difference(a, b, truth, "accuracy", draws=300)
    first, second = (single_label(scores, truth, names, draws=300)["metrics"]["accuracy"] for scores in (a, b))
    assert found["difference"] == pytest.approx(first["value"] - second["value"])
    low, high = found["interval"]
    assert low < found["difference"] < high
    # Narrower than that of two independent runs.
    apart = math.hypot(*(scores["interval"][1] - scores["interval"][0] for scores in (first, second)))
    assert high - low < 0.9 * apart
    turned = paired_difference(b, a, truth, "accuracy", draws=300)
    assert turned["interval"] == pytest.approx([-high, -low])


def test_paired_difference_of_several_labels() -> None:
    a, targets = several(300, 8)
    b = a + np.random.default_rng(5).normal(size=a.shape) * 0.5
    found = paired_difference(a, b, targets, "mAP", draws=200)
    expected = [np.nanmean(average_precision(scores, targets)) for scores in (a, b)]
    assert found["difference"] == pytest.approx(expected[0] - expected[1])
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    same = paired_difference(a, a, targets, "mAP", draws=20, groups=np.arange(300) // 10)
    assert same == {"difference": 0.0, "interval": [0.0, 0.0]}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_scores_that_are_refused() -> None:
    scores, targets = several(20, 4)
    truth, names = np.zeros(20, int), list("abcd")
    scores[[7, 12], 1] = np.nan
    for call in (
        lambda: average_precision(scores, targets),
        lambda: multi_label(scores, targets, names),
        lambda: single_label(scores, truth, names),
        lambda: paired_difference(scores, np.zeros_like(scores), truth, "accuracy"),
        lambda: paired_difference(np.zeros_like(scores), scores, targets, "mAP"),
    ):
        with pytest.raises(AsitError, match="2 of 20 clips have NaN scores, the first is clip 7"):
            call()
    with pytest.raises(AsitError, match="3 clips without any label among 2 classes"):
        multi_label(np.zeros((3, 2)), np.zeros((3, 2), bool), ["a", "b"])
    with pytest.raises(AsitError, match="scores of shape \\(0, 2\\)"):
        single_label(np.zeros((0, 2)), truth[:0], ["a", "b"])
    with pytest.raises(AsitError, match="1 of 3 clips have no group, the first is clip 1"):
        single_label(np.zeros((3, 2)), truth[:3], ["a", "b"], groups=np.array(["s", None, "t"], object))
