"""The loader: batches made by worker processes, in the sampler's order; a sample is a pure function of its key."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asit.errors import AsitError, TrainingError

AHEAD = 4
"""Batches that each worker prefetches."""
GRACE_SECONDS = 2.0
"""How long workers have to end by themselves when no more batches are wanted."""
S = TypeVar("S")
B = TypeVar("B")


class KeyedDataset(Dataset[S], Generic[S]):
    """A data set whose samples are read by lists of keys."""

    def __getitem__(self, key: Any) -> S:
        raise IndexError(key)  # subclasses define it

    def fetch(self, keys: list[Any]) -> None:
        """Called before the samples of a batch are read, to read what they need from shards together."""

    def __getitems__(self, keys: list[Any]) -> list[S] | AsitError:
        """Return the samples of a batch, or the error: raised in a worker, it would arrive with a traceback."""
        try:
            self.fetch(keys)
            return [self[key] for key in keys]
        except AsitError as error:
            return error


class TensorBatch:
    """Base of batches: dataclasses of tensors, and of other such dataclasses, that can be moved to a device."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device; itself where it is there already."""
        return self if device.type == "cpu" else self._mapped(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory; the DataLoader calls it."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        for name, value in held.items():
            if isinstance(value, Tensor):
                held[name] = change(value)
            elif isinstance(value, TensorBatch):
                held[name] = value._mapped(change)
        return type(self)(**held)


def loader(
    samples: KeyedDataset[S], keys: Iterable[list[Any]], collate: Callable[[list[S]], B], *, workers: int, pin: bool
) -> Generator[B]:
    """Yield batches, one for each list of keys, in order; they do not depend on the number of workers.

    Close it (`contextlib.closing`) to end its workers.

    Raises:
        AsitError: a batch could not be read.
        TrainingError: a worker died.
    """
    options: dict[str, Any] = {"prefetch_factor": AHEAD} if workers else {}
    made: Any = DataLoader(
        samples,
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=functools.partial(_collated, collate),
        pin_memory=pin,
        worker_init_fn=quiet_worker,
        # A worker's base seed would be drawn from the global generator otherwise.
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    with _quiet_children():
        batches = iter(made)
    return _raised(batches)


@contextlib.contextmanager
def _quiet_children() -> Iterator[None]:
    """Remove the SIGCHLD handler that torch installs with a process's first loader."""
    # It would raise anywhere, even in the middle of a step; without it the loader notices when it waits for a batch.
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(number, before)


def _raised(batches: Iterator[B | AsitError]) -> Generator[B]:
    workers: list[Any] = getattr(batches, "_workers", [])
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                # A worker that dies while it sends a batch shows as a connection that ends.
                lost = str(error).startswith("DataLoader worker (pid")
                if not lost and (isinstance(error, RuntimeError) or not _dead(workers)):
                    raise
                raise _worker_died(workers, error) from None
            if isinstance(batch, AsitError):
                try:
                    raise batch
                finally:
                    # The traceback keeps this frame: with them in it, error and frame would hold each other, and
                    # workers that are collected as garbage end slowly.
                    del batch, batches
            yield batch
    finally:
        _end(workers)


def _dead(workers: Sequence[Any]) -> bool:
    """Return whether a worker has ended, or ends within a second."""
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0))


def _end(workers: Sequence[Any]) -> None:
    """Kill workers that do not end within `GRACE_SECONDS`; the loader itself waits up to 65 s."""

    def kill() -> None:
        for worker in workers:
            with contextlib.suppress(ValueError):  # closed
                worker.kill()

    timer = threading.Timer(GRACE_SECONDS, kill)
    timer.daemon = True
    timer.start()


def _worker_died(workers: Sequence[Any], error: Exception) -> TrainingError:
    codes = {worker.pid: worker.exitcode for worker in workers if worker.exitcode is not None}
    ends = ", ".join(
        f"process {pid} by {signal.Signals(-code).name}" if code < 0 else f"process {pid} with exit status {code}"
        for pid, code in codes.items()
    )
    return TrainingError(
        f"{len(codes) or 'some'} of {len(workers)} loader workers ended unexpectedly: {ends or error}",
        "workers that live as long as the run; SIGKILL is most often the system's, which was out of memory",
        "see the system's log (dmesg, or the scheduler's report of memory); ask for more memory, or fewer --workers",
    )


def _collated(collate: Callable[[list[S]], B], samples: list[S] | AsitError) -> B | AsitError:
    return samples if isinstance(samples, AsitError) else collate(samples)


def quiet_worker(_: int) -> None:
    """Initialise a worker so that signals to the process group do not end it before the run."""
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group, but the run needs its workers to finish the
    # step, and ends them itself; the alarm is for a run that died.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
