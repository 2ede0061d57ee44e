"""Convert AST's and SSAST's own files, whose (mel, time) axes are transposed.

Sources: YuanGongND/ast and YuanGongND/ssast, src/models/ast_models.py and the recipes beside it: timm's DeiT under
"v.", with a distillation token; a head of LayerNorm (epsilon 1e-5, torch's own) and Linear. AST reads the mean of
both tokens; SSAST the mean of the patch tokens (ft_avgtok, its recipes) or the tokens (ft_cls).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asit.errors import CheckpointError
from asit.interop.convert.source_model import (
    NORM_AND_LINEAR,
    Pair,
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    fit_grid,
    frames_of,
    front_end,
    patch_count,
    source_model,
    tensor_shape,
)
from asit.io import safe_load

log = logging.getLogger(__name__)

_RULES = {r"v\.(head|head_dist)\.(weight|bias)": "head of the image classifier, not used in AST"}
_OBJECTIVES = {
    r"cpredlayer\.\d+\.(weight|bias)": "discriminative head of pretraining",
    r"gpredlayer\.\d+\.(weight|bias)": "reconstruction head of pretraining",
    r"mask_embed": "mask token of pretraining",
    r"p_input_fdim|p_input_tdim": "size of the input, now in the card",
}
STRIDES = (10, 12, 14, 16)
"""Strides of the published ASTs; over 1,024 frames each gives another number of patches."""
_FRAMES = 1024


def original(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert AST's own file.

    Raises:
        CheckpointError: unknown tensors, no distillation token, or positions that fit no grid.
    """
    found = safe_load.tensors(path, content)
    tensors = assign_tensors(path, found, _RULES, "v.", [NORM_AND_LINEAR], options.no_head)
    if "dist_token" not in tensors.state:
        raise CheckpointError(
            f"{path} has no v.dist_token",
            "AST has a class and a distillation token",
            "pass --kind ssast for an SSAST of size base_nokd, or --kind asit for an ASiT fine-tuned in AST's way",
        )
    mels, (patch, count) = options.mels or 128, _patches(path, tensors.state)
    published = [(s, s) for s in STRIDES if count == ((mels - patch[1]) // s + 1) * ((_FRAMES - patch[0]) // s + 1)]
    likely = [s for s in (*published, (10, 10), patch) if s[0] <= patch[0] and s[1] <= patch[1]]
    stride, grid = fit_grid(path, count, patch, mels, [options.stride] if options.stride else likely)
    if options.stride is None:
        why = "that of AST on 10 s" if stride in published else "AST's default: the file does not say"
        log.info(f"Stride {stride[0]}x{stride[1]}, {why}")
    front = front_end(options, mels, padding="zero")
    head = SourceHead(tensors.head, "mean" if options.pooling == "mean" else "class") if tensors.head else None
    return source_model(path, "ast", tensors, (stride, grid), front, head, transposed=True)


def ssast(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert SSAST's own file: pretrained or fine-tuned, of patches or of frames.

    Raises:
        CheckpointError: unknown tensors, or positions that fit no grid.
    """
    found = safe_load.tensors(path, content)
    tensors = assign_tensors(path, found, _RULES | _OBJECTIVES, "v.", [NORM_AND_LINEAR], options.no_head)
    patch, count = _patches(path, tensors.state)
    mels, frames = _input(path, found, options, patch)
    if frames is not None:
        stride, grid = fit_grid(path, count, patch, mels, [patch])
        if not 0 <= frames - frames_of(grid, patch, stride) < patch[0]:
            raise CheckpointError(
                f"{path} has positions of {count} patches, and says that its input had {frames} frames by {mels}",
                f"{grid[1]} rows and {(frames - patch[0]) // patch[0] + 1} columns",
                "get the file again",
            )
    else:
        # The recipes of fine-tuning: patches of 16 every 10, frames one by one.
        likely = [(1, patch[1]) if patch[1] == mels else (10, 10), patch]
        stride, grid = fit_grid(path, count, patch, mels, [options.stride] if options.stride else likely)
        if options.stride is None:
            log.info(f"Stride {stride[0]}x{stride[1]}, SSAST's fine-tuning default: the file does not say")
    if tensors.head and options.pooling == "auto":
        log.info("The head reads the mean of the patch tokens, as in SSAST's recipes; else pass --pooling class")
    front = front_end(options, mels, padding="zero")
    head = SourceHead(tensors.head, "class" if options.pooling == "class" else "mean") if tensors.head else None
    return source_model(path, "ssast", tensors, (stride, grid), front, head, transposed=True)


def _input(path: Path, found: Mapping[str, Tensor], options: SourceOptions, patch: Pair) -> tuple[int, int | None]:
    """Return the mel bins and frames of pretraining; frames are None in a fine-tuned file."""
    sizes = [found[name] for name in ("p_input_fdim", "p_input_tdim") if name in found]
    if not sizes:
        return options.mels or 128, None
    if len(sizes) != 2 or any(size.numel() != 1 or size.dtype not in (torch.int64, torch.int32) for size in sizes):
        raise CheckpointError(
            f"{path} has p_input_fdim and p_input_tdim that are no two whole numbers",
            "the mel bins and frames of pretraining",
            "get the file again",
        )
    mels, frames = (int(size.item()) for size in sizes)
    if options.mels not in (None, mels) or options.stride not in (None, patch):
        raise CheckpointError(
            f"{path} says {mels} mel bins, and its stride is that of the patches, {patch[0]}x{patch[1]}",
            "the same as requested",
            "omit --mels and --stride",
        )
    return mels, frames


def _patches(path: Path, state: Mapping[str, Tensor]) -> tuple[Pair, int]:
    """Return the size (frames, mel bins) and the number of the patches."""
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    return (filters[3], filters[2]), patch_count(path, state)
