"""Asynchronous checkpoints: the tensors are copied, and a thread writes the copies during the next steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Saver:
    """Writes one checkpoint at a time, in the background.

    Leaving the context waits for the writer; `settle` raises the writer's error.

    The copies are in main memory, page-locked where the tensors are on a CUDA device, and are reused for the next
    checkpoint: during the run they take as much memory as one checkpoint.

    Args:
        background: copy, and write in a thread; otherwise `copy` returns the tensors themselves, and `start` returns
            when they are written.
    """

    def __init__(self, background: bool = True) -> None:
        # Not a daemon thread: a process that ends still finishes the file.
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._spare: dict[str, Tensor] = {}
        self._written: Future[None] | None = None
        self._copied: list[torch.cuda.Event] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.shutdown()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._written is not None and not self._written.done()

    @property
    def failed(self) -> bool:
        """Whether the writer has failed; `settle` raises its error."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def settle(self) -> None:
        """Wait until nothing is being written.

        Raises:
            BaseException: what the writer raised.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they are now, on the CPU; the copies of the last call must have been written.

        Copies from a CUDA device are queued behind its work, and are complete when `start` runs its function.
        """
        assert not self.busy, "the copies are still being written"
        if self._writer is None:
            return dict(tensors)
        devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
        out = {}
        for name, tensor in tensors.items():
            held = self._spare.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=bool(devices))
            # Only a CUDA copy has an event to wait for later; copies from other devices finish here.
            out[name] = held.copy_(tensor.detach(), non_blocking=tensor.device.type == "cuda")
        self._spare = out
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        return dict(out)

    def start(self, write: Callable[[], None]) -> None:
        """Run `write`, which may read what `copy` returned."""
        if self._writer is None:
            write()
        else:
            copied = self._copied

            def write_copies() -> None:
                for event in copied:
                    event.synchronize()
                write()

            self._written = self._writer.submit(write_copies)
