"""Convert image transformers (ViT, DeiT with timm's names); see `asit.model.imagenet` for what changes.

A distilled DeiT keeps its second token, as in AST. An image has no length in time, so a length must be requested.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asit.errors import CheckpointError, ConfigError
from asit.interop.convert.source_model import (
    NO_HEAD,
    OURS,
    SourceModel,
    SourceOptions,
    encoder_settings,
    front_end,
    requested_frames,
)
from asit.io import safe_load
from asit.model import imagenet
from asit.model.positions import grid_of, patch_of, stride_of

log = logging.getLogger(__name__)

PATCH = 16
"""Side of a patch in pixels."""


def image(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert an image transformer.

    Raises:
        CheckpointError: see `load_imagenet`.
        ConfigError: neither frames nor seconds are given.
    """
    found = safe_load.tensors(path, content)
    imagenet.size(path, found)
    _, channels, *patch = found["patch_embed.proj.weight"].shape
    if channels != 3:
        raise CheckpointError(f"{path} has {channels} channels", "3, as an image transformer has", "pass --kind")
    if patch != [PATCH, PATCH]:
        raise CheckpointError(
            f"{path} has patches of {patch[0]}x{patch[1]} pixels",
            f"{PATCH}x{PATCH}, as in ViT-*/16 and DeiT: of 8x8 a spectrogram has four times as many",
            f"give a network with patches of {PATCH}",
        )
    outside = [name for name in found if options.no_head and not OURS.fullmatch(name)]
    found = {name: value for name, value in found.items() if name not in outside}
    grey = {**found, "patch_embed.proj.weight": found["patch_embed.proj.weight"][:, :1]}
    settings = encoder_settings(path, grey, options.stride)
    mels = options.mels or 128
    settled, origin = front_end(options, mels)
    frames = requested_frames(options, settings, settled)
    if frames is None:
        side = math.isqrt(found["pos_embed"].shape[1])
        raise ConfigError(
            f"{path} has positions of {side} x {side} patches of an image, and no length in time is given",
            "one of --frames and --seconds",
            "pass --frames 592 (ASiT's 6 s) or --seconds 10",
        )
    grid = grid_of(frames, mels, patch_of(settings), stride_of(settings))
    state, names = imagenet.convert(path, found, settings, frames, mels)
    left_out = dict.fromkeys(names, "head of the image classifier") | dict.fromkeys(outside, NO_HEAD)
    facts = {
        "kind": "vit",
        "axes": "rows of the image are time, columns mel bins",
        "grid": list(grid),
        "stride": list(stride_of(settings)),
        "positions": "resized from the image's, bicubic",
        "statistics": origin,
        "colours": "filters summed over red, green and blue",
    }
    log.info(f"Positions resized to {grid[0]} x {grid[1]} (time x mel); filters summed over colours")
    return SourceModel(settings, frames, settled, state, len(found) - len(names), left_out, None, facts)
