"""Asynchronous checkpoints: the tensors are copied, and a thread writes the copies during the next steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor

Write = Callable[[], None]


class Saver:
    """Writes one checkpoint at a time, in the background.

    Leaving the context waits for the writer; `settle` raises the writer's error.

    The copies are in main memory, page-locked where the tensors are on a CUDA device, and are reused for the next
    checkpoint: during the whole run they take as much memory as one checkpoint.

    Args:
        background: copy, and write in a thread; otherwise `copy` returns the tensors themselves, and `start` returns
            when they are written.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._spare: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._copied: list[torch.cuda.Event] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the writer has failed; `settle` raises its error."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until nothing is being written.

        Raises:
            BaseException: what the writer raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors as they are now, on the CPU; the copies of the last call must have been written.

        Copies from a CUDA device are queued behind its work, and are complete when `start` runs its function.
        """
        assert not self.busy, "the copies are still being written"
        if not self.background:
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

    def start(self, write: Write) -> None:
        """Run `write`, which may read what `copy` returned."""
        if not self.background:
            write()
            return
        copied = self._copied

        def run() -> None:
            try:
                for event in copied:
                    event.synchronize()
                write()
            except BaseException as error:
                self._error = error

        # Not a daemon thread: a process that ends still finishes the file.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()
