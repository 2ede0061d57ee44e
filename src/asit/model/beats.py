"""BEATs' encoder (arXiv 2212.09058): relative positions and no class token.

Letters: R rows, P patches, D width, E width of the patch embedding, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.blocks import Attention, Block, residual
from asit.model.positions import grid_of
from asit.model.vit import Encoder, PatchEmbed

PATCH_WIDTH, KERNEL, GROUPS, BUCKETS = 512, 128, 16, 320
"""E; size and groups of the convolutional positions; number of relative positions, half for each direction."""


class BeatsPatchEmbed(PatchEmbed):
    """Patches to E without a bias, LayerNorm, linear to D."""

    def __init__(self, width: int, patch: tuple[int, int], stride: tuple[int, int], eps: float) -> None:
        super().__init__(PATCH_WIDTH, patch, stride)
        self.proj.bias = None
        self.norm = nn.LayerNorm(PATCH_WIDTH, eps=eps)
        self.project = nn.Linear(PATCH_WIDTH, width)

    def forward(self, x: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        out: Tensor = self.project(self.norm(super().forward(x, valid, keep)))
        return out


class BeatsAttention(Attention):
    """Self-attention with a bias for each distance, which each query scales (gated relative positions)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.gate = nn.Linear(width // heads, 8)
        self.gate_scale = nn.Parameter(torch.empty(1, heads, 1, 1))

    def biased(self, x: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
        """Return (R, P, D); `mask` (R, 1, 1, P) bool: keys to attend to, `bias` (H, P, P)."""
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        update, reset = self.gate(q).unflatten(3, (2, 4)).sum(4).sigmoid().split(1, dim=3)
        gated = (update * (reset * self.gate_scale - 1.0) + 2.0) * bias
        if mask is not None:
            gated = gated.masked_fill(~mask, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=gated.to(q.dtype))
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(rows, tokens, width))
        return projected


class BeatsBlock(Block):
    """Transformer block with norms after the sums, in which the input has the factor `alpha` (arXiv 2203.00555)."""

    attn: BeatsAttention

    def __init__(self, width: int, heads: int, hidden: int, eps: float = 1e-5) -> None:
        super().__init__(width, heads, hidden, eps)
        self.attn = BeatsAttention(width, heads)
        self.alpha = 1.0

    def forward(  # type: ignore[override]
        self, x: Tensor, drop: Tensor | None, mask: Tensor | None, bias: Tensor
    ) -> Tensor:
        """Apply the block; `bias` as in `BeatsAttention.biased`, the others as in `Block.forward`."""
        more = self.alpha - 1.0

        def attend(rows: Tensor, mask: Tensor | None) -> Tensor:
            return self.attn.biased(rows, mask, bias)

        x = self.norm1(residual(x, attend, None if drop is None else drop[0], mask) + more * x)
        out: Tensor = self.norm2(
            residual(x, lambda rows, _: self.mlp(rows), None if drop is None else drop[1]) + more * x
        )
        return out


class Beats(Encoder):
    """BEATs' encoder: convolutional and gated relative positions, norms after the sums, no class token.

    An input may have any length. `Tokens.cls` is the mean of the patch tokens.
    """

    norm_first, block = True, BeatsBlock

    def __init__(self, settings: EncoderSettings, frames: int, mels: int) -> None:
        super().__init__(settings, frames, mels)
        if self.width % GROUPS:
            raise ConfigError(f"a BEATs of width {self.width}", f"a multiple of {GROUPS}", "")
        del self.cls_token
        self.patch_embed = BeatsPatchEmbed(self.width, self.patch, self.stride, settings.norm_eps)
        self.pos_conv = nn.Conv1d(self.width, self.width, KERNEL, padding=KERNEL // 2, groups=GROUPS)
        self.relative_bias = nn.Embedding(BUCKETS, self.heads)
        for block in self.blocks:
            assert isinstance(block, BeatsBlock)
            block.alpha = (2 * self.depth) ** 0.25
        self.init_weights()

    def add_positions(self, count: int) -> None:
        """There are none; the empty buffer gives the device and the number of tokens."""
        self.register_buffer("pos_embed", torch.empty(1, count, 0), persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; the scales of the gates are 1."""
        super().init_weights(generator)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, BeatsBlock)
                block.attn.gate_scale.fill_(1.0)

    def summary(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """See `Encoder.summary`: the mean of the valid patch tokens."""
        if valid is None:
            return tokens.mean(1)
        return torch.where(valid[..., None], tokens, 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

    def embedded(
        self, x: Tensor, valid: Tensor | None, stretch: bool, keep: Tensor | None
    ) -> tuple[Tensor, tuple[int, int], tuple[Tensor | None, ...]]:
        """See `Encoder.embedded`; blocks get the bias of distances beside the mask.

        Raises:
            ConfigError: with `keep`, which the convolution of neighbouring patches does not allow.
        """
        if keep is not None:
            raise ConfigError("some patches of an input for BEATs", "all of them: its positions are a convolution", "")
        grid = grid_of(x.shape[2], x.shape[3], self.patch, self.stride)
        tokens = self.patch_embed(x, valid)
        if valid is not None:
            tokens = torch.where(valid[..., None], tokens, 0.0)
        near = self.pos_conv(tokens.mT)[..., : tokens.shape[1]]  # an even kernel gives one more
        tokens = self.norm(tokens + F.gelu(near).mT)
        mask = None if valid is None else valid[:, None, None, :]
        return tokens, grid, (mask, self.distances(tokens.shape[1]))

    def distances(self, count: int) -> Tensor:
        """Return the bias of P = `count` patches for each query and key: (H, P, P)."""
        at = torch.arange(count, device=self.pos_embed.device)
        bucket = relative_buckets(at[None] - at[:, None], self.settings.max_distance)
        return self.relative_bias(bucket).permute(2, 0, 1)


def relative_buckets(distance: Tensor, most: int) -> Tensor:
    """Return the bucket of each distance key - query, as in T5 (arXiv 1910.10683): int64 of the same shape.

    A direction has half of the buckets: half of these for one distance each, the others for ranges that grow up to
    `most`. The logarithm is in float32, since its rounding decides the bucket at the borders.
    """
    side = BUCKETS // 2
    exact, away = side // 2, distance.abs()
    share = torch.log(away.float() / exact) / math.log(most / exact)
    far = (exact + (share * (side - exact)).clamp(min=0).long()).clamp(max=side - 1)
    return torch.where(away < exact, away, far) + (distance > 0) * side
