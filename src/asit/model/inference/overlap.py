"""Join the parts of a sound: overlaps of windows are blended, passes that begin a hop apart interleaved.

Letters: P patches, D width, t columns of one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from asit.model.inference.data_frames import data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

ClipPooling = Literal["mean", "class", "class+mean"]
"""The vector of a clip: the mean of its patch tokens, its class token, or both, the class token first."""


@dataclass(frozen=True)
class Embedding:
    """The embedding of one clip, or of a stretch of a long sound; float32, on the CPU.

    Attributes:
        clip: (D,) mean of the patch tokens: the vector to compare and to classify clips by.
        frames: (time, D) mean of the patch tokens over mel.
        patches: (P, D) time-major: all mel patches of the first column of time, then the next; None: not requested.
        grid: (time, mel), with time x mel = P.
        times: (time,) centres of the columns, in seconds from the sound's start.
        class_token: (D,); of a long clip, the mean over windows, weighted by the columns that each adds.
        weight: sum of these weights, to average the class tokens of several stretches by.
    """

    clip: Tensor
    frames: Tensor
    patches: Tensor | None
    grid: tuple[int, int]
    times: Tensor
    class_token: Tensor
    weight: int = 0

    def __repr__(self) -> str:
        columns, bands = self.grid
        patches = "" if self.patches is None else f", {columns * bands} patches"
        return f"Embedding({columns} frames of {len(self.clip)} values{patches}{_span(self.times)})"

    def to_frame(self) -> DataFrame:
        """Return a pandas DataFrame with a row for each frame: time, and its values v0, v1, ...

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame({"time": self.times}, self.frames, [f"v{i}" for i in range(self.frames.shape[1])])

    def pooled(self, pooling: ClipPooling) -> Tensor:
        """Return the vector of the clip: (D,), or (2 D,) for class token and mean, in this order."""
        parts = {"mean": [self.clip], "class": [self.class_token], "class+mean": [self.class_token, self.clip]}
        return torch.cat(parts[pooling])


def _span(times: Tensor) -> str:
    return f", {float(times[0]):.2f} to {float(times[-1]):.2f} s" if len(times) else ""


@dataclass(frozen=True)
class Timing:
    """Times of a sound's frames: `passes` of columns, interleaved, the first at `first` s, then every `hop` s; each has
    `mel` bands."""

    passes: int
    mel: int
    first: float
    hop: float


@dataclass(frozen=True)
class Part:
    """Output of the encoder for one window; on the CPU.

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


class Blender:
    """Joins the parts of one sound, each pass in order; parts of different passes may come in any order.

    Where two windows overlap over n columns, the weight of the later one grows from 1 / (n + 1) to n / (n + 1).
    """

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self._tail: list[_Columns | None] = [None] * timing.passes
        self._done: list[list[_Columns]] = [[] for _ in range(timing.passes)]
        self._tokens: list[tuple[Tensor, int]] = []
        self._given = 0  # frames

    def add(self, part: Part) -> None:
        """Add the next part."""
        columns: _Columns = (part.frames,) if part.patches is None else (part.frames, part.patches)
        before = self._tail[part.shift]
        if before is not None:
            columns = _blend(before, columns)
        final = len(part.frames) - part.tail
        self._tail[part.shift] = tuple(one[final:] for one in columns) if part.tail else None
        self._done[part.shift].append(tuple(one[:final] for one in columns))
        self._tokens.append((part.cls, part.fresh))

    def ready(self) -> Embedding | None:
        """Return the frames that are final and have not been returned, or None where there are none."""
        count = min(self._counts())
        return self._give([count] * self.timing.passes) if count else None

    def rest(self) -> Embedding:
        """Return all frames that have not been returned; a part must have been added since."""
        return self._give(self._counts())

    def _counts(self) -> list[int]:
        return [sum(len(columns[0]) for columns in done) for done in self._done]

    def _give(self, counts: list[int]) -> Embedding:
        taken: list[_Columns] = []
        for shift, count in enumerate(counts):
            if count:
                joined = _join(self._done[shift])
                self._done[shift] = [tuple(one[count:] for one in joined)]
                taken.append(tuple(one[:count] for one in joined))
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
        weight, self._tokens = sum(fresh for _, fresh in self._tokens), []
        grid = len(frames), self.timing.mel
        return Embedding(
            frames.mean(0), frames, patches[0].flatten(0, 1) if patches else None, grid, times, cls, weight
        )


_Columns = tuple[Tensor, ...]
"""Columns of time: their means over mel (t, D) and, where kept, their patches (t, mel, D)."""


def _join(pieces: list[_Columns]) -> _Columns:
    """Concatenate consecutive pieces."""
    return tuple(torch.cat(ones) for ones in zip(*pieces, strict=True))


def _blend(tail: _Columns, columns: _Columns) -> _Columns:
    """Blend the beginning of columns with the tail of those before."""
    count = len(tail[0])
    out = []
    for before, own in zip(tail, columns, strict=True):
        grow = torch.arange(1, count + 1, device=own.device) / (count + 1)
        weights = grow.view(-1, *[1] * (own.dim() - 1))
        out.append(torch.cat([torch.lerp(before, own[:count], weights.expand_as(before)), own[count:]]))
    return tuple(out)
