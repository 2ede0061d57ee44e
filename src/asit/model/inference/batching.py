"""Run recordings through a network in batches: threads prepare windows, one thread runs them, results keep the order.

Which windows share a batch follows from the order of the recordings alone, never from the timing of threads, so the
same recordings give the same numbers, bit for bit, on one machine with one number of threads.

Letters of types: W a window, P the network's output for one, A what the outputs of a stretch of sound are joined to.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch

from asit.audio.faults import Wave
from asit.audio.fbank import FrontEnd
from asit.audio.stream import Sound, open_sound
from asit.errors import AsitError, ConfigError, StoreError
from asit.model.vit import Encoder

_AHEAD = 2
"""Batches of windows that may be ready and waiting: half a megabyte for each window of 10 s."""
_PATCHES = 1024
"""Patches in a batch for each thread of a CPU, two threads at least: four windows of 10 s. More are no faster, since
allocations above 32 MB are returned to the system and mapped again for each product."""


class Sized(Protocol):
    """A window of so many columns of patches."""

    @property
    def columns(self) -> int: ...


W = TypeVar("W", bound=Sized)
P = TypeVar("P")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)


class Gatherer(Protocol[P_contra, A_co]):
    """Joins the outputs for the windows of one piece of sound, added in order."""

    def add(self, part: P_contra, /) -> None: ...

    def ready(self) -> A_co | None:
        """Return what is final and has not been returned yet; None: nothing."""

    def rest(self) -> A_co:
        """Return all that has not been returned yet, at the end of the piece."""


@dataclass(frozen=True)
class Result(Generic[A]):
    """The answer for a piece of a recording, or for a stretch of a long one.

    Attributes:
        index: of the recording.
        start: of the piece in its file, s.
        seconds: length of the piece; None: more stretches of it follow.
        found: the answer; its times count from the start of the piece.
    """

    index: int
    start: float
    seconds: float | None
    found: A


@dataclass(frozen=True)
class Done:
    """The end of a recording; `fault`: why it could not be read to its end."""

    index: int
    fault: str | None = None


_Event = Any  # a window, a _Piece that begins, the seconds of the piece that ends, Done, or an exception to raise


class BatchedModel(ABC, Generic[W, P, A]):
    """A network that takes sound in windows: any thread may make `windows`, one thread calls `run`."""

    encoder: Encoder
    front_end: FrontEnd
    pooled: ClassVar[int]
    """Batches of windows of several sounds that `run_sounds` collects, so that windows of like length share one."""

    @abstractmethod
    def windows_of(self, blocks: Iterator[Wave]) -> Generator[W, None, None]:
        """Cut samples into windows: mono blocks (n,) float32 at the front end's rate, none of them empty."""

    @abstractmethod
    def run(self, windows: Sequence[W], /) -> list[P]:
        """Run windows, of one sound or of many, as one batch; outputs in their order."""

    @abstractmethod
    def gatherer(self) -> Gatherer[P, A]:
        """Return what joins the outputs of one sound."""

    def join(self, parts: Iterable[P]) -> A:
        """Join the outputs for all windows of one sound, in order."""
        gatherer = self.gatherer()
        for part in parts:
            gatherer.add(part)
        return gatherer.rest()

    @staticmethod
    @abstractmethod
    def checked(found: A) -> A:
        """Return the answer; AudioError where it is not finite."""

    def windows(
        self, sound: Sound, rate: int | None = None, start: float = 0.0, seconds: float | None = None
    ) -> Generator[W, None, None]:
        """Decode, resample and cut a sound into windows of log-mel, in constant memory.

        Args:
            sound: a file, its bytes, or samples.
            rate: of samples in Hz; None: the front end's.
            start: where the part to read begins, s.
            seconds: its length; None: to the end.

        Raises:
            AudioError: a sound that is empty, not finite, of another shape or unreadable; also in the middle of it.
        """
        settings = self.front_end.settings
        with open_sound(sound, rate, settings.rate, settings.resampler, start, seconds) as source:
            yield from self.windows_of(source.blocks())

    def stream(
        self, sound: Sound, rate: int | None = None, batch: int = 8, start: float = 0.0, seconds: float | None = None
    ) -> Iterator[A]:
        """Yield the answers for consecutive stretches of up to `batch` windows, each as soon as it is final.

        Args and errors are those of `windows`.
        """
        check_batch(batch)
        settings = self.front_end.settings
        with open_sound(sound, rate, settings.rate, settings.resampler, start, seconds) as source:
            batcher = _Batcher(self, batch, pooled=1, partial=True)
            for result in batcher.through(_events(self, 0, [(0.0, source)])):
                yield self.checked(result.found)

    def run_sounds(self, sounds: Iterable[Sound], rate: int | None = None, batch: int = 16) -> list[A]:
        """Return the answers for sounds, in their order; arguments are those of `windows` and `run_recordings`."""
        check_batch(batch)
        events = (event for i, sound in enumerate(sounds) for event in _events(self, i, [(0.0, sound)], rate))
        return [self.checked(result.found) for result in _Batcher(self, batch, self.pooled).through(events)]


