"""The sampler: the order of an epoch's samples, and the keys of each process's micro-batches.

Every order is a pure function of (seed, epoch), so a resumed run needs no random state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ORDER, MATERIAL, CORRUPTION, VIEW_CHANGE, OBJECTIVE = 0, 1, 2, 3, 4
"""Independent streams of random numbers: seeds of `default_rng([seed, stream, ...])`."""
Key = tuple[int, ...]
"""(epoch, index), or (epoch, index, position) where an epoch may hold an index twice: with the seed and the settings,
all that a sample depends on."""
Order = Callable[[int], npt.NDArray[np.int64]]
"""Epoch to the indices of its samples, in order."""


def shuffled(seed: int, count: int) -> Order:
    """Return the order that takes each of `count` samples once an epoch, by `permutation`."""
    return functools.partial(permutation, seed, count=count)


def weighted(seed: int, weights: npt.NDArray[np.float64], count: int) -> Order:
    """Return the order that draws `count` samples an epoch with replacement, in proportion to `weights`."""
    return functools.partial(_draw, seed, np.cumsum(weights / weights.sum()), count)


def _draw(seed: int, cumulated: npt.NDArray[np.float64], count: int, epoch: int) -> npt.NDArray[np.int64]:
    uniform = np.random.default_rng([seed, ORDER, epoch]).random(count)
    # Rounding may leave the last sum slightly below one.
    return np.minimum(np.searchsorted(cumulated, uniform, side="right"), len(cumulated) - 1)


def in_blocks(seed: int, positions: npt.NDArray[np.int64], block: int) -> Order:
    """Return the order that takes each sample once an epoch, with neighbours in a shard close together.

    Each shard is split into blocks of neighbours, at an offset drawn for each shard and epoch; the blocks are shuffled,
    and then the samples within each window of four blocks. A micro-batch of M samples thus makes about M / block reads
    instead of M, on any process and worker, without a cache.

    Args:
        seed: of the draws.
        positions: (N, 2) each sample's shard, and its position there, such as its first byte.
        block: samples of a block.
    """
    stored = np.lexsort((positions[:, 1], positions[:, 0]))
    ends = np.append(np.flatnonzero(np.diff(positions[stored, 0])) + 1, len(stored)).astype(np.int64)
    return functools.partial(_blocks, seed, stored, ends, block)


WINDOW = 4
"""Blocks in a window that is shuffled: as many as there are clips in a donor group."""


def _blocks(
    seed: int, stored: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], block: int, epoch: int
) -> npt.NDArray[np.int64]:
    rng, count = np.random.default_rng([seed, ORDER, epoch]), int(ends[-1])
    firsts = np.append(0, ends[:-1])
    offset = rng.integers(block, size=len(ends))
    shard = np.repeat(np.arange(len(ends)), ends - firsts)
    number = (np.arange(count) - firsts[shard] + offset[shard]) // block
    begins = np.append(True, (np.diff(number) != 0) | (np.diff(shard) != 0))
    blocks = np.cumsum(begins) - 1
    drawn = np.argsort(rng.permutation(int(blocks[-1]) + 1)[blocks], kind="stable")
    # Windows begin at multiples of one length, where micro-batches mostly do too.
    mixed = drawn[np.lexsort((rng.random(count), np.arange(count) // (WINDOW * block)))]
    return stored[mixed]


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the epoch's permutation of `count` samples."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


@dataclass(frozen=True)
class DonorGroups:
    """Keys of a micro-batch and of the clips outside it that share a donor group with one of its own.

    Attributes:
        keys: of complete groups, in order.
        first, count: which of them are the micro-batch.
    """

    keys: list[Key]
    first: int
    count: int

    @property
    def own(self) -> list[Key]:
        """The keys of the micro-batch."""
        return self.keys[self.first : self.first + self.count]


@dataclass(frozen=True, kw_only=True)
class MicroBatchSampler:
    """Iterates over the keys of this process's micro-batches from step `start` on, without end.

    A step takes `batch` consecutive samples of the epoch's order; micro-batch m of process r takes the clips
    from (m * size + r) * micro on, so that all processes together take what one process would.
    """

    order: Order
    count: int
    """Samples an epoch; those after the last complete batch are left out."""
    batch: int
    micro: int
    rank: int = 0
    size: int = 1
    """Processes."""
    start: int = 0
    positions: bool = False
    """Whether keys hold the position in the epoch, so that an index drawn twice gives two samples."""
    donor_pool: int = 0
    """Clips of a donor group, or 0. Groups divide the step's clips, not a micro-batch's: where a border between
    processes or passes splits a group, the keys come as `DonorGroups`."""

    def _grouped(self, keys: npt.NDArray[np.int64], first: int, epoch: int) -> list[Key] | DonorGroups:
        """Return the micro-batch from `first` on of a step's indices, with the rest of its donor groups."""
        end, pool = first + self.micro, self.donor_pool
        # A last group of one clip joins the group before it.
        begin = first // pool * pool
        if begin and self.batch - begin == 1:
            begin -= pool
        until = min(-(-end // pool) * pool, self.batch)
        if self.batch - until == 1:
            until = self.batch
        found = DonorGroups([(epoch, i) for i in keys[begin:until].tolist()], first - begin, self.micro)
        return found.own if len(found.keys) == self.micro else found

    def __iter__(self) -> Iterator[Any]:
        steps = self.count // self.batch
        epoch, within = divmod(self.start, steps)
        while True:
            indices = self.order(epoch)
            for step in range(within, steps):
                for first in range(self.rank * self.micro, self.batch, self.size * self.micro):
                    begin = step * self.batch + first
                    drawn = indices[begin : begin + self.micro].tolist()
                    if self.donor_pool:
                        yield self._grouped(indices[step * self.batch : (step + 1) * self.batch], first, epoch)
                    elif self.positions:
                        yield [(epoch, index, begin + i) for i, index in enumerate(drawn)]
                    else:
                        yield [(epoch, index) for index in drawn]
            epoch, within = epoch + 1, 0
