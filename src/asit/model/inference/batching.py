"""Many recordings through a network: threads decode and make log-mels, one thread runs batches, the order is kept.

Which windows go through the network together follows from the recordings' order alone, never from which thread was
first; so the same recordings give the same numbers, bit for bit, on one machine with one number of threads.

Letters of types: W a window, P what the network says about one, A what a stretch of a recording comes to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from asit.audio.stream import OpenSound
from asit.model.inference.embedding import Embedder
from asit.model.inference.feed import Done, Feed, First, Last, Sign
from asit.model.inference.overlap import Blender, Embedding, Part
from asit.model.vit import Encoder

__all__ = ["Answer", "Done", "Ear", "Gatherer", "Heard", "Piece", "hear", "listen"]

_AHEAD = 2
"""Batches' worth that may lie ready beside those: half a megabyte for each window of 10 s."""
_PATCHES = 1024
"""Patches that go through an encoder at once for each thread of a CPU, two threads at least: four windows of 10 s. More
are no faster: pieces above 32 MB are given back to the system and mapped anew for each product. Keeping them
(`asit.model.cpu.bf16.keep_freed_memory`) saves nothing beyond that, and grows by 0.4 GB in an hour of sound."""

W = TypeVar("W")
P = TypeVar("P")
A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)


class Ear(Protocol[W, P]):
    """A network asked in two stages, such as `Embedder` and `Tagger`."""

    @property
    def encoder(self) -> Encoder: ...

    def windows(self, sound: OpenSound, /) -> Iterator[W]:
        """What the network hears at once, in order; called by several threads."""

    def run(self, windows: Sequence[W], /) -> list[P]:
        """One batch through the network, answers in the order given."""


class Gatherer(Protocol[P_contra, A_co]):
    """Puts together what the network says about the windows of one piece."""

    def add(self, part: P_contra, /) -> None:
        """The next window's, in order."""

    def ready(self) -> A_co | None:
        """What is certain and has not been given out; None: nothing yet."""

    def rest(self) -> A_co:
        """All that has not been given out, at the end of the piece."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording that is heard by itself.

    Attributes:
        sound: open; asked for its blocks once.
        start: where in the file it starts, s.
    """

    sound: OpenSound
    start: float


@dataclass(frozen=True)
class Answer(Generic[A]):
    """To a piece, or to a stretch of a long one, in order.

    Attributes:
        place: of the recording among those asked for.
        start: of the piece in the file, s.
        seconds: of the piece; None: more of it is to come.
        found: what its windows came to.
    """

    place: int
    start: float
    seconds: float | None
    found: A


@dataclass(frozen=True)
class Heard:
    """An `Answer` of an embedder.

    Attributes:
        place, start, seconds: as there; the embedding's times count from the start.
        embedding: of the stretch.
        columns: that its class token is the mean over, as a weight.
    """

    place: int
    start: float
    seconds: float | None
    embedding: Embedding
    columns: int


def hear(
    embedder: Embedder,
    count: int,
    cut: Callable[[int], Iterator[Piece]],
    *,
    batch: int = 16,
    threads: int = 1,
    ends: Collection[int] = (),
) -> Generator[Heard | Done]:
    """What the encoder says about recordings 0 to `count` - 1, in their order; arguments as those of `listen`."""
    answers = listen(
        embedder,
        count,
        cut,
        lambda: _Stretches(embedder.blender()),
        size=lambda window: window.columns,
        batch=batch,
        threads=threads,
        ends=ends,
    )
    with closing(answers):
        for one in answers:
            yield one if isinstance(one, Done) else Heard(one.place, one.start, one.seconds, *one.found)


class _Stretches:
    """Embeddings of stretches, each with the columns that its class token is the mean over."""

    def __init__(self, blender: Blender) -> None:
        self.blender, self.columns = blender, 0

    def add(self, part: Part) -> None:
        self.blender.add(part)
        self.columns += part.fresh

    def ready(self) -> tuple[Embedding, int] | None:
        stretch = self.blender.ready()
        return None if stretch is None else self._with_columns(stretch)

    def rest(self) -> tuple[Embedding, int]:
        return self._with_columns(self.blender.rest())

    def _with_columns(self, stretch: Embedding) -> tuple[Embedding, int]:
        columns, self.columns = self.columns, 0
        return stretch, columns


