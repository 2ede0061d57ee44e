"""Blocks of work distributed over processes, in rounds; an error in one process is raised in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from asit.errors import AsitError
from asit.runtime import World

R = TypeVar("R")

ROUND = 4
"""Blocks that each of several processes works on between two exchanges of results."""


class BlockRounds:
    """Distributes blocks over the processes: each round gives every process `ROUND` of them, one process one.

    Args:
        world: the processes.
        blocks: numbers of the blocks, the same in every process.

    Attributes:
        own: the blocks of this process, in the order of the rounds.
    """

    def __init__(self, world: World, blocks: Sequence[int]) -> None:
        self.world = world
        step = world.size * (ROUND if world.size > 1 else 1)
        self._shares = [blocks[first : first + step][world.rank :: world.size] for first in range(0, len(blocks), step)]
        self.own = [block for share in self._shares for block in share]

    def run(self, work: Callable[[Sequence[int]], R]) -> Iterator[list[R]]:
        """Call `work` with this process's blocks of each round; yields the results of all processes, round by round.

        Raises:
            AsitError, OSError: what `work` raised in any process.
        """
        for share in self._shares:
            result: R | None = None
            error: AsitError | OSError | None = None
            try:
                result = work(share)
            except (AsitError, OSError) as raised:  # exchanged, or the other processes would wait for this one
                error = raised
            everyone = self.world.gather((result, error))
            for _, error in everyone:
                if error is not None:
                    raise error
            yield [result for result, _ in everyone]


def block_ends(sizes: Iterable[float], most: int, largest: float) -> list[int]:
    """Return where blocks of consecutive items end: after `most` items, or once their sizes reach `largest`."""
    ends, count, total, at = list[int](), 0, 0.0, 0
    for at, size in enumerate(sizes, 1):
        count, total = count + 1, total + size
        if count == most or total >= largest:
            ends.append(at)
            count, total = 0, 0.0
    return ends if not count else [*ends, at]
