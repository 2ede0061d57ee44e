"""The order of samples: weighted draws, division over steps and processes, resuming at any step."""

from __future__ import annotations

import numpy as np
import pytest

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import Labels, balanced_weights, inverse_weights, read_labels
from asit.data.loading import sampler


def labels(texts: list[str]) -> Labels:
    return read_labels(Catalogue.from_clips([Clip(f"/c/{i}", 1.0, 8000, 1, t) for i, t in enumerate(texts)]))


def test_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 0.0, 3.0, 6.0])
    draw = sampler.weighted(3, weights, 20_000)
    counts = np.bincount(draw(0), minlength=4)
    assert counts[1] == 0
    np.testing.assert_allclose(counts / 20_000, weights / 10, atol=0.012)
    assert np.array_equal(draw(0), sampler.weighted(3, weights * 7, 20_000)(0))  # only proportions count
    assert not np.array_equal(draw(0), draw(1))
    assert not np.array_equal(draw(0), sampler.weighted(4, weights, 20_000)(0))
    tiny = sampler.weighted(0, np.full(1000, 0.1), 50_000)(0)
    assert (tiny.min(), tiny.max()) == (0, 999)


def test_balanced_and_inverse_draws() -> None:
    """AST's rule by hand, and classes drawn as often as one another."""
    found = labels(["a"] * 90 + ["b"] * 9 + ["a;b"])
    rows = np.arange(100)
    weights = balanced_weights(found, rows)
    np.testing.assert_allclose(weights[[0, 90, 99]], [1000 / 91.01, 1000 / 10.01, 1000 / 91.01 + 1000 / 10.01])
    drawn = sampler.weighted(1, weights, 50_000)(0)
    np.testing.assert_allclose(np.bincount(drawn, minlength=100) / 50_000, weights / weights.sum(), atol=0.005)
    single = labels(["a"] * 90 + ["b"] * 10)
    drawn = sampler.weighted(1, inverse_weights(single, rows), 20_000)(0)
    assert (drawn < 90).mean() == pytest.approx(0.5, abs=0.012)


def test_shuffled_takes_each_once() -> None:
    orders = [sampler.shuffled(5, 30)(epoch) for epoch in range(4)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in [*orders, sampler.shuffled(4, 30)(0)]}) == 5
    assert np.array_equal(sampler.shuffled(5, 30)(2), orders[2])


BLOCKS = np.stack([np.repeat([0, 1], [12, 8]), np.arange(20)], axis=1)
ORDERS = {
    "shuffled": (sampler.shuffled(11, 103), 103, 24),
    "weighted": (sampler.weighted(1, np.array([1.0, 1.0, 8.0]), 20), 20, 8),
    "in blocks": (sampler.in_blocks(1, BLOCKS, 4), 20, 8),
}


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("name", ORDERS)
def test_processes_together_and_resumed_runs_take_one_process_steps(
    name: str, places: bool, no_global_draws: None
) -> None:
    draw, count, batch = ORDERS[name]

    def steps(size: int, start: int = 0) -> list[list[sampler.Key]]:
        micro = batch // size // (2 if size < 4 else 1)
        shared = {"order": draw, "count": count, "batch": batch, "micro": micro, "size": size, "positions": places}
        ranks = [iter(sampler.MicroBatchSampler(**shared, rank=rank, start=start)) for rank in range(size)]
        return [[key for _ in range(batch // size // micro) for r in ranks for key in next(r)] for _ in range(9)]

    alone = steps(1)
    for size in [size for size in (2, 3, 4, 8) if batch % size == 0]:
        assert steps(size) == alone
        for start in range(1, 6):
            assert steps(size, start)[:4] == alone[start : start + 4]
    if name == "shuffled":
        assert all(len(set(step)) == batch for step in alone)
        assert len({key for step in alone[:4] for key in step}) == 96  # four complete batches an epoch
    if name == "weighted" and places:
        keys = [key for step in alone[:2] for key in step]
        assert len(set(keys)) == 16  # although only three clips are drawn
        assert len({key[:2] for key in keys}) <= 3
        assert [key[2] for key in keys] == list(range(16))
        assert [key[1] for key in keys] == draw(0)[:16].tolist()