def run_recordings(
    model: BatchedModel[W, P, A],
    count: int,
    pieces: Callable[[int], Iterator[tuple[float, Sound]]],
    *,
    batch: int = 16,
    pooled: int = 4,
    partial: bool = False,
    threads: int = 0,
    ends: Collection[int] = (),
) -> Generator[Result[A] | Done]:
    """Yield the answers for recordings 0 to `count` - 1, in their order, each recording followed by its `Done`.

    Memory does not grow with their number, and with `partial` not with their lengths. Closing the generator joins its
    threads.

    Args:
        model: `WindowEmbedder` or `Tagger`.
        count: recordings.
        pieces: yields (start in the file, sound) of the pieces of a recording, each read before the next one is taken;
            called by several threads. An AsitError or OSError becomes the fault of that recording.
        batch: windows in a batch; on a CPU fewer of them, where they are long.
        pooled: batches of windows that are collected, so that windows of like length share a batch.
        partial: yield stretches of a piece as they become final, not only the whole piece.
        threads: that prepare windows; 0: as many as torch computes with.
        ends: recordings before which no window is left waiting, so that later results do not depend on earlier ones.
    """
    prepared = _Prepared(
        count, lambda index: _events(model, index, pieces(index)), _AHEAD * batch, threads or torch.get_num_threads()
    )
    batcher = _Batcher(model, batch, pooled, partial, small_on_cpu=True)
    try:
        for index in range(count):
            if index in ends:
                yield from batcher.flush()
            for event in prepared.of(index):
                yield from batcher.take(event)
        yield from batcher.flush()
    finally:
        prepared.close()


def check_batch(batch: int) -> None:
    """Raise ConfigError where so many windows cannot be in a batch."""
    if not isinstance(batch, int | np.integer) or batch < 1:
        raise ConfigError(
            f"batch {batch!r}", "a whole number from 1 on: windows that go through the network at once", "leave it out"
        )


def _events(
    model: BatchedModel[W, P, A], index: int, pieces: Iterable[tuple[float, Sound]], rate: int | None = None
) -> Generator[_Event]:
    """Yield all windows of a recording, and where its pieces begin and end."""
    settings = model.front_end.settings
    for start, sound in pieces:
        with open_sound(sound, rate, settings.rate, settings.resampler) as source:
            yield _Piece(index, start, model.gatherer())
            yield from model.windows_of(source.blocks())
            yield source.given / source.target


class _Piece(Generic[P, A]):
    """A piece of sound without all of its answers."""

    def __init__(self, index: int, start: float, gatherer: Gatherer[P, A]) -> None:
        self.index, self.start, self.gatherer = index, start, gatherer
        self.seconds: float | None = None


