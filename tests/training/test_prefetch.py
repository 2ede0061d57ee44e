"""Prefetched batches: the same ones in the same order, errors after the last good one, and nothing on a CPU."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from asit.data.loading.loader import TensorBatch
from asit.errors import AudioError
from asit.training.prefetch import prefetched

CPU = torch.device("cpu")


@dataclass
class Numbers(TensorBatch):
    x: Tensor


def doubled(batch: Numbers) -> Numbers:
    return Numbers(batch.x * 2)


def source(count: int, closed: list[bool], error: Exception | None = None, pin: bool = False) -> Generator[Numbers]:
    try:
        for i in range(count):
            x = torch.full((1000,), float(i))
            yield Numbers(x.pin_memory() if pin else x)
        if error is not None:
            raise error
    finally:
        closed.append(True)


def test_nothing_stands_between_on_a_cpu() -> None:
    batches = source(2, [])
    assert prefetched(batches, CPU) is batches


def test_prepared_when_asked_for_and_closed_with_it() -> None:
    closed: list[bool] = []
    made = prefetched(source(5, closed), CPU, doubled)
    assert [float(next(made).x[0]) for _ in range(3)] == [0.0, 2.0, 4.0]
    assert not closed
    made.close()
    assert closed == [True]


@pytest.mark.gpu
def test_the_same_batches_in_order_on_a_gpu_and_errors_after_the_last_good_one() -> None:
    closed: list[bool] = []
    made = prefetched(source(50, closed, AudioError("gone"), pin=True), torch.device("cuda"), doubled)
    seen = list[Tensor]()

    def take() -> None:
        for batch in made:
            # The step's stream is busy while the next batch comes on the other one.
            work = torch.randn(2000, 2000, device="cuda") @ torch.randn(2000, 2000, device="cuda")
            seen.append((batch.x + 0 * work[0, 0]).sum())

    with pytest.raises(AudioError, match="gone"):
        take()
    assert [float(total) for total in seen] == [2000.0 * i for i in range(50)]
    assert closed == [True]
