"""Patch grids, and position resize: position embeddings for another grid.

A grid is (time, mel), and patches are time-major. A stride below the patch size makes patches overlap, as in AST (arXiv
2104.01778: 16 x 16 patches every 10 frames and mel bins). Letters: T frames, F mel bins, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.runtime import autocast

_FREE = {"patch_stride_frames", "patch_stride_mels", "drop_path"}
"""Settings that affect the shape of no weight but the position embedding."""


def patch_of(settings: EncoderSettings) -> tuple[int, int]:
    """Return the (frames, mel bins) of a patch."""
    return settings.patch_frames, settings.patch_mels


def prefix_of(settings: EncoderSettings) -> int:
    """Return the number of tokens before the patches: 1, or 2 with a distillation token; BEATs has none."""
    return 0 if settings.family == "beats" else 2 if settings.distilled else 1


def stride_of(settings: EncoderSettings) -> tuple[int, int]:
    """Return the stride of the patches in (frames, mel bins).

    Raises:
        ConfigError: a stride is larger than the patch.
    """
    patch, given = patch_of(settings), (settings.patch_stride_frames, settings.patch_stride_mels)
    for size, step, name in zip(patch, given, ("frames", "mels"), strict=True):
        if step is not None and step > size:
            raise ConfigError(
                f"encoder.patch_stride_{name} is {step}, patches have {size}",
                f"at most {size}: a larger stride leaves parts of the input unread",
                f"set encoder.patch_stride_{name} to {size} or less, or omit it",
            )
    return given[0] or patch[0], given[1] or patch[1]


def grid_of(frames: int, mels: int, patch: tuple[int, int], stride: tuple[int, int] | None = None) -> tuple[int, int]:
    """Return the (time, mel) grid of a spectrogram of `frames` by `mels`: (size - patch) // stride + 1 patches.

    The patches must cover all frames, and all mel bins unless they overlap; if they do, the last bins that fill no
    patch are not read, as in AST (with stride 10 the last two of 128).

    Args:
        stride: of the patches; None: the patch size.

    Raises:
        ConfigError: an axis is shorter than a patch or leaves a remainder; names the nearest lengths that do not.
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
    """Return the frames of the fewest patch columns that cover `frames`, such as 112 for 98."""
    side, step = settings.patch_frames, stride_of(settings)[0]
    return side + max(0, math.ceil((frames - side) / step)) * step


def resize_positions(embedding: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 1) -> Tensor:
    """Resize position embeddings to another grid, bicubic without aligned corners, as in the official code.

    Args:
        embedding: (1, prefix + P, D); the first `prefix` are kept.
        old: its (time, mel) grid of P patches.
        new: the new grid.
        prefix: tokens before the patches.

    Returns:
        (1, prefix + P', D) float32, differentiable.
    """
    count = prefix + old[0] * old[1]
    if embedding.shape[1] != count:
        raise ValueError(f"{embedding.shape[1]} position embeddings, and a grid of {old} has {count}")
    with autocast("float32", embedding.device):
        own = embedding[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
        moved = F.interpolate(own, size=new, mode="bicubic", align_corners=False) if new != old else own
        return torch.cat([embedding[:, :prefix].float(), moved.flatten(2).transpose(1, 2)], dim=1)


def sincos_table(rows: int, columns: int, width: int) -> Tensor:
    """Return sines and cosines of a table's column, then of its row, row-major: (1, rows * columns, width) float32.

    Each coordinate has D / 4 frequencies, 10000 ** (-4 i / D) (MAE, arXiv 2111.06377, for a table that is no square).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    row, column = (at.reshape(-1, 1) * frequencies for at in np.mgrid[:rows, :columns].astype(np.float64))
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


def adapt_positions(
    state: Mapping[str, Tensor],
    old: EncoderSettings,
    new: EncoderSettings,
    *,
    old_frames: int,
    frames: int,
    mels: int,
) -> dict[str, Tensor]:
    """Adapt an encoder's position embeddings to another input length or stride.

    A longer input gets all old positions, resized. A shorter one gets those of the first columns, so that a column
    keeps its time (as in `Encoder.positions`), resized only for another stride. AST takes the middle ones and
    interpolates bilinearly; its author expects the same of the first ones (issue 45 of its repository).

    Args:
        state: of an encoder with `old` settings for inputs of `old_frames` by `mels`.
        old: settings of the state.
        new: settings that differ at most in strides and stochastic depth.
        old_frames: T of the state.
        frames: new T.
        mels: F of both.

    Returns:
        A state for `new` settings and `frames`; only the positions are new tensors.

    Raises:
        ConfigError: other settings differ, patches do not cover a length, or positions are fixed and there are none for
            the new grid.
    """
    were, are = dict(old), dict(new)
    differ = [f"{name} {were[name]} and {are[name]}" for name in were if name not in _FREE and were[name] != are[name]]
    if differ:
        raise ConfigError(
            f"encoders that differ in {', '.join(differ)}",
            "the same but for strides and stochastic depth",
            "take these settings from the card of the pretrained model",
        )
    before = grid_of(old_frames, mels, patch_of(old), stride_of(old))
    after = grid_of(frames, mels, patch_of(new), stride_of(new))
    longer = after[0] > before[0]
    if old.family == "beats" and stride_of(new) == stride_of(old):
        return dict(state)
    positions, prefix = state.get("pos_embed", torch.empty(0)), prefix_of(old)
    if old.family != "vit":
        if stride_of(new) != stride_of(old) or (longer and old.family not in ("eat", "beats")):
            raise ConfigError(
                f"{frames} frames with patches every {stride_of(new)} (frames, mel bins), and fixed positions",
                f"at most {old_frames} frames with patches every {stride_of(old)}: {old.family} has no other positions",
                "request a shorter input, and leave the stride",
            )
        if longer:
            table = sincos_table(*after, positions.shape[2]).to(positions)
            return {**state, "pos_embed": torch.cat([positions[:, :prefix], table], dim=1)}
        return {**state, "pos_embed": positions[:, : prefix + after[0] * after[1]].contiguous()}
    columns = (round_up_frames(frames, old) - old.patch_frames) // stride_of(old)[0] + 1
    if columns < before[0]:
        before = columns, before[1]
        positions = positions[:, : prefix + before[0] * before[1]]
    return {**state, "pos_embed": resize_positions(positions, before, after, prefix).contiguous()}
