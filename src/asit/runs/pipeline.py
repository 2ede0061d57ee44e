"""Many recordings through an encoder: threads decode and make log-mels, one thread runs batches, the order is kept.

Which windows go through the encoder together follows from the recordings' order alone, never from which thread was
first; so the same recordings give the same numbers, bit for bit, on one machine with one number of threads.

Letters: n samples of a block, W windows.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass

import torch

from asit.audio.sounds import OpenSound
from asit.errors import AsitError
from asit.model.blending import Blender, Embedding, Part
from asit.model.embedding import Embedder, Window

_BATCHES = 4
"""Batches' worth of windows that are collected, so that like lengths can go together."""
_AHEAD = 2
"""Batches' worth that may lie ready beside those: half a megabyte for each window of 10 s."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording that is embedded by itself.

    Attributes:
        sound: open; asked for its blocks once.
        start: where in the file it starts, s.
    """

    sound: OpenSound
    start: float


@dataclass(frozen=True)
class Heard:
    """A piece, or of a long one a stretch, in order.

    Attributes:
        place: of the recording among those asked for.
        start: of the piece in the file, s; the embedding's times count from there.
        seconds: of the piece; None: more of it is to come.
        embedding: of the stretch.
        columns: that its class token is the mean over, as a weight.
    """

    place: int
    start: float
    seconds: float | None
    embedding: Embedding
    columns: int


@dataclass(frozen=True)
class Done:
    """All of a recording has been given; or, with a fault, no more of it can be."""

    place: int
    fault: str | None = None


@dataclass(frozen=True)
class _First:
    """A piece begins."""

    start: float


@dataclass(frozen=True)
class _Last:
    """A piece has ended."""

    seconds: float


_Thing = _First | Window | _Last | Done | BaseException


def hear(
    embedder: Embedder,
    count: int,
    cut: Callable[[int], Iterator[Piece]],
    *,
    batch: int = 16,
    threads: int = 1,
    ends: Collection[int] = (),
) -> Generator[Heard | Done]:
    """What the encoder says about recordings 0 to `count` - 1, in their order.

    Args:
        embedder: of the model.
        count: recordings.
        cut: opens a recording and gives its pieces one after the other, each used up before the next is asked for; is
            called by several threads. An AsitError or OSError ends that recording with a fault, and the others go on.
        batch: windows that go through the encoder at once.
        threads: that prepare windows.
        ends: numbers of recordings; before one of them nothing is left waiting, so that what comes after does not hang
            on what came before.

    Memory does not grow with the recordings' lengths. Whoever stops early closes the generator; its threads are then
    ended and waited for.
    """
    feed = _Feed(count, lambda place: _prepare(embedder, cut, place), _AHEAD * batch, threads)
    pool = _Pool(embedder, batch)
    stops = set(ends)
    try:
        for place in range(count):
            if place in stops:
                yield from pool.flush()
            for thing in feed.of(place):
                if isinstance(thing, Window) and len(pool) >= _BATCHES * batch:
                    yield from pool.flush()  # only now: the window shows that its piece was not at its end
                pool.take(place, thing)
        yield from pool.flush()
    finally:
        feed.close()


def _prepare(embedder: Embedder, cut: Callable[[int], Iterator[Piece]], place: int) -> Iterator[_Thing]:
    for piece in cut(place):
        yield _First(piece.start)
        yield from embedder.windows(piece.sound)
        yield _Last(piece.sound.given / embedder.front_end.settings.rate)


class _Open:
    """A piece some of whose windows are not embedded yet, or not given out."""

    def __init__(self, place: int, start: float, blender: Blender) -> None:
        self.place, self.start, self.blender = place, start, blender
        self.seconds: float | None = None
        self.columns = 0

    def add(self, part: Part) -> None:
        self.blender.add(part)
        self.columns += part.fresh

    def give(self) -> Heard | None:
        """What is certain, or at the piece's end the rest."""
        if self.seconds is None:
            stretch = self.blender.ready()
            if stretch is None:
                return None
        else:
            stretch = self.blender.rest()
        columns, self.columns = self.columns, 0
        return Heard(self.place, self.start, self.seconds, stretch, columns)


