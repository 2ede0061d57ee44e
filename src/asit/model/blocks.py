"""Transformer blocks with norms before the branches (ViT, arXiv 2010.11929) or after the sums, and stochastic depth.

Source of stochastic depth: arXiv 1603.09382. Parameters are named as in timm and the official ASiT files.
Letters: R rows, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.model.cpu.bf16 import Linear, add, attention, bf16_on_cpu, branch


class Attention(nn.Module):
    """Multi-head self-attention with biases: (R, N, D) -> (R, N, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(x).view(rows, tokens, 3, self.heads, width // self.heads)
        if mask is None and bf16_on_cpu(x):
            out = attention(qkv)
        else:
            # Views only: the attention kernels read strided queries, keys and values.
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out = out.transpose(1, 2).reshape(rows, tokens, width)
        projected: Tensor = self.proj(out)
        return projected


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block: (R, N, D) -> (R, N, D)."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, drop: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Apply the block; `drop` (2, R): factors of the two branches, `mask` (R, 1, 1, N) bool: keys to attend to."""
        if mask is None and self.training and x.dtype is torch.float32 and bf16_on_cpu(x):
            return self._fused(x, drop)
        x = residual(x, lambda rows, mask: self.attn(self.norm1(rows), mask), None if drop is None else drop[0], mask)
        return residual(x, lambda rows, _: self.mlp(self.norm2(rows)), None if drop is None else drop[1])

    def _fused(self, x: Tensor, drop: Tensor | None) -> Tensor:
        """The same with one autograd function per branch; hooks of the submodules are not called."""
        attn, mlp = self.attn, self.mlp
        for i, (norm, inner, outer, heads) in enumerate(
            [(self.norm1, attn.qkv, attn.proj, attn.heads), (self.norm2, mlp.fc1, mlp.fc2, 0)]
        ):
            kept, factors = (None, None) if drop is None else _kept(drop[i])
            weights = (inner.weight, inner.bias), (outer.weight, outer.bias)
            x = branch(x, (norm.weight, norm.bias, norm.eps), *weights, heads, kept, factors)
        return x


class PostBlock(Block):
    """Transformer block with the norms after the sums (arXiv 1706.03762): (R, N, D) -> (R, N, D)."""

    def forward(self, x: Tensor, drop: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Apply the block; arguments as in `Block.forward`."""
        x = self.norm1(residual(x, self.attn, None if drop is None else drop[0], mask))
        out: Tensor = self.norm2(residual(x, lambda rows, _: self.mlp(rows), None if drop is None else drop[1]))
        return out


@torch.no_grad()
def init_transformer(module: nn.Module, generator: torch.Generator | None) -> None:
    """Initialise every parameter: truncated normal (0.02) for weights and embeddings, zero biases, unit norms."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)


def _kept(drop: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows whose factor (R,) is not 0 (None if all), at least one, and their factors (None if all are 1)."""
    listed = drop.tolist()
    if all(factor == 1.0 for factor in listed):
        return None, None
    if all(listed):
        return None, drop
    kept = torch.tensor([i for i, factor in enumerate(listed) if factor] or [0])
    return kept, drop[kept]


def residual(
    x: Tensor, branch: Callable[[Tensor, Tensor | None], Tensor], drop: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Return x + drop * branch(x, mask) for `drop` (R,); on a CPU rows with factor 0 are not computed."""
    if drop is None:
        return add(x, branch(x, mask))
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # counting the rows would synchronise a GPU
        out = branch(x, mask)
        return x + out * drop[:, None, None].to(out.dtype)
    kept = drop.nonzero().flatten()
    if len(kept) == len(x):
        return x + branch(x, mask).to(x.dtype) * drop[:, None, None]
    if not len(kept):  # one row is, so that every parameter has a gradient in every step
        kept = kept.new_zeros(1)
    out = branch(x.index_select(0, kept), None if mask is None else mask.index_select(0, kept))
    return x.index_add(0, kept, out.to(x.dtype) * drop[kept, None, None])
