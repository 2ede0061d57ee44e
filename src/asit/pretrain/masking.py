"""GMML, group masked model learning: blocks of the student's view are wiped or replaced (arXiv 2211.13189).

T frames, F mel bins, B clips, V views, R = B * V rows, P patches. Rows are view-major: row v * B + b is
view v of clip b. Masks are drawn in numpy from a seeded generator and applied in torch, so a stored batch
replays a step.

Departures from the official code, each for a reason:

* A block's first row is uniform over every position where the block still overlaps the view, so blocks are
  clipped at both borders and every row and every column is masked equally often. Officially blocks start inside the
  view and are clipped at its end only, so that the first rows and columns are hardly ever masked.
  `MaskingSettings.official_bounds` brings that back.
* Draws are seeded, and a clip is never its own donor.
* Noise is drawn at the scale of the normalised input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from asit.config import MaskingSettings

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

MASKED = 0.5
"""A patch counts as masked when more than this share of its area is corrupted."""
NOISE_STD = 0.5
"""Standard deviation of the input after (x - mean) / (2 std), hence of the noise that replaces it."""


@dataclass(frozen=True)
class ViewMask:
    """The mask of one view.

    Attributes:
        drop: (T, F) bool, what is wiped.
        replace: (T, F) bool, what is taken from another clip. Where both are set, drop wins.
    """

    drop: BoolArray
    replace: BoolArray

    @property
    def any(self) -> BoolArray:
        """(T, F) bool: all that is changed in what the student sees."""
        return self.drop | self.replace


def draw(
    rng: np.random.Generator,
    frames: int,
    mels: int,
    settings: MaskingSettings,
    patch: tuple[int, int] = (16, 16),
    replace: bool | None = None,
) -> ViewMask:
    """Draw the mask of one view.

    Wiped area: a share U(min(0.5, drop), drop) of the view; replaced area: the share `replace`; each is
    overshot by less than one block. A share of 0 switches that corruption off: with replace 0 every view is
    wiped, with drop 0 the views that are not replaced stay clean.

    Args:
        rng: seeded by the caller; the only source of randomness.
        frames: T.
        mels: F.
        settings: shares, block sizes and fill.
        patch: (frames, mels) of a patch, the unit of blocks when `settings.align`.
        replace: whether the view is replaced; None: drawn with `replace_probability`. Pass False where there
            is no donor. A replaced view is not wiped, unless `settings.combine`.
    """
    coin = bool(rng.random() < settings.replace_probability)
    replaced = (coin if replace is None else replace) and settings.replace > 0
    dropped = settings.combine or not replaced
    empty = np.zeros((frames, mels), dtype=bool)
    drop_mask = replace_mask = empty
    if dropped and settings.drop > 0:
        share = rng.uniform(min(0.5, settings.drop), settings.drop)
        drop_mask = _blocks(rng, frames, mels, share, settings, patch, settings.fill)
    if replaced:
        replace_mask = _blocks(rng, frames, mels, settings.replace, settings, patch, "zeros")
    return ViewMask(drop_mask, replace_mask)


def _blocks(
    rng: np.random.Generator,
    frames: int,
    mels: int,
    share: float,
    settings: MaskingSettings,
    patch: tuple[int, int],
    fill: str,
) -> BoolArray:
    """Return a (T, F) mask, with blocks added one by one until `share` of the view is covered."""
    steps = patch if settings.align else (1, 1)
    rows = _Axis(frames, steps[0], settings.max_block, settings.official_bounds, full=fill == "freq")
    cols = _Axis(mels, steps[1], settings.max_block, settings.official_bounds, full=fill == "time")
    mask = np.zeros((frames, mels), dtype=bool)
    wanted = share * frames * mels
    # Everything that blocks can reach is to be masked: random blocks would end at the same mask, only later, and
    # with official bounds, which may leave out the last rows and columns, they would never end.
    if wanted >= rows.reach * cols.reach:
        mask[: rows.reach, : cols.reach] = True
        return mask
    batch = int(np.clip(2 * wanted / (rows.mean_size * cols.mean_size), 8, 4096))
    covered, unseen = 0, 0
    while True:
        u = rng.random((4, batch))
        tops, bottoms = rows.spans(u[0], u[1])
        lefts, rights = cols.spans(u[2], u[3])
        areas = ((bottoms - tops) * (rights - lefts)).tolist()
        for top, bottom, left, right, area in zip(
            tops.tolist(), bottoms.tolist(), lefts.tolist(), rights.tolist(), areas, strict=True
        ):
            mask[top:bottom, left:right] = True
            unseen += area
            # Counting costs as much as a block, and is needed only when the blocks since the last count
            # would suffice if nothing overlapped; the mask at which drawing stops is the same.
            if covered + unseen >= wanted:
                covered, unseen = int(np.count_nonzero(mask)), 0
                if covered >= wanted:
                    return mask


@dataclass(frozen=True)
class _Axis:
    """Positions of blocks along one axis of a view, in multiples of `step`."""

    size: int
    step: int
    max_block: float
    official: bool
    full: bool

    @property
    def longest(self) -> int:
        """Longest block, a multiple of `step` and at least one step."""
        return max(self.step, int(self.max_block * self.size) // self.step * self.step)

    @property
    def mean_size(self) -> float:
        return float(self.size) if self.full else (self.step + self.longest) / 2

    @property
    def reach(self) -> int:
        """Rows (columns) from the first that any block can cover."""
        if self.full or not self.official:
            return self.size
        _, ends = self.spans(np.full(self.size, 1 - 1e-9), np.arange(self.size) / self.size)
        return int(ends.max())

    def spans(self, length: npt.NDArray[np.float64], position: npt.NDArray[np.float64]) -> tuple[IntArray, IntArray]:
        """First and last-plus-one row of blocks from uniform draws in [0, 1)."""
        if self.full:
            return np.zeros(len(length), dtype=np.int64), np.full(len(length), self.size, dtype=np.int64)
        if self.official:
            # Sizes and starts are integers of frames or bins below exclusive bounds, the size is cut at
            # the end of the view, and then both are brought to multiples of the step.
            sizes = self.step + (length * max(1, int(self.max_block * self.size) - self.step)).astype(np.int64)
            starts = (position * max(1, self.size - self.step)).astype(np.int64) // self.step * self.step
            sizes = np.minimum(sizes, self.size - starts)
            if self.step > 1:
                sizes = np.rint(sizes / self.step).astype(np.int64) * self.step
            return starts, np.minimum(starts + sizes, self.size)
        units = math.ceil(self.size / self.step)
        sizes = 1 + (length * (self.longest // self.step)).astype(np.int64)
        starts = (position * (units + sizes - 1)).astype(np.int64) - sizes + 1
        ends = np.minimum((starts + sizes) * self.step, self.size)
        return np.maximum(starts, 0) * self.step, ends


def donor_clips(draws: npt.NDArray[np.float64], first: int, clips: int, *, pool: int) -> IntArray:
    """Choose the clip that each view's replaced area comes from: another one nearby.

    Clips are taken in blocks of `pool` neighbours (a last block of one joins the block before), and donors
    within a block. Blocks are counted from the first clip of the step, so that the choice does not depend on
    how a step is divided among processes and passes. A single clip names itself: draw no replacement then.

    Args:
        draws: (B, V) uniform in [0, 1), for clips `first` to `first + B` of `clips`.
        first: position of the first of them, counted from the beginning of a block.
        clips: clips from there to the end of a block.
        pool: clips in a block, at least 2.

    Returns:
        (B, V) int64, positions of clips.
    """
    clip = first + np.arange(len(draws))
    blocks = max(1, clips // pool + (clips % pool >= 2))
    block = np.minimum(clip // pool, blocks - 1)
    begin = block * pool
    size = np.where(block == blocks - 1, clips - begin, pool)
    offset = 1 + np.floor(draws * (size - 1)[:, None]).astype(np.int64)
    return begin[:, None] + ((clip - begin)[:, None] + offset) % size[:, None]


def corrupt(
    clean: Tensor,
    drop: Tensor,
    replace: Tensor,
    donor: Tensor,
    fill: str,
    noise: Tensor | None,
    others: Tensor | None = None,
) -> Tensor:
    """Apply drawn masks to the views: return what the student sees.

    Args:
        clean: (R, 1, T, F), normalised.
        drop: (R, 1, T, F) bool, wiped; or (M * R, 1, T, F), M copies one after the other, and the rest likewise.
        replace: (R, 1, T, F) bool, taken from the clean view of the donor row; drop wins where both are set.
        donor: (R,) int64.
        fill: "zeros", "time", "freq" (all wipe to 0, the mean after normalisation) or "noise".
        others: (n, 1, T, F), rows that follow those of `clean` for `donor`; None: none.
        noise: (R, 1, T, F) standard normal, brought to the scale of the input here; used for "noise" only.

    Returns:
        (R, 1, T, F), a new tensor.
    """
    given = clean if len(drop) == len(clean) else clean.repeat(len(drop) // len(clean), 1, 1, 1)
    lent = clean if others is None else torch.cat([clean, others])
    seen = torch.where(replace, lent[donor], given)
    if fill != "noise":
        return seen.masked_fill_(drop, 0.0)
    if noise is None:
        raise ValueError('fill "noise" needs the drawn noise')
    return torch.where(drop, noise.to(clean.dtype) * NOISE_STD, seen)


def token_mask(mask: Tensor, patch: tuple[int, int] = (16, 16)) -> Tensor:
    """Return the tokens that count as masked, by `MASKED`.

    Args:
        mask: (R, 1, T, F) bool.
        patch: (frames, mels) of a patch; what does not fill a patch at the end is left out, as in the encoder.

    Returns:
        (R, P) bool, time-major.
    """
    return (F.avg_pool2d(mask.float(), patch) > MASKED).flatten(1)
