"""The decoder of pretraining with left-out patches: fills the grid again from the patches that the encoder saw.

Letters: R rows, P patches of the grid, K of them seen, D width. Source: masked autoencoders (arXiv 2111.06377), whose
decoder also gets the class token; here it is as wide as the encoder, so that nothing has to be projected.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asit.model.blocks import Block, init_transformer


class Decoder(nn.Module):
    """Seen tokens at their positions, a learned mask token at the others, positions, blocks and a norm.

    Args:
        width: D.
        heads: of attention.
        hidden: of the MLPs.
        depth: blocks.
        patches: P.
        eps: of the norms.
    """

    def __init__(self, width: int, heads: int, hidden: int, depth: int, patches: int, eps: float) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, patches, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters: see `blocks.init_transformer`."""
        init_transformer(self, generator)

    def forward(self, cls: Tensor, seen: Tensor, keep: Tensor) -> Tensor:
        """Turn class token (R, D), seen patches (R, K, D) and their positions (R, K) int64 into (R, P, D)."""
        rows, _, width = seen.shape
        empty = self.mask_token.to(seen.dtype).expand(rows, self.pos_embed.shape[1], width)
        grid = empty.scatter(1, keep[..., None].expand(-1, -1, width), seen)
        tokens = torch.cat([cls[:, None], grid + self.pos_embed], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        # The class token served the patches; its own output is not used.
        out: Tensor = self.norm(tokens[:, 1:])
        return out
