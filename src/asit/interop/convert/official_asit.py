"""Convert ASiT's own files: of the official pretraining (v1 and v2), fine-tuned ones, and those of PretrainedSED.

Their axes are asit's. Sources: Sara-Ahmed/ASiT (v1: 2023, v2: 2024) for the names of heads and the arguments;
qingkezyy/ASiT-CRNN for fine-tuning in AST's way (v.*, mlp_head, one token, class token read); fschmid56/PretrainedSED.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.config import FrontEndSettings
from asit.errors import CheckpointError
from asit.interop.convert.families import MASKED, are_sines
from asit.interop.convert.official_heads import heads_of
from asit.interop.convert.source_model import (
    NORM_AND_LINEAR,
    PUBLISHED,
    Pair,
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    fit_grid,
    front_end,
    patch_count,
    source_model,
    tensor_shape,
)
from asit.io import safe_load
from asit.model.positions import resize_positions

log = logging.getLogger(__name__)

_PROJECTION = "projection head of pretraining"
_NORMED = r"(weight_g|weight_v|weight|parametrizations\.weight\.original[01])"
_RULES = {
    r"(head_cls|head)\.mlp\.\d+\.(weight|bias)": _PROJECTION,
    rf"head_cls\.(cls_layer|data_layer)\.{_NORMED}": _PROJECTION,
    rf"head\.last_layer\.{_NORMED}": _PROJECTION,
    r"head_recons\.(mlp\.\d+|convTrans)\.(weight|bias)": "reconstruction head of pretraining",
}
_NETWORKS = ("student", "teacher")
_VERSIONS = {"v1": r"head_cls\.cls_layer", "v2": r"head\.last_layer"}
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
    if options.which not in there and (there or options.which == "student"):
        raise CheckpointError(
            f"{path} holds {'the ' + there[0] if there else 'one network'} and no {options.which}",
            "the requested network",
            f"pass --which {there[0]}" if there else "omit --which",
        )
    network = content[options.which] if there else content
    found = safe_load.tensors(path, network, () if there else ("model", "state_dict"))
    prefix = next((p for p in ("backbone.", "v.") if f"{p}cls_token" in found), "")
    linear = {f"{prefix}head.weight": "linear.weight", f"{prefix}head.bias": "linear.bias"}
    tensors = assign_tensors(path, found, _RULES, prefix, [linear, NORM_AND_LINEAR], options.no_head)
    for name, value in content.items() if there else ():
        if name != options.which:
            other = name in _NETWORKS
            tensors.left_out[name] = f"the other network of {len(value)} tensors" if other else "training state"
    args = content.get("args")
    args = args if isinstance(args, Mapping) else {}
    mels = options.mels or _whole(args, "num_mel_bins") or 128
    own = _is_asits(content, found) or "num_mel_bins" in args
    taken_for = _check_is_asit(path, tensors.state, own, bool(prefix or there), options)
    filters = tensors.state["patch_embed.proj.weight"]
    if filters.shape[1] == 3:
        tensors.state["patch_embed.proj.weight"] = filters.sum(1, keepdim=True)
        log.info("Filters summed over three channels, which all read the spectrogram")
    patches = _fit_grid(path, tensors.state, mels, options)
    version = next((name for name, sign in _VERSIONS.items() if any(map(re.compile(sign).match, found))), None)
    front = _front_end(options, mels, args, version)
    head = None
    if tensors.head:
        # A Linear alone reads the class token; what a norm and a Linear read is not published.
        normed = "norm.weight" in tensors.head
        head = SourceHead(tensors.head, "mean" if normed and options.pooling == "mean" else "class")
        if normed and options.pooling == "auto":
            log.info("Assumed that the head reads the class token; else pass --pooling mean")
    facts = {"which": options.which if there else None, "epoch": _whole(content, "epoch"), "taken_for": taken_for}
    heads = None if options.keep_heads is False else heads_of(path, found, content, required=options.keep_heads is True)
    if heads is not None:
        tensors = tensors._replace(left_out={n: why for n, why in tensors.left_out.items() if n not in heads.names})
    model = source_model(path, "asit", tensors, patches, front, head, facts={"version": version, **facts})
    model.pretraining = heads
    return model


def _front_end(
    options: SourceOptions, mels: int, args: Mapping[str, Any], version: str | None
) -> tuple[FrontEndSettings, str]:
    rate = _whole(args, "sample_rate")
    known: dict[str, Any] = {"rate": rate or (32000 if version == "v1" else 16000)}
    known |= {name: value for name in ("mean", "std") if isinstance(value := args.get(f"data_{name}"), float)}
    known["origin"] = "the arguments in the file" if {"mean", "std"} <= set(known) else PUBLISHED
    if options.rate is None and "sample_rate" not in args and version != "v2":
        why = "as in the code of v1; pass --rate for a network trained at another" if version else "is assumed"
        log.info(f"Rate {known['rate']} Hz, {why}")
    return front_end(options, mels, **known)


def _is_asits(content: Mapping[str, Any], found: Mapping[str, Tensor]) -> bool:
    """Whether there are heads that only ASiT's pretraining has: of reconstruction, or v1's two last layers."""
    nested = [name for held in content.values() if isinstance(held, Mapping) for name in held]
    return any(re.match(r"(module\.)?(head_recons|head_cls)\.", str(name)) for name in [*found, *nested])


def _check_is_asit(path: Path, state: Mapping[str, Tensor], own: bool, wrapped: bool, options: SourceOptions) -> str:
    """Return the reason to take this for an ASiT, whose names are timm's and those of many others.

    Args:
        own: whether the file has parts that only ASiT's pretraining has.
        wrapped: whether its names have a prefix of ASiT's files, or are of a teacher or a student.

    Raises:
        CheckpointError: it cannot be an ASiT, or nothing in the file shows that it is one.
    """
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    channels, patch, count = filters[1], filters[2:], patch_count(path, state)
    if are_sines(state["pos_embed"], state["pos_embed"].shape[1] - count):
        raise CheckpointError(
            f"{path} has positions that are sines and cosines: it is {MASKED}",
            "ASiT's positions, which are learned",
            "if it is AudioMAE, pass --kind audiomae; no option converts another",
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
        return "ASiT, by its pretraining heads or arguments"
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
    log.info(f"Assumed to be {reason}; their front end, padding or order of patches differ: results would be wrong")
    return reason


def _divides(count: int, mels: int, patch: int) -> bool:
    return mels >= patch and mels % patch == 0 and count % (mels // patch) == 0


def _fit_grid(path: Path, state: Mapping[str, Tensor], mels: int, options: SourceOptions) -> tuple[Pair, Pair]:
    """Return the stride and the grid of the patches."""
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    patch = filters[2], filters[3]
    stride, grid = fit_grid(path, patch_count(path, state), patch, mels, [options.stride or patch])
    if not options.stride:
        log.info(f"Stride {stride[0]}x{stride[1]}, that of the patches, as published")
    return stride, grid


def sed(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of PretrainedSED: ASIT_ssl, ASIT_weak, ASIT_strong_1.

    Its code reads the 296 positions as 8 x 37 instead of 37 x 8 before it resizes them to the 62 x 8 of 10 s. The weak
    and strong networks were trained so, and their positions are resized in the same way here; ASIT_ssl was trained with
    37 x 8 and keeps its positions.

    Raises:
        CheckpointError: unknown tensors, or positions that fit no grid.
    """
    found = safe_load.tensors(path, content)
    prefix = "model.asit." if any(name.startswith("model.asit.") for name in found) else "model."
    read = "a head on 250 averages of neighbouring tokens, the class token included: not supported"
    rules = {
        r"(strong_head|weak_head)\.(weight|bias)": read,
        r"seq_model\..*": "the recurrent network between encoder and head",
        r"model\.(asit_mel|mel_transform)\..*": "tables of the front end",
    }
    tensors = assign_tensors(path, found, rules, prefix, no_head=options.no_head)
    mels, state = options.mels or 128, tensors.state
    stride, (time, mel) = _fit_grid(path, state, mels, options)
    how, grid = "as they are", (time, mel)
    if any(name.startswith(("strong_head.", "weak_head.")) for name in found):
        grid = _SED_COLUMNS, mel
        state["pos_embed"] = resize_positions(state["pos_embed"], (mel, time), grid)
        how = f"read as {mel}x{time} and resized to {_SED_COLUMNS}x{mel}, as in PretrainedSED's code"
        log.info(f"Positions of {time}x{mel} (time x mel) {how}: the network was trained with that")
    else:
        log.info("No head: assumed to be ASIT_ssl, with ASiT's own positions")
    return source_model(path, "asit-sed", tensors, (stride, grid), front_end(options, mels), facts={"positions": how})


def _whole(facts: Mapping[str, Any], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
