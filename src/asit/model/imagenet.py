"""Initialise the encoder from image transformers (ImageNet ViT or DeiT, with timm's names).

- The patch filters are summed over red, green and blue, as in v2 of the official code and in AST.
- The position grid (14 x 14 of 224 pixels, 24 x 24 of 384) is resized bicubically; rows become time, columns mel bins,
  as in v2 (14 x 14 to 37 x 8). AST takes rows as mel bins, and crops or resizes bilinearly.
- Classification heads are left out, and a distilled DeiT's distillation token unless the encoder is `distilled` too;
  AST keeps both tokens and averages their outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import CheckpointError, ConfigError
from asit.io import checkpoint, safe_load
from asit.model.encoders import empty_encoder
from asit.model.positions import resize_positions

_HEADS = ("head.", "head_dist.", "pre_logits.")
HEAD_WIDTH = 64
"""Width of an attention head in every ViT, DeiT, AST, SSAST and ASiT, which tensors do not show."""


def load_imagenet(
    path: Path, settings: EncoderSettings, frames: int, mels: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Load an image transformer's weights for an encoder.

    Args:
        path: a .safetensors, .pth, .pt, .bin or .ckpt file; nothing in it is executed.
        settings: of the encoder; width, blocks and patch must be the file's.
        frames: T of the encoder's input.
        mels: F.

    Returns:
        The encoder's state, float32, and the names of what was left out.

    Raises:
        CheckpointError: the file cannot be read, or has another size, unknown tensors or numbers that are not finite.
        ConfigError: settings, frames and mels do not match.
    """
    path = Path(path)
    return convert(path, safe_load.tensors(path, safe_load.read(path)), settings, frames, mels)


def convert(
    path: Path, found: Mapping[str, Tensor], settings: EncoderSettings, frames: int, mels: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert tensors that were read from `path`; see `load_imagenet`."""
    if settings.family != "vit":
        raise ConfigError(
            f"image weights for an encoder of family {settings.family}",
            "encoder.family vit, which has an image transformer's layers and positions",
            "omit encoder.family, or convert a model of that family",
        )
    encoder = empty_encoder(settings, frames, mels)
    width, blocks = size(path, found)
    if (width, blocks) != (encoder.width, encoder.depth):
        raise CheckpointError(
            f"{path} is {width} wide and has {blocks} blocks; the encoder is {encoder.width} wide and has "
            f"{encoder.depth}",
            "the same size",
            "give another file, or set encoder.size to the file's: tiny 192/12, small 384/12, base 768/12, "
            "large 1024/24",
        )
    if width != encoder.heads * HEAD_WIDTH:
        raise CheckpointError(
            f"{path} is {width} wide, the encoder has {encoder.heads} heads of {width // encoder.heads}",
            f"heads of {HEAD_WIDTH}, as in every ViT and DeiT",
            f"set encoder.heads to {width // HEAD_WIDTH}" if width >= HEAD_WIDTH else "give another file",
        )
    drops = "dist_token" in found and not settings.distilled
    out = [name for name in found if name.startswith(_HEADS) or (drops and name == "dist_token")]
    checkpoint.check_numbers(str(path), {name: value for name, value in found.items() if name not in out})
    state = {name: value.float() for name, value in found.items() if name not in out}
    filters = state["patch_embed.proj.weight"]
    if tuple(filters.shape[2:]) != encoder.patch:
        raise CheckpointError(
            f"{path} has patches of {'x'.join(map(str, filters.shape[2:]))}, the encoder of "
            f"{'x'.join(map(str, encoder.patch))}",
            "the same patch",
            "give a file for patches of 16, and leave encoder.patch_frames and patch_mels at 16",
        )
    state["patch_embed.proj.weight"] = filters.sum(1, keepdim=True)
    positions, prefix = state["pos_embed"], encoder.prefix
    if drops:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        out.append("pos_embed[1], the distillation token's")
    patches = positions.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        raise CheckpointError(
            f"{path} has {positions.shape[1]} position embeddings{' without the distillation token' if drops else ''}",
            "one for the class token and those of a square grid, such as 14 x 14",
            "give a ViT or DeiT with a class token, trained on square images",
        )
    state["pos_embed"] = resize_positions(positions, (side, side), encoder.grid, prefix)
    checkpoint.load_strict(encoder, state, str(path))
    return encoder.state_dict(), tuple(out)


def size(path: Path, found: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return width and number of blocks of an image transformer's tensors."""
    wanted = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    missing = [name for name, axes in wanted.items() if name not in found or found[name].ndim != axes]
    numbers = [int(match[1]) for name in found if (match := re.match(r"blocks\.(\d+)\.", name))]
    if missing or not numbers:
        raise CheckpointError(
            f"{path} has {len(found)} tensors ({', '.join([*found][:3])}, ...), and no "
            f"{', no '.join(missing or ['blocks.0.*'])}",
            "the tensors of a ViT or DeiT as timm names them",
            "give such a file; pass an asit model folder with --model",
        )
    return found["cls_token"].shape[2], max(numbers) + 1
