"""The order of samples, and the loader that brings them: a sample is a pure function of (seed, epoch, index)."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asit.errors import AsitError, TrainingError

AHEAD = 4
"""Batches that each loader process holds ready."""
GRACE_SECONDS = 2.0
"""How long loader processes have to end by themselves when no more batches are wanted."""
ORDER, MATERIAL, CORRUPTION = 0, 1, 2
"""Streams of random numbers that never meet."""
Key = tuple[int, ...]
"""(epoch, index), or (epoch, index, place) where an epoch may hold an index twice: all that a sample depends on besides
the seed and the settings."""
Order = Callable[[int], npt.NDArray[np.int64]]
"""An epoch's samples, in order: a pure function of the epoch."""
S = TypeVar("S")
B = TypeVar("B")


class Samples(Dataset[S], Generic[S]):
    """A data set read by lists of keys."""

    def __getitem__(self, key: Any) -> S:
        raise IndexError(key)  # every data set has its own

    def fetch(self, keys: list[Any]) -> None:
        """Called before a batch's samples are asked for, so that what they need can be read together."""

    def __getitems__(self, keys: list[Any]) -> list[S] | AsitError:
        """A batch's samples. An error is handed on as a value: raised in a worker it would come with a traceback."""
        try:
            self.fetch(keys)
            return [self[key] for key in keys]
        except AsitError as error:
            return error


