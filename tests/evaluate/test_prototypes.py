"""The prototype probe: what it computes, what it can read that a mean cannot, and that it is seeded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from asit.evaluate import prototypes
from asit.evaluate.probes import ridge_scores
from asit.evaluate.prototypes import LabelledRows, PrototypeHead, prototype_probe

from .conftest import average_precision, one_hot  # type: ignore[import-not-found]


@pytest.fixture(autouse=True)
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A short training; call it to change its constants."""

    def change(**values: float) -> None:
        for name, value in values.items():
            monkeypatch.setattr(prototypes, name, value)

    change(PER_CLASS=3, EPOCHS=10, STEPS=150, MOST_EPOCHS=40, BATCH=32)
    return change


def needles(n: int, seed: int, classes: int = 3, width: int = 12) -> tuple[list[np.ndarray], np.ndarray]:
    """Clips of 5 to 30 tokens of loud noise, one of which is the class's own vector: lost in a mean."""
    own = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    clips = []
    for label in y:
        tokens = 3.0 * rng.normal(size=(rng.integers(5, 31), width))
        tokens[rng.integers(len(tokens))] = 4 * own[label] + 0.3 * rng.normal(size=width)
        clips.append((tokens + 7).astype(np.float16))
    return clips, y.astype(np.int64)


def test_head_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    start, tokens = rng.normal(size=(4, 5)), rng.normal(size=(3, 6, 5))
    mean, deviation = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    head = PrototypeHead(*(torch.tensor(a, dtype=torch.float32) for a in (start, mean, deviation)), classes=2).eval()
    with torch.no_grad():
        head.weight.copy_(torch.arange(8.0).reshape(2, 4))
        head.bias.copy_(torch.tensor([0.5, -1]))
        head.norm.running_mean.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        head.norm.running_var.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    valid = np.array([[1] * 6, [1] * 2 + [0] * 4, [1] * 5 + [0]], bool)
    tokens[1, 3] = 100 * start[2]  # the best match by far, in the padding
    found = head(torch.tensor(tokens, dtype=torch.float32), torch.tensor(valid)).detach().numpy()
    for r in range(3):
        best = []
        for k in range(4):
            cosines = []
            for p in np.flatnonzero(valid[r]):
                x = (tokens[r, p] - mean) / deviation
                cosines.append(x @ start[k] / np.linalg.norm(x) / np.linalg.norm(start[k]))
            best.append(max(cosines))
        standard = (np.array(best) - [0.1, 0.2, 0.3, 0.4]) / np.sqrt(np.array([0.5, 1.0, 1.5, 2.0]) + 1e-5)
        np.testing.assert_allclose(found[r], np.arange(8).reshape(2, 4) @ standard + [0.5, -1], rtol=1e-4)


def test_it_finds_what_the_mean_of_the_tokens_has_lost() -> None:
    clips, y = needles(400, 0)
    train, test = np.arange(300), np.arange(300, 400)
    scored = prototype_probe(clips, LabelledRows(train, one_hot(y[train], 3)), test, multi=False, seed=0)
    means = np.stack([tokens.astype(np.float32).mean(0) for tokens in clips])
    linear = ridge_scores(means[train], one_hot(y[train], 3), means[test], criterion="accuracy", seed=0)
    accuracy = (scored.scores.argmax(1) == y[test]).mean()
    assert accuracy > 0.9
    assert accuracy > (linear.scores.argmax(1) == y[test]).mean() + 0.2
    np.testing.assert_allclose(scored.scores.sum(1), 1, atol=1e-5)
    assert scored.chosen_by == "loss on a part held out of the training split"


def test_seeded_and_blind_to_the_test_side(no_global_draws: None) -> None:
    clips, y = needles(120, 1)
    train = LabelledRows(np.arange(80), one_hot(y[:80], 3))
    one = prototype_probe(clips, train, np.arange(80, 120), multi=False, seed=4)
    again = prototype_probe(clips, train, np.arange(80, 120), multi=False, seed=4)
    fewer = prototype_probe(clips, train, np.arange(80, 90), multi=False, seed=4)
    other = prototype_probe(clips, train, np.arange(80, 120), multi=False, seed=5)
    np.testing.assert_array_equal(one.scores, again.scores)
    np.testing.assert_allclose(one.scores[:10], fewer.scores, atol=1e-5)
    assert np.abs(one.scores - other.scores).max() > 1e-3


def test_several_labels_by_binary_cross_entropy(training: Callable[..., None]) -> None:
    training(PER_CLASS=4, STEPS=400, EPOCHS=20, MOST_EPOCHS=100, EARLY_STOPPING=0.5)
    first, a = needles(280, 2)
    second, b = needles(280, 3)
    clips = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    targets = np.maximum(one_hot(a, 3), one_hot(b, 3))
    train, test = np.arange(180), np.arange(180, 240)
    scored = prototype_probe(
        clips,
        LabelledRows(train, targets[train]),
        test,
        multi=True,
        seed=0,
        validation=LabelledRows(np.arange(240, 280), targets[240:]),
    )
    assert average_precision(scored.scores, targets[test]).mean() > 0.9
    assert scored.chosen_by == "loss on the validation split"


def test_few_clips_hold_none_out() -> None:
    clips, y = needles(30, 4)
    train = np.array([np.flatnonzero(y == c)[0] for c in range(3)])
    scored = prototype_probe(
        clips, LabelledRows(train, np.eye(3, dtype=np.float32)), np.arange(30), multi=False, seed=0
    )
    assert scored.chosen_by == "all 40 epochs: too few clips to hold some out"
    assert scored.scores[train].argmax(1).tolist() == [0, 1, 2]


def test_a_held_out_part_stops_what_cannot_be_learned(training: Callable[..., None]) -> None:
    training(EPOCHS=100, MOST_EPOCHS=100, EARLY_STOPPING=0.05)
    clips, y = needles(200, 5)
    noise = np.random.default_rng(0).permutation(y)
    scored = prototype_probe(
        clips, LabelledRows(np.arange(160), one_hot(noise[:160], 3)), np.arange(5), multi=False, seed=0
    )
    assert scored.regularisation is not None
    assert scored.regularisation < 50
