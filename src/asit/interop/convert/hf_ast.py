"""Convert Hugging Face's AST: a folder with config.json, weights and, mostly, preprocessor_config.json.

Both naming schemes are read: of transformers 4.x (encoder.layer.0.attention.attention.query) and of 5.x
(layers.0.attention.q_proj). Query, key and value are separate, all norms use the config's epsilon (1e-12), and the axes
are AST's. Source: transformers 5.23, models/audio_spectrogram_transformer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asit.errors import CheckpointError
from asit.interop.convert.source_model import (
    MEAN,
    STD,
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    front_end,
    source_model,
)
from asit.io import parsing, safe_load

log = logging.getLogger(__name__)

MODEL_TYPE = "audio-spectrogram-transformer"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREFIX = "audio_spectrogram_transformer."
"""Of the encoder's names in a model with a head."""
_PLAIN = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_INNER = {
    **dict.fromkeys(("attention.attention.query", "attention.q_proj"), "query"),
    **dict.fromkeys(("attention.attention.key", "attention.k_proj"), "key"),
    **dict.fromkeys(("attention.attention.value", "attention.v_proj"), "value"),
    **dict.fromkeys(("attention.output.dense", "attention.o_proj"), "attn.proj"),
    **dict.fromkeys(("intermediate.dense", "mlp.fc1"), "mlp.fc1"),
    **dict.fromkeys(("output.dense", "mlp.fc2"), "mlp.fc2"),
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_HEAD = {
    "classifier.layernorm.weight": "norm.weight",
    "classifier.layernorm.bias": "norm.bias",
    "classifier.dense.weight": "linear.weight",
    "classifier.dense.bias": "linear.bias",
}


def read_json(
    path: Path, expected: str = "a folder with config.json and the weights", remedy: str = "download the folder again"
) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: with `expected` and `remedy`, if the file is missing or holds something else.
    """
    return parsing.json_object(path, CheckpointError, expected, remedy)


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    there = sorted(path.name for path in folder.iterdir())
    raise CheckpointError(
        f"{folder} has no {' and no '.join(WEIGHTS)} ({', '.join(there[:4]) or 'it is empty'})",
        "a folder as transformers saves it, with weights in one file",
        "download the weights too; model.save_pretrained(FOLDER) joins weights in several files",
    )


def hugging_face(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert Hugging Face's AST, with or without a head.

    Args:
        path: the file of weights, beside its config.json.

    Raises:
        CheckpointError: the config is missing, not supported or does not fit the weights; or unknown tensors.
    """
    config = read_json(path.parent / "config.json")
    found = _renamed(path, safe_load.tensors(path, content, ()), config.get("qkv_bias") is not False)
    tensors = assign_tensors(path, found, {}, "", [_HEAD], options.no_head)
    patch = _number(path, config, "patch_size", 16)
    strides = _number(path, config, "time_stride", 10), _number(path, config, "frequency_stride", 10)
    mels, most = _number(path, config, "num_mel_bins", 128), _number(path, config, "max_length", 1024)
    if options.mels not in (None, mels) or options.stride not in (None, strides):
        raise CheckpointError(
            f"{path.parent / 'config.json'} says {mels} mel bins and stride {strides[0]}x{strides[1]}",
            "the same as requested",
            "omit --mels and --stride",
        )
    grid = (most - patch) // strides[0] + 1, (mels - patch) // strides[1] + 1
    positions, count = tensors.state.get("pos_embed"), 2 + grid[0] * grid[1]
    if positions is None or positions.ndim != 3 or positions.shape[1] != count or min(grid) < 1:
        has = "none" if positions is None else tuple(positions.shape)
        raise CheckpointError(
            f"{path} has position embeddings {has}, and its config makes {grid[0]} x {grid[1]} patches (time x mel)",
            f"(1, {count}, width)",
            "give the config.json that belongs to these weights",
        )
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise CheckpointError(f"{path.parent / 'config.json'} says layer_norm_eps {eps!r}", "such as 1e-12")
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path.parent / 'config.json'} says hidden_act {act!r}", "gelu", "")
    head = None
    if tensors.head:
        kind = config.get("problem_type")
        multi = None if kind is None else kind == "multi_label_classification"
        head = SourceHead(tensors.head, "class", eps, _names(config, tensors.head), multi)
    front = _front_end(path.parent, options, mels, most)
    over = {"heads": _number(path, config, "num_attention_heads", 12), "norm_eps": eps}
    model = source_model(path, "hf-ast", tensors, (strides, grid), front, head, transposed=True, over=over)
    model.mapped = len(content) - len(model.left_out)  # query, key and value are three
    return model


