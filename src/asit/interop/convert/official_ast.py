"""Convert AST's and SSAST's own files, whose (mel, time) axes are transposed.

Sources: YuanGongND/ast and YuanGongND/ssast, src/models/ast_models.py and the recipes beside it: timm's DeiT under
"v.", with a distillation token; a head of LayerNorm (epsilon 1e-5, torch's own) and Linear. AST reads the mean of
both tokens; SSAST the mean of the patch tokens (ft_avgtok, its recipes) or the tokens (ft_cls).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asit.errors import CheckpointError
from asit.interop.convert.source_model import (
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    encoder_settings,
    front_end,
    tensor_shape,
)
from asit.interop.convert.transposed import Pair, fit_grid, frames_of, transpose_filters, transpose_positions
from asit.io import safe_load
from asit.model.classifier import Pooling
from asit.model.positions import patch_of

HEAD = {
    "mlp_head.0.weight": "norm.weight",
    "mlp_head.0.bias": "norm.bias",
    "mlp_head.1.weight": "linear.weight",
    "mlp_head.1.bias": "linear.bias",
}
_RULES = [(r"v\.(head|head_dist)\.(weight|bias)", "head of the image classifier, not used in AST")]
_OBJECTIVES = [
    (r"cpredlayer\.\d+\.(weight|bias)", "discriminative head of pretraining"),
    (r"gpredlayer\.\d+\.(weight|bias)", "reconstruction head of pretraining"),
    (r"mask_embed", "mask token of pretraining"),
    (r"p_input_fdim|p_input_tdim", "size of the input, now in the card"),
]


class _Tensors(NamedTuple):
    """Tensors of a file in asit's names; `found`: all tensors of the file, in its own names."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, str]
    found: dict[str, Tensor]


class _Patches(NamedTuple):
    """Where the patches of positions are."""

    mels: int
    stride: Pair
    grid: Pair


STRIDES = (10, 12, 14, 16)
"""Strides of the published ASTs; over 1,024 frames each gives another number of patches."""
_FRAMES = 1024


