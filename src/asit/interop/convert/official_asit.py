"""Convert ASiT's own files: of the official pretraining (v1 and v2), fine-tuned ones, and those of PretrainedSED.

Their axes are asit's. Sources: Sara-Ahmed/ASiT (v1: 2023, v2: 2024) for the names of heads and the arguments;
qingkezyy/ASiT-CRNN for fine-tuning in AST's way (v.*, mlp_head, one token, class token read); fschmid56/PretrainedSED.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import CheckpointError
from asit.interop.convert.families import MASKED, are_sines
from asit.interop.convert.source_model import (
    PUBLISHED,
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    encoder_settings,
    front_end,
    tensor_shape,
)
from asit.interop.convert.transposed import Pair, fit_grid, frames_of
from asit.io import safe_load
from asit.model.classifier import Pooling
from asit.model.positions import patch_of, resize_positions, stride_of

_PROJECTION = "projection head of pretraining"
_NORMED = r"(weight_g|weight_v|weight|parametrizations\.weight\.original[01])"
_RULES = [
    (r"(head_cls|head)\.mlp\.\d+\.(weight|bias)", _PROJECTION),
    (rf"head_cls\.(cls_layer|data_layer)\.{_NORMED}", _PROJECTION),
    (rf"head\.last_layer\.{_NORMED}", _PROJECTION),
    (r"head_recons\.(mlp\.\d+|convTrans)\.(weight|bias)", "reconstruction head of pretraining"),
]
_NETWORKS = ("student", "teacher")
PUBLISHED_COUNTS = (296, 496, 504, 512)
"""Positions of published ASiTs over 128 mel bins: 37 columns of 6 s, 62 to 64 of 10 s."""
MELS = (64, 80, 96, 128)
"""Mel bins that networks of spectrograms have."""
_SED_COLUMNS = 62
"""Columns of 16 frames in 10 s, PretrainedSED's clip."""


