"""AST as Hugging Face has it: a folder with config.json, weights and, mostly, preprocessor_config.json.

Transformers 4.x names the tensors as its ViT did (encoder.layer.0.attention.attention.query); in 5.x they are
layers.0.attention.q_proj and so on, though files are still written with the old names. Both are read. Query, key and
value lie apart, epsilon is the config's (1e-12) for all norms, and the axes are AST's. Source: transformers,
models/audio_spectrogram_transformer, of 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asit.errors import CheckpointError
from asit.interop.convert.axes import frames_of, turn_filters, turn_positions
from asit.interop.convert.converted import MEAN, NO_HEAD, STD, Ask, Taken, TakenHead, front_end, settings_of
from asit.io import parsing, safe_load

MODEL_TYPE = "audio-spectrogram-transformer"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREFIX = "audio_spectrogram_transformer."
"""Before the encoder's names where there is a head."""
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
    **dict.fromkeys(("attention.attention.query", "attention.q_proj"), "q"),
    **dict.fromkeys(("attention.attention.key", "attention.k_proj"), "k"),
    **dict.fromkeys(("attention.attention.value", "attention.v_proj"), "v"),
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
    """A JSON file with an object in it.

    Args:
        expected, remedy: of the error.

    Raises:
        CheckpointError: it is not there, or is something else.
    """
    return parsing.json_object(path, CheckpointError, expected, remedy)


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder.

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
        "download the weights too; weights in several parts are brought together by model.save_pretrained(FOLDER)",
    )


def hugging_face(path: Path, content: Mapping[str, Any], ask: Ask) -> Taken:
    """AST from Hugging Face, with or without its head.

    Args:
        path: the file of weights; config.json lies beside it.

    Raises:
        CheckpointError: a config that is missing, that asit's encoder cannot follow or that the weights do not fit, or
            tensors without a place.
    """
    config = read_json(path.parent / "config.json")
    state, head, left_out, notes = _sort(path, safe_load.tensors(path, content), config, ask.no_head)
    patch = _number(path, config, "patch_size", 16)
    strides = _number(path, config, "time_stride", 10), _number(path, config, "frequency_stride", 10)
    mels, most = _number(path, config, "num_mel_bins", 128), _number(path, config, "max_length", 1024)
    if ask.mels not in (None, mels) or ask.stride not in (None, strides):
        raise CheckpointError(
            f"{path.parent / 'config.json'} says {mels} mel bins and stride {strides[0]}x{strides[1]}",
            "the same as asked for",
            "leave --mels and --stride out",
        )
    grid = (most - patch) // strides[0] + 1, (mels - patch) // strides[1] + 1
    positions = state.get("pos_embed")
    count = 2 + grid[0] * grid[1]
    if positions is None or positions.ndim != 3 or positions.shape[1] != count or min(grid) < 1:
        has = "none" if positions is None else tuple(positions.shape)
        raise CheckpointError(
            f"{path} has position embeddings {has}, and its config makes {grid[0]} x {grid[1]} patches (time x mel)",
            f"(1, {count}, width)",
            "give the config.json that belongs to these weights",
        )
    if "patch_embed.proj.weight" in state and state["patch_embed.proj.weight"].ndim == 4:
        state["patch_embed.proj.weight"] = turn_filters(state["patch_embed.proj.weight"])
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise CheckpointError(f"{path.parent / 'config.json'} says layer_norm_eps {eps!r}", "such as 1e-12")
    heads = _number(path, config, "num_attention_heads", 12)
    settings = settings_of(path, state, strides, heads=heads, norm_eps=eps)
    state["pos_embed"] = turn_positions(positions, grid, 2)
    mapped = len(content) - len(left_out)
    settled, origin = _front_end(path.parent, ask, mels, most, notes)
    taken = None
    if head:
        kind = config.get("problem_type")
        multi = None if kind is None else kind == "multi_label_classification"
        taken = TakenHead(head, "class", eps, _names(config, head), multi)
    source = {
        "kind": "hf-ast",
        "axes": "(mel, time), turned to (time, mel)",
        "grid": list(grid),
        "stride": list(strides),
        "statistics": origin,
    }
    frames = frames_of(grid, (patch, patch), strides)
    return Taken(settings, frames, settled, state, mapped, left_out, taken, source, notes)


