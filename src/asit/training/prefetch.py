"""Batches moved to the device one step ahead.

On a GPU the copy, and the preparation that follows it, run on a CUDA stream of their own, from pinned memory: the host
never waits, and the step's stream waits only for the batch that it reads next. On other devices a batch is moved when
it is requested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import TypeVar

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
    if device.type == "cuda":
        return _ahead(batches, device, prepare)

    def in_turn() -> Generator[M, None, None]:
        with contextlib.closing(batches):
            for batch in batches:
                yield prepare(batch.to(device))

    return in_turn()


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
            for field in fields(batch):  # type: ignore[arg-type]
                # Allocated on the side stream, which must not reuse the memory while the step reads it.
                if isinstance(tensor := getattr(batch, field.name), Tensor) and tensor.is_cuda:
                    tensor.record_stream(now)
            # Enqueued before the step's own kernels, so that both run at the same time.
            coming = fetch()
            yield batch
            del batch
