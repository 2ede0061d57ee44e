"""Float64 networks of other projects, in their own axes, names and order of operations, and Kaldi's log-mel."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of these shapes; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    out = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value + 1 if "norm" in name and name.endswith("weight") else value for name, value in out.items()}


def double(w: Weights) -> dict[str, Tensor]:
    return {name: value.double() for name, value in w.items()}


def affine(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def attention(x: Tensor, w: Weights, name: str) -> Tensor:
    """timm's attention with heads of 64, one at a time."""
    q, k, v = affine(x, w, f"{name}.qkv").chunk(3, -1)
    heads = [slice(at, at + 64) for at in range(0, x.shape[-1], 64)]
    mixed = [(q[..., h] @ k[..., h].mT / 8).softmax(-1) @ v[..., h] for h in heads]
    return affine(torch.cat(mixed, -1), w, f"{name}.proj")


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    return affine(gelu(affine(x, w, f"{name}.fc1")), w, f"{name}.fc2")


def sincos(rows: int, columns: int, width: int) -> Tensor:
    """Positions of a table, row-major: of the column in the first half of the width, of the row in the second."""
    out = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for half, at in enumerate((column, row)):
                for i in range(width // 4):
                    angle = at / 10000 ** (i / (width / 4))
                    out[row * columns + column, half * width // 2 + i] = math.sin(angle)
                    out[row * columns + column, half * width // 2 + width // 4 + i] = math.cos(angle)
    return torch.from_numpy(out)


def logmel(wave: np.ndarray, window: str = "hanning", scale: float = 1.0) -> Tensor:
    """torchaudio.compliance.kaldi.fbank at 16 kHz with 128 bins and no dither: (S,) to (T, 128).

    Only the bank of triangles is in float32, as in torchaudio.
    """
    x = np.asarray(wave, np.float64) * scale
    frames = np.stack([x[at : at + 400] for at in range(0, len(x) - 399, 160)])
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    frames = frames * (hann**0.85 if window == "povey" else hann)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (20.0, 8000.0))
    edges = [low + (torch.arange(128) + i) * ((high - low) / 129) for i in (0.0, 1.0, 2.0)]
    mel = 1127.0 * (1.0 + (16000 / 512 * torch.arange(256)) / 700.0).log()[:, None]
    rise, fall = (mel - edges[0]) / (edges[1] - edges[0]), (edges[2] - mel) / (edges[2] - edges[1])
    bank = F.pad(torch.minimum(rise, fall).clamp(min=0.0), (0, 0, 0, 1)).double().numpy()
    return torch.from_numpy(np.log(np.maximum(power @ bank, torch.finfo(torch.float32).eps)))


def audiomae_weights(columns: int, width: int = 128, blocks: int = 2, head: int | None = None) -> dict[str, Tensor]:
    """A state dict of models_mae.py (its decoder in part) or, with `head` classes, of models_vit.py."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 1, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= timm_blocks(width, blocks)
    norms = ("norm", "decoder_norm") if head is None else ("fc_norm",)
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    if head is None:
        shapes |= {"mask_token": (1, 1, 32), "decoder_pos_embed": (1, 1 + 8 * columns, 32)}
        shapes |= {"decoder_embed.weight": (32, width), "decoder_embed.bias": (32,)}
        shapes |= {"decoder_blocks.0.attn.relative_position_bias_table": (49, 2), "decoder_pred.weight": (256, 32)}
    else:
        shapes |= {"head.weight": (head, width), "head.bias": (head,)}
    table = sincos(8, columns, width).float()
    return draw(shapes) | {"pos_embed": torch.cat([torch.zeros(1, width), table])[None]}


def timm_blocks(width: int, blocks: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(blocks):
        for name, (out, inn) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, inn * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        shapes |= {f"blocks.{i}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    return shapes


def audiomae(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens (R, 1 + P, D) of an input (R, 1, frames, 128), and logits of a fine-tuned network."""
    w = double(weights)
    x = F.conv2d(x.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).mT
    x = x + w["pos_embed"][:, 1 : 1 + x.shape[1]]
    first = w["cls_token"] + w["pos_embed"][:, :1]
    x = torch.cat([first.expand(len(x), -1, -1), x], 1)
    for i in range(sum(name.endswith("norm1.weight") and name.startswith("blocks") for name in w)):
        x = x + attention(norm(x, w, f"blocks.{i}.norm1", 1e-6), w, f"blocks.{i}.attn")
        x = x + mlp(norm(x, w, f"blocks.{i}.norm2", 1e-6), w, f"blocks.{i}.mlp")
    if "norm.weight" in w:
        return norm(x, w, "norm", 1e-6), None
    return x, affine(norm(x[:, 1:].mean(1), w, "fc_norm", 1e-6), w, "head")


def eat_weights(
    columns: int = 80, width: int = 128, blocks: int = 2, head: int | None = None, hub: bool = False
) -> dict[str, Tensor]:
    """A state dict of EAT_pretraining.py, of EAT_audio_classification.py, or of the hub's eat_model.py."""
    image = "" if hub else "modality_encoders.IMAGE."
    before = "pre_norm" if hub else f"{image}context_encoder.norm"
    shapes = {f"{image}extra_tokens": (1, 1, width), f"{image}local_encoder.proj.weight": (width, 1, 16, 16)}
    shapes |= {f"{image}local_encoder.proj.bias": (width,), f"{before}.weight": (width,), f"{before}.bias": (width,)}
    shapes |= timm_blocks(width, blocks)
    if head is None and not hub:
        shapes |= {f"{image}decoder.blocks.0.0.weight": (8, 4, 3, 3), f"{image}decoder.proj.bias": (width,)}
    out = draw(shapes) | {f"{image}fixed_positional_encoder.positions": sincos(columns, 8, width).float()[None]}
    if head is None and not hub:
        return out
    whole = {f"model.{name}": value for name, value in out.items()}
    if head is None:
        return whole
    shapes = {"fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (head, width), "head.bias": (head,)}
    return whole | {("model." if hub else "") + name: value for name, value in draw(shapes, seed=1).items()}


def eat(weights: Weights, x: Tensor, eps: float = 1e-6, pooling: str = "class") -> tuple[Tensor, Tensor | None]:
    """Tokens (R, 1 + P, D) of an input (R, 1, frames, 128), and logits of a fine-tuned network."""
    w = {name.removeprefix("model.").removeprefix("modality_encoders.IMAGE."): v for name, v in double(weights).items()}
    x = F.conv2d(x.double(), w["local_encoder.proj.weight"], w["local_encoder.proj.bias"], stride=16).flatten(2).mT
    x = x + w["fixed_positional_encoder.positions"][:, : x.shape[1]]
    x = torch.cat([w["extra_tokens"].expand(len(x), -1, -1), x], 1)
    x = norm(x, w, "pre_norm" if "pre_norm.weight" in w else "context_encoder.norm", 1e-6)
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        residual = norm(x + attention(x, w, f"blocks.{i}.attn"), w, f"blocks.{i}.norm1", 1e-6)
        x = norm(residual + mlp(residual, w, f"blocks.{i}.mlp"), w, f"blocks.{i}.norm2", 1e-6)
    if "head.weight" not in w:
        return x, None
    pooled = x[:, 0] if pooling == "class" else x[:, 1:].mean(1)
    return x, affine(norm(pooled, w, "fc_norm", eps), w, "head")


def beats_weights(width: int = 128, layers: int = 2, head: int | None = None) -> dict[str, Tensor]:
    """A state dict of BEATs.py, with the table of relative positions under each layer that shares it."""
    heads = width // 64
    shapes: dict[str, tuple[int, ...]] = {"patch_embedding.weight": (512, 1, 16, 16)}
    shapes |= {"layer_norm.weight": (512,), "layer_norm.bias": (512,)}
    shapes |= {"post_extract_proj.weight": (width, 512), "post_extract_proj.bias": (width,)}
    shapes |= {"encoder.pos_conv.0.bias": (width,), "encoder.pos_conv.0.weight_g": (1, 1, 128)}
    shapes |= {"encoder.pos_conv.0.weight_v": (width, width // 16, 128)}
    shapes |= {"encoder.layer_norm.weight": (width,), "encoder.layer_norm.bias": (width,)}
    for i in range(layers):
        at = f"encoder.layers.{i}"
        for name, (out, inn) in {
            **dict.fromkeys([f"self_attn.{p}_proj" for p in ("k", "v", "q", "out")], (width, width)),
            "self_attn.grep_linear": (8, 64), "fc1": (4 * width, width), "fc2": (width, 4 * width),
        }.items():  # fmt: skip
            shapes |= {f"{at}.{name}.weight": (out, inn), f"{at}.{name}.bias": (out,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{at}.{name}.weight": (width,), f"{at}.{name}.bias": (width,)}
        shapes |= {f"{at}.self_attn.grep_a": (1, heads, 1, 1)}
        shapes |= {f"{at}.self_attn.relative_attention_bias.weight": (320, heads)}
    if head is not None:
        shapes |= {"predictor.weight": (head, width), "predictor.bias": (head,)}
    out = draw(shapes)
    shared = [name for name in out if name.endswith("relative_attention_bias.weight")]
    table = 5 * out[shared[0]]
    gates = {name: 10 * value for name, value in out.items() if "grep_" in name}
    return (
        out
        | gates
        | dict.fromkeys(shared, table)
        | {"encoder.pos_conv.0.weight_g": out["encoder.pos_conv.0.weight_g"] + 2}
    )


def bucket(distance: int, most: int = 800) -> int:
    """The bucket of key - query: of 320, half for keys after the query, 80 of each half for one distance."""
    away, after = abs(distance), 160 if distance > 0 else 0
    if away < 80:
        return after + away
    share = np.float32(np.log(np.float32(away / 80))) / np.float32(math.log(most / 80)) * 80
    return after + min(80 + int(share), 159)


def beats(weights: Weights, x: Tensor, layers: int = 2) -> tuple[Tensor, Tensor | None]:
    """Tokens (R, P, D) of an input (R, 1, frames, 128), and logits of a fine-tuned network."""
    w = double(weights)
    x = F.conv2d(x.double(), w["patch_embedding.weight"], stride=16).flatten(2).mT
    x = affine(norm(x, w, "layer_norm", 1e-5), w, "post_extract_proj")
    v = w["encoder.pos_conv.0.weight_v"]
    kernel = w["encoder.pos_conv.0.weight_g"] * v / v.norm(dim=(0, 1), keepdim=True)
    near = F.conv1d(F.pad(x.mT, (64, 63)), kernel, w["encoder.pos_conv.0.bias"], groups=16).mT
    x = norm(x + gelu(near), w, "encoder.layer_norm", 1e-5)
    count, alpha = x.shape[1], (2 * layers) ** 0.25
    index = torch.tensor([[bucket(key - query) for key in range(count)] for query in range(count)])
    table = w["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    for i in range(layers):
        at = f"encoder.layers.{i}"
        q, k, v = (affine(x, w, f"{at}.self_attn.{p}_proj") for p in "qkv")
        mixed = []
        for head in range(x.shape[-1] // 64):
            own = slice(64 * head, 64 * head + 64)
            eight = affine(q[..., own], w, f"{at}.self_attn.grep_linear")
            a, b = (eight[..., part].sum(-1).sigmoid() for part in (slice(0, 4), slice(4, 8)))
            gate = a * (b * w[f"{at}.self_attn.grep_a"][0, head, 0, 0] - 1) + 2
            scores = q[..., own] @ k[..., own].mT / 8 + gate[..., None] * table[:, head][index]
            mixed.append(scores.softmax(-1) @ v[..., own])
        out = affine(torch.cat(mixed, -1), w, f"{at}.self_attn.out_proj")
        x = norm(alpha * x + out, w, f"{at}.self_attn_layer_norm", 1e-5)
        hidden = affine(gelu(affine(x, w, f"{at}.fc1")), w, f"{at}.fc2")
        x = norm(alpha * x + hidden, w, f"{at}.final_layer_norm", 1e-5)
    return x, None if "predictor.weight" not in w else affine(x, w, "predictor").mean(1)


def padded(frames: Tensor, length: int, mean: float = -4.2677393, std: float = 4.5689974) -> Tensor:
    """AudioMAE's and EAT's input: cut, or padded with 0 before the normalisation; (1, 1, length, 128)."""
    frames = F.pad(frames[:length], (0, 0, 0, max(0, length - len(frames))))
    return ((frames - mean) / (2 * std))[None, None]