def _renamed(path: Path, found: Mapping[str, Tensor], biases: bool) -> dict[str, Tensor]:
    """Return the tensors with timm's names of the encoder's, query, key and value joined."""
    out: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in found.items():
        own = name.removeprefix(PREFIX)
        layer = _LAYER.fullmatch(own)
        inner = _INNER.get(layer[2]) if layer else None
        if layer and inner in ("query", "key", "value"):
            parts.setdefault((layer[1], layer[3]), {})[inner] = value
        else:
            out[f"blocks.{layer[1]}.{inner}.{layer[3]}" if layer and inner else _PLAIN.get(own, own)] = value
    for (number, kind), three in parts.items():
        shapes = {name: tuple(value.shape) for name, value in three.items()}
        if len(shapes) != 3 or len(set(shapes.values())) != 1 or () in shapes.values():
            raise CheckpointError(
                f"{path} has of the three {kind} tensors of layer {number} {shapes}",
                "query, key and value of one shape",
                "give an unchanged folder of Hugging Face's AST",
            )
        joined = torch.cat([three["query"], three["key"], three["value"]])
        out[f"blocks.{number}.attn.qkv.{kind}"] = joined
        if kind == "weight" and not biases:
            out[f"blocks.{number}.attn.qkv.bias"] = torch.zeros(len(joined))
    if not biases:
        log.info("Query, key and value have no biases: set to zeros")
    return out


def _number(path: Path, config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path.parent / 'config.json'} says {name} {value!r}", "a whole number above 0")
    return value


def _front_end(folder: Path, options: SourceOptions, mels: int, most: int) -> tuple[Any, str]:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        log.info("No preprocessor_config.json: rate 16000 Hz is assumed")
        return front_end(options, mels, padding="zero")
    facts = read_json(path)
    if facts.get("num_mel_bins", mels) != mels:
        raise CheckpointError(f"{path} says {facts['num_mel_bins']} mel bins, config.json {mels}", "the same number")
    if facts.get("max_length", most) != most:
        log.info(f"{path.name} pads clips to {facts['max_length']} frames, the network reads {most}: used {most}")
    if (maker := facts.get("feature_extractor_type", "ASTFeatureExtractor")) != "ASTFeatureExtractor":
        raise CheckpointError(
            f"{path} is of a {maker}",
            "an ASTFeatureExtractor",
            "get the file again; without it the published mean and std are used",
        )
    # Missing fields have the extractor's defaults, which are the published values.
    mean, std = (facts.get("mean", MEAN), facts.get("std", STD)) if facts.get("do_normalize", True) else (0.0, 0.5)
    if facts.get("padding_value", 0.0) != 0.0:
        raise CheckpointError(f"{path} says padding_value {facts['padding_value']}", "0.0, as AST has it", "")
    rate = facts.get("sampling_rate", 16000)
    return front_end(options, mels, rate=rate, padding="zero", origin=path.name, mean=mean, std=std)


def _names(config: Mapping[str, Any], head: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """Return the names of id2label; None if they are placeholders (LABEL_0, ...)."""
    names = config.get("id2label")
    count = head["linear.bias"].numel()
    if not isinstance(names, Mapping) or set(names) != {str(i) for i in range(count)}:
        return None
    given = tuple(str(names[str(i)]) for i in range(count))
    return None if given == tuple(f"LABEL_{i}" for i in range(count)) else given
