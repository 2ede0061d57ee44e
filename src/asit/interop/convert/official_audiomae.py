"""Convert AudioMAE's own files, pretrained or fine-tuned.

Sources: facebookresearch/AudioMAE, models_mae.py, models_vit.py, dataset.py, util/pos_embed.py and main_finetune_as.py:
timm's ViT (epsilon 1e-6) over spectrograms of (1024 frames, 128 mel bins), patches of 16 x 16, time-major; fixed
positions, numbered as a table of 8 rows and 64 columns; clips are padded with 0 before the normalisation. Fine-tuned:
no norm after the blocks, and a head of the mean of the patch tokens, LayerNorm (epsilon 1e-6) and Linear.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.errors import CheckpointError
from asit.interop.convert.source_model import (
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    fit_grid,
    front_end,
    source_model,
    tensor_shape,
)
from asit.io import safe_load
from asit.model.positions import sincos_table

log = logging.getLogger(__name__)

_RULES = {r"decoder_.*": "decoder of pretraining", r"mask_token": "mask token of pretraining"}
_HEAD = {"fc_norm.weight": "norm.weight", "fc_norm.bias": "norm.bias"}
_HEAD |= {"head.weight": "linear.weight", "head.bias": "linear.bias"}
_PATCH, _MELS = (16, 16), 128
_ROUNDING = 1e-3  # of positions in float16


def audiomae(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of AudioMAE.

    Raises:
        CheckpointError: unknown tensors, two kinds of norm, or positions that fit no grid.
    """
    found = safe_load.tensors(path, content)
    tensors = assign_tensors(path, found, _RULES, "", [_HEAD], options.no_head)
    state, pretrained = tensors.state, "norm.weight" in tensors.state
    if pretrained == ("fc_norm.weight" in found):
        raise CheckpointError(
            f"{path} has {'norm and fc_norm' if pretrained else 'neither norm nor fc_norm'}",
            "norm (pretrained) or fc_norm (fine-tuned), as AudioMAE has them",
            "give an unchanged network",
        )
    filters, positions = (tensor_shape(path, state, *of) for of in (("patch_embed.proj.weight", 4), ("pos_embed", 3)))
    mels = options.mels or _MELS
    patch = filters[2], filters[3]
    stride, grid = fit_grid(path, positions[1] - 1, patch, mels, [options.stride or patch])
    if not are_published(state["pos_embed"], mels):
        log.info("Positions are not those of AudioMAE's formula: kept as they are, for inputs up to this length")
    head = SourceHead(tensors.head, "mean", 1e-6) if tensors.head else None
    over = {"family": "audiomae" if pretrained else "audiomae-finetuned"}
    return source_model(
        path, "audiomae", tensors, (stride, grid), front_end(options, mels, padding="zero"), head, over=over
    )


def is_audiomae(found: Mapping[str, Tensor]) -> bool:
    """Whether names, filters and positions are all AudioMAE's; other masked autoencoders share the names."""
    filters, positions = found.get("patch_embed.proj.weight"), found.get("pos_embed")
    if filters is None or positions is None or filters.shape[1:] != (1, *_PATCH) or positions.ndim != 3:
        return False
    pretrained = "mask_token" in found and "decoder_embed.weight" in found
    fine_tuned = set(_HEAD) <= set(found) and "norm.weight" not in found
    return (pretrained or fine_tuned) and "norm_stats" not in found and are_published(positions, _MELS)


def are_published(positions: Tensor, mels: int) -> bool:
    """Whether positions (1, 1 + P, D) are sines and cosines in AudioMAE's order."""
    rows, patches = mels // _PATCH[1], positions[:, 1:].float()
    count, width = patches.shape[1:]
    if not rows or not count or count % rows or width % 4:
        return False
    return bool((patches - sincos_table(rows, count // rows, width)).abs().max() < _ROUNDING)
