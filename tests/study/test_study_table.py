"""The numbers of the table against loops and hand computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asit.evaluate.bootstrap import DRAWS, Value
from asit.evaluate.metrics import paired_difference
from asit.evaluate.paired_draws import Draws, over_seeds, paired
from asit.study.study_table import ScoredClips, seed_draws


def write(path: Path, right: list[bool], names: list[str]) -> Path:
    """Scores of two classes, all clips of the first, so that those that are right have the higher first score."""
    scores = np.array([[0.8, 0.2] if one else [0.3, 0.7] for one in right], np.float32)
    n = len(right)
    held = {"indptr": np.arange(n + 1), "indices": np.zeros(n, np.int64), "weights": np.ones(n, np.float32)}
    np.savez(path, ids=np.array(names), scores=scores, **held)
    return path


def folds(folder: Path, name: str, first: list[bool], second: list[bool]) -> list[ScoredClips]:
    names = [[f"{fold}-{i}" for i in range(len(right))] for fold, right in (("x", first), ("y", second))]
    return [
        ScoredClips(fold, "accuracy", write(folder / f"{name}-{fold}.npz", right, ids))
        for fold, right, ids in (("1", first, names[0]), ("2", second, names[1]))
    ]


def test_the_score_is_the_mean_of_folds_and_its_draws_those_of_a_loop(tmp_path: Path) -> None:
    first, second = [True, True, False, True], [False, True, False, False, True, False]
    found = seed_draws(folds(tmp_path, "a", first, second), None)
    assert found.value == pytest.approx((3 / 4 + 2 / 6) / 2)
    assert (found.folds, len(found.ids), found.drawn.shape) == (2, 10, (DRAWS,))
    expected = np.zeros(DRAWS)
    for fold, right in enumerate((first, second)):
        rng = np.random.default_rng([fold, len(right)])
        for k in range(DRAWS):
            expected[k] += np.mean([right[i] for i in rng.integers(0, len(right), len(right))]) / 2
    np.testing.assert_allclose(found.drawn, expected, rtol=1e-12)


def test_groups_are_drawn_whole(tmp_path: Path) -> None:
    part = ScoredClips("", "accuracy", write(tmp_path / "a.npz", [True, True, False, False], list("abcd")))
    found = seed_draws([part], {"a": "g", "b": "g", "c": "h", "d": "h"})
    assert set(np.unique(found.drawn)) == {0.0, 0.5, 1.0}


def test_intervals_hold_clips_and_seeds() -> None:
    level = {seed: Draws(value, np.full(DRAWS, value), ("a", "b"), 1) for seed, value in ((0, 0.4), (1, 0.6))}
    # Without a spread of clips the draws are the means of two seeds drawn with replacement: 0.4, 0.5 or 0.6.
    found = over_seeds(level)
    assert tuple(found) == pytest.approx((0.5, 0.4, 0.6))
    assert over_seeds({0: level[0]}) == Value(0.4, 0.4, 0.4)


def test_differences_are_paired_and_of_one_seed_those_of_compare(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.random((2, 30)) < share for share in (0.6, 0.5))

    def draws(name: str, right: np.ndarray) -> Draws:
        names = [f"{i:02d}" for i in range(30)]
        return seed_draws([ScoredClips("", "accuracy", write(tmp_path / f"{name}.npz", right.tolist(), names))], None)

    own, base = ({seed: draws(f"{name}{seed}", of[seed]) for seed in (0, 1)} for name, of in (("a", a), ("b", b)))
    both, note = paired(own, base)
    assert both.value == pytest.approx(a.mean() - b.mean())
    assert note == ""
    one, note = paired({0: own[0]}, base)
    scores = [np.where(of[0][:, None], [0.8, 0.2], [0.3, 0.7]) for of in (a, b)]
    expected = paired_difference(*scores, np.zeros(30, np.int64), "accuracy")
    assert tuple(one) == pytest.approx((expected["difference"], *expected["interval"]))
    assert note == "difference over 1 seeds"
    other = {0: own[0]._replace(ids=own[0].ids[::-1])}
    assert paired(other, base)[1] == "scored on other clips than the reference"
    assert np.isnan(paired({7: own[0]}, base)[0].value)
