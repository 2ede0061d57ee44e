"""The parts of a sound put together: overlaps of windows blended, passes that begin a hop apart interleaved.

Letters: P patches, D width, t columns of one part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Embedding:
    """What a model says about one clip, or about a stretch of a long sound; float32, on the CPU.

    Attributes:
        clip: (D,) mean of the patch tokens: the vector to compare and to classify clips by.
        frames: (time, D) mean of the patch tokens over mel.
        patches: (P, D) time-major: all mel patches of the first column of time, then the next; None: not asked for.
        grid: (time, mel), with time x mel = P.
        times: (time,) centres of the columns, in seconds from the sound's start.
        class_token: (D,); of a long clip, the mean over windows, weighted by the time that each adds.
    """

    clip: Tensor
    frames: Tensor
    patches: Tensor | None
    grid: tuple[int, int]
    times: Tensor
    class_token: Tensor


@dataclass(frozen=True)
class Timing:
    """When the frames of a sound are: `passes` of columns, interleaved, the first at `first` s, then every `hop` s;
    `mel` bands in each."""

    passes: int
    mel: int
    first: float
    hop: float


@dataclass(frozen=True)
class Part:
    """What the encoder says about one window; on the CPU.

    Attributes:
        cls: (D,) class token.
        frames: (t, D) means over mel of the columns that it answers for.
        patches: (t, mel, D) their tokens, or None.
        shift: the pass.
        lead: columns at the beginning that are blended with the tail of the part before it.
        tail: columns at the end that are blended with the lead of the part after it.
    """

    cls: Tensor
    frames: Tensor
    patches: Tensor | None
    shift: int
    lead: int
    tail: int

    @property
    def fresh(self) -> int:
        """Columns that no part before it has."""
        return len(self.frames) - self.lead

    def without_patches(self) -> Part:
        """The same without the patch tokens."""
        return replace(self, patches=None)


class Blender:
    """Puts the parts of one sound together as they come, in order; those of several passes may come in any order.

    Where two windows overlap over n columns, the weight of the later one grows from 1 / (n + 1) to n / (n + 1).
    """

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._tail: list[_Columns | None] = [None] * timing.passes
        self._done: list[list[_Columns]] = [[] for _ in range(timing.passes)]
        self._tokens: list[tuple[Tensor, int]] = []
        self._given = 0  # frames

    def add(self, *parts: Part) -> None:
        """Take in the next parts."""
        for part in parts:
            columns: _Columns = (part.frames,) if part.patches is None else (part.frames, part.patches)
            before = self._tail[part.shift]
            if before is not None:
                columns = _blend(before, columns)
            whole = len(part.frames) - part.tail
            self._tail[part.shift] = tuple(one[whole:] for one in columns) if part.tail else None
            self._done[part.shift].append(tuple(one[:whole] for one in columns))
            self._tokens.append((part.cls, part.fresh))

    def ready(self) -> Embedding | None:
        """The frames that are certain and have not been given out, or None where there is none."""
        count = min(self._counts())
        return self._give([count] * self.timing.passes) if count else None

    def rest(self) -> Embedding:
        """All frames that have not been given out; there is one at least after a part that was added since."""
        return self._give(self._counts())

    def _counts(self) -> list[int]:
        return [sum(len(columns[0]) for columns in done) for done in self._done]

    def _give(self, counts: list[int]) -> Embedding:
        taken: list[_Columns] = []
        for shift, count in enumerate(counts):
            if count:
                whole = _join(self._done[shift])
                self._done[shift] = [tuple(one[count:] for one in whole)]
                taken.append(tuple(one[:count] for one in whole))
        # The passes' columns in turn; at the sound's end the first passes may have one more than the later ones.
        least = min(counts)
        ends = [tuple(one[least:] for one in columns) for columns in taken]
        if least:
            together = zip(*(tuple(one[:least] for one in columns) for columns in taken), strict=True)
            ends.insert(0, tuple(torch.stack(ones, 1).flatten(0, 1) for ones in together))
        frames, *patches = _join(ends)
        weights = torch.tensor([fresh for _, fresh in self._tokens], dtype=torch.float64, device="cpu")
        share = (weights / weights.sum()).float()
        cls = (torch.stack([token for token, _ in self._tokens]) * share[:, None]).sum(0)
        # In double precision: the sum of many hops would drift in single precision.
        at = torch.arange(self._given, self._given + len(frames), dtype=torch.float64, device="cpu")
        times = (self.timing.first + at * self.timing.hop).float()
        self._given += len(frames)
        self._tokens = []
        grid = len(frames), self.timing.mel
        return Embedding(frames.mean(0), frames, patches[0].flatten(0, 1) if patches else None, grid, times, cls)


_Columns = tuple[Tensor, ...]
"""Columns of time: their means over mel (t, D) and, where kept, their patches (t, mel, D)."""


def _join(pieces: list[_Columns]) -> _Columns:
    """Pieces that follow one another, as one."""
    return tuple(torch.cat(ones) for ones in zip(*pieces, strict=True))


def _blend(tail: _Columns, columns: _Columns) -> _Columns:
    """Columns whose beginning is blended with the tail of those before."""
    count = len(tail[0])
    out = []
    for before, own in zip(tail, columns, strict=True):
        grow = torch.arange(1, count + 1, device=own.device) / (count + 1)
        weights = grow.view(-1, *[1] * (own.dim() - 1))
        out.append(torch.cat([torch.lerp(before, own[:count], weights.expand_as(before)), own[count:]]))
    return tuple(out)