def official(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of the official pretraining, or one fine-tuned from it.

    Raises:
        CheckpointError: no such network, unknown tensors, or positions that fit no grid.
    """
    there = [name for name in _NETWORKS if isinstance(content.get(name), Mapping)]
    left_out: dict[str, str] = {}
    if options.which not in there and (there or options.which == "student"):
        raise CheckpointError(
            f"{path} holds {'the ' + there[0] if there else 'one network'} and no {options.which}",
            "the requested network",
            f"pass --which {there[0]}" if there else "omit --which",
        )
    if there:
        found = safe_load.tensors(path, content[options.which])
        for name, value in content.items():
            if name != options.which:
                size = f" of {len(value)} tensors" if name in _NETWORKS else ""
                left_out[name] = f"the other network{size}" if name in _NETWORKS else "training state"
    else:
        found = safe_load.tensors(path, content, ("model", "state_dict"))
    found = {name.removeprefix("module."): value for name, value in found.items()}
    prefix = next((p for p in ("backbone.", "v.") if f"{p}cls_token" in found), "")
    finetuned = [f"{prefix}head.weight", f"{prefix}head.bias"]
    normed = ["mlp_head.0.weight", "mlp_head.0.bias", "mlp_head.1.weight", "mlp_head.1.bias"]
    state, head, more = assign_tensors(path, found, _RULES, prefix, [*finetuned, *normed], options.no_head)
    args = content.get("args")
    facts = args if isinstance(args, Mapping) else {}
    mels = options.mels or _whole(facts, "num_mel_bins") or 128
    own = _is_asits(content, found) or "num_mel_bins" in facts
    notes, taken_for = _check_is_asit(path, state, own, bool(prefix or there), options)
    filters = state.get("patch_embed.proj.weight")
    if filters is not None and filters.ndim == 4 and filters.shape[1] == 3:
        state["patch_embed.proj.weight"] = filters.sum(1, keepdim=True)
        notes.append("filters summed over three channels, which all read the spectrogram")
    settings, frames, stride, grid = _fit_grid(path, state, mels, options)
    first = any(name.startswith("head_cls.cls_layer") for name in found)
    second = any(name.startswith("head.last_layer") for name in found)
    known: dict[str, Any] = {"rate": _whole(facts, "sample_rate") or (32000 if first else 16000)}
    for name in ("mean", "std"):
        if isinstance(value := facts.get(f"data_{name}"), float):
            known[name] = value
    known["origin"] = "the arguments in the file" if {"mean", "std"} <= set(known) else PUBLISHED
    settled, origin = front_end(options, mels, **known)
    if first and options.rate is None and "sample_rate" not in facts:
        notes.append("rate 32000 Hz, as in the code of v1; pass --rate for a network trained at another")
    if not first and not second and options.rate is None and "sample_rate" not in facts:
        notes.append("rate 16000 Hz is assumed: the file does not say")
    if not options.stride and stride == patch_of(settings):
        notes.append(f"stride {stride[0]}x{stride[1]}, that of the patches, as published")
    facts = {
        "kind": "asit",
        "version": "v1" if first else "v2" if second else None,
        "which": options.which if there else None,
        "taken_for": taken_for,
        "epoch": _whole(content, "epoch"),
        "axes": "(time, mel)",
        "grid": list(grid),
        "stride": list(stride),
        "statistics": origin,
    }
    source_head = _head(path, head, finetuned, normed, options.pooling)
    if source_head is not None and "norm.weight" in source_head.state and options.pooling == "auto":
        notes.append("assumed that the head reads the class token; else pass --pooling mean")
    mapped = len(state) + len(head)
    return SourceModel(settings, frames, settled, state, mapped, left_out | more, source_head, facts, notes)


def _is_asits(content: Mapping[str, Any], found: Mapping[str, Tensor]) -> bool:
    """Whether there are heads that only ASiT's pretraining has: of reconstruction, or v1's two last layers."""
    nested = [name for held in content.values() if isinstance(held, Mapping) for name in held]
    return any(re.match(r"(module\.)?(head_recons|head_cls)\.", str(name)) for name in [*found, *nested])


def _check_is_asit(
    path: Path, state: Mapping[str, Tensor], own: bool, wrapped: bool, options: SourceOptions
) -> tuple[list[str], str]:
    """Return notes and the reason to take this for an ASiT, whose names are timm's and those of many others.

    Args:
        own: whether the file has parts that only ASiT's pretraining has.
        wrapped: whether its names have a prefix of ASiT's files, or are of a teacher or a student.

    Raises:
        CheckpointError: it cannot be an ASiT, or nothing in the file shows that it is one.
    """
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    positions = tensor_shape(path, state, "pos_embed", 3)
    prefix = 2 if "dist_token" in state else 1
    channels, patch, count = filters[1], filters[2:], positions[1] - prefix
    if are_sines(state["pos_embed"], prefix):
        raise CheckpointError(
            f"{path} has positions that are sines and cosines: it is {MASKED}, which asit does not support",
            "ASiT's positions, which are learned",
            "use it with the code it was published with; no option converts it",
        )
    square = math.isqrt(max(count, 0)) ** 2 == count
    if channels == 3 and not own and (square or patch != (16, 16)):
        raise CheckpointError(
            f"{path} has 3 channels and {count} positions of patches of {patch[0]}x{patch[1]}: it is an image network, "
            "such as DINO, with the same names",
            "an ASiT, of spectrograms",
            "convert an image network with patches of 16, saved alone, with --kind vit --frames 592",
        )
    if own:
        return [], "ASiT, by its pretraining heads or arguments"
    others = "AudioMAE, M2D, MSM-MAE, DINO and iBOT name their tensors likewise"
    published = patch == (16, 16) and count in PUBLISHED_COUNTS
    if not wrapped and options.kind == "auto" and options.mels is None and not published:
        ways = [f"{count // (m // patch[1])} x {m // patch[1]} over {m}" for m in MELS if _divides(count, m, patch[1])]
        raise CheckpointError(
            f"{path} has {count} positions of patches of {patch[0]}x{patch[1]} and nothing shows whose they are: "
            f"{others}, and the mel bins are not known ({', '.join(ways) or 'none divides the positions'})",
            f"a published ASiT ({', '.join(map(str, PUBLISHED_COUNTS))} positions of 16x16)",
            "if it is an ASiT, pass --kind asit --mels 128, or the number of mel bins it was trained with",
        )
    reason = f"ASiT, by its names alone: {others}"
    note = f"assumed to be {reason}; their front end, padding or order of patches differ and would give wrong results"
    return [note], reason


def _divides(count: int, mels: int, patch: int) -> bool:
    return mels >= patch and mels % patch == 0 and count % (mels // patch) == 0


def _head(path: Path, head: dict[str, Tensor], plain: list[str], normed: list[str], pooling: str) -> SourceHead | None:
    """Return the head; a Linear alone reads the class token, what a norm and a Linear read is not published."""
    if not head:
        return None
    names = [names for names in (plain, normed) if set(names) == set(head)]
    if not names:
        raise CheckpointError(
            f"{path} has {', '.join(sorted(head))}",
            f"{' and '.join(plain)}, or {', '.join(normed)}",
            "give the whole file of a fine-tuned network",
        )
    ours = ["linear.weight", "linear.bias"] if names[0] is plain else _NORM_LINEAR
    reads: Pooling = "mean" if pooling == "mean" and names[0] is normed else "class"
    return SourceHead({own: head[name] for own, name in zip(ours, names[0], strict=True)}, reads)


_NORM_LINEAR = ["norm.weight", "norm.bias", "linear.weight", "linear.bias"]


def _fit_grid(
    path: Path, state: Mapping[str, Tensor], mels: int, options: SourceOptions
) -> tuple[EncoderSettings, int, Pair, Pair]:
    filters, positions = (
        tensor_shape(path, state, "patch_embed.proj.weight", 4),
        tensor_shape(path, state, "pos_embed", 3),
    )
    patch = filters[2], filters[3]
    prefix = 2 if "dist_token" in state else 1
    stride, grid = fit_grid(path, positions[1] - prefix, patch, mels, [options.stride or patch])
    return encoder_settings(path, state, stride), frames_of(grid, patch, stride), stride, grid


def sed(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of PretrainedSED: ASIT_ssl, ASIT_weak, ASIT_strong_1.

    Its code reads the 296 positions as 8 x 37 instead of 37 x 8 before it resizes them to the 62 x 8 of 10 s. The weak
    and strong networks were trained so, and their positions are resized in the same way here; ASIT_ssl was trained with
    37 x 8 and keeps its positions.

    Raises:
        CheckpointError: unknown tensors, or positions that fit no grid.
    """
    found = safe_load.tensors(path, content, ("model", "state_dict"))
    prefix = "model.asit." if any(name.startswith("model.asit.") for name in found) else "model."
    read = "a head on 250 averages of neighbouring tokens, the class token included: not supported"
    rules = [
        (r"(strong_head|weak_head)\.(weight|bias)", read),
        (r"seq_model\..*", "the recurrent network between encoder and head"),
        (r"model\.(asit_mel|mel_transform)\..*", "tables of the front end"),
    ]
    state, _, left_out = assign_tensors(path, found, rules, prefix, no_head=options.no_head)
    mels = options.mels or 128
    settings, frames, stride, grid = _fit_grid(path, state, mels, options)
    trained = any(name.startswith(("strong_head.", "weak_head.")) for name in found)
    notes = [f"stride {stride[0]}x{stride[1]}, that of the patches, as published"] if not options.stride else []
    how = "as they are"
    if not trained:
        notes.append("no head: assumed to be ASIT_ssl, with ASiT's own positions")
    else:
        time, mel = grid
        state["pos_embed"] = resize_positions(state["pos_embed"], (mel, time), (_SED_COLUMNS, mel))
        how = f"read as {mel}x{time} and resized to {_SED_COLUMNS}x{mel}, as in PretrainedSED's code"
        notes.append(f"positions of {grid[0]}x{grid[1]} (time x mel) {how}: the network was trained with that")
        grid = _SED_COLUMNS, grid[1]
        frames = frames_of(grid, patch_of(settings), stride_of(settings))
    settled, origin = front_end(options, mels, rate=16000)
    facts = {
        "kind": "asit-sed",
        "axes": "(time, mel)",
        "grid": list(grid),
        "stride": list(stride),
        "positions": how,
        "statistics": origin,
    }
    return SourceModel(settings, frames, settled, state, len(state), left_out, None, facts, notes)


def _whole(facts: Mapping[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