class _Pool:
    """Windows of several recordings that wait to go through the encoder together."""

    def __init__(self, embedder: Embedder, batch: int) -> None:
        self.embedder, self.batch = embedder, batch
        self.windows: list[tuple[_Open, Window]] = []
        self.pending: list[_Open | Done] = []
        self.faulty: set[int] = set()

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, place: int, thing: _Thing) -> None:
        """The next thing in order: of a recording, its pieces' beginnings, windows and ends, and its own end."""
        if isinstance(thing, BaseException):
            raise thing
        if isinstance(thing, _First):
            self.pending.append(_Open(place, thing.start, self.embedder.blender()))
            return
        if isinstance(thing, Done):
            if thing.fault is not None:  # an open piece will never end
                self.windows = [(piece, window) for piece, window in self.windows if piece.place != place]
                self.pending = [one for one in self.pending if one.place != place]
            self.pending.append(thing)
            return
        piece = self.pending[-1]
        assert isinstance(piece, _Open)
        if isinstance(thing, _Last):
            piece.seconds = thing.seconds
        else:
            self.windows.append((piece, thing))

    def flush(self) -> Iterator[Heard | Done]:
        """Run all windows, and give what is known by then."""
        # Neighbours of like length waste least on filling. The sort is stable, so a piece's windows stay in order.
        self.windows.sort(key=lambda owned: owned[1].columns)
        for first in range(0, len(self.windows), self.batch):
            few = self.windows[first : first + self.batch]
            for (piece, _), part in zip(few, self.embedder.run([window for _, window in few]), strict=True):
                piece.add(part)
        self.windows = []
        unfinished: list[_Open | Done] = []
        for one in self.pending:
            if isinstance(one, Done):
                yield one
                continue
            if (heard := one.give()) is not None:
                yield heard
            if one.seconds is None:
                unfinished.append(one)
        self.pending = unfinished


class _ClosedError(Exception):
    """The feed was closed."""


class _Feed:
    """What threads prepare, handed over in the order of the recordings, with a bound on what lies ready.

    A thread works on one recording at a time and takes the next that nobody has. The recording that is wanted now may
    always go on, so that the others, who wait for room, never hold it up.
    """

    def __init__(self, count: int, prepare: Callable[[int], Iterator[_Thing]], most: int, threads: int) -> None:
        self.count, self.prepare, self.most = count, prepare, most
        self.changed = threading.Condition()
        self.queues: dict[int, deque[_Thing]] = {}
        self.next, self.head, self.held = 0, 0, 0
        self.stopped = False
        torch.get_num_threads()  # settles the caller's own number before the workers say theirs
        self.threads = [
            threading.Thread(target=self._work, name=f"prepare-{i}", daemon=True) for i in range(min(threads, count))
        ]
        for thread in self.threads:
            thread.start()

    def of(self, place: int) -> Iterator[_Thing]:
        """All that a recording gives, the last being its `Done`."""
        with self.changed:
            self.head = place
            self.changed.notify_all()
        while True:
            with self.changed:
                while not self.queues.get(place):
                    self.changed.wait()
                things = list(self.queues[place])
                self.queues[place].clear()
                self.held -= len(things)
                if isinstance(things[-1], Done):
                    del self.queues[place]
                self.changed.notify_all()
            for thing in things:
                yield thing
                if isinstance(thing, Done):
                    return

    def close(self) -> None:
        """End the threads, and wait for them."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)  # of this thread alone: the cores are shared out already
        while True:
            with self.changed:
                # So far ahead that short recordings, and not only long ones, keep every thread at work.
                while not self.stopped and self.next < self.count and self.next - self.head > 8 * self.most:
                    self.changed.wait()
                if self.stopped or self.next >= self.count:
                    return
                place = self.next
                self.next += 1
                self.queues[place] = deque()
            try:
                self._fill(place)
            except _ClosedError:
                return

    def _fill(self, place: int) -> None:
        things = self.prepare(place)
        try:
            for thing in things:
                self._put(place, thing)
            self._put(place, Done(place))
        except (AsitError, OSError) as error:
            self._put(place, Done(place, _told(error)))
        except _ClosedError:
            raise
        except BaseException as error:  # a mistake of ours: raised where the results are waited for
            self._put(place, error)
        finally:
            things.close()  # type: ignore[attr-defined]  # closes the file

    def _put(self, place: int, thing: _Thing) -> None:
        with self.changed:
            while not self.stopped and self._full(place):
                self.changed.wait()
            if self.stopped:
                raise _ClosedError
            self.queues[place].append(thing)
            self.held += 1
            if place == self.head:
                self.changed.notify_all()

    def _full(self, place: int) -> bool:
        return (len(self.queues[place]) if place == self.head else self.held) >= self.most


def _told(error: AsitError | OSError) -> str:
    return error.found if isinstance(error, AsitError) else error.strerror or str(error)
