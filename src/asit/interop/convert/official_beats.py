"""Convert BEATs' own files: pretrained, or fine-tuned on AudioSet with 527 labels.

Sources: microsoft/unilm, beats/BEATs.py, backbone.py, modules.py; the log-mel is Kaldi's with the Povey window on
samples of 16 bits, and clips are not padded. Epsilon 1e-5. The head is a Linear layer on each token, whose logits are
averaged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.config.yaml import build
from asit.errors import CheckpointError
from asit.interop.convert.source_model import SourceHead, SourceModel, SourceOptions, front_end, tensor_shape
from asit.io import safe_load
from asit.model.beats import BUCKETS, GROUPS, KERNEL, PATCH_WIDTH
from asit.model.vit import size_of

log = logging.getLogger(__name__)

_FIXED: dict[str, Any] = {
    "layer_norm_first": False,
    "deep_norm": True,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "activation_fn": "gelu",
    "conv_bias": False,
    "conv_pos": KERNEL,
    "conv_pos_groups": GROUPS,
    "num_buckets": BUCKETS,
    "embed_dim": PATCH_WIDTH,
}
"""Settings of every published BEATs."""
_DISTANCE = 800
_COLUMNS = 62
"""Columns of 16 frames in AudioSet's clips of 10 s, whose last 6 frames BEATs does not read."""
_PLAIN = {
    "patch_embedding.weight": "patch_embed.proj.weight",
    **{f"layer_norm.{kind}": f"patch_embed.norm.{kind}" for kind in ("weight", "bias")},
    **{f"post_extract_proj.{kind}": f"patch_embed.project.{kind}" for kind in ("weight", "bias")},
    "encoder.pos_conv.0.bias": "pos_conv.bias",
    **{f"encoder.layer_norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")},
    "encoder.layers.0.self_attn.relative_attention_bias.weight": "relative_bias.weight",
    **{f"predictor.{kind}": f"head.{kind}" for kind in ("weight", "bias")},
}
_INNER = {
    **{f"self_attn.out_proj.{kind}": f"attn.proj.{kind}" for kind in ("weight", "bias")},
    **{f"self_attn.grep_linear.{kind}": f"attn.gate.{kind}" for kind in ("weight", "bias")},
    "self_attn.grep_a": "attn.gate_scale",
    **{f"self_attn_layer_norm.{kind}": f"norm1.{kind}" for kind in ("weight", "bias")},
    **{f"final_layer_norm.{kind}": f"norm2.{kind}" for kind in ("weight", "bias")},
    **{f"{layer}.{kind}": f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")},
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.(weight|bias)")
_CONV = ("encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v")


def beats(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of BEATs.

    Raises:
        CheckpointError: unknown or missing tensors, or settings of no published BEATs.
    """
    found = safe_load.tensors(path, content, ("model",))
    cfg = content.get("cfg")
    cfg = cfg if isinstance(cfg, Mapping) else {}
    _check(path, cfg)
    state, left_out = _renamed(path, found)
    linear = {name.removeprefix("head."): state.pop(name) for name in ("head.weight", "head.bias") if name in state}
    if len(linear) == 1:
        raise CheckpointError(f"{path} has of a head only {next(iter(linear))}", "a weight and a bias", "get it again")
    if linear and options.no_head:
        left_out |= dict.fromkeys(("predictor.weight", "predictor.bias"), "outside the encoder (--no-head)")
        linear = {}
    mels = options.mels or 128
    settings = _settings(path, state, cfg)
    front, origin = front_end(
        options, mels, mean=15.41663, std=6.55582, window="povey", scale=32768, origin="AudioSet's, of BEATs' code"
    )
    frames = _COLUMNS * settings.patch_frames
    head = None
    if linear:
        names = _names(content.get("label_dict"), len(linear["bias"]))
        named = {f"linear.{kind}": value for kind, value in linear.items()}
        seconds = None if options.frames or options.seconds else 10.0
        head = SourceHead(named, "mean", classes=names, seconds=seconds)
    patch = [settings.patch_frames, settings.patch_mels]
    facts = {
        "kind": "beats",
        "axes": "(time, mel)",
        "grid": [_COLUMNS, mels // patch[1]],
        "stride": patch,
        "statistics": origin,
    }
    return SourceModel(settings, frames, front, state, len(found) - len(left_out), left_out, head, facts)


def is_beats(found: Mapping[str, Tensor]) -> bool:
    """Whether the names of a file's tensors are BEATs'."""
    return {"patch_embedding.weight", "encoder.layers.0.self_attn.grep_a", *_CONV} <= set(found)


def _check(path: Path, cfg: Mapping[str, Any]) -> None:
    wrong = [f"{name} {cfg[name]!r}" for name, value in _FIXED.items() if name in cfg and cfg[name] != value]
    distance = cfg.get("max_distance", _DISTANCE)
    if not isinstance(distance, int) or not BUCKETS // 4 < distance < 1 << 31:
        wrong.append(f"max_distance {distance!r}")
    if wrong:
        raise CheckpointError(
            f"{path} says {', '.join(wrong)}",
            ", ".join(f"{name} {value!r}" for name, value in _FIXED.items()),
            "give a BEATs as published (iter1 to iter3+); its tokenizers and changed networks cannot be converted",
        )
    if "max_distance" not in cfg:
        log.info(f"Relative positions up to {_DISTANCE} patches are assumed, as published: the file does not say")


def _renamed(path: Path, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors in asit's names, and what is left out with the reason."""
    state: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    three: dict[str, dict[str, Tensor]] = {}
    unknown = []
    table = found.get("encoder.layers.0.self_attn.relative_attention_bias.weight")
    for name, value in found.items():
        layer = _LAYER.fullmatch(name)
        part = _QKV.fullmatch(layer[2]) if layer else None
        if layer and part:
            three.setdefault(f"blocks.{layer[1]}.attn.qkv.{part[2]}", {})[part[1]] = value
        elif layer and layer[2] in _INNER:
            state[f"blocks.{layer[1]}.{_INNER[layer[2]]}"] = value
        elif name in _PLAIN:
            state[_PLAIN[name]] = value
        elif layer and layer[2] == "self_attn.relative_attention_bias.weight":
            if table is None or not torch.equal(value, table):
                raise CheckpointError(f"{path} has another {name} than in layer 0", "one table for all layers", "")
            left_out[name] = "the table of layer 0, which all layers share"
        elif name not in _CONV:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} unknown tensors ({', '.join(unknown[:3])})",
            "the tensors of a BEATs",
            "give a BEATs as published; its tokenizers and changed networks cannot be converted",
        )
    for name, parts in three.items():
        if set(parts) != set("qkv") or len({tuple(value.shape) for value in parts.values()}) != 1:
            raise CheckpointError(
                f"{path} has of {name} only {sorted(parts)}", "q, k and v of one shape", "get it again"
            )
        state[name] = torch.cat([parts[which] for which in "qkv"])
    scale, direction = (found.get(name) for name in _CONV)
    if scale is None or direction is None or direction.ndim != 3 or scale.shape != (1, 1, direction.shape[2]):
        raise CheckpointError(f"{path} has no {' and '.join(_CONV)} of one size", "a convolution with weight norm", "")
    exact = direction.double()
    state["pos_conv.weight"] = (scale.double() * exact / exact.square().sum((0, 1), keepdim=True).sqrt()).float()
    return state, left_out


def _settings(path: Path, state: Mapping[str, Tensor], cfg: Mapping[str, Any]) -> EncoderSettings:
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    width = tensor_shape(path, state, "patch_embed.project.weight", 2)[0]
    heads = tensor_shape(path, state, "blocks.0.attn.gate_scale", 4)[1]
    hidden = tensor_shape(path, state, "blocks.0.mlp.fc1.weight", 2)[0]
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if numbers != set(range(len(numbers))) or width % heads or width % GROUPS or filters[:2] != (PATCH_WIDTH, 1):
        raise CheckpointError(
            f"{path} has blocks {sorted(numbers)[:3]} to {max(numbers)}, width {width}, {heads} heads and patch "
            f"filters {filters}",
            f"blocks from 0 on without a gap, a width of whole heads, and ({PATCH_WIDTH}, 1, 16, 16)",
            "give an unchanged network",
        )
    more = {"patch_frames": filters[2], "patch_mels": filters[3], "mlp_ratio": hidden / width, "norm_eps": 1e-5}
    distance = {"family": "beats", "max_distance": cfg.get("max_distance", _DISTANCE)}
    return build(EncoderSettings, {**size_of(width, len(numbers), heads), **more, **distance}, str(path))


def _names(labels: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of the outputs (AudioSet's ids), if the file has one for each."""
    if not isinstance(labels, Mapping) or set(labels) != set(range(count)):
        return None
    names = tuple(str(labels[i]) for i in range(count))
    return names if len(set(names)) == count else None