def original(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert AST's own file.

    Raises:
        CheckpointError: unknown tensors, no distillation token, or positions that fit no grid.
    """
    tensors = _read(path, content, _RULES, options)
    state = tensors.state
    if "dist_token" not in state:
        raise CheckpointError(
            f"{path} has no v.dist_token",
            "AST has a class and a distillation token",
            "pass --kind ssast for an SSAST of size base_nokd, or --kind asit for an ASiT fine-tuned in AST's way",
        )
    mels, count = options.mels or 128, tensor_shape(path, state, "pos_embed", 3)[1] - 2
    patch = _patch(path, state)
    notes = []
    if options.stride is None:
        published = [
            (s, s)
            for s in STRIDES
            if count == ((mels - patch[1]) // s + 1) * ((_FRAMES - patch[0]) // s + 1) and s <= min(patch)
        ]
        strides = [*published, (10, 10), patch]
        stride, grid = fit_grid(path, count, patch, mels, [s for s in strides if s[0] <= patch[0] and s[1] <= patch[1]])
        why = "that of AST on 10 s" if published else "AST's default: the file does not say"
        notes.append(f"stride {stride[0]}x{stride[1]}, {why}")
    else:
        stride, grid = fit_grid(path, count, patch, mels, [options.stride])
    pooling: Pooling = "mean" if options.pooling == "mean" else "class"
    return _source_model(path, options, "ast", tensors, _Patches(mels, stride, grid), pooling, notes)


def ssast(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert SSAST's own file: pretrained or fine-tuned, of patches or of frames.

    Raises:
        CheckpointError: unknown tensors, or positions that fit no grid.
    """
    tensors = _read(path, content, _RULES + _OBJECTIVES, options)
    state, head, found = tensors.state, tensors.head, tensors.found
    patch, prefix = _patch(path, state), 2 if "dist_token" in state else 1
    count = tensor_shape(path, state, "pos_embed", 3)[1] - prefix
    sizes = [found[name] for name in ("p_input_fdim", "p_input_tdim") if name in found]
    if any(size.numel() != 1 or size.dtype not in (torch.int64, torch.int32) for size in sizes) or len(sizes) == 1:
        raise CheckpointError(
            f"{path} has p_input_fdim and p_input_tdim that are no two whole numbers",
            "the mel bins and frames of pretraining",
            "get the file again",
        )
    notes = []
    if sizes:
        mels, frames = int(sizes[0].item()), int(sizes[1].item())
        if options.mels not in (None, mels) or options.stride not in (None, patch):
            raise CheckpointError(
                f"{path} says {mels} mel bins, and its stride is that of the patches, {patch[0]}x{patch[1]}",
                "the same as requested",
                "omit --mels and --stride",
            )
        stride, grid = fit_grid(path, count, patch, mels, [patch])
        if frames_of(grid, patch, stride) > frames or frames - frames_of(grid, patch, stride) >= patch[0]:
            raise CheckpointError(
                f"{path} has positions of {count} patches, and says that its input had {frames} frames by {mels}",
                f"{grid[1]} rows and {(frames - patch[0]) // patch[0] + 1} columns",
                "get the file again",
            )
    else:
        mels = options.mels or 128
        # The recipes of fine-tuning: patches of 16 every 10, frames one by one.
        default = (1, patch[1]) if patch[1] == mels else (10, 10)
        stride, grid = fit_grid(
            path, count, patch, mels, [options.stride or default, *([] if options.stride else [patch])]
        )
        if options.stride is None:
            notes.append(f"stride {stride[0]}x{stride[1]}, SSAST's fine-tuning default: the file does not say")
    pooling: Pooling = "class" if options.pooling == "class" else "mean"
    if head and options.pooling == "auto":
        notes.append("the head reads the mean of the patch tokens, as in SSAST's recipes; else pass --pooling class")
    return _source_model(path, options, "ssast", tensors, _Patches(mels, stride, grid), pooling, notes)


def _read(path: Path, content: Mapping[str, Any], rules: list[tuple[str, str]], options: SourceOptions) -> _Tensors:
    found = safe_load.tensors(path, content, ("model", "state_dict"))
    found = {name.removeprefix("module."): value for name, value in found.items()}
    state, head, left_out = assign_tensors(path, found, rules, "v.", HEAD, options.no_head)
    if head and set(head) != set(HEAD):
        raise CheckpointError(
            f"{path} has of a head only {', '.join(sorted(head))}", ", ".join(HEAD), "get the file again"
        )
    return _Tensors(state, head, left_out, found)


def _patch(path: Path, state: Mapping[str, Tensor]) -> Pair:
    """The patch as (frames, mel bins)."""
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    return filters[3], filters[2]


def _source_model(
    path: Path,
    options: SourceOptions,
    kind: str,
    tensors: _Tensors,
    patches: _Patches,
    pooling: Pooling,
    notes: list[str],
) -> SourceModel:
    state, head, (mels, stride, grid) = tensors.state, tensors.head, patches
    state["patch_embed.proj.weight"] = transpose_filters(state["patch_embed.proj.weight"])
    settings = encoder_settings(path, state, stride)
    prefix = 2 if settings.distilled else 1
    state["pos_embed"] = transpose_positions(state["pos_embed"], grid, prefix)
    settled, origin = front_end(options, mels, rate=16000, padding="zero")
    facts = {
        "kind": kind,
        "axes": "(mel, time), transposed to (time, mel)",
        "grid": list(grid),
        "stride": list(stride),
        "statistics": origin,
    }
    source_head = SourceHead({own: head[name] for name, own in HEAD.items()}, pooling) if head else None
    frames = frames_of(grid, patch_of(settings), stride)
    return SourceModel(
        settings, frames, settled, state, len(state) + len(head), tensors.left_out, source_head, facts, notes
    )