class _Batcher(Generic[W, P, A]):
    """Collects windows of several recordings, and runs them in batches of like length."""

    def __init__(
        self, model: BatchedModel[W, P, A], batch: int, pooled: int, partial: bool = False, small_on_cpu: bool = False
    ) -> None:
        self.model, self.batch, self.capacity, self.partial = model, batch, pooled * batch, partial
        self.windows: list[tuple[_Piece[P, A], W]] = []
        self.pending: list[_Piece[P, A] | Done] = []
        self.most: int | None = None  # columns in a batch
        if small_on_cpu and model.encoder.pos_embed.device.type == "cpu":
            self.most = _PATCHES * max(2, torch.get_num_threads()) // model.encoder.grid[1]

    def through(self, events: Iterable[_Event]) -> Iterator[Result[A]]:
        """Yield all results of one stream of events without `Done`."""
        for event in events:
            yield from self.take(event)  # type: ignore[misc]
        yield from self.flush()  # type: ignore[misc]

    def take(self, event: _Event) -> Iterator[Result[A] | Done]:
        """Take the next event; yields results where the pool was full."""
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, _Piece):
            self.pending.append(event)
        elif isinstance(event, Done):
            if event.fault is not None:  # its open piece will never end
                self.windows = [owned for owned in self.windows if owned[0].index != event.index]
                self.pending = [one for one in self.pending if one.index != event.index]
            self.pending.append(event)
        else:
            piece = self.pending[-1]
            assert isinstance(piece, _Piece)
            if isinstance(event, float):
                piece.seconds = event
                return
            if len(self.windows) >= self.capacity:
                yield from self.flush()  # only now: this window shows that its piece has not ended
            self.windows.append((piece, event))

    def flush(self) -> Iterator[Result[A] | Done]:
        """Run all windows, and yield what is known by then."""
        # Windows of like length need least padding. The sort is stable, so a piece's windows stay in order.
        self.windows.sort(key=lambda owned: owned[1].columns)
        for few in self._batches():
            for (piece, _), part in zip(few, self.model.run([window for _, window in few]), strict=True):
                piece.gatherer.add(part)
        self.windows = []
        unfinished: list[_Piece[P, A] | Done] = []
        for one in self.pending:
            if isinstance(one, Done):
                yield one
            elif one.seconds is not None:
                yield Result(one.index, one.start, one.seconds, one.gatherer.rest())
            else:
                unfinished.append(one)
                if self.partial and (found := one.gatherer.ready()) is not None:
                    yield Result(one.index, one.start, None, found)
        self.pending = unfinished

    def _batches(self) -> Iterator[list[tuple[_Piece[P, A], W]]]:
        few: list[tuple[_Piece[P, A], W]] = []
        for owned in self.windows:  # the longest so far
            full = self.most is not None and (len(few) + 1) * owned[1].columns > self.most
            if few and (full or len(few) == self.batch):
                yield few
                few = []
            few.append(owned)
        if few:
            yield few


class _Prepared:
    """Events that threads prepare, those of each recording in a queue of its own."""

    # Threads take recordings in their order: the one that is being read is never behind one that waits for room.

    def __init__(self, count: int, prepare: Callable[[int], Generator[_Event]], most: int, threads: int) -> None:
        self.count, self.prepare, self.started = count, prepare, 0
        self.room, self.ahead = max(4, most // threads), 4 * threads  # events of a recording; recordings
        self.queues: dict[int, queue.Queue[_Event]] = {}
        self.tasks = queue.SimpleQueue[int | None]()
        self.stopped = threading.Event()
        torch.get_num_threads()  # fixes the caller's own number before the workers set theirs
        names = [f"prepare-{i}" for i in range(min(threads, count))]
        self.threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self.threads:
            thread.start()

    def of(self, index: int) -> Iterator[_Event]:
        """Yield all events of a recording, the last being its `Done`."""
        for started in range(self.started, min(self.count, index + self.ahead)):
            self.queues[started] = queue.Queue(self.room)
            self.tasks.put(started)
        self.started = max(self.started, min(self.count, index + self.ahead))
        event: _Event = None
        while not isinstance(event, Done):
            event = self.queues[index].get()
            yield event
        del self.queues[index]

    def close(self) -> None:
        """End and join the threads."""
        self.stopped.set()
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread alone: the cores are shared out already
        while not self.stopped.is_set() and (index := self.tasks.get()) is not None:
            with contextlib.closing(self.prepare(index)) as events:  # which closes the file
                for event in _ended(index, events):
                    if not self._put(self.queues[index], event):
                        return

    def _put(self, room: queue.Queue[_Event], event: _Event) -> bool:
        """Add an event when there is room; False if the threads are to end."""
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                room.put(event, timeout=0.1)
                return True
        return False


def _ended(index: int, events: Iterator[_Event]) -> Iterator[_Event]:
    """Yield the events of a recording, and how it ended: `Done`, or an exception that ends everything."""
    try:
        yield from events
    except StoreError as error:  # not one bad recording: all others in that store would be missing too
        yield error
    except (AsitError, OSError) as error:
        yield Done(index, error.found if isinstance(error, AsitError) else error.strerror or str(error))
    except GeneratorExit:
        raise
    except BaseException as error:  # a bug: raised where the results are read
        yield error
    else:
        yield Done(index)
