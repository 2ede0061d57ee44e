"""What threads prepare of many recordings, handed over in the recordings' order, with a bound on what lies ready.

Letters of types: W what is prepared, such as a window.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from asit.errors import AsitError, StoreError

W = TypeVar("W")


@dataclass(frozen=True)
class Done:
    """All of a recording has been given; or, with a fault, no more of it can be."""

    place: int
    fault: str | None = None


@dataclass(frozen=True)
class First:
    """A piece begins."""

    start: float


@dataclass(frozen=True)
class Last:
    """A piece has ended."""

    seconds: float


Sign = First | Last | Done | BaseException
"""What is said between windows."""


class _ClosedError(Exception):
    """The feed was closed."""


class Feed(Generic[W]):
    """What threads prepare, handed over in the order of the recordings, with a bound on what lies ready.

    A thread works on one recording at a time and takes the next that nobody has. The recording that is wanted now may
    always go on, so that the others, who wait for room, never hold it up.
    """

    def __init__(self, count: int, prepare: Callable[[int], Iterator[W | Sign]], most: int, threads: int) -> None:
        self.count, self.prepare, self.most = count, prepare, most
        self.changed = threading.Condition()
        self.queues: dict[int, deque[W | Sign]] = {}
        self.next, self.head, self.held = 0, 0, 0
        self.stopped = False
        torch.get_num_threads()  # settles the caller's own number before the workers say theirs
        self.threads = [
            threading.Thread(target=self._work, name=f"prepare-{i}", daemon=True) for i in range(min(threads, count))
        ]
        for thread in self.threads:
            thread.start()

    def of(self, place: int) -> Iterator[W | Sign]:
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
        except StoreError as error:  # no bad recording: all others of that place would be missing too
            self._put(place, error)
        except (AsitError, OSError) as error:
            self._put(place, Done(place, _told(error)))
        except _ClosedError:
            raise
        except BaseException as error:  # a mistake of ours: raised where the results are waited for
            self._put(place, error)
        finally:
            things.close()  # type: ignore[attr-defined]  # closes the file

    def _put(self, place: int, thing: W | Sign) -> None:
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