class Portable:
    """A dataclass of tensors that moves between devices; a base of batches."""

    def to(self, device: torch.device) -> Self:
        """The batch on a device; the same object where it is there already."""
        return self if device.type == "cpu" else self._mapped(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Called by the DataLoader where it pins."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        held = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        held |= {name: change(value) for name, value in held.items() if isinstance(value, Tensor)}
        return type(self)(**held)


def shuffled(seed: int, count: int) -> Order:
    """Each of `count` samples once an epoch, in the order of `order`."""
    return functools.partial(order, seed, count=count)


def weighted(seed: int, weights: npt.NDArray[np.float64], count: int) -> Order:
    """`count` samples an epoch, drawn with replacement in proportion to `weights`: a pure function of (seed, epoch)."""
    return functools.partial(_draw, seed, np.cumsum(weights / weights.sum()), count)


def _draw(seed: int, cumulated: npt.NDArray[np.float64], count: int, epoch: int) -> npt.NDArray[np.int64]:
    uniform = np.random.default_rng([seed, ORDER, epoch]).random(count)
    # Rounding may leave the last sum a little under one.
    return np.minimum(np.searchsorted(cumulated, uniform, side="right"), len(cumulated) - 1)


def in_blocks(seed: int, places: npt.NDArray[np.int64], block: int) -> Order:
    """Each sample once an epoch, neighbours together: a pure function of (seed, epoch).

    Samples lie in parts, such as the shards of a catalogue. Each part is cut into blocks of neighbours, from a place
    drawn anew for each part and epoch; the blocks are shuffled, and then the samples within each stretch of four
    blocks' length. So a micro-batch of M samples reads some M / block places instead of M, on any process and worker,
    without a cache.

    Args:
        seed: of the draws.
        places: (N, 2) the part that each sample lies in, and where in it, such as its first byte.
        block: samples of a block.
    """
    lying = np.lexsort((places[:, 1], places[:, 0]))
    ends = np.append(np.flatnonzero(np.diff(places[lying, 0])) + 1, len(lying)).astype(np.int64)
    return functools.partial(_blocks, seed, lying, ends, block)


WINDOW = 4
"""Blocks in a stretch that is shuffled: as many as there are neighbours in the group that a donor comes from."""


def _blocks(
    seed: int, lying: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], block: int, epoch: int
) -> npt.NDArray[np.int64]:
    rng, count = np.random.default_rng([seed, ORDER, epoch]), int(ends[-1])
    firsts = np.append(0, ends[:-1])
    shift = rng.integers(block, size=len(ends))
    part = np.repeat(np.arange(len(ends)), ends - firsts)
    # A number for each block, rising from sample to sample.
    number = (np.arange(count) - firsts[part] + shift[part]) // block
    fresh = np.append(True, (np.diff(number) != 0) | (np.diff(part) != 0))
    blocks = np.cumsum(fresh) - 1
    drawn = np.argsort(rng.permutation(int(blocks[-1]) + 1)[blocks], kind="stable")
    # Stretches begin at multiples of one length, where micro-batches mostly do too.
    mixed = drawn[np.lexsort((rng.random(count), np.arange(count) // (WINDOW * block)))]
    return lying[mixed]


def order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The epoch's permutation of `count` samples: a pure function of (seed, epoch)."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


@dataclass(frozen=True)
class Neighbourhood:
    """Keys of a micro-batch, and of the clips beside it that share a group of donors with one of its own.

    Attributes:
        keys: whole groups, in their order.
        first, count: which of them are the micro-batch.
    """

    keys: list[Key]
    first: int
    count: int

    @property
    def own(self) -> list[Key]:
        """Keys of the micro-batch."""
        return self.keys[self.first : self.first + self.count]


@dataclass(frozen=True)
class MicroBatches:
    """Keys of this process's micro-batches from step `start` on, without end.

    A step takes `batch` consecutive samples of the epoch's order; micro-batch m of process r takes the clips
    from (m * size + r) * micro on, so several processes together see just what one process would.
    """

    order: Order
    count: int
    """Samples an epoch; those after the last whole batch are left out of it."""
    batch: int
    micro: int
    rank: int
    size: int
    start: int
    places: bool = False
    """Whether keys hold the place in the epoch, so that an index drawn twice gives two samples."""
    pool: int = 0
    """Clips of a group of donors, or 0. Groups are of the step's clips, not of a micro-batch's: where a border between
    processes or passes lies in a group, a `Neighbourhood` comes."""

    def _around(self, keys: npt.NDArray[np.int64], first: int, epoch: int) -> list[Key] | Neighbourhood:
        """The micro-batch from `first` on of a step's indices, in its groups; a last group of one joins the one before
        it."""
        end = first + self.micro
        begin = first // self.pool * self.pool
        if begin and self.batch - begin == 1:
            begin -= self.pool
        until = min(-(-end // self.pool) * self.pool, self.batch)
        if self.batch - until == 1:
            until = self.batch
        found = Neighbourhood([(epoch, i) for i in keys[begin:until].tolist()], first - begin, self.micro)
        return found.own if len(found.keys) == self.micro else found

    def __iter__(self) -> Iterator[Any]:
        steps = self.count // self.batch
        epoch, within = divmod(self.start, steps)
        while True:
            permutation = self.order(epoch)
            for step in range(within, steps):
                for first in range(self.rank * self.micro, self.batch, self.size * self.micro):
                    begin = step * self.batch + first
                    drawn = permutation[begin : begin + self.micro].tolist()
                    if self.pool:
                        yield self._around(permutation[step * self.batch : (step + 1) * self.batch], first, epoch)
                    elif self.places:
                        yield [(epoch, index, begin + i) for i, index in enumerate(drawn)]
                    else:
                        yield [(epoch, index) for index in drawn]
            epoch, within = epoch + 1, 0


def loader(
    samples: Samples[S], keys: Iterable[list[Any]], collate: Callable[[list[S]], B], *, workers: int, pin: bool
) -> Generator[B]:
    """Batches in the order of `keys`, each the keys of one; what comes out does not depend on the number of workers.

    Close it (`contextlib.closing`) to end its workers.
    """
    options: dict[str, Any] = {"prefetch_factor": AHEAD} if workers else {}
    made: Any = DataLoader(
        samples,
        batch_sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_Collate(collate),
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
    """Take back the handler of SIGCHLD that torch sets with a process's first loader.

    It raises wherever the run is when a worker is killed, be it half through the optimiser's step. Without it the
    loader finds out when the worker's next batch is waited for, where all steps are whole.
    """
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
                # One that dies while it hands a batch over is met as a connection that ends.
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
    """Whether one has ended, or ends within a second."""
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0))


def _end(workers: Sequence[Any]) -> None:
    """Kill workers that have not ended by themselves soon: what they read is not wanted any more.

    The loader asks them to end and waits, up to 65 s for one that is held up by a slow file, or by the lock of another
    that died with it.
    """

    def kill() -> None:
        for worker in workers:
            with contextlib.suppress(ValueError):  # closed
                worker.kill()

    timer = threading.Timer(GRACE_SECONDS, kill)
    timer.daemon = True
    timer.start()


def _worker_died(workers: Sequence[Any], error: Exception) -> TrainingError:
    codes = {worker.pid: worker.exitcode for worker in workers if worker.exitcode is not None}
    told = ", ".join(
        f"process {pid} by {signal.Signals(-code).name}" if code < 0 else f"process {pid} with exit status {code}"
        for pid, code in codes.items()
    )
    return TrainingError(
        f"{len(codes) or 'some'} of {len(workers)} loader workers ended before their work did: {told or error}",
        "workers that live as long as the run; SIGKILL is most often the system's, which was out of memory",
        "see the system's log (dmesg, or the scheduler's report of memory); ask for more memory, or fewer --workers",
    )


@dataclass(frozen=True)
class _Collate(Generic[S, B]):
    collate: Callable[[list[S]], B]

    def __call__(self, samples: list[S] | AsitError) -> B | AsitError:
        return samples if isinstance(samples, AsitError) else self.collate(samples)


def quiet_worker(_: int) -> None:
    """To be called at the start of a loader's process: signals to the group do not end it before the run does."""
    # Ctrl-C and a scheduler's SIGTERM reach every process of the group, and the run still needs its workers to end the
    # step. It tells them itself when to end; the alarm is for a run that could not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