def listen(
    ear: Ear[W, P],
    count: int,
    cut: Callable[[int], Iterator[Piece]],
    gatherer: Callable[[], Gatherer[P, A]],
    *,
    size: Callable[[W], int],
    batch: int = 16,
    batches: int = 4,
    threads: int = 1,
    ends: Collection[int] = (),
) -> Generator[Answer[A] | Done]:
    """What the network says about recordings 0 to `count` - 1, in their order.

    Args:
        ear: the network.
        count: recordings.
        cut: opens a recording and gives its pieces one after the other, each used up before the next is asked for; is
            called by several threads. An AsitError or OSError ends that recording with a fault, and the others go on.
        gatherer: for each piece.
        size: of a window, in columns of patches.
        batch: windows that go through the network at once; on a CPU fewer of them, where they are long.
        batches: as many windows are collected, so that like lengths can go together; 1 where all are alike.
        threads: that prepare windows.
        ends: numbers of recordings; before one of them nothing is left waiting, so that what comes after does not hang
            on what came before.

    Memory does not grow with the recordings' lengths. Whoever stops early closes the generator; its threads are then
    ended and waited for.
    """
    feed = Feed(count, lambda place: _prepare(ear, cut, place), _AHEAD * batch, threads)
    pool = _Pool(ear, gatherer, size, batch)
    stops = set(ends)
    try:
        for place in range(count):
            if place in stops:
                yield from pool.flush()
            for thing in feed.of(place):
                if isinstance(thing, Sign):
                    pool.note(place, thing)
                    continue
                if len(pool) >= batches * batch:
                    yield from pool.flush()  # only now: the window shows that its piece was not at its end
                pool.take(thing)
        yield from pool.flush()
    finally:
        feed.close()


def _prepare(ear: Ear[W, P], cut: Callable[[int], Iterator[Piece]], place: int) -> Iterator[W | Sign]:
    for piece in cut(place):
        yield First(piece.start)
        yield from ear.windows(piece.sound)
        yield Last(piece.sound.given / piece.sound.target)


class _Open(Generic[P, A]):
    """A piece some of whose windows have not been through the network yet, or not been answered."""

    def __init__(self, place: int, start: float, gatherer: Gatherer[P, A]) -> None:
        self.place, self.start, self.gatherer = place, start, gatherer
        self.seconds: float | None = None

    def give(self) -> Answer[A] | None:
        """What is certain, or at the piece's end the rest."""
        found = self.gatherer.ready() if self.seconds is None else self.gatherer.rest()
        return None if found is None else Answer(self.place, self.start, self.seconds, found)


class _Pool(Generic[W, P, A]):
    """Windows of several recordings that wait to go through the network together."""

    def __init__(
        self, ear: Ear[W, P], gatherer: Callable[[], Gatherer[P, A]], size: Callable[[W], int], batch: int
    ) -> None:
        self.ear, self.gatherer, self.size, self.batch = ear, gatherer, size, batch
        self.windows: list[tuple[_Open[P, A], W]] = []
        self.pending: list[_Open[P, A] | Done] = []
        self.most: int | None = None  # columns in a batch
        if ear.encoder.pos_embed.device.type == "cpu":
            self.most = _PATCHES * max(2, torch.get_num_threads()) // ear.encoder.grid[1]

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, window: W) -> None:
        """The next window of the piece that was begun last."""
        piece = self.pending[-1]
        assert isinstance(piece, _Open)
        self.windows.append((piece, window))

    def note(self, place: int, sign: Sign) -> None:
        """A piece of a recording begins or ends, or the recording does."""
        if isinstance(sign, BaseException):
            raise sign
        if isinstance(sign, First):
            self.pending.append(_Open(place, sign.start, self.gatherer()))
        elif isinstance(sign, Last):
            piece = self.pending[-1]
            assert isinstance(piece, _Open)
            piece.seconds = sign.seconds
        else:
            if sign.fault is not None:  # an open piece will never end
                self.windows = [(piece, window) for piece, window in self.windows if piece.place != place]
                self.pending = [one for one in self.pending if one.place != place]
            self.pending.append(sign)

    def flush(self) -> Iterator[Answer[A] | Done]:
        """Run all windows, and give what is known by then."""
        # Neighbours of like length waste least on filling. The sort is stable, so a piece's windows stay in order.
        self.windows.sort(key=lambda owned: self.size(owned[1]))
        for few in self._batches():
            for (piece, _), part in zip(few, self.ear.run([window for _, window in few]), strict=True):
                piece.gatherer.add(part)
        self.windows = []
        unfinished: list[_Open[P, A] | Done] = []
        for one in self.pending:
            if isinstance(one, Done):
                yield one
                continue
            if (answer := one.give()) is not None:
                yield answer
            if one.seconds is None:
                unfinished.append(one)
        self.pending = unfinished

    def _batches(self) -> Iterator[list[tuple[_Open[P, A], W]]]:
        few: list[tuple[_Open[P, A], W]] = []
        for owned in self.windows:  # the one at hand is the longest
            enough = self.most is not None and (len(few) + 1) * self.size(owned[1]) > self.most
            if few and (enough or len(few) == self.batch):
                yield few
                few = []
            few.append(owned)
        if few:
            yield few
