"""Batches moved to the device one step ahead.

On a GPU the copy, and the preparation that follows it, run on a CUDA stream of their own, from pinned memory: the host
never waits, and the step's stream waits only for the batch that it reads next. On other devices a batch is moved when
it is requested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from asit.data.loading.loader import TensorBatch

M = TypeVar("M", bound=TensorBatch)


def prefetched(
    batches: Generator[M], device: torch.device, prepare: Callable[[M], M] | None = None
) -> Generator[M, None, None]:
    """Yield the same batches on a device, prepared, in the same order.

    An error of `batches` is raised in place of its batch, after the one before it was yielded. Close the generator to
    close `batches`.

    Args:
        batches: from the loader, pinned where the device is a GPU.
        device: where they go.
        prepare: computed from a batch on the device, such as log-mels; must not wait for the device.
    """
    if device.type == "cpu" and prepare is None:
        return batches
    prepare = prepare or (lambda batch: batch)
    return _ahead(batches, device, prepare) if device.type == "cuda" else _in_turn(batches, device, prepare)


def _in_turn(batches: Generator[M], device: torch.device, prepare: Callable[[M], M]) -> Generator[M, None, None]:
    with contextlib.closing(batches):
        for batch in batches:
            yield prepare(batch.to(device))


def _ahead(batches: Generator[M], device: torch.device, prepare: Callable[[M], M]) -> Generator[M, None, None]:
    side = torch.cuda.Stream(device)

    def fetch() -> tuple[M, torch.cuda.Event] | Exception | None:
        """Return the next batch and the event that it is ready, the error instead, or None at the end."""
        try:
            batch = next(batches)
        except StopIteration:
            return None
        except Exception as error:
            return error
        with torch.cuda.stream(side):
            prepared = prepare(batch.to(device))
            ready = torch.cuda.Event()
            ready.record(side)
        return prepared, ready

    with contextlib.closing(batches):
        coming = fetch()
        while coming is not None:
            if isinstance(coming, Exception):
                raise coming
            batch, ready = coming
            now = torch.cuda.current_stream(device)
            now.wait_event(ready)
            for tensor in _tensors(batch):
                # Allocated on the side stream, which must not reuse the memory while the step reads it.
                tensor.record_stream(now)
            # Enqueued before the step's own kernels, so that both run at the same time.
            coming = fetch()
            yield batch
            del batch


def _tensors(batch: Any) -> list[Tensor]:
    held = (getattr(batch, f.name) for f in fields(batch))
    return [value for value in held if isinstance(value, Tensor) and value.is_cuda]
