"""Where patches lie, and how position embeddings follow to another grid.

Letters: T frames, F mel bins, P patches, D width. A grid is (time, mel), and patches are time-major.

With a stride less than the patch's side, patches overlap, as in AST (arXiv 2104.01778; its code: 16 x 16 patches, every
10 frames and every 10 mel bins).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.runtime import autocast

_FREE = {"patch_stride_frames", "patch_stride_mels", "drop_path"}
"""Settings that have no part in the shape of any weight but the position embedding."""


def patch_of(settings: EncoderSettings) -> tuple[int, int]:
    """The (frames, mel bins) of a patch."""
    return settings.patch_frames, settings.patch_mels


def prefix_of(settings: EncoderSettings) -> int:
    """Tokens before the patches: the class token, and of a distilled encoder the distillation token."""
    return 2 if settings.distilled else 1


def stride_of(settings: EncoderSettings) -> tuple[int, int]:
    """The step from patch to patch in (frames, mel bins).

    Raises:
        ConfigError: a stride is larger than the patch, which would leave parts of the input unread.
    """
    patch, given = patch_of(settings), (settings.patch_stride_frames, settings.patch_stride_mels)
    for size, step, name in zip(patch, given, ("frames", "mels"), strict=True):
        if step is not None and step > size:
            raise ConfigError(
                f"encoder.patch_stride_{name} is {step}, patches have {size}",
                f"at most {size}: a larger stride leaves parts of the input unread",
                f"set encoder.patch_stride_{name} to {size} or less, or take it out",
            )
    return given[0] or patch[0], given[1] or patch[1]


def grid_of(frames: int, mels: int, patch: tuple[int, int], stride: tuple[int, int] | None = None) -> tuple[int, int]:
    """The (time, mel) grid of a spectrogram of `frames` by `mels` cut into patches: (side - patch) // stride + 1.

    Frames have to come out even. So do mel bins where patches do not overlap; where they do, the last bins that fill
    no further patch are not read, as in AST (stride 10 of 128 bins: the last two), for their number is the front
    end's.

    Args:
        stride: from patch to patch; None: the patch's own size.

    Raises:
        ConfigError: a side is shorter than a patch or does not come out even; names the nearest lengths that do.
    """
    stride = stride or patch
    grid = []
    for size, side, step, name in zip((frames, mels), patch, stride, ("frames", "mel bins"), strict=True):
        more = (size - side) // step
        strict = name == "frames" or step == side
        if size < side or (strict and (size - side) % step):
            below, above = more * step + side, (more + 1) * step + side
            overlapping = "" if step == side else f" every {step}"
            raise ConfigError(
                f"a spectrogram of {size} {name}, patches of {side}{overlapping}",
                f"a positive multiple of {step} {name}" if step == side else f"{side} {name} and a multiple of {step}",
                f"use {side} {name}" if size < side else f"use {below} or {above} {name}",
            )
        grid.append(more + 1)
    return grid[0], grid[1]


def round_up_frames(frames: int, settings: EncoderSettings) -> int:
    """The shortest length of whole patch columns that holds this many frames, such as 112 for 98."""
    side, step = settings.patch_frames, stride_of(settings)[0]
    return side + max(0, math.ceil((frames - side) / step)) * step


def resize_positions(embedding: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1) -> Tensor:
    """Position embeddings of another grid, bicubic without aligned corners, as in the official code.

    Args:
        embedding: (1, prefix + P, D); those of the class and distillation tokens, which stay as they are, come first.
        old: its grid, (time, mel) with time x mel = P.
        new: the grid wanted.
        prefix: tokens before the patches, see `prefix_of`.

    Returns:
        (1, prefix + P', D) float32, whatever the surrounding precision; gradients flow through it.
    """
    count = prefix + old[0] * old[1]
    if embedding.shape[1] != count:
        raise ValueError(f"{embedding.shape[1]} position embeddings, and a grid of {old} has {count}")
    with autocast("float32", embedding.device):
        own = embedding[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
        moved = F.interpolate(own, size=new, mode="bicubic", align_corners=False) if new != old else own
        return torch.cat([embedding[:, :prefix].float(), moved.flatten(2).transpose(1, 2)], dim=1)


def adapt_positions(
    state: Mapping[str, Tensor],
    old: EncoderSettings,
    new: EncoderSettings,
    *,
    old_frames: int,
    frames: int,
    mels: int,
    stretch: bool = False,
) -> dict[str, Tensor]:
    """The weights of an encoder for inputs of another length or with another stride; all but the positions stay.

    The positions of a longer input are all of the old ones, resized. Of a shorter one they are those of the first
    columns, so that a column keeps its place in time (`Encoder.positions` does the same for short clips); where the
    stride is another too, these are then resized. AST takes the middle ones instead, and interpolates bilinearly; by
    its author the first ones should do as well (issue 45 of its repository).

    Args:
        state: of an encoder of `old` settings for inputs of `old_frames` by `mels`.
        old_frames: T that the weights were trained for.
        frames: T wanted.
        mels: F of both: it belongs to the front end, which travels with the weights.
        stretch: resize all of the old positions for a shorter input too.

    Returns:
        a state for an encoder of `new` settings for inputs of `frames` by `mels`; only the positions are new tensors.

    Raises:
        ConfigError: the settings differ in more than strides and stochastic depth, or a length does not come out even.
    """
    were, are = old.model_dump(), new.model_dump()
    differ = [f"{name} {were[name]} and {are[name]}" for name in were if name not in _FREE and were[name] != are[name]]
    if differ:
        raise ConfigError(
            f"encoders that differ in {', '.join(differ)}",
            "the same but for strides and stochastic depth",
            "take these settings from the card of the pretrained model",
        )
    before = grid_of(old_frames, mels, patch_of(old), stride_of(old))
    after = grid_of(frames, mels, patch_of(new), stride_of(new))
    positions, prefix = state["pos_embed"], prefix_of(old)
    if not stretch:
        columns = (round_up_frames(frames, old) - old.patch_frames) // stride_of(old)[0] + 1
        if columns < before[0]:
            before = columns, before[1]
            positions = positions[:, : prefix + before[0] * before[1]]
    return {**state, "pos_embed": resize_positions(positions, before, after, prefix).contiguous()}