def _sort(
    path: Path, found: Mapping[str, Tensor], config: Mapping[str, Any], no_head: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str], list[str]]:
    """The encoder's tensors, query, key and value as one; the head's; what was left out; notes."""
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    left_out: dict[str, str] = {}
    for name, value in found.items():
        own = name.removeprefix(PREFIX)
        layer = _LAYER.fullmatch(own)
        inner = _INNER.get(layer[2]) if layer else None
        if own in _PLAIN:
            state[_PLAIN[own]] = value
        elif name in _HEAD and not no_head:
            head[_HEAD[name]] = value
        elif layer and inner in ("q", "k", "v"):
            parts.setdefault((layer[1], layer[3]), {})[inner] = value
        elif layer and inner:
            state[f"blocks.{layer[1]}.{inner}.{layer[3]}"] = value
        elif no_head and not re.match(r"(embeddings|encoder|layers|layernorm)\.", own):
            left_out[name] = NO_HEAD
        else:
            unknown.append(name)
    odd = [f"{kind} of layer {number}" for (number, kind), three in parts.items() if set(three) != set("qkv")]
    if unknown or odd or not parts or (head and set(head) != set(_HEAD.values())):
        what = [f"{len(unknown)} tensors without a place ({', '.join(unknown[:3])})"] if unknown else []
        what += [f"query, key and value apart in {', '.join(odd[:3])}"] if odd else []
        what += ["no layers"] if not parts else []
        raise CheckpointError(
            f"{path} has {'; '.join(what) or 'a part of a head'}",
            "the tensors of ASTModel or ASTForAudioClassification",
            "give an unchanged folder of Hugging Face's AST",
        )
    for (number, kind), three in parts.items():
        shapes = {tuple(value.shape) for value in three.values()}
        if len(shapes) != 1 or () in shapes:
            raise CheckpointError(
                f"{path} has query, key and value {kind} of layer {number} of {' and '.join(map(str, sorted(shapes)))}",
                "one shape for the three",
                "get the file again",
            )
        state[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([three["q"], three["k"], three["v"]])
    notes = []
    if config.get("qkv_bias") is False:
        for number in {number for number, kind in parts if kind == "weight"}:
            weight = state[f"blocks.{number}.attn.qkv.weight"]
            state.setdefault(f"blocks.{number}.attn.qkv.bias", torch.zeros(len(weight)))
        notes.append("query, key and value have no biases there: zeros here")
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{path.parent / 'config.json'} says hidden_act {act!r}", "gelu", "")
    return state, head, left_out, notes


def _number(path: Path, config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path.parent / 'config.json'} says {name} {value!r}", "a whole number above 0")
    return value


def _front_end(folder: Path, ask: Ask, mels: int, most: int, notes: list[str]) -> tuple[Any, str]:
    place = folder / "preprocessor_config.json"
    if not place.exists():
        notes.append("there is no preprocessor_config.json: rate 16000 Hz is assumed")
        return front_end(ask, mels, rate=16000, padding="zero")
    facts = read_json(place)
    if facts.get("num_mel_bins", mels) != mels:
        raise CheckpointError(f"{place} says {facts['num_mel_bins']} mel bins, config.json {mels}", "the same number")
    if facts.get("max_length", most) != most:
        notes.append(
            f"{place.name} fills clips up to {facts['max_length']} frames, the network reads {most}: {most} here"
        )
    if (maker := facts.get("feature_extractor_type", "ASTFeatureExtractor")) != "ASTFeatureExtractor":
        raise CheckpointError(
            f"{place} is of a {maker}",
            "an ASTFeatureExtractor",
            "get the file again; without it the published mean and std are taken",
        )
    # What is not said is the extractor's default, which is what was published.
    mean, std = (facts.get("mean", MEAN), facts.get("std", STD)) if facts.get("do_normalize", True) else (0.0, 0.5)
    if facts.get("padding_value", 0.0) != 0.0:
        raise CheckpointError(f"{place} says padding_value {facts['padding_value']}", "0.0, as AST has it", "")
    rate = facts.get("sampling_rate", 16000)
    return front_end(ask, mels, rate=rate, padding="zero", origin=place.name, mean=mean, std=std)


def _names(config: Mapping[str, Any], head: Mapping[str, Tensor]) -> tuple[str, ...] | None:
    """The names of id2label; None where they say nothing (LABEL_0, ...)."""
    names = config.get("id2label")
    count = head["linear.bias"].numel()
    if not isinstance(names, Mapping) or set(names) != {str(i) for i in range(count)}:
        return None
    given = tuple(str(names[str(i)]) for i in range(count))
    return None if given == tuple(f"LABEL_{i}" for i in range(count)) else given
