"""Augmentations of a waveform or its log-mel: roll, gain, time stretch, mel warp, stripes and mixup.

S samples, R rows, T frames, F mel bins. Log-mels are those of `FrontEnd.fbank`: natural logarithms of power, not
normalised. Drawing (numpy, seeded) is separate from applying (torch, any device); neutral parameters return the input
bit for bit. Of these only the roll is in ASiT: in the first version of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asit.config import AugmentSettings, ViewSettings

NEPERS_PER_DB = math.log(10.0) / 10.0
"""A gain of x dB adds x ln(10) / 10 to the natural logarithm of a power."""


@dataclass(frozen=True)
class ViewDraw:
    """The augmentation of one view.

    Attributes:
        gain_db: change of level in dB; 0: none.
        stretch: length of the crop over the length of the view; 1: none. Above 1 the view is faster.
        mel_warp: factor on the mel axis; 1: none. Above 1 spectral peaks move up.
    """

    gain_db: float = 0.0
    stretch: float = 1.0
    mel_warp: float = 1.0


def draw_view(rng: np.random.Generator, settings: ViewSettings | AugmentSettings) -> ViewDraw:
    """Draw the augmentation of one view; a setting of 0 gives exactly the neutral value.

    The generator advances by the same amount for all settings, so switching one on or off leaves the other draws
    unchanged.
    """
    gain, stretch, warp = rng.uniform(-1.0, 1.0, 3).tolist()
    return ViewDraw(
        gain_db=gain * settings.gain_db,
        stretch=1.0 + stretch * settings.stretch,
        mel_warp=1.0 + warp * settings.mel_warp,
    )


def draw_roll(rng: np.random.Generator, settings: ViewSettings) -> float:
    """Draw the share of its length that a waveform is rolled by: U(0, 1) with probability `settings.roll`, else 0."""
    coin, share = rng.random(2).tolist()
    return share if coin < settings.roll else 0.0


def roll(wave: Tensor, share: float) -> Tensor:
    """Roll (..., S) circularly, later by `share` (0 to 1) of its length, rounded down to a sample."""
    samples = int(share * wave.shape[-1])
    return wave.roll(samples, -1) if samples else wave


def gain(logmel: Tensor, db: Tensor | float) -> Tensor:
    """Change the level of (T, F) or (R, T, F) by `db`, one number or one for each row (R,).

    Exact for bins above the front end's floor; unlike a real change of level it moves the floor too. 0 dB returns the
    input bit for bit.
    """
    if isinstance(db, Tensor):
        return logmel + (db.to(logmel) * NEPERS_PER_DB).view(-1, *(1,) * (logmel.ndim - 1))
    return logmel + db * NEPERS_PER_DB if db else logmel


def resize_time(logmel: Tensor, frames: int) -> Tensor:
    """Resize in time by linear interpolation, keeping the first and the last frame.

    Args:
        logmel: (t, F) or (R, t, F).
        frames: of the result; an equal length returns the frames bit for bit.

    Returns:
        (frames, F) or (R, frames, F).
    """
    t = logmel.shape[-2]
    if t == frames:
        return logmel
    low, high, weight = _interpolation(torch.full((), t - 1, device=logmel.device), frames, logmel)
    return torch.lerp(logmel.index_select(-2, low), logmel.index_select(-2, high), weight)


def _interpolation(last: Tensor, frames: int, logmel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both neighbours of each of `frames` positions from 0 to `last`, and the weight of the second."""
    position = torch.arange(frames, device=logmel.device, dtype=torch.float32) * (last / max(frames - 1, 1))
    low = torch.minimum(position.long(), last)
    return low, torch.minimum(low + 1, last), (position - low).to(logmel.dtype).unsqueeze(-1)


def crop_time(logmel: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Crop log-mels and resize each crop in time as `resize_time` does.

    Args:
        logmel: (B, t, F).
        rows: (R,) int64, the log-mel of each crop.
        starts: (R,) int64, its first frame.
        lengths: (R,) int64, its frames, 1 or more; start + length is at most t.
        frames: of the result; a crop of equal length is returned bit for bit.

    Returns:
        (R, frames, F).
    """
    low, high, weight = _interpolation(lengths.unsqueeze(-1) - 1, frames, logmel)
    row, start = rows.unsqueeze(-1), starts.unsqueeze(-1)
    return torch.lerp(logmel[row, start + low], logmel[row, start + high], weight)


def warp_mel(logmel: Tensor, factor: Tensor | float) -> Tensor:
    """Scale the mel axis, moving bin f to bin factor * f, by linear interpolation.

    Bins beyond the scaled axis get the value of the last one. This stretches the spacing of formants as another size of
    vocal tract does; it is not a pitch shift.

    Args:
        logmel: (T, F) or (R, T, F).
        factor: above 0; one number, or one for each row (R,). A factor of 1 returns the row bit for bit.
    """
    bins = logmel.shape[-1]
    if isinstance(factor, Tensor):
        factor = factor.to(device=logmel.device, dtype=torch.float32).view(-1, 1, 1)
    elif factor == 1.0:
        return logmel
    source = (torch.arange(bins, device=logmel.device, dtype=torch.float32) / factor).clamp(max=bins - 1)
    low = source.long()
    high = (low + 1).clamp(max=bins - 1)
    weight = (source - low).to(logmel.dtype)
    if isinstance(factor, Tensor):
        return torch.lerp(logmel.gather(-1, low.expand_as(logmel)), logmel.gather(-1, high.expand_as(logmel)), weight)
    return torch.lerp(logmel.index_select(-1, low), logmel.index_select(-1, high), weight)


def draw_stripe(rng: np.random.Generator, size: int, largest: int) -> tuple[int, int]:
    """Draw (first, width) of a stripe on an axis of `size`: a width of U{0..largest}, anywhere (SpecAugment)."""
    width = min(int(rng.integers(largest + 1)), size)
    return int(rng.integers(size - width + 1)), width


def mask_stripes(logmel: Tensor, time: Iterable[tuple[int, int]], mel: Iterable[tuple[int, int]]) -> Tensor:
    """Set stripes (first, width) of a normalised (T, F) log-mel to 0, the mean, in place."""
    for first, width in time:
        logmel[first : first + width] = 0.0
    for first, width in mel:
        logmel[:, first : first + width] = 0.0
    return logmel


def mix(wave: Tensor, other: Tensor, weight: float) -> Tensor:
    """Mix weight x wave + (1 - weight) x other without their means: mixup (arXiv 1710.09412) as in AST.

    (S,) and (S',) give (max(S, S'),): the shorter one is padded with zeros.
    """
    samples = max(len(wave), len(other))
    first, second = (torch.nn.functional.pad(x - x.mean(), (0, samples - len(x))) for x in (wave, other))
    return weight * first + (1.0 - weight) * second
