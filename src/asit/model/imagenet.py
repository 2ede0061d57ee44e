"""Weights of image transformers (ViT, DeiT) as a start for the encoder; the files are the user's own.

Letters: D width, P patches. The tensors are those of timm's `vit_*_patch16_*` and `deit_*_patch16_*` models and of
the DeiT authors' files, whose names ours are. What changes on the way from pictures:

- the patch filters are summed over red, green and blue, as in v2 of the official code and in AST;
- the position grid (14 x 14 of 224 pixels, 24 x 24 of 384) is resized bicubically to ours, its rows becoming time and
  its columns mel bins, as in v2 (14 x 14 to 37 x 8). AST has the rows as mel bins, and cuts or resizes bilinearly;
- the classification heads are left out, and of a distilled DeiT the distillation token and its position. AST keeps
  both tokens and averages what comes out of them; an encoder with one class token cannot.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asit import checkpoint
from asit.errors import CheckpointError
from asit.model.positions import resize_positions
from asit.model.vit import blank
from asit.settings import EncoderSettings

_PICKLED = (".pth", ".pt", ".bin")
_HEADS = ("head.", "head_dist.", "pre_logits.")
_NESTS = ("model", "state_dict")
_HEAD_WIDTH = 64
"""Width of an attention head in every ViT and DeiT with patches of 16: not to be seen from the tensors."""


def load_imagenet(
    path: Path, settings: EncoderSettings, frames: int, mels: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """An encoder's weights from an image transformer's.

    Args:
        path: a .safetensors file, or a .pth, .pt or .bin file, read without running anything in it; the tensors lie
            in it as they are, or under "model" or "state_dict".
        settings: of the encoder to be filled; width, blocks and patch have to be the file's.
        frames: T of the encoder's input.
        mels: F.

    Returns:
        the encoder's state, float32, and the names of what was left out, for the log.

    Raises:
        CheckpointError: the file cannot be read, or holds something else, another size, or tensors without a place
            in the encoder, which are named.
        ConfigError: settings, frames and mels do not go together.
    """
    encoder = blank(settings, frames, mels)
    found = _read(Path(path))
    width, blocks = _size(path, found)
    if (width, blocks) != (encoder.width, encoder.depth):
        raise CheckpointError(
            f"{path} is {width} wide and has {blocks} blocks; the encoder is {encoder.width} wide and has "
            f"{encoder.depth}",
            "the same size",
            "give another file, or set encoder.size to the file's: tiny 192/12, small 384/12, base 768/12, "
            "large 1024/24",
        )
    if width != encoder.heads * _HEAD_WIDTH:
        raise CheckpointError(
            f"{path} is {width} wide, the encoder has {encoder.heads} heads of {width // encoder.heads}",
            f"heads of {_HEAD_WIDTH}, as in every ViT and DeiT",
            f"set encoder.heads to {width // _HEAD_WIDTH}" if width >= _HEAD_WIDTH else "give another file",
        )
    distilled = "dist_token" in found
    out = [name for name in found if name.startswith(_HEADS) or name == "dist_token"]
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
    positions = state["pos_embed"]
    if distilled:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
        out.append("pos_embed[1], the distillation token's")
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1:
        raise CheckpointError(
            f"{path} has {positions.shape[1]} position embeddings without the distillation token's",
            "one for the class token and those of a square grid, such as 14 x 14",
            "give a ViT or DeiT with a class token, trained on square pictures",
        )
    state["pos_embed"] = resize_positions(positions, (side, side), encoder.grid)
    checkpoint.load_strict(encoder, state, str(path))
    return encoder.state_dict(), tuple(out)


def _size(path: Path, found: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and blocks of an image transformer's tensors."""
    wanted = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    missing = [name for name, axes in wanted.items() if name not in found or found[name].ndim != axes]
    numbers = [int(match[1]) for name in found if (match := re.match(r"blocks\.(\d+)\.", name))]
    if missing or not numbers:
        raise CheckpointError(
            f"{path} has {len(found)} tensors ({', '.join([*found][:3])}, ...), and no "
            f"{', no '.join(missing or ['blocks.0.*'])}",
            "the tensors of a ViT or DeiT as timm names them",
            "give such a file; an asit model folder is given with --model instead",
        )
    return found["cls_token"].shape[2], max(numbers) + 1


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file."""
    expected = f"a .safetensors file, or one of {', '.join(_PICKLED)} with nothing in it but tensors"
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}", expected)
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        elif path.suffix in _PICKLED:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'}", expected, "give one of these")
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} holds {refused[1]}, and reading that could run code"
            if refused
            else f"{path} cannot be read as tensors alone",
            expected,
            "where the file came from, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error
    except (safetensors.SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read: {reason}", expected, "get the file again") from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__} and no named tensors", expected)
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are no tensors ({', '.join(others[:3])})",
            f"tensors by name, as they are or under {' or '.join(map(repr, _NESTS))}",
            "save the tensors alone",
        )
    return {str(name): value for name, value in content.items()}
