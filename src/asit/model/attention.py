"""The class token's attention to the patches in one block. Letters: R rows, N tokens, H heads, D width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asit import runtime
from asit.model import blocks
from asit.model.inference.embedding import Embedder, Window


@dataclass(frozen=True)
class AttentionMap:
    """The class token's attention to the patches of one window; float32, on the CPU.

    Attributes:
        map: (heads, time, mel); with the attention to the class (and distillation) token, each head sums to 1.
        grid: (time, mel).
        times: (time,) centres of the columns, in seconds from the start.
    """

    map: Tensor
    grid: tuple[int, int]
    times: Tensor


def attention_of(embedder: Embedder, window: Window) -> AttentionMap:
    """Return the class token's attention in the embedder's layer (None: the last block).

    For a distilled encoder it is the mean over class and distillation token, as its output is the mean of both.

    Raises:
        ConfigError: no such layer.
    """
    encoder, (view, mel) = embedder.encoder, embedder.encoder.grid
    device = encoder.pos_embed.device
    layer = encoder.block_index(-1 if embedder.layer is None else embedder.layer)
    block: Any = encoder.blocks[layer]
    with torch.inference_mode(), runtime.autocast(embedder.precision, device):
        tokens, _ = encoder.hidden(window.x[None, None].to(device), layer, stretch=window.columns > view)
        normed = block.norm1(tokens)
    with torch.inference_mode(), runtime.autocast("float32", device):
        rows = _rows(block.attn, normed.float(), encoder.prefix)[0].mean(1)
    patches = rows[:, encoder.prefix :].cpu().clone().unflatten(1, (window.columns, mel))
    timing = embedder.timing
    times = timing.first + torch.arange(window.columns, dtype=torch.float64, device="cpu") * timing.hop
    return AttentionMap(patches, (window.columns, mel), times.float())


def _rows(layer: blocks.Attention, x: Tensor, prefix: int) -> Tensor:
    """Return the attention of the first `prefix` tokens: (R, N, D) to (R, H, prefix, N), float32."""
    width = x.shape[2]
    weight, bias = layer.qkv.weight.float(), layer.qkv.bias.float()
    q = x[:, :prefix] @ weight[:width].T + bias[:width]
    k = x @ weight[width : 2 * width].T + bias[width : 2 * width]
    q, k = (one.unflatten(2, (layer.heads, width // layer.heads)).transpose(1, 2) for one in (q, k))
    return ((q @ k.transpose(2, 3)) * (width // layer.heads) ** -0.5).softmax(-1)
