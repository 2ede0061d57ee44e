"""Batches brought to the device one ahead of the step that takes them.

On a GPU the copy, and what is prepared from it, run on a stream of their own: pinned memory, no wait of the host, and
the step's stream waits only for what it is about to read. On other devices a batch is brought when it is asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """A dataclass of tensors, such as `asit.data.loading.loader.TensorBatch`."""

    def to(self, device: torch.device) -> Self: ...


M = TypeVar("M", bound=Movable)


def prefetched(
    batches: Generator[M], device: torch.device, prepare: Callable[[M], M] | None = None
) -> Generator[M, None, None]:
    """The same batches on a device, prepared, in the same order.

    An error of `batches` is raised where its batch would have come: the one before it is handed out first. Close it to
    close `batches`.

    Args:
        batches: from the loader, pinned where the device is a GPU.
        device: where they are wanted.
        prepare: what is computed from a batch that lies on the device, such as log-mels; must not wait for the device.
    """
    if device.type == "cuda":
        return _ahead(batches, device, prepare or (lambda batch: batch))
    # On a CPU nothing is copied: a step and the next batch's preparation would share the same cores.
    if device.type == "cpu" and prepare is None:
        return batches
    return _in_turn(batches, device, prepare or (lambda batch: batch))


def _in_turn(batches: Generator[M], device: torch.device, prepare: Callable[[M], M]) -> Generator[M, None, None]:
    with contextlib.closing(batches):
        for batch in batches:
            yield prepare(batch.to(device))


def _ahead(batches: Generator[M], device: torch.device, prepare: Callable[[M], M]) -> Generator[M, None, None]:
    side = torch.cuda.Stream(device)

    def fetch() -> tuple[M, torch.cuda.Event] | Exception | None:
        """The next batch and the event of its being there, the error that came instead, or None at the end."""
        try:
            batch = next(batches)
        except StopIteration:
            return None
        except Exception as error:
            return error
        with torch.cuda.stream(side):
            ready = prepare(batch.to(device))
            there = torch.cuda.Event()
            there.record(side)
        return ready, there

    with contextlib.closing(batches):
        coming = fetch()
        while coming is not None:
            if isinstance(coming, Exception):
                raise coming
            batch, there = coming
            now = torch.cuda.current_stream(device)
            now.wait_event(there)
            for tensor in _tensors(batch):
                # Its memory came from the side stream's stock, which must not take it back while the step reads it.
                tensor.record_stream(now)
            # Enqueued before the step's own kernels, and run beside them.
            coming = fetch()
            yield batch
            del batch


def _tensors(batch: Any) -> list[Tensor]:
    held = (getattr(batch, f.name) for f in fields(batch))
    return [value for value in held if isinstance(value, Tensor) and value.is_cuda]
